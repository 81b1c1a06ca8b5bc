"""Teacher logits to targets: centering and Sinkhorn-Knopp.

Both give probabilities of the form ``exp(logits / temp + a[prototype] + b[sample])``. Only the two vectors are
computed here; the probabilities themselves are made where they are read, a few rows at a time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dinoforge import distributed


@dataclass(frozen=True)
class Targets:
    """Probabilities over prototypes of N samples."""

    logits: Tensor  # [N, K]
    temp: float
    per_prototype: Tensor  # a [K]
    per_sample: Tensor  # b [N]

    def rows(self, index: Tensor | slice) -> Tensor:
        """Probabilities of some samples [n, K], float32."""
        scaled = self.logits[index].float() / self.temp
        return scaled.add_(self.per_prototype).add_(self.per_sample[index][:, None]).exp_()


@torch.no_grad()
def centering(logits: Tensor, temp: float, center: Tensor) -> Targets:
    """``softmax((logits - center) / temp)``.

    Args:
        logits: of the teacher [N, K].
        temp: the teacher's temperature.
        center: running mean of earlier logits [K].

    Source: DINO (arXiv 2104.14294), section 3.1.
    """
    a = -center / temp
    b = [-torch.logsumexp(part.float() / temp + a, dim=1) for part in logits.split(_rows_at_once(logits))]
    return Targets(logits, temp, a, torch.cat(b) if b else logits.new_empty(0))


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, iterations: int = 3) -> Targets:
    """Balanced assignment of the samples of all ranks to prototypes.

    Each iteration scales the matrix ``exp(logits / temp)`` so that all prototypes have equal mass, then so that all
    samples have; the last word is the samples', so each sample's probabilities sum to one. It is done on logarithms:
    no size of the logits overflows. As pseudocode, with N samples on all ranks:

        for i in range(iterations):
            for k in range(K): a[k] = -log(sum(exp(logits[n, k] / temp + b[n]) for n in range(N)))
            for n in range(N): b[n] = -log(sum(exp(logits[n, k] / temp + a[k]) for k in range(K)))

    The constant masses 1/K and 1/N cancel.

    Args:
        logits: of the teacher [n, K], the samples of this rank; n may be 0 on some.
        temp: the teacher's temperature.
        iterations: 3 in SwAV (arXiv 2006.09882, section 3.1) and DINOv2 (arXiv 2304.07193, section 4).
    """
    n, k = logits.shape
    a = logits.new_zeros(k, dtype=torch.float32)
    b = logits.new_zeros(n, dtype=torch.float32)
    columns = max(1, _ELEMENTS_AT_ONCE // max(n, 1))
    for _ in range(iterations):
        mass = [torch.logsumexp(p.float() / temp + b[:, None], dim=0) for p in logits.split(columns, dim=1)]
        a = -distributed.logsumexp_over_ranks(torch.cat(mass))
        a = a - a.amax()  # keeps both vectors in range; b takes it back
        if n:
            mass = [torch.logsumexp(p.float() / temp + a, dim=1) for p in logits.split(_rows_at_once(logits))]
            b = -torch.cat(mass)
    return Targets(logits, temp, a, b)


@torch.no_grad()
def updated_center(center: Tensor, logits: Tensor, momentum: float) -> Tensor:
    """The running mean [K] with this step's logits [N, K] in it; the mean over ranks of each rank's mean.

    A rank without samples counts as its share of the old centre, so that it neither makes NaN nor pulls to 0.
    """
    mean = logits.float().mean(dim=0) if len(logits) else center
    return center * momentum + distributed.mean_over_ranks(mean) * (1 - momentum)


_ELEMENTS_AT_ONCE = 1 << 21  # bounds temporary copies to 8 MiB


def _rows_at_once(logits: Tensor) -> int:
    return max(1, math.ceil(_ELEMENTS_AT_ONCE / max(logits.shape[1], 1)))
