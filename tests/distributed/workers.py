"""What each of two processes does; ``test_reductions.py`` starts it as a script, by ``ranks.py``.

It gives what the process got, and nothing of how that should look.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dinoforge.builders.networks import build_optimizer, build_student_teacher
from dinoforge.data.bad_images import BadImages
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.optim.schedules import Hyperparameters
from dinoforge.recipe.load import load_recipe
from dinoforge.system import distributed
from dinoforge.training.parallel import wrap
from dinoforge.training.state import TrainState
from dinoforge.training.step import Stepper
from distributed import ranks
from plain_losses import sinkhorn_knopp, updated_center

INFINITY = float("inf")
VALUES = torch.tensor(
    [
        [0.0, 1.0, -INFINITY, -INFINITY, 1e4, -1e4],
        [2.0, -INFINITY, 3.0, -INFINITY, 1e4, 1e4],
    ]
)
SPLITS = {"even": (3, 3), "uneven": (1, 5), "none_on_first": (0, 6), "none_on_last": (6, 0)}


def logits(name: str, rank: int) -> Tensor:
    """This rank's part of the same 6 samples."""
    whole = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3
    return whole.split(SPLITS[name])[rank]


def reductions(rank: int, folder: Path) -> dict[str, Tensor]:
    x = VALUES[rank].clone()
    results = {
        "rank": torch.tensor([distributed.rank(), distributed.world_size(), int(distributed.is_active())]),
        "sum": distributed.sum_over_ranks(torch.tensor([1.0, 10.0]) * (rank + 1)),
        "mean": distributed.mean_over_ranks(torch.tensor([1.0, 10.0]) * (rank + 1)),
        "logsumexp": distributed.logsumexp_over_ranks(x),
    }
    return results | {"unchanged": torch.tensor(torch.equal(x, VALUES[rank]))}


def targets(rank: int, folder: Path) -> dict[str, Tensor]:
    results = {name: sinkhorn_knopp(logits(name, rank), 0.3).rows(slice(None)) for name in SPLITS}
    center = torch.arange(5.0)
    return results | {f"center_{name}": updated_center(center, logits(name, rank), 0.9) for name in SPLITS}


RECIPE = {
    "student.arch": "vit_custom",
    "student.embed_dim": 16,
    "student.depth": 1,
    "student.num_heads": 2,
    "student.patch_size": 4,
    "crops.global_crops_size": 16,
    "crops.local_crops_size": 12,
    "augment.blur_kernel": 3,
    "ibot.separate_head": True,
    **{f"{k}.head_n_prototypes": 8 for k in ("dino", "ibot")},
    **{f"{k}.head_hidden_dim": 12 for k in ("dino", "ibot")},
    **{f"{k}.head_bottleneck_dim": 6 for k in ("dino", "ibot")},
}


def batch_of(rank: int, masked_ranks: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(rank)
    masks = torch.rand(6, 16, generator=generator) < (0.4 if rank in masked_ranks else 0.0)
    return Batch(
        global_crops=torch.randn(6, 3, 16, 16, generator=generator),
        local_crops=torch.randn(6, 3, 12, 12, generator=generator),
        masks=masks,
        masked=masked_patches(masks),
        indices=torch.arange(3),
    )


def step(rank: int, folder: Path) -> dict[str, Tensor]:
    """Two steps in which a rank, or every rank, has no masked patch."""
    results = {}
    for targets_name in ("centering", "sinkhorn_knopp"):
        for masked_ranks in ((1,), (0, 1), ()):
            recipe, _ = load_recipe("dinov2", RECIPE | {"train.centering": targets_name})
            torch.manual_seed(0)
            networks: StudentTeacher = build_student_teacher(recipe)
            parallel = wrap(networks, "ddp", torch.device("cpu"))
            state = TrainState(networks, build_optimizer(recipe, networks), None, BadImages(0.0, 1))
            stepper = Stepper(clip_grad=3.0, parallel=parallel)
            hyper = Hyperparameters(1e-2, 1e-2, 0.04, 0.9, 0.05, last_layer_frozen=False)
            for _ in range(2):
                result = stepper(state, batch_of(rank, masked_ranks), hyper)
            prefix = f"{targets_name}_{''.join(map(str, masked_ranks))}"
            results |= {f"{prefix}.loss.{k}": v.detach() for k, v in vars(result.losses).items()}
            results |= {f"{prefix}.norm.{k}": v for k, v in result.grad_norms.items()}
            results |= {f"{prefix}.state.{k}": v for k, v in networks.state_dict().items()}
    return results


TASKS: dict[str, Callable[[int, Path], dict[str, Tensor]]] = {
    "reductions": reductions,
    "targets": targets,
    "step": step,
}


if __name__ == "__main__":
    ranks.serve(TASKS)
