"""What the operations take and give."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Probabilities over K prototypes of N samples: ``scaled[k, n] · per_prototype[k] · per_sample[n]``."""

    scaled: Tensor  # [K, N], from 0 to 1, in the precision of the logits
    per_prototype: Tensor  # u [K]
    per_sample: Tensor  # v [N]

    def tile(self, prototypes: slice, samples: slice) -> Tensor:
        """Probabilities of some samples [k, n], a new tensor."""
        scaled = self.scaled[prototypes, samples] * self.per_sample[samples]
        return scaled.mul_(self.per_prototype[prototypes, None])

    def agreement(self, logits: Tensor, prototypes: slice, samples: slice) -> Tensor:
        """Sums [n] over prototypes of probability times student's logit [k, n], without making the probabilities."""
        products = (logits * self.scaled[prototypes, samples]).to(self.per_prototype.dtype)
        return torch.mv(products.T, self.per_prototype[prototypes]).mul_(self.per_sample[samples])

    def subtract_from(self, matrix: Tensor, prototypes: slice, samples: slice) -> None:
        """Takes probabilities from a matrix [k, n], without making them."""
        scaled = self.scaled[prototypes, samples] * self.per_sample[samples]
        matrix.addcmul_(scaled, self.per_prototype[prototypes, None], value=-1)

    def rows(self, samples: slice) -> Tensor:
        """Probabilities of some samples over all prototypes [n, K]."""
        return self.tile(slice(None), samples).T


@dataclass(frozen=True)
class Term:
    """A part of a loss: crops of the student held against targets of the teacher.

        for c in range(C):
            for i in range(G):
                for samples in sources:
                    loss -= weights[i] * dot(targets[samples][i], log_softmax(logits[c, i]))

    with ``logits = embeddings @ prototypes.T / temp``.

    Args:
        embeddings: normalised student bottlenecks [C, G, d]: C crops that share targets.
        targets: of the teacher.
        sources: slices of the targets' samples, each of length G.
        weights: [G].
        temp: the student's temperature.
    """

    embeddings: Tensor
    targets: Targets
    sources: tuple[slice, ...]
    weights: Tensor
    temp: float


Groups = tuple[tuple[int, int], ...]  # (images, tokens per image) of each resolution


class Kept(NamedTuple):
    """The images of a group that a residual branch keeps (stochastic depth).

    images: their indices, on the CPU.
    scale: images / images kept, which keeps the expectation of the branch; of the whole group, if this is a part of it.
    """

    images: Tensor
    scale: float


@dataclass(frozen=True)
class Subset:
    """The images of a batch that one residual branch keeps (stochastic depth).

    rows: packed indices of their tokens [T'].
    groups: the groups that these tokens form.
    scales: per group, see ``Kept``.
    """

    rows: Tensor
    groups: Groups
    scales: tuple[float, ...]
