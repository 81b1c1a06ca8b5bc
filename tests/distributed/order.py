"""What one of sixty-four ranks asks the others for, in a process of its own.

PyTorch's fake process group communicates nothing and gives each rank its own values, so the numbers mean nothing.

    PYTHONPATH=tests python -m distributed.order RANK FILE
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinoforge.builders.lengths import build_schedules, run_length
from dinoforge.builders.networks import build_state
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.recipe.load import load_recipe
from dinoforge.runs import checkpoint
from dinoforge.training.loop import train
from dinoforge.training.parallel import Parallel, wrap
from dinoforge.training.step import Stepper
from distributed import layouts

WORLD, STEPS = 64, 2
MASKED = {0: 0.4, 8: 0.0, 63: 0.9}
"""Ranks that are played, and the share of their patches that is masked."""
KINDS = {
    f"{layout}, {centering}": {**keys, "train.centering": centering}
    for centering in ("centering", "sinkhorn_knopp")
    for layout, keys in {
        "ddp": {"parallel.mode": "ddp"},
        "fsdp": {"parallel.mode": "fsdp"},
        "hsdp": {"parallel.mode": "hsdp", "parallel.shard_ranks": 8},  # 8 copies
        "ddp in turn": {
            "parallel.mode": "ddp",
            "train.accumulate": 2,
            "parallel.crops_in_turn": True,
            "parallel.activation_checkpointing": True,
        },
    }.items()
}
SHORT = {
    "train.steps": STEPS,
    "train.batch_size_per_gpu": 2,
    "precision": "fp32",
    # Every rank has a row of each matrix; of what others have, the fake group makes copies of it.
    "student.embed_dim": WORLD,
    **{f"dino.head_{size}": WORLD for size in ("n_prototypes", "hidden_dim", "bottleneck_dim")},
    "optim.warmup_length": "1 step",
    "optim.freeze_last_layer_length": "1 step",
    "teacher.warmup_teacher_temp_length": "1 step",
}
Collective = list[Any]


class Collectives(TorchDispatchMode):
    """Notes each collective: its name, its group, and the sizes and dtypes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait_tensor" not in name:
            leaves = tree_leaves((args, kwargs))
            tensors = [[list(t.shape), str(t.dtype)] for t in leaves if isinstance(t, torch.Tensor)]
            self.seen.append([name, *self._groups(leaves), *tensors])
        return func(*args, **(kwargs or {}))

    def _groups(self, leaves: list[Any]) -> Iterator[list[Any]]:
        """What groups are for, and their sizes: equal for groups of different ranks that do the same."""
        for leaf in leaves:
            if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
                group = dist.ProcessGroup.unbox(leaf)
                yield [group.group_desc, group.size()]
            elif isinstance(leaf, str) and leaf in (g.group_name for g in dist.distributed_c10d._world.pg_map):
                group = dist.distributed_c10d._resolve_process_group(leaf)
                yield [group.group_desc, group.size()]


@contextmanager
def playing(rank: int) -> Iterator[None]:
    """This process is one of the ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


def batch_of(rank: int, number: int, images: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    masks = torch.rand(2 * images, 16, generator=generator) < MASKED[rank]
    return Batch(
        global_crops=torch.randn(2 * images, 3, 16, 16, generator=generator),
        local_crops=torch.randn(8 * images, 3, 8, 8, generator=generator),
        masks=masks,
        masked=masked_patches(masks),
        indices=torch.arange(images),
    )


def averaged(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does with a bucket by itself, which fails on the future that the fake group's work gives."""
    buffer = bucket.buffer().div_(WORLD)
    dist.all_reduce(buffer)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


def not_expected(batch: Batch, values: dict[str, float]) -> None:
    raise AssertionError(f"not finite: {values}")


def collectives_of(rank: int, keys: dict[str, Any]) -> list[Collective]:
    """Of some steps of the training loop, one of them measured, and of a checkpoint."""
    recipe, _ = load_recipe("dinov2", layouts.BASE | SHORT | keys)
    device = torch.device("cpu")
    with playing(rank), Collectives() as collectives:
        laid_out: list[Parallel] = []
        settings = recipe.parallel
        state = build_state(
            recipe,
            device,
            images=1000,
            lay_out=lambda networks: laid_out.append(
                wrap(
                    networks,
                    settings.mode,
                    device,
                    activation_checkpointing=settings.activation_checkpointing,
                    shard_ranks=settings.shard_ranks,
                )
            ),
        )
        if settings.mode == "ddp":
            laid_out[0].forward.register_comm_hook(None, averaged)
        length = run_length(recipe, images=10_000, world_size=WORLD)
        started = len(collectives.seen)
        losses: list[float] = []
        train(
            state,
            (batch_of(rank, number, 2 * recipe.train.accumulate) for number in range(STEPS)),
            build_schedules(recipe, length),
            Stepper(
                clip_grad=3.0,
                drop_path_rates=[0.3, 0.3],
                accumulate=recipe.train.accumulate,
                least_tokens=1 if settings.crops_in_turn else None,
                parallel=laid_out[0],
            ),
            samples_per_step=length.batch_size,
            prepare=lambda batch: batch,
            hooks=[lambda report: losses.append(report.result.values()["total"])],
            is_measured=lambda step: step == 2,
            should_stop=lambda: False,
            on_skipped=lambda skipped: None,
            on_non_finite=not_expected,
        )
        trained = len(collectives.seen)
        checkpoint.whole(state.tensors(), copy=True)
        assert len(losses) == STEPS
        assert trained - started >= 5 * STEPS
        assert (len(collectives.seen) > trained) == (settings.mode != "ddp")
    return collectives.seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = {kind: collectives_of(int(sys.argv[1]), keys) for kind, keys in KINDS.items()}
    Path(sys.argv[2]).write_text(json.dumps(seen))
