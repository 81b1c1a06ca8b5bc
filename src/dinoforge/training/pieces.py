"""A step in pieces: some crops of some images at a time, whose losses and gradients add up to those of the whole batch.

The activations of a piece are freed before the next piece is computed. Micro-batches (``train.accumulate``) and crops
in turn (``parallel.crops_in_turn``) are both pieces. A piece is a ``Batch`` that knows its share of the whole batch.
The teacher sees all images first, since targets are computed over the global batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dinoforge.data.batch import Batch
from dinoforge.health.numbers import Diagnostics
from dinoforge.kernels import ops
from dinoforge.method.dinov2 import Objective, StudentTeacher
from dinoforge.method.ibot import patch_weights
from dinoforge.method.targets import BatchTargets
from dinoforge.models.stochastic_depth import KeptSamples, draw_kept_samples
from dinoforge.system import distributed
from dinoforge.system.phases import phase

Kept = Sequence[KeptSamples]


@dataclass(frozen=True)
class Crops:
    """A selection of the crops of every image in a batch.

    Args:
        views: The selected global crops, out of 0 and 1, in order.
        local: The selected local crops, out of L.
    """

    views: tuple[int, ...]
    local: slice

    @property
    def local_number(self) -> int:
        """The number of selected local crops per image."""
        number: int = self.local.stop - self.local.start
        return number


@dataclass(frozen=True)
class Piece:
    """The input of one forward and backward pass of the student.

    Args:
        batch, targets, kept, neighbours: The arguments of ``StudentTeacher``.
        is_last: Whether the piece is the last one of the step.
        to_means: The factor of each loss that makes the losses of the first micro-batch's pieces add up to mean
            cross-entropies. Empty for pieces of other micro-batches, and in steps without diagnostics.
    """

    batch: Batch
    targets: BatchTargets
    kept: Kept | None
    neighbours: Tensor | None
    is_last: bool
    to_means: Mapping[str, Tensor]


def pieces(
    networks: StudentTeacher,
    batch: Batch,
    *,
    teacher_temp: float,
    kept: Sequence[Kept | None] = (None,),
    least_tokens: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]],
    diagnostics: Diagnostics | None = None,
) -> Iterator[Piece]:
    """Cut a batch into pieces, and compute the targets of each piece when the iterator reaches it.

    Args:
        networks: The student and the teacher.
        batch: The normalised crops of this rank.
        teacher_temp: The temperature of the teacher's targets.
        kept: Stochastic depth of each micro-batch. Its length is the number of micro-batches that the batch is cut
            into.
        least_tokens: The minimum number of tokens in a piece, if the student sees the crops of a micro-batch in turn;
            None: all crops at once.
        autocast: Makes the context of the forward pass.
        diagnostics: Filled with statistics of the teacher's features and targets for the first micro-batch.
    """
    micro_batches = batch.split(len(kept))
    neighbours: Tensor | None = None
    targets_of: Callable[[int], BatchTargets] | None = None
    if len(micro_batches) > 1:
        with autocast():
            targets_of = _targets_of_parts(networks, micro_batches, teacher_temp)
            neighbours = _neighbours(networks, micro_batches, kept)
    ways = _ways(networks, micro_batches[0], least_tokens)
    for number, (part, part_kept) in enumerate(zip(micro_batches, kept, strict=True)):
        with phase("teacher"), autocast():
            targets = networks.targets(part, teacher_temp) if targets_of is None else targets_of(number)
        to_means: Mapping[str, Tensor] = {}
        if diagnostics is not None and number == 0:
            _measure(diagnostics, targets, part)
            to_means = _to_means(networks.objective, part)
        targets = replace(targets, features=None, last_layers=_last_layers(networks, ways))
        for crops in ways:
            is_all = len(ways) == 1
            yield Piece(
                part if is_all else part.with_crops(crops.views, crops.local),
                targets,
                part_kept if is_all else _kept_of(part_kept, part, crops),
                neighbours,
                is_last=number + 1 == len(micro_batches) and crops is ways[-1],
                to_means=to_means,
            )


def crops_in_turn(
    networks: StudentTeacher, images: int, local: int, tokens: tuple[int, int], least: int | None
) -> list[Crops]:
    """Choose the crops that the student sees together, local crops first.

    The candidates are: the two halves of the local crops, then each global crop alone; all local crops, then each
    global crop alone; each global crop with half of the local crops. The candidate with the smallest largest piece
    wins. All crops are seen at once if every candidate has a piece with too few tokens. The same holds if the DINO head
    reads no global crops, since the last piece, a global one, hands on the gradient of the head's last layer.

    Args:
        networks: The student and the teacher.
        images: The number of images B.
        local: The number of local crops L that a loss reads.
        tokens: The numbers of tokens of a global and of a local crop.
        least: The minimum number of tokens in a piece; None: all crops at once.
    """

    def size(crops: Crops) -> int:
        return images * (len(crops.views) * tokens[0] + crops.local_number * tokens[1])

    o = networks.objective
    at_once = Crops((0, 1), slice(0, local))
    shares_head = o.has_ibot and networks.student.ibot_head is None
    if least is None or not (o.dino_global_weight > 0 or shares_head):
        return [at_once]
    middle = -(-local // 2)
    halves = [slice(0, middle), slice(middle, local)]
    every, none = slice(0, local), slice(local, local)
    alone = [Crops((0,), none), Crops((1,), none)]
    ways = [
        [Crops((), half) for half in halves if half.start < half.stop] + alone,
        [Crops((), every), *alone],
        [Crops((view,), half) for view, half in enumerate(halves)],
    ]
    # The largest piece takes the most memory; among equals, fewer pieces read the weights less often.
    fitting = [way for way in ways if min(map(size, way)) >= least]
    return min(fitting, key=lambda way: (max(map(size, way)), len(way)), default=[at_once])


def kept_samples(
    networks: StudentTeacher,
    batch: Batch,
    drop_path_rates: Sequence[float],
    *,
    seed: int,
    number: int,
    parts: int = 1,
    rank: int | None = None,
) -> list[list[KeptSamples] | None]:
    """Draw stochastic depth for each micro-batch, independently of earlier draws; None if all rates are 0.

    Args:
        networks: The student and the teacher.
        batch: The batch of one rank, on any device.
        drop_path_rates: The rate of each block of the student.
        seed: The seed of the run.
        number: The number of the batch; see ``TrainState.next_batch``.
        parts: The number of micro-batches that the batch is cut into.
        rank: The rank that the batch belongs to; None: this rank.
    """
    if not any(drop_path_rates):
        return [None] * parts
    # Seeded by the micro-batch's place in the global batch, so that two ranks draw as one rank with two micro-batches.
    first = parts * (distributed.rank() if rank is None else rank)
    sizes = [size // parts for size in crop_counts(networks.objective, batch)]
    mixed = [((seed * 1_000_003 + number) * 65_537 + first + part) % 2**63 for part in range(parts)]
    return [draw_kept_samples(drop_path_rates, sizes, torch.Generator().manual_seed(m)) for m in mixed]


def crop_counts(objective: Objective, batch: Batch) -> list[int]:
    """Count the global crops and, if a loss reads them, the local crops: the groups of stochastic depth."""
    has_local = objective.dino_local_weight > 0 and len(batch.local_crops) > 0
    return [len(batch.global_crops), len(batch.local_crops)] if has_local else [len(batch.global_crops)]


def _ways(networks: StudentTeacher, batch: Batch, least_tokens: int | None) -> list[Crops]:
    """Call ``crops_in_turn`` with the sizes of a batch."""
    images, tokens_of = len(batch.indices), networks.student.backbone.tokens_of
    local = sum(crop_counts(networks.objective, batch)[1:]) // images
    of_global = tokens_of(batch.global_crops.shape[-2:])
    of_local = tokens_of(batch.local_crops.shape[-2:]) if local else 0
    return crops_in_turn(networks, images, local, (of_global, of_local), least_tokens)


def _kept_of(kept: Kept | None, batch: Batch, crops: Crops) -> Kept | None:
    """Select from ``kept`` the entries of some crops of a batch."""
    if kept is None:
        return None
    images = len(batch.indices)
    groups: list[tuple[int, slice]] = []
    if crops.views:
        groups.append((0, slice(crops.views[0] * images, (crops.views[-1] + 1) * images)))
    if crops.local_number:
        groups.append((1, slice(crops.local.start * images, crops.local.stop * images)))
    return [block.of(groups) for block in kept]


def _last_layers(networks: StudentTeacher, ways: Sequence[Crops]) -> dict[str, ops.LastLayer]:
    """Make the state of the heads' last layers that the pieces of a micro-batch share."""
    if len(ways) == 1:
        return {}
    heads = networks.student.heads
    layers = {"dino_head": ops.LastLayer(len(ways))}
    if "ibot_head" in heads:
        layers["ibot_head"] = ops.LastLayer(sum(len(crops.views) > 0 for crops in ways))
        # Both weights are kept between pieces; the larger one takes the memory that the teacher's weight had.
        smaller = min(layers, key=lambda name: heads[name].last_layer.weight_v.numel())
        layers[smaller].name = "second weight"
    return layers


