"""Targets of a global batch that is seen in parts, so that they are those of the batch seen at once.

What is kept of each part are the teacher's bottlenecks, not the logits of all prototypes: those are made again for
one part at a time. Both kinds of targets are a softmax of logits shifted by a vector over prototypes, and that vector
is all that has to be known of the other parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dinoforge.kernels.ops import Scratch, centering, teacher_logits
from dinoforge.kernels.types import Targets
from dinoforge.system import distributed


@dataclass(frozen=True)
class Parts:
    """The teacher's side of one loss.

    Args:
        embeddings: normalised bottlenecks [N, d] of each part; N may be 0.
        weight_g, weight_v: of the teacher's last layer [K, 1], [K, d].
        temp: the teacher's temperature.
        scratch, name: where the logits of one part at a time are, see ``teacher_logits``.
    """

    embeddings: list[Tensor]
    weight_g: Tensor
    weight_v: Tensor
    temp: float
    scratch: Scratch
    name: str

    def logits(self) -> Iterator[Tensor]:
        """Of each part over the temperature [K, N], one at a time."""
        return map(self._logits, self.embeddings)

    def targets(self, part: int, log_u: Tensor) -> Targets:
        """Targets of a part: ``softmax(logits + log_u)``.

        Args:
            part: its number.
            log_u: over prototypes [K]: minus the centre over the temperature, or what ``sinkhorn_knopp_scales`` gives.
        """
        return centering(self._logits(self.embeddings[part]), -log_u, 1.0)

    def _logits(self, z: Tensor) -> Tensor:
        return teacher_logits(z, self.weight_g, self.weight_v, self.temp, scratch=self.scratch, name=self.name)


@torch.no_grad()
def sinkhorn_knopp_scales(parts: Parts, iterations: int) -> Tensor:
    """Logarithms of the prototypes' scales u [K] that ``sinkhorn_knopp`` ends with, over the parts of all ranks.

    See there: the samples' scales are what makes each sample sum to one, so they follow from u. Each iteration takes
    the mass that the targets so far give each prototype, and divides u by it.
    """
    exact = torch.promote_types(parts.weight_v.dtype, torch.float32)
    mass = torch.stack([torch.logsumexp(logits.to(exact), dim=1) for logits in parts.logits()])
    log_u = -distributed.logsumexp_over_ranks(torch.logsumexp(mass, dim=0))
    for _ in range(iterations - 1):
        masses = torch.zeros_like(log_u)
        for part in range(len(parts.embeddings)):
            targets = parts.targets(part, log_u)
            masses += torch.mv(targets.scaled.to(exact), targets.per_sample) * targets.per_prototype
        log_u = log_u - distributed.sum_over_ranks(masses).log()
    return log_u
