"""The networks, optimizer and state of a recipe."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dinoforge.builders.layout import turn_tokens
from dinoforge.data.bad_images import BadImages
from dinoforge.errors import RecipeError
from dinoforge.method.dinov2 import Objective, StudentTeacher
from dinoforge.method.targets import TargetRule
from dinoforge.models.head import DINOHead
from dinoforge.models.network import Network
from dinoforge.models.stochastic_depth import drop_path_rates
from dinoforge.models.vit import SIZES, VisionTransformer
from dinoforge.optim.adamw import AdamW
from dinoforge.optim.param_groups import parameter_groups
from dinoforge.recipe.schema import Dino, Ibot, Recipe
from dinoforge.system.device import autocast, resolve_precision
from dinoforge.training.parallel import Parallel
from dinoforge.training.state import TrainState
from dinoforge.training.step import Stepper


def vit_size(recipe: Recipe) -> tuple[int, int, int]:
    """Return the recipe's embed_dim, depth and num_heads.

    Raises:
        RecipeError: A size is missing, contradicts ``student.arch``, or does not fit the others.
    """
    s = recipe.student
    given = {"embed_dim": s.embed_dim, "depth": s.depth, "num_heads": s.num_heads}
    if s.arch == "vit_custom":
        if missing := [f"student.{k}" for k, v in given.items() if v is None]:
            raise RecipeError(f"student.arch=vit_custom needs {', '.join(missing)}")
        embed_dim, depth, heads = (v for v in given.values() if v is not None)
    elif s.arch in SIZES:
        embed_dim, depth, heads = SIZES[s.arch]
        for (key, value), size in zip(given.items(), SIZES[s.arch], strict=True):
            if value not in (None, size):
                raise RecipeError(
                    f"student.{key}={value} contradicts student.arch={s.arch}, which has {size}: "
                    "give student.arch=vit_custom with all three sizes"
                )
    else:
        raise RecipeError(f"student.arch: expected {', '.join(SIZES)} or vit_custom, got {s.arch!r}")
    if embed_dim % heads:
        raise RecipeError(f"student.embed_dim={embed_dim} is not a multiple of student.num_heads={heads}")
    return embed_dim, depth, heads


def vit_arguments(recipe: Recipe) -> dict[str, Any]:
    """Collect the arguments of the recipe's ``VisionTransformer``."""
    embed_dim, depth, num_heads = vit_size(recipe)
    s = recipe.student
    return {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "patch_size": s.patch_size,
        "image_size": recipe.crops.global_crops_size,
        "in_chans": s.in_chans,
        "mlp_ratio": s.mlp_ratio,
        "ffn_layer": s.ffn_layer,
        "layerscale": s.layerscale,
        "qkv_bias": s.qkv_bias,
        "proj_bias": s.proj_bias,
        "ffn_bias": s.ffn_bias,
        "num_register_tokens": s.num_register_tokens,
        "interpolate_antialias": s.interpolate_antialias,
        "interpolate_offset": s.interpolate_offset,
    }


def build_student_teacher(recipe: Recipe) -> StudentTeacher:
    """Build both networks, with equal weights drawn from torch's current random state, and the losses between them."""
    d, i = recipe.dino, recipe.ibot
    objective = Objective(
        dino_global_weight=d.loss_weight * d.global_loss_weight,
        dino_local_weight=d.loss_weight * d.local_loss_weight,
        ibot_weight=i.loss_weight,
        koleo_weight=d.koleo_loss_weight,
        dino_targets=TargetRule(
            d.targets or recipe.train.centering, d.center_momentum, iterations=recipe.train.sinkhorn_iterations
        ),
        ibot_targets=TargetRule(
            i.targets or recipe.train.centering,
            i.center_momentum,
            center_by_count=i.center_mean == "patches",
            iterations=recipe.train.sinkhorn_iterations,
        ),
        dino_student_temp=d.student_temp,
        ibot_student_temp=i.student_temp,
        koleo_scope=d.koleo_scope,
        koleo_group_size=d.koleo_group_size,
    )
    backbone = VisionTransformer(**vit_arguments(recipe))
    dino_head = ibot_head = None  # a head that no loss reads is left out
    if objective.has_dino or (objective.has_ibot and not i.separate_head):
        dino_head = _head(d, backbone.embed_dim)
    if objective.has_ibot and i.separate_head:
        ibot_head = _head(i, backbone.embed_dim)
    return StudentTeacher(Network(backbone, dino_head, ibot_head), objective)