@torch.no_grad()
def _targets_of_parts(networks: StudentTeacher, parts: Sequence[Batch], temp: float) -> Callable[[int], BatchTargets]:
    """Compute ``StudentTeacher.targets`` of each micro-batch; they depend on the images of all micro-batches."""
    o, teacher, memory = networks.objective, networks.teacher, networks.workspace
    if not (o.has_dino or o.has_ibot):
        return lambda part: BatchTargets()
    features = [networks.teacher_tokens(part) for part in parts]
    of_cls = of_patches = None
    if o.has_dino:
        cls = [each for each, _ in features]
        of_cls = o.dino_targets.make_in_parts(teacher.cls_head, cls, temp, networks.dino_center, memory, "cls targets")
    if o.has_ibot:
        patches = [each for _, each in features]
        of_patches = o.ibot_targets.make_in_parts(
            teacher.patch_head, patches, temp, networks.ibot_center, memory, "patch targets"
        )
    first = features[0]

    def targets(part: int) -> BatchTargets:
        return BatchTargets(
            None if of_cls is None else of_cls(part),
            None if of_patches is None else of_patches(part),
            features=first if part == 0 else None,
        )

    return targets


@torch.no_grad()
def _neighbours(networks: StudentTeacher, parts: Sequence[Batch], kept: Sequence[Kept | None]) -> Tensor | None:
    """Compute the student's cls tokens of both views of the global batch [2, G, D], if KoLeo needs other micro-batches.

    This is a second forward pass of the student, without gradients.
    """
    if networks.objective.koleo_weight == 0 or networks.objective.koleo_scope == "rank":
        return None
    both = Crops((0, 1), slice(0, 0))
    seen = []
    for part, of_part in zip(parts, kept, strict=True):
        encode = networks.student.backbone.encode_crops
        cls, *_ = encode(part.global_crops, masks=part.masks, kept=_kept_of(of_part, part, both))
        seen.append(cls.float().chunk(2))
    return torch.stack([distributed.rows_of_all_ranks(torch.cat(view)) for view in zip(*seen, strict=True)])


