"""Recipe to objects: the only place that unpacks a recipe for training."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from dinoforge import checkpoint
from dinoforge.config import Dino, Ibot, Recipe, flatten, load_recipe, parse_length
from dinoforge.data.crops import BLUR_PROBABILITY, MultiCrop
from dinoforge.data.loader import BadImages, DrawMasks, TrainingData
from dinoforge.data.masks import batch_masks, max_num_patches
from dinoforge.data.sources import Source
from dinoforge.errors import RecipeError, WeightsError
from dinoforge.models.head import DINOHead
from dinoforge.models.layers import Block
from dinoforge.models.layouts import misfits
from dinoforge.models.vit import SIZES, VisionTransformer, drop_path_rates
from dinoforge.optim.adamw import AdamW
from dinoforge.optim.param_groups import parameter_groups
from dinoforge.optim.schedules import Schedules, sqrt_scaled_lr
from dinoforge.student_teacher import Objective, StudentTeacher
from dinoforge.training.device import resolve_precision
from dinoforge.training.loop import TrainState
from dinoforge.weights import Backbone, ImageInput


@dataclass(frozen=True)
class RunLength:
    """How long a run is, and what that means for the user's images."""

    steps: int
    batch_size: int  # over all ranks
    images: int

    @property
    def epochs(self) -> float:
        """Passes over the images."""
        return self.steps * self.batch_size / self.images


def vit_size(recipe: Recipe) -> tuple[int, int, int]:
    """embed_dim, depth and num_heads that the recipe asks for."""
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
    """The arguments of the recipe's ``VisionTransformer``."""
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


def adopted(given: Backbone, recipe: Recipe) -> dict[str, Any]:
    """What ``init.architecture: file`` takes from a backbone, by the keys of ``ADOPTED``: its network and its images.

    Crops are as large as in the run that made it, times ``init.enlarge``; of other files, 224 pixels, or what their
    position embeddings are for if that is smaller, with local crops of 3/7 of it, as in the reference. With
    ``init.heads: run``, heads are of the sizes, and targets of the kinds and the temperature, of that run; else those
    of recipe ``small``.
    """
    signature = inspect.signature(VisionTransformer).parameters
    network = {n: p.default for n, p in signature.items() if p.default is not p.empty} | given.architecture
    values = {f"student.{key}": network[key] for key in signature if key != "image_size"}
    values |= {"student.arch": "vit_custom"}
    values |= {f"data.{key}": getattr(given.image, key) for key in _OF_IMAGES}
    before = given.metadata.get("recipe") or {}
    sizes = before.get("crops", {})
    whole = sizes.get("global_crops_size", min(network["image_size"], _OFFICIAL_CROPS[0]))
    part = sizes.get("local_crops_size", whole * _OFFICIAL_CROPS[1] / _OFFICIAL_CROPS[0])
    patch = network["patch_size"]
    for key, side in (("global", whole), ("local", part)):
        values[f"crops.{key}_crops_size"] = max(patch, round(side * recipe.init.enlarge / patch) * patch)
    if recipe.init.heads == "run":
        known = flatten(load_recipe("small")[0])
        known |= {
            f"{section}.{key}": v
            for section in ("dino", "ibot", "train", "teacher")
            for key, v in before.get(section, {}).items()
        }
        values |= {key: known[key] for key in _OF_HEADS}
    assert values.keys() <= ADOPTED
    return values


_OF_IMAGES = ("mean", "std", "range", "sixteen_bit", "nodata", "fill", "plane")
_OFFICIAL_CROPS = (224, 96)  # global and local, in pixels
_OF_HEADS = {
    "train.centering",
    "teacher.teacher_temp",
    "ibot.separate_head",
    *(
        f"{section}.{key}"
        for section in ("dino", "ibot")
        for key in ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim", "targets")
    ),
}
ADOPTED = {
    "student.arch",
    *(f"student.{key}" for key in inspect.signature(VisionTransformer).parameters if key != "image_size"),
    *(f"data.{key}" for key in _OF_IMAGES),
    *(f"crops.{key}_crops_size" for key in ("global", "local")),
    *_OF_HEADS,
}
"""Keys of the recipe that ``init.architecture: file`` can take from a file."""


def image_input(recipe: Recipe) -> ImageInput:
    """What the backbone of a run expects of images."""
    return ImageInput(
        size=recipe.crops.global_crops_size,
        in_chans=recipe.student.in_chans,
        mean=recipe.data.mean,
        std=recipe.data.std,
        sixteen_bit=recipe.data.sixteen_bit,
        max_pixels=recipe.data.max_pixels,
        range=recipe.data.range,
        nodata=recipe.data.nodata,
        fill=recipe.data.fill,
        plane=recipe.data.plane,
    )