def _head(sizes: Dino | Ibot, embed_dim: int) -> DINOHead:
    return DINOHead(
        embed_dim,
        prototypes=sizes.head_n_prototypes,
        bottleneck_dim=sizes.head_bottleneck_dim,
        nlayers=sizes.head_nlayers,
        hidden_dim=sizes.head_hidden_dim,
    )


def build_optimizer(recipe: Recipe, student_teacher: StudentTeacher) -> AdamW:
    """Build AdamW for the student; ``set_hyperparameters`` sets learning rates and weight decay at each step."""
    _, depth, _ = vit_size(recipe)
    groups = parameter_groups(
        student_teacher.student.parts,
        depth=depth,
        layerwise_decay=recipe.optim.layerwise_decay,
        patch_embed_lr_mult=recipe.optim.patch_embed_lr_mult,
        weight_decay_scope=recipe.optim.weight_decay_scope,
    )
    betas = (recipe.optim.adamw_beta1, recipe.optim.adamw_beta2)
    optimizer = AdamW(groups, lr=0.0, betas=betas, fused=True)
    # AdamW would create its state at a parameter's first update. Created here, it is in the checkpoints of all steps.
    for parameter in student_teacher.student.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def build_drop_path_rates(recipe: Recipe) -> list[float]:
    """Compute the rate of stochastic depth of each block of the student."""
    _, depth, _ = vit_size(recipe)
    return drop_path_rates(recipe.student.drop_path_rate, depth, recipe.student.drop_path_uniform)


def build_state(
    recipe: Recipe,
    device: torch.device,
    *,
    images: int,
    precision: torch.dtype | None = None,
    initialise: Callable[[StudentTeacher], object] | None = None,
    lay_out: Callable[[StudentTeacher], object] | None = None,
) -> TrainState:
    """Build the state of a run at step 0.

    The weights are a function of the recipe's seed; torch's global random state does not change.

    Args:
        recipe: The recipe of the run.
        device: The device of the state.
        images: The number of images in the data.
        precision: The plan's precision of matrix products; float16 needs a scaler. None: the recipe's precision, in one
            process.
        initialise: A function that loads other weights into the fresh networks.
        lay_out: A function that distributes the networks over ranks before the optimizer is built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        student_teacher = build_student_teacher(recipe)
    if initialise:
        initialise(student_teacher)
    student_teacher.to(device)
    if lay_out:
        lay_out(student_teacher)
    half = (precision or resolve_precision(recipe.precision, device)) is torch.float16
    return TrainState(
        student_teacher=student_teacher,
        optimizer=build_optimizer(recipe, student_teacher),
        scaler=torch.amp.GradScaler(device.type) if half else None,
        bad_images=BadImages(recipe.data.max_bad_share, images),
    )


def build_stepper(recipe: Recipe, device: torch.device, precision: torch.dtype, parallel: Parallel) -> Stepper:
    """Build the stepper of a run.

    Args:
        recipe: The recipe.
        device: The device of the networks.
        precision: The precision of matrix products.
        parallel: How the networks are distributed over ranks.
    """
    return Stepper(
        clip_grad=recipe.optim.clip_grad,
        autocast=partial(autocast, device, precision),
        seed=recipe.train.seed,
        drop_path_rates=build_drop_path_rates(recipe),
        accumulate=recipe.train.accumulate,
        least_tokens=turn_tokens(recipe.parallel, device, parallel.mode),
        parallel=parallel,
    )
