"""Targets: what the teacher's outputs become, by centering or by Sinkhorn-Knopp."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinoforge.kernels import ops
from dinoforge.models.head import DINOHead
from dinoforge.system import distributed


@dataclass(frozen=True)
class BatchTargets:
    """What the student is to predict of the images of a batch; None where a loss is off.

    Args:
        cls: Of the global crops' cls tokens [2B].
        patches: Of their masked patches [M].
        features: The teacher's cls tokens [2B, D] and masked patches [M, D], which targets were made of.
        last_layers: What the pieces of a batch share of the heads' last layers, by head.
    """

    cls: ops.Targets | None = None
    patches: ops.Targets | None = None
    features: tuple[Tensor, Tensor] | None = None
    last_layers: Mapping[str, ops.LastLayer] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetRule:
    """How the teacher's logits of one loss become targets.

    Args:
        kind: ``centering``, or ``sinkhorn_knopp``.
        center_momentum: The momentum of the running centre.
        center_by_count: Take the centre as the mean over all samples, not as the mean of ranks' means.
        iterations: The number of Sinkhorn-Knopp iterations.
    """

    kind: str = "centering"
    center_momentum: float = 0.9
    center_by_count: bool = False
    iterations: int = 3

    def first_center(self, head: DINOHead) -> Tensor | None:
        """The centre at step 0 [K]; None without centering."""
        return torch.zeros(len(head.last_layer.weight_g)) if self.kind == "centering" else None

    @torch.no_grad()
    def make(
        self, head: DINOHead, tokens: Tensor, temp: float, center: Tensor | None, scratch: ops.Scratch, name: str
    ) -> ops.Targets:
        """Make the targets of tokens, and move the centre.

        Args:
            head: The teacher's.
            tokens: The teacher's [N, D]: all of this rank's.
            temp: The teacher's temperature.
            center: The running centre [K], moved in place; None for Sinkhorn-Knopp.
            scratch, name: The memory that the targets take.
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
        """Make the targets of a batch that is seen in parts; they are those of the batch seen at once.

        What is kept of each part are the bottlenecks, not the logits of all prototypes: these are made again for one
        part at a time. Both kinds of targets are a softmax of logits shifted by a vector over prototypes, and that
        vector is all that has to be known of the other parts.

        Args:
            head, temp, center, scratch, name: As for ``make``.
            tokens: The teacher's of each part [N, D]; N may be 0.

        Returns:
            A function that makes the targets of the part of a number.
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
        """The running mean [K] with this step's ``logits`` in it; see ``updated_center``."""
        return updated_center(center, logits, temp, self.center_momentum, by_count=self.center_by_count)


def _sinkhorn_knopp_shift(logits: Callable[[], Iterable[Tensor]], dtype: torch.dtype, iterations: int) -> Tensor:
    """The logarithms of the prototypes' scales u [K] that Sinkhorn-Knopp ends with, over the parts of all ranks.

    See ``ops.sinkhorn_knopp``: the samples' scales are what makes each sample sum to one, so they follow from u. Each
    iteration takes the mass that the targets so far give each prototype, and divides u by it.

    Args:
        logits: Makes the logits of each part anew [K, N], one at a time.
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
            with torch.autocast(part.device.type, enabled=False):  # which would multiply in half precision
                masses += torch.mv(targets.scaled.to(exact), targets.per_sample) * targets.per_prototype
        shift = shift - distributed.sum_over_ranks(masses).log()
    return shift


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
