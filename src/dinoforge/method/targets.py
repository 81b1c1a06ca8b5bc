"""Turn the teacher's outputs into targets, by centering or by Sinkhorn-Knopp."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinoforge.kernels import ops
from dinoforge.models.head import DINOHead
from dinoforge.system import distributed


@dataclass(frozen=True)
class BatchTargets:
    """The student's targets for the images of a batch; None where a loss is off.

    Args:
        cls: The targets for the cls tokens of the global crops [2B].
        patches: The targets for the masked patches of the global crops [M].
        features: The teacher's cls tokens [2B, D] and masked patches [M, D] that the targets were computed from.
        last_layers: The state of the last layers that the pieces of a batch share, by head.
    """

    cls: ops.Targets | None = None
    patches: ops.Targets | None = None
    features: tuple[Tensor, Tensor] | None = None
    last_layers: Mapping[str, ops.LastLayer] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetRule:
    """The rule by which the teacher's logits for one loss become targets.

    Args:
        kind: ``centering`` or ``sinkhorn_knopp``.
        center_momentum: The momentum of the running centre.
        center_by_count: Whether the centre is the mean over all samples instead of the mean of the ranks' means.
        iterations: The number of Sinkhorn-Knopp iterations.
    """

    kind: str = "centering"
    center_momentum: float = 0.9
    center_by_count: bool = False
    iterations: int = 3

    def first_center(self, head: DINOHead) -> Tensor | None:
        """Create the centre of step 0 [K]; None without centering."""
        return torch.zeros(len(head.last_layer.weight_g)) if self.kind == "centering" else None

    @torch.no_grad()
    def make(
        self, head: DINOHead, tokens: Tensor, temp: float, center: Tensor | None, scratch: ops.Scratch, name: str
    ) -> ops.Targets:
        """Compute the targets of tokens, and update the centre.

        Args:
            head: The teacher's head.
            tokens: All of this rank's tokens from the teacher [N, D].
            temp: The teacher's temperature.
            center: The running centre [K], updated in place; None for Sinkhorn-Knopp.
            scratch: The scratch memory that holds the targets.
            name: The name of the targets' block in ``scratch``.
        """
        layer = head.last_layer
        logits = ops.teacher_logits(head.embed(tokens), *layer.parts(), temp, scratch=scratch, name=name)
        if center is None:
            largest = ops.largest_logit(distributed.whole(layer.weight_g), temp)
            return ops.sinkhorn_knopp(logits, self.iterations, largest)
        moved = self.updated_center(center, [logits], temp)
        targets = ops.centering(logits, center, temp)
        center.copy_(moved)
        return targets

    @torch.no_grad()
    def make_in_parts(
        self,
        head: DINOHead,
        tokens: Sequence[Tensor],
        temp: float,
        center: Tensor | None,
        scratch: ops.Scratch,
        name: str,
    ) -> Callable[[int], ops.Targets]:
        """Compute the targets of a batch in parts; they equal the targets of the batch computed at once.

        Only the bottlenecks of each part are kept. The logits over all prototypes are recomputed, one part at a time.
        Both kinds of targets are a softmax of logits shifted by a vector over prototypes, and this vector is all that
        a part needs to know of the others.

        Args:
            head, temp, center, scratch, name: See ``make``.
            tokens: The teacher's tokens of each part [N, D]; N may be 0.

        Returns:
            A function from the number of a part to the part's targets.
        """
        embeddings, parts = [head.embed(each) for each in tokens], head.last_layer.parts()

        def logits(part: int) -> Tensor:
            return ops.teacher_logits(embeddings[part], *parts, temp, scratch=scratch, name=name)

        def every() -> Iterator[Tensor]:
            return map(logits, range(len(embeddings)))

        if center is None:
            shift = _sinkhorn_knopp_shift(every, parts[1].dtype, self.iterations)
        else:
            shift = -center / temp
            center.copy_(self.updated_center(center, every(), temp))
        return lambda part: ops.centering(logits(part), -shift, 1.0)

    @torch.no_grad()
    def updated_center(self, center: Tensor, logits: Iterable[Tensor], temp: float) -> Tensor:
        """Compute the running mean [K] with this step's ``logits``; see the function ``updated_center``."""
        return updated_center(center, logits, temp, self.center_momentum, by_count=self.center_by_count)


def _sinkhorn_knopp_shift(logits: Callable[[], Iterable[Tensor]], dtype: torch.dtype, iterations: int) -> Tensor:
    """Compute the logarithms of the final scales u [K] of Sinkhorn-Knopp's prototypes, over the parts of all ranks.

    See ``ops.sinkhorn_knopp``. The scales of the samples follow from u, since each sample sums to one. Each iteration
    computes the mass that the current targets give each prototype, and divides u by it.

    Args:
        logits: A function that recomputes the logits of each part [K, N], one part at a time.
        dtype: The precision of the last layer.
        iterations: The number of iterations.
    """
    exact = torch.promote_types(dtype, torch.float32)
    mass = torch.stack([torch.logsumexp(part.to(exact), dim=1) for part in logits()])
    shift = -distributed.logsumexp_over_ranks(torch.logsumexp(mass, dim=0))
    for _ in range(iterations - 1):
        masses = torch.zeros_like(shift)
        for part in logits():
            targets = ops.centering(part, -shift, 1.0)
            with torch.autocast(part.device.type, enabled=False):  # autocast would multiply in half precision
                masses += torch.mv(targets.scaled.to(exact), targets.per_sample) * targets.per_prototype
        shift = shift - distributed.sum_over_ranks(masses).log()
    return shift


@torch.no_grad()
def updated_center(
    center: Tensor, logits: Iterable[Tensor], temp: float, momentum: float, *, by_count: bool = False
) -> Tensor:
    """Compute the running mean [K] with this step's ``logits``.

    Args:
        center: The running mean before this step [K].
        logits: The logits over ``temp`` of each of this rank's micro-batches [K, N].
        temp: The teacher's temperature.
        momentum: The momentum of the running mean.
        by_count: Whether to average over all samples. Otherwise the means of the ranks and micro-batches are averaged,
            as in the reference. A micro-batch without samples then contributes the old centre, so that its mean is
            neither NaN nor 0.
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
