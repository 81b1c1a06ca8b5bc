"""The crops of a step, one piece after another."""

from collections.abc import Sequence

import torch

from dinoforge.data.batch import Batch
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.models.stochastic_depth import KeptSamples, draw_kept_samples
from dinoforge.system import distributed


def kept_samples(
    student_teacher: StudentTeacher,
    batch: Batch,
    drop_path_rates: Sequence[float],
    *,
    seed: int,
    number: int,
    parts: int = 1,
    rank: int | None = None,
) -> list[list[KeptSamples] | None]:
    """Stochastic depth of each micro-batch of a batch, whatever happened before; None where no block has any.

    Args:
        student_teacher: the networks.
        batch: of one rank, on any device.
        drop_path_rates: per block of the student.
        seed: of the run.
        number: of the batch; see ``TrainState.next_batch``.
        parts: micro-batches that the batch is cut into.
        rank: whose batch it is; None: this one's.
    """
    if not any(drop_path_rates):
        return [None] * parts
    # By its place in the global batch, so that it is the same on two ranks and in two micro-batches.
    first = parts * (distributed.rank() if rank is None else rank)
    sizes = [len(crops) // parts for crops in student_teacher.student_crops(batch)]
    mixed = [((seed * 1_000_003 + number) * 65_537 + first + part) % 2**63 for part in range(parts)]
    return [draw_kept_samples(drop_path_rates, sizes, torch.Generator().manual_seed(m)) for m in mixed]