def build_student_teacher(recipe: Recipe) -> StudentTeacher:
    """Both networks with fresh, equal weights from torch's current random state, and the losses between them."""
    d, i = recipe.dino, recipe.ibot
    objective = Objective(
        dino_global_weight=d.loss_weight * d.global_loss_weight,
        dino_local_weight=d.loss_weight * d.local_loss_weight,
        ibot_weight=i.loss_weight,
        koleo_weight=d.koleo_loss_weight,
        dino_targets=d.targets or recipe.train.centering,
        ibot_targets=i.targets or recipe.train.centering,
        dino_student_temp=d.student_temp,
        ibot_student_temp=i.student_temp,
        dino_center_momentum=d.center_momentum,
        ibot_center_momentum=i.center_momentum,
        sinkhorn_iterations=recipe.train.sinkhorn_iterations,
        ibot_center_by_count=i.center_mean == "patches",
        koleo_scope=d.koleo_scope,
        koleo_group_size=d.koleo_group_size,
    )
    backbone = VisionTransformer(**vit_arguments(recipe))
    heads = {}
    if objective.has_dino or (objective.has_ibot and not i.separate_head):
        heads["dino_head"] = _head(d, backbone.embed_dim)
    if objective.has_ibot and i.separate_head:
        heads["ibot_head"] = _head(i, backbone.embed_dim)
    return StudentTeacher(backbone, heads, objective)


def _head(sizes: Dino | Ibot, embed_dim: int) -> DINOHead:
    return DINOHead(
        embed_dim,
        prototypes=sizes.head_n_prototypes,
        bottleneck_dim=sizes.head_bottleneck_dim,
        nlayers=sizes.head_nlayers,
        hidden_dim=sizes.head_hidden_dim,
    )


def build_optimizer(recipe: Recipe, student_teacher: StudentTeacher) -> AdamW:
    """AdamW over the student; learning rates and weight decay are written by ``set_hyperparameters`` at each step."""
    _, depth, _ = vit_size(recipe)
    groups = parameter_groups(
        dict(student_teacher.student.items()),
        depth=depth,
        layerwise_decay=recipe.optim.layerwise_decay,
        patch_embed_lr_mult=recipe.optim.patch_embed_lr_mult,
        weight_decay_scope=recipe.optim.weight_decay_scope,
    )
    betas = (recipe.optim.adamw_beta1, recipe.optim.adamw_beta2)
    optimizer = AdamW(groups, lr=0.0, betas=betas, fused=True)
    # AdamW would make its state when a parameter is first updated. Made here, a checkpoint of any step has it all.
    for parameter in student_teacher.student.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def build_drop_path_rates(recipe: Recipe) -> list[float]:
    """Rate of stochastic depth of each block of the student."""
    _, depth, _ = vit_size(recipe)
    return drop_path_rates(recipe.student.drop_path_rate, depth, recipe.student.drop_path_uniform)


