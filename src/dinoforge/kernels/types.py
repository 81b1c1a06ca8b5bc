"""The argument and result types of the operations."""

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
        """Compute the probabilities of some prototypes and samples [k, n], as a new tensor."""
        scaled = self.scaled[prototypes, samples] * self.per_sample[samples]
        return scaled.mul_(self.per_prototype[prototypes, None])

    def agreement(self, logits: Tensor, prototypes: slice, samples: slice) -> Tensor:
        """Sum probability times student logit [k, n] over prototypes [n], without storing the probabilities."""
        products = (logits * self.scaled[prototypes, samples]).to(self.per_prototype.dtype)
        return torch.mv(products.T, self.per_prototype[prototypes]).mul_(self.per_sample[samples])

    def subtract_from(self, matrix: Tensor, prototypes: slice, samples: slice) -> None:
        """Subtract the probabilities from a matrix [k, n] in place, without storing them."""
        scaled = self.scaled[prototypes, samples] * self.per_sample[samples]
        matrix.addcmul_(scaled, self.per_prototype[prototypes, None], value=-1)

    def rows(self, samples: slice) -> Tensor:
        """Compute the probabilities of some samples over all prototypes [n, K]."""
        return self.tile(slice(None), samples).T


@dataclass(frozen=True)
class Term:
    """A part of a loss: crops of the student compared with targets of the teacher.

        for c in range(C):
            for i in range(G):
                for samples in sources:
                    loss -= weights[i] * dot(targets[samples][i], log_softmax(logits[c, i]))

    with ``logits = embeddings @ prototypes.T / temp``.

    Args:
        embeddings: The normalised student bottlenecks [C, G, d] of C crops that share targets.
        targets: The targets of the teacher.
        sources: The slices of the targets' samples to compare with, each of length G.
        weights: The weights of the samples [G].
        temp: The student's temperature.
    """

    embeddings: Tensor
    targets: Targets
    sources: tuple[slice, ...]
    weights: Tensor
    temp: float


Groups = tuple[tuple[int, int], ...]  # (images, tokens per image) of each resolution


class Kept(NamedTuple):
    """The images of a group that a residual branch keeps (stochastic depth).

    Args:
        images: The indices of the kept images, on the CPU.
        scale: The number of images over the number of kept images, which preserves the expectation of the branch. For a
            part of a group, both numbers are those of the whole group.
    """

    images: Tensor
    scale: float


@dataclass(frozen=True)
class Subset:
    """The images of a batch that one residual branch keeps (stochastic depth).

    Args:
        rows: The packed indices of the kept images' tokens [T'].
        groups: The groups that these tokens form.
        scales: The scale of each group; see ``Kept``.
    """

    rows: Tensor
    groups: Groups
    scales: tuple[float, ...]
