"""The running centre of teacher outputs."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dinoforge.system import distributed


@torch.no_grad()
def updated_center(
    center: Tensor, logits: Iterable[Tensor], temp: float, momentum: float, *, by_count: bool = False
) -> Tensor:
    """The running mean [K] with this step's ``logits`` in it.

    Args:
        center: [K].
        logits: of each of this rank's micro-batches, over ``temp`` [K, N].
        temp: the teacher's temperature.
        momentum: of the running mean.
        by_count: take the mean over all samples. Otherwise it is the mean of each rank's, or micro-batch's, mean, as in
            the reference. One without samples counts as its share of the old centre, so that it neither makes NaN nor
            pulls to 0.
    """
    sums, means, count = torch.zeros_like(center), torch.zeros_like(center), 0
    parts = 0
    for part in logits:
        n = part.shape[1]
        mean = part.mean(dim=1, dtype=center.dtype) * temp if n else center
        means += mean
        sums += n * mean
        count, parts = count + n, parts + 1
    if by_count:
        *_, samples = both = distributed.sum_over_ranks(torch.cat([sums, sums.new_tensor([count])]))
        mean = torch.where(samples > 0, both[:-1] / samples.clamp(min=1), center)
    else:
        mean = distributed.mean_over_ranks(means / parts)
    return center * momentum + mean * (1 - momentum)
