"""Ten steps on a global batch that is laid over ranks and micro-batches in a certain way.

``test_layouts.py`` runs it on one process, and as a script on several.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinoforge.builders.networks import build_optimizer, build_student_teacher
from dinoforge.data.bad_images import BadImages
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.optim.schedules import Hyperparameters
from dinoforge.recipe.load import load_recipe
from dinoforge.system import distributed
from dinoforge.training.parallel import Mode, wrap
from dinoforge.training.state import TrainState
from dinoforge.training.step import Stepper
from distributed import ranks

IMAGES, STEPS, MEASURED = 8, 10, 3
BASE = {
    "student.arch": "vit_custom",
    "student.embed_dim": 16,
    "student.depth": 2,
    "student.num_heads": 2,
    "student.patch_size": 4,
    "student.drop_path_rate": 0.0,
    "student.layerscale": 0.1,
    "crops.global_crops_size": 16,
    "crops.local_crops_size": 8,
    "augment.blur_kernel": 3,
    "dino.koleo_scope": "global",
    "ibot.center_mean": "patches",
    **{f"{k}.head_n_prototypes": 10 for k in ("dino", "ibot")},
    **{f"{k}.head_hidden_dim": 12 for k in ("dino", "ibot")},
    **{f"{k}.head_bottleneck_dim": 6 for k in ("dino", "ibot")},
}
KINDS = {
    "centering": {"train.centering": "centering"},
    "sinkhorn_knopp": {"train.centering": "sinkhorn_knopp"},
    "separate heads, groups": {
        "train.centering": "sinkhorn_knopp",
        "ibot.targets": "centering",
        "ibot.separate_head": True,
        "dino.koleo_scope": "groups",
        "dino.koleo_group_size": 4,
    },
    "only heads learn at first": {"train.centering": "sinkhorn_knopp"},
    # Over eight ranks, shards of 2 rows, of 1, and of none.
    "prime sizes": {
        "train.centering": "sinkhorn_knopp",
        **{f"{k}.head_n_prototypes": 11 for k in ("dino", "ibot")},
        **{f"{k}.head_hidden_dim": 13 for k in ("dino", "ibot")},
        **{f"{k}.head_bottleneck_dim": 5 for k in ("dino", "ibot")},
    },
    # How it is cut has a meaning here: the same in ranks as in micro-batches.
    "of the reference": {
        "dino.koleo_scope": "rank",
        "ibot.center_mean": "ranks",
        "student.drop_path_rate": 0.3,
    },
}


class Layout(NamedTuple):
    mode: Mode
    accumulate: int = 1
    activation_checkpointing: bool = False
    shard_ranks: int | None = None
    least_tokens: int | None = None


ON_TWO = {
    "ddp": Layout("ddp"),
    "fsdp": Layout("fsdp"),
    "ddp, accumulated": Layout("ddp", 2),
    "fsdp, accumulated, checkpointed": Layout("fsdp", 2, True),
    "ddp, in turn": Layout("ddp", least_tokens=1),
    "fsdp, accumulated, in turn": Layout("fsdp", 2, least_tokens=1),
}
COMBINATIONS = [
    *((kind, layout) for kind in ("centering", "sinkhorn_knopp") for layout in ON_TWO),
    ("separate heads, groups", "ddp"),
    ("separate heads, groups", "ddp, in turn"),
    ("separate heads, groups", "fsdp, accumulated, checkpointed"),
    *(("only heads learn at first", layout) for layout in ON_TWO),
    ("of the reference", "ddp"),
    ("of the reference", "fsdp"),
]
ON_ONE = {
    "accumulated": Layout("none", 2),
    "accumulated 4": Layout("none", 4),
    "checkpointed": Layout("none", 1, True),
    "in turn": Layout("none", least_tokens=1),
    "accumulated, in turn": Layout("none", 2, least_tokens=1),
}


def global_batch(step: int) -> Batch:
    """All images of a step. In some steps only the first half has masks, or no image."""
    generator = torch.Generator().manual_seed(step)
    masks = torch.rand(2, IMAGES, 16, generator=generator) < 0.4
    masks[:, IMAGES // 2 if step % 3 == 1 else IMAGES :] = False
    if step == 5:
        masks[:] = False
    masks = masks.flatten(0, 1)
    return Batch(
        global_crops=torch.randn(2 * IMAGES, 3, 16, 16, generator=generator),
        local_crops=torch.randn(8 * IMAGES, 3, 8, 8, generator=generator),
        masks=masks,
        masked=masked_patches(masks),
        indices=torch.arange(IMAGES),
    )


def run(kind: str, layout: Layout) -> dict[str, torch.Tensor]:
    """Losses and gradient norms of each step, and the weights after the last."""
    overrides = BASE | KINDS[kind]
    recipe, _ = load_recipe("dinov2", overrides)
    torch.manual_seed(0)
    networks = build_student_teacher(recipe)
    with torch.no_grad():  # images look different from the start
        for p in networks.student.parameters():
            p += 0.2 * torch.randn_like(p)
    networks.teacher.load_state_dict(networks.student.state_dict())
    parallel = wrap(
        networks,
        layout.mode,
        torch.device("cpu"),
        activation_checkpointing=layout.activation_checkpointing,
        shard_ranks=layout.shard_ranks,
        some_frozen=kind == "only heads learn at first",
    )
    optimizer = build_optimizer(recipe, networks)
    for group in optimizer.param_groups:
        group["eps"] = 1e-4  # with a tiny one the first steps' length is all there is, also where a gradient is noise
    state = TrainState(networks, optimizer, None, BadImages(0.0, 1))
    stepper = Stepper(
        clip_grad=0.5,
        drop_path_rates=[recipe.student.drop_path_rate] * 2,
        accumulate=layout.accumulate,
        least_tokens=layout.least_tokens,
        parallel=parallel,
    )
    results: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        only_heads = kind == "only heads learn at first" and step < 3
        hyper = Hyperparameters(2e-3, 2e-3, 0.04, 0.9, 0.07, step == 0, backbone_frozen=only_heads)
        own = global_batch(step).split(distributed.world_size())[distributed.rank()]
        batch = replace(own, piece_of=None)  # losses and gradients are averaged over ranks
        result = stepper(state, batch, hyper, measure=step == MEASURED)
        state.step += 1
        results |= {f"{step} {name}": torch.tensor(value) for name, value in result.values().items()}
    results |= {f"state {k}": distributed.whole(v).detach().clone() for k, v in networks.state_dict().items()}
    return results


def two(rank: int, folder: Path) -> dict[str, Any]:
    return {f"{kind}: {layout}": run(kind, ON_TWO[layout]) for kind, layout in COMBINATIONS}


def four(rank: int, folder: Path) -> dict[str, Any]:
    return {"centering": run("centering", Layout("hsdp", 1, True, 2))}


if __name__ == "__main__":
    ranks.serve({"two": two, "four": four})