def with_batch_cut(recipe: Recipe, *, world_size: int) -> Recipe:
    """The recipe with the ``train.batch_size_per_gpu`` that ``train.batch_size`` means on so many ranks.

    Raises:
        RecipeError: a global batch that cannot be cut into equal parts.
    """
    train = recipe.train
    parts = world_size * train.accumulate
    if train.batch_size is not None:
        if train.batch_size % parts:
            near = max(1, round(train.batch_size / parts)) * parts
            raise RecipeError(
                f"train.batch_size={train.batch_size} cannot be cut evenly over {world_size} ranks × "
                f"{train.accumulate} micro-batches (train.accumulate): the nearest that can is {near}"
            )
        recipe = replace(recipe, train=replace(train, batch_size_per_gpu=train.batch_size // parts))
    images, group = recipe.train.batch_size_per_gpu * parts, recipe.dino.koleo_group_size
    if group is not None and images % group:
        raise RecipeError(f"dino.koleo_group_size={group} does not divide the batch of {images} images")
    return recipe


def in_one(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe of a run with that global batch, as one rank takes it at once: the data is the same."""
    train = replace(recipe.train, batch_size=batch_size, batch_size_per_gpu=batch_size, accumulate=1)
    return replace(recipe, train=train)


def run_length(recipe: Recipe, *, images: int, world_size: int = 1) -> RunLength:
    """Steps of the run: ``train.steps``, else ``train.epochs`` of the images, else ``optim.epochs`` nominal epochs.

    Raises:
        RecipeError: a batch that is larger than the data.
    """
    parts = world_size * recipe.train.accumulate
    batch_size = recipe.train.batch_size_per_gpu * parts
    if batch_size > images:
        raise RecipeError(
            f"the batch of {batch_size} images is larger than the data ({images} images): set "
            + (
                f"train.batch_size_per_gpu to {max(images // parts, 1)} or less"
                if recipe.train.batch_size is None  # or else it wins
                else f"train.batch_size to {max(images // parts, 1) * parts} or less"
            )
            + (f", on {images} ranks or fewer" if images < parts else "")
        )
    if recipe.train.steps is not None:
        steps = recipe.train.steps
    elif recipe.train.epochs is not None:
        steps = math.ceil(recipe.train.epochs * images / batch_size)
    else:
        steps = math.ceil(recipe.optim.epochs * recipe.train.OFFICIAL_EPOCH_LENGTH)
    return RunLength(steps, batch_size, images)


def build_schedules(recipe: Recipe, length: RunLength) -> Schedules:
    """The schedules of a run of that length.

    Raises:
        RecipeError: a warm-up or freeze that is as long as the run.
    """
    o, t = recipe.optim, recipe.teacher

    def steps_of(key: str, text: str | None, official_epochs: float) -> int:
        if text is None:
            steps = round(official_epochs * recipe.train.OFFICIAL_EPOCH_LENGTH)
            key = f"{key}_epochs={official_epochs:g} (of {recipe.train.OFFICIAL_EPOCH_LENGTH} steps each)"
        else:
            steps = parse_length(text).steps(
                length.steps, length.images / length.batch_size, recipe.train.OFFICIAL_EPOCH_LENGTH
            )
            key = f"{key}_length={text}"
        if steps >= length.steps and steps > 0:
            raise RecipeError(
                f"{key} is {steps:,} steps, but the run has only {length.steps:,}: make the run longer, or give a "
                f"share of it, such as {key.split('_epochs=')[0].split('_length=')[0]}_length=10%"
            )
        return steps

    return Schedules(
        total_steps=length.steps,
        lr=sqrt_scaled_lr(o.base_lr, length.batch_size) if o.scaling_rule == "sqrt_wrt_1024" else o.base_lr,
        min_lr=o.min_lr,
        warmup_steps=steps_of("optim.warmup", o.warmup_length, o.warmup_epochs),
        weight_decay=o.weight_decay,
        weight_decay_end=o.weight_decay_end,
        momentum=t.momentum_teacher,
        final_momentum=t.final_momentum_teacher,
        warmup_teacher_temp=t.warmup_teacher_temp,
        teacher_temp=t.teacher_temp,
        teacher_temp_steps=steps_of(
            "teacher.warmup_teacher_temp", t.warmup_teacher_temp_length, t.warmup_teacher_temp_epochs
        ),
        freeze_last_layer_steps=steps_of(
            "optim.freeze_last_layer", o.freeze_last_layer_length, o.freeze_last_layer_epochs
        ),
        freeze_by_gradient=o.freeze_last_layer == "gradient",
        freeze_backbone_steps=steps_of("optim.freeze_backbone", o.freeze_backbone_length or "0%", 0),
        frozen_momentum=t.frozen_momentum_teacher,
    )


def build_state(
    recipe: Recipe,
    device: torch.device,
    *,
    images: int,
    precision: torch.dtype | None = None,
    initialise: Callable[[StudentTeacher], object] | None = None,
    lay_out: Callable[[StudentTeacher], object] | None = None,
) -> TrainState:
    """A run at step 0. The weights are a function of the recipe's seed; torch's global random state is left alone.

    Args:
        recipe: the run.
        device: where to.
        images: in the data.
        precision: of matrix products, as the plan has it: float16 needs a scaler. None: the recipe's, in one process.
        initialise: puts other weights into the fresh networks.
        lay_out: shards the networks, which the optimizer follows.
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


def initialise(student_teacher: StudentTeacher, given: VisionTransformer, in_chans: str | None) -> list[str]:
    """Puts the weights of ``given`` into both backbones; heads stay as they are.

    Args:
        given: position embeddings are resampled by its rule if it is for another size of images.
        in_chans: what to do with another number of input channels. ``repeat``: its channels in turn; ``mean``: their
            mean for every channel; both scaled so that equal channels give the same sum. ``fresh``: random weights.
            None: refuse.

    Returns:
        What was reshaped, in words.

    Raises:
        WeightsError: weights that do not fit; nothing was changed.
    """
    student = cast(VisionTransformer, student_teacher.student["backbone"])
    tensors, expected = dict(given.state_dict()), student.state_dict()
    notes = []
    old, new = (math.isqrt(n.pos_embed.shape[1] - 1) for n in (given, student))
    if old != new:
        with torch.no_grad():
            tensors["pos_embed"] = torch.cat(given.position_embeddings(new, new), dim=1)
        notes.append(f"pos_embed resampled from {old} × {old} to {new} × {new} patches")
    rules = [(n.interpolate_antialias, n.interpolate_offset) for n in (given, student)]
    if rules[0] != rules[1]:
        notes.append(
            "position embeddings of other sizes: the file has antialias={}, offset={}, ".format(*rules[0])
            + "the recipe {}, {}: see student.interpolate_antialias, student.interpolate_offset".format(*rules[1])
        )
    filters = tensors["patch_embed.proj.weight"]  # [D, C, p, p]
    if filters.shape[1] != student.in_chans and in_chans is not None:
        scale = filters.shape[1] / student.in_chans
        if in_chans == "repeat":
            filters = filters[:, torch.arange(student.in_chans) % filters.shape[1]] * scale
        elif in_chans == "mean":
            filters = filters.mean(dim=1, keepdim=True).repeat(1, student.in_chans, 1, 1) * scale
        else:
            filters = expected["patch_embed.proj.weight"]
        tensors["patch_embed.proj.weight"] = filters
        notes.append(f"input channels from {given.in_chans} to {student.in_chans}: {in_chans}")
    wrong = misfits(tensors, expected)
    heads, wanted = (cast(Block, n.blocks[0]).attn.num_heads for n in (given, student))
    if heads != wanted:
        wrong.append(f"{heads} attention heads, expected {wanted}")
    if wrong:
        raise WeightsError(
            f"init.weights does not fit the recipe: {'; '.join(wrong)}. Set student.* to the architecture of the file"
            + ("" if given.in_chans == student.in_chans else ", or init.in_chans to repeat, mean or fresh")
        )
    if not student.pos_embed.is_meta:
        for networks in (student_teacher.student, student_teacher.teacher):
            networks["backbone"].load_state_dict(tensors)
    return notes


def heads_of_run(student_teacher: StudentTeacher, run: Path) -> str:
    """Puts the heads and centres of a run's newest checkpoint into fresh networks; says what it did.

    Raises:
        WeightsError: heads of other sizes, or no whole checkpoint.
    """
    steps = checkpoint.steps(run)
    if not steps:
        return "heads start fresh: there is no checkpoint of a run to take them from"
    theirs = {name: t for name, t in student_teacher.state_dict().items() if ".backbone." not in name}
    checkpoint.load(run, steps[-1], theirs)
    return f"heads and centres of the checkpoint at step {steps[-1]:,}"


def build_masks(recipe: Recipe) -> DrawMasks:
    """Draws the masks of all global crops of a batch."""
    i = recipe.ibot
    return partial(
        batch_masks,
        kind=i.mask_kind,
        ratio=i.mask_ratio_min_max,
        probability=i.mask_sample_probability,
        max_patches=max_num_patches(recipe.crops.global_crops_size, recipe.student.patch_size),
        min_patches=i.mask_min_patches,
        min_aspect=i.mask_min_aspect,
    )


def least_reduction(recipe: Recipe, width: int, height: int) -> int:
    """By how much large JPEG files of that size are at least reduced when they are decoded for training."""
    if not recipe.data.reduced_decode:
        return 1
    c = recipe.crops
    areas = {c.global_crops_size: c.global_crops_scale[0]}
    if c.local_crops_number:
        areas[c.local_crops_size] = min(c.local_crops_scale[0], areas.get(c.local_crops_size, 1.0))
    narrow = min(c.aspect_ratio[0], 1 / c.aspect_ratio[1])
    return max(1, min(int(math.sqrt(area * width * height * narrow) / size) for size, area in areas.items()))


def build_data(recipe: Recipe, source: Source, *, rank: int = 0, world_size: int = 1) -> TrainingData:
    """The training batches of a source."""
    c, a = recipe.crops, recipe.augment
    crops = MultiCrop(
        global_size=c.global_crops_size,
        global_scale=c.global_crops_scale,
        local_size=c.local_crops_size,
        local_scale=c.local_crops_scale,
        local_number=c.local_crops_number,
        aspect=c.aspect_ratio,
        horizontal_flip=a.horizontal_flip,
        vertical_flip=a.vertical_flip,
        quarter_turns=a.quarter_turns,
        jitter_probability=a.jitter_probability,
        brightness=a.brightness,
        contrast=a.contrast,
        saturation=a.saturation,
        hue=a.hue,
        grayscale_probability=a.grayscale_probability,
        blur_probability=a.blur_probability or BLUR_PROBABILITY[a.blur],
        blur_sigma=a.blur_sigma,
        blur_kernel=a.blur_kernel,
        solarize_probability=a.solarize_probability,
        solarize_threshold=a.solarize_threshold,
    )
    return TrainingData(
        source,
        crops,
        build_masks(recipe),
        patch_size=recipe.student.patch_size,
        channels=recipe.student.in_chans,
        decoding=image_input(recipe).decoding,
        reduced_decode=recipe.data.reduced_decode,
        photometry=a.device == "workers",
        seed=recipe.train.seed,
        batch_size=recipe.train.batch_size_per_gpu * world_size * recipe.train.accumulate,
        rank=rank,
        world_size=world_size,
    )