def _measure(diagnostics: Diagnostics, targets: BatchTargets, batch: Batch) -> None:
    """Add statistics of the teacher's features and targets for a batch."""
    if targets.features is not None:
        diagnostics.add_features(*targets.features, batch.masks)
    if targets.cls is not None:
        diagnostics.add_targets("dino", targets.cls)
    if targets.patches is not None and len(batch.masked):
        weights = patch_weights(batch.masks, len(batch.masked), len(batch.masks))
        diagnostics.add_targets("ibot", targets.patches, weights)


def _to_means(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """Compute the factors that turn losses of a micro-batch into mean cross-entropies per pair or per masked patch."""
    share, local = batch.share, batch.share.local_crops
    parts = torch.tensor(share.images / len(batch.indices))
    factors = {}
    if objective.dino_global_weight > 0:
        factors["dino_global"] = parts * (1 + local) / objective.dino_global_weight
    if objective.dino_local_weight > 0 and local:
        factors["dino_local"] = parts * (1 + local) / (local * objective.dino_local_weight)
    if objective.ibot_weight > 0:
        masked_crops = (batch.masks.sum(dim=1) > 0).float().mean()  # crops without a mask count as zero in the loss
        factors["ibot"] = parts / (objective.ibot_weight * masked_crops)
    return factors
