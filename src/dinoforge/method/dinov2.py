"""The two networks, the losses between them, and the moving average: batch to named losses."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from dinoforge.data.batch import Batch
from dinoforge.health.numbers import Diagnostics
from dinoforge.kernels.ops import (
    LastLayer,
    Scratch,
    centering,
    cross_entropy,
    largest_logit,
    sinkhorn_knopp,
    teacher_logits,
)
from dinoforge.kernels.types import Targets, Term
from dinoforge.method.dino import dino_terms
from dinoforge.method.ibot import ibot_term, patch_weights
from dinoforge.method.koleo import koleo_loss, koleo_loss_among
from dinoforge.method.parts import Parts, sinkhorn_knopp_scales
from dinoforge.method.targets import updated_center
from dinoforge.models.head import DINOHead
from dinoforge.models.stochastic_depth import KeptSamples
from dinoforge.models.vit import VisionTransformer
from dinoforge.system import distributed
from dinoforge.system.phases import phase


@dataclass(frozen=True)
class Losses:
    """The terms as they enter the optimised sum, already weighted, and the sum, which alone has a gradient; scalars."""

    dino_local: Tensor
    dino_global: Tensor
    ibot: Tensor
    koleo: Tensor
    total: Tensor


@dataclass(frozen=True)
class Objective:
    """Weights and constants of the losses; a term of weight 0 is not computed."""

    dino_global_weight: float = 1.0
    dino_local_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    dino_targets: str = "centering"  # or sinkhorn_knopp
    ibot_targets: str = "centering"
    dino_student_temp: float = 0.1
    ibot_student_temp: float = 0.1
    dino_center_momentum: float = 0.9
    ibot_center_momentum: float = 0.9
    sinkhorn_iterations: int = 3
    ibot_center_by_count: bool = False  # whether its centre is the mean over patches, or over ranks' means
    koleo_scope: str = "rank"  # where neighbours are sought: also global, or groups of consecutive images
    koleo_group_size: int | None = None

    @property
    def has_dino(self) -> bool:
        return self.dino_global_weight > 0 or self.dino_local_weight > 0

    @property
    def has_ibot(self) -> bool:
        return self.ibot_weight > 0


TargetsOfBoth = tuple[Targets | None, Targets | None]
"""Of the cls tokens [2B] and of the masked patches [M]; None where the loss is off."""


@dataclass(frozen=True)
class OtherParts:
    """What a micro-batch has to know of the others of its step.

    targets: makes its own targets, which depend on all.
    cls: the student's cls tokens of both views of the global batch [2, G, D]; None where KoLeo stays inside.
    first: place of its first image among the G.
    """

    targets: Callable[[], TargetsOfBoth]
    cls: Tensor | None
    first: int


@dataclass(frozen=True)
class Crops:
    """Some of the crops of all images of a batch.

    views: which of the two global ones, in order.
    local: which of the L local ones.
    """

    views: tuple[int, ...]
    local: slice

    @property
    def local_number(self) -> int:
        number: int = self.local.stop - self.local.start
        return number

    def rows(self, images: int) -> tuple[slice, slice]:
        """Their places among the global crops [2B] and the local ones [L·B] of B images, crop-major."""
        first, last = (self.views[0], self.views[-1] + 1) if self.views else (0, 0)
        return slice(first * images, last * images), slice(self.local.start * images, self.local.stop * images)


@dataclass(frozen=True)
class Turn:
    """What the student has one forward and backward pass for.

    crops: that it sees.
    patches: which of the masked ones [M] are theirs and have a loss.
    targets: of all crops.
    last_layers: of its heads, by name, which all turns of a batch read.
    """

    crops: Crops
    patches: slice
    targets: TargetsOfBoth
    last_layers: Mapping[str, LastLayer]


class StudentTeacher(nn.Module):
    """Student, teacher and the losses between them (DINOv2, arXiv 2304.07193, section 4).

    Args:
        backbone: of the student.
        heads: of the student: ``dino_head`` and, where the patch loss has its own, ``ibot_head``; a head that no
            loss reads is left out.
        objective: weights and constants of the losses.

    The teacher starts as a copy of the student and is only moved by ``update_teacher``.
    """

    dino_center: Tensor
    ibot_center: Tensor

    def __init__(self, backbone: VisionTransformer, heads: Mapping[str, DINOHead], objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self._scratch = Scratch()
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if objective.has_dino and objective.dino_targets == "centering":
            self.register_buffer("dino_center", torch.zeros(_prototypes(self.student, "dino_head")))
        if objective.has_ibot and objective.ibot_targets == "centering":
            self.register_buffer("ibot_center", torch.zeros(_prototypes(self.student, self.ibot_head_name)))

    @property
    def ibot_head_name(self) -> str:
        return "ibot_head" if "ibot_head" in self.student else "dino_head"

    def crops_in_turn(self, images: int, local: int, tokens: tuple[int, int], least: int | None) -> list[Crops]:
        """The crops that the student sees together, the local ones first.

        They are the local ones, or half of them, and each global one by itself, or each global one with half of the
        local ones: whichever makes the largest turn smallest. All are seen at once if these have too few tokens, or if
        the DINO head reads no global ones, since the last turn gives its last layer the gradient of all.

        Args:
            images: B.
            local: L, the number of local crops that a loss reads.
            tokens: of a global and of a local crop.
            least: tokens of a turn; None: all crops at once.
        """

        def size(crops: Crops) -> int:
            return images * (len(crops.views) * tokens[0] + crops.local_number * tokens[1])

        o = self.objective
        if least is None or not (o.dino_global_weight > 0 or (o.has_ibot and self.ibot_head_name == "dino_head")):
            return [Crops((0, 1), slice(0, local))]
        middle = -(-local // 2)
        halves = [slice(0, middle), slice(middle, local)]
        every, none = slice(0, local), slice(local, local)
        alone = [Crops((0,), none), Crops((1,), none)]
        ways = [
            [Crops((), half) for half in halves if half.start < half.stop] + alone,
            [Crops((), every), *alone],
            [Crops((view,), half) for view, half in enumerate(halves)],
        ]
        # The largest turn takes the most memory; of equals, the fewest visits to the weights.
        fitting = [way for way in ways if min(map(size, way)) >= least]
        return min(fitting, key=lambda way: (max(map(size, way)), len(way)), default=[Crops((0, 1), every)])

    def forward(
        self,
        batch: Batch,
        *,
        teacher_temp: float,
        kept: Sequence[KeptSamples] | None = None,
        others: OtherParts | None = None,
        diagnostics: Diagnostics | None = None,
        backbone_frozen: bool = False,
        turn: Turn | None = None,
    ) -> Losses:
        """The losses of a batch of normalised crops.

        Args:
            batch: crops float32 on the networks' device; see ``Batch`` for the order of crops.
            teacher_temp: temperature of the teacher's targets.
            kept: stochastic depth of the student: per block, the images that each branch keeps.
            others: what ``look_at_parts`` gave, if the batch is one of several micro-batches of a step.
            diagnostics: filled with what the step says about its health; takes time, changes nothing.
            backbone_frozen: whether only the heads get a gradient; the student's backbone then takes no memory for one.
            turn: one of ``turns``, whose losses add up to those of the batch; so do the gradients, when all turns had
                their backward pass. None: all crops at once.
        """
        if turn is None:
            (turn,) = self.turns(batch, teacher_temp=teacher_temp, least=None, others=others, diagnostics=diagnostics)
        with phase("student"), torch.set_grad_enabled(torch.is_grad_enabled() and not backbone_frozen):
            tokens = self._student_tokens(batch, kept, turn)
        with phase("losses"):
            losses = self._losses(batch, tokens, others, turn)
        if diagnostics is not None:
            diagnostics.add_cross_entropies(self._cross_entropies(losses, batch))
        return losses

    def turns(
        self,
        batch: Batch,
        *,
        teacher_temp: float,
        least: int | None,
        others: OtherParts | None = None,
        diagnostics: Diagnostics | None = None,
    ) -> list[Turn]:
        """What ``forward`` is called with, one after the other, to see some crops at a time.

        The activations of one turn are gone when those of the next come.

        Args:
            batch, teacher_temp, others, diagnostics: as for ``forward``.
            least: tokens of a turn, see ``crops_in_turn``.
        """
        images = len(batch.global_crops) // 2
        every = self.student_crops(batch)
        local = len(every[1]) // images if len(every) > 1 else 0
        backbone = cast(VisionTransformer, self.student["backbone"])
        tokens = [backbone.tokens_of(crops.shape[-2:]) for crops in every]
        turns = self.crops_in_turn(images, local, (tokens[0], tokens[-1]), least)
        targets = self._targets(batch, teacher_temp, others, diagnostics)
        layers = {"dino_head": LastLayer(len(turns))}
        if "ibot_head" in self.student:
            layers["ibot_head"] = LastLayer(sum(len(crops.views) > 0 for crops in turns))
            if len(turns) > 1:
                # Between turns both weights are kept, the larger one where the teacher's was.
                smaller = min(layers, key=lambda name: cast(DINOHead, self.student[name]).last_layer.weight_v.numel())
                layers[smaller].name = "second weight"
        return [Turn(crops, self._patches(batch, crops), targets, layers) for crops in turns]

    def _student_tokens(
        self, batch: Batch, kept: Sequence[KeptSamples] | None, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The cls tokens of global [V·B, D] and local crops [l·B, D], and their masked patches [m, D]."""
        of_globals, of_locals = turn.crops.rows(len(batch.global_crops) // 2)
        groups: list[tuple[int, slice]] = []
        masks: list[Tensor | None] = []
        wanted: list[Tensor | None] = []
        if turn.crops.views:
            first = of_globals.start * batch.masks.shape[1]
            groups.append((0, of_globals))
            masks.append(batch.masks[of_globals])  # also without the iBOT loss, as in the reference
            wanted.append(batch.masked[turn.patches] - first)
        if of_locals.start < of_locals.stop:
            groups.append((1, of_locals))
            masks.append(None)
            wanted.append(None)
        every = self.student_crops(batch)
        if kept is not None and groups != [(group, slice(0, len(crops))) for group, crops in enumerate(every)]:
            kept = [block.of(groups) for block in kept]
        backbone = cast(VisionTransformer, self.student["backbone"])
        tokens = backbone.encode_some([every[group][rows] for group, rows in groups], masks, wanted, kept)
        none = tokens[0][0][:0]
        cls = {group: cls for (group, _), (cls, _) in zip(groups, tokens, strict=True)}
        return cls.get(0, none), cls.get(1, none), tokens[0][1]

    def _patches(self, batch: Batch, crops: Crops) -> slice:
        """Which of the masked patches [M] of a batch are those of its crops and have a loss."""
        if not self.objective.has_ibot:
            return slice(0, 0)
        rows, _ = crops.rows(len(batch.global_crops) // 2)
        bounds = torch.tensor([rows.start, rows.stop]) * batch.masks.shape[1]
        first, last = torch.searchsorted(batch.masked, bounds).tolist()
        return slice(first, last)

    def _losses(
        self, batch: Batch, tokens: tuple[Tensor, Tensor, Tensor], others: OtherParts | None, turn: Turn
    ) -> Losses:
        """Losses of what ``_student_tokens`` gave."""
        o = self.objective
        global_cls, local_cls, patches = tokens
        dino_targets, ibot_targets = turn.targets
        views = turn.crops.views
        terms: list[tuple[str, str, Term]] = []  # loss, head
        cls = [global_cls, local_cls] if dino_targets is not None else []
        masked = [patches] if ibot_targets is not None and views else []
        if self.ibot_head_name == "dino_head":
            embedded = self._embed("dino_head", cls + masked)
        else:
            embedded = self._embed("dino_head", cls) + self._embed(self.ibot_head_name, masked)
        if dino_targets is not None:
            of_globals, of_locals = dino_terms(
                embedded[0],
                embedded[1],
                dino_targets,
                local_crops_number=len(batch.local_crops) * 2 // len(batch.global_crops),
                student_temp=o.dino_student_temp,
                views=views,
                global_weight=o.dino_global_weight,
                local_weight=o.dino_local_weight,
            )
            terms += [("dino_global", "dino_head", term) for term in of_globals]
            terms += [("dino_local", "dino_head", term) for term in of_locals]
        if ibot_targets is not None and views:
            term = ibot_term(embedded[-1], ibot_targets, batch.masks, o.ibot_student_temp, o.ibot_weight, turn.patches)
            terms.append(("ibot", self.ibot_head_name, term))

        zero = torch.zeros((), device=batch.global_crops.device)
        each = dict.fromkeys(("dino_local", "dino_global", "ibot", "koleo"), zero)
        total = zero
        for name, network in self.student.items():
            own = [(loss, term) for loss, head_name, term in terms if head_name == name]
            if own:
                last = cast(DINOHead, network).last_layer.parts()
                summed, values = cross_entropy([term for _, term in own], *last, self._scratch, turn.last_layers[name])
                total = total + summed
                for (loss, _), value in zip(own, values, strict=True):
                    each[loss] = each[loss] + value
        if o.koleo_weight > 0 and views:
            # Each view by itself: two views of one image should be close, not apart.
            koleo = o.koleo_weight * sum(self._koleo(global_cls, views, others), zero)
            each["koleo"] = koleo.detach()
            total = total + koleo
        return Losses(**each, total=total)

    def _embed(self, head_name: str, tokens: list[Tensor]) -> list[Tensor]:
        """Bottlenecks of the student's tokens, by one pass through the head: one gradient of its weights, not two."""
        if not tokens:
            return []
        head = cast(DINOHead, self.student[head_name])
        return list(head.embed(torch.cat(tokens)).split([len(t) for t in tokens]))

    def _koleo(self, cls: Tensor, views: tuple[int, ...], others: OtherParts | None) -> list[Tensor]:
        """KoLeo of each of the global crops ``views``, given their cls tokens [V·B, D]."""
        each = cls.chunk(len(views))
        if self.objective.koleo_scope == "rank":
            return [koleo_loss(own) for own in each]
        if others is None or others.cls is None:
            first = distributed.rank() * len(each[0])
            everyone = [distributed.rows_of_all_ranks(own.float()) for own in each]
        else:
            first, everyone = others.first, [others.cls[view] for view in views]
        size = self.objective.koleo_group_size if self.objective.koleo_scope == "groups" else None
        return [koleo_loss_among(own, rows, first, size) for own, rows in zip(each, everyone, strict=True)]

    def student_crops(self, batch: Batch) -> list[Tensor]:
        """The groups of crops that the student reads: local ones only if a loss does."""
        has_local = self.objective.dino_local_weight > 0 and len(batch.local_crops) > 0
        return [batch.global_crops, batch.local_crops] if has_local else [batch.global_crops]

    def _targets(
        self, batch: Batch, temp: float, others: OtherParts | None, diagnostics: Diagnostics | None
    ) -> TargetsOfBoth:
        with phase("teacher"):
            dino, ibot = self._own_targets(batch, temp, diagnostics) if others is None else others.targets()
            if diagnostics is not None and dino is not None:
                diagnostics.add_targets("dino", dino)
            if diagnostics is not None and ibot is not None and len(batch.masked):
                diagnostics.add_targets("ibot", ibot, patch_weights(batch.masks, len(batch.masked)))
        return dino, ibot

    @torch.no_grad()
    def _own_targets(self, batch: Batch, temp: float, diagnostics: Diagnostics | None) -> TargetsOfBoth:
        o = self.objective
        if not (o.has_dino or o.has_ibot):
            return None, None
        cls, patches = self._teacher_tokens(batch)
        if diagnostics is not None:
            diagnostics.add_features(cls, patches, batch.masks)
        dino: Targets | None = None
        ibot: Targets | None = None
        if o.has_dino:
            logits = self._teacher_logits("dino_head", cls, temp, "cls targets")
            if o.dino_targets == "centering":
                center = updated_center(self.dino_center, [logits], temp, o.dino_center_momentum)
                dino = centering(logits, self.dino_center, temp)
                self.dino_center.copy_(center)
            else:
                dino = sinkhorn_knopp(logits, o.sinkhorn_iterations, self._largest_logit("dino_head", temp))
        if o.has_ibot:
            logits = self._teacher_logits(self.ibot_head_name, patches, temp, "patch targets")
            if o.ibot_targets == "centering":
                center = updated_center(
                    self.ibot_center, [logits], temp, o.ibot_center_momentum, by_count=o.ibot_center_by_count
                )
                ibot = centering(logits, self.ibot_center, temp)
                self.ibot_center.copy_(center)
            else:
                largest = self._largest_logit(self.ibot_head_name, temp)
                ibot = sinkhorn_knopp(logits, o.sinkhorn_iterations, largest)
        return dino, ibot

    @torch.no_grad()
    def _cross_entropies(self, losses: Losses, batch: Batch) -> dict[str, Tensor]:
        """The mean cross-entropy of a pair of views or of a masked patch, in each term; of a turn, its part."""
        o = self.objective
        local = 0 if not len(batch.local_crops) else len(batch.local_crops) * 2 // len(batch.global_crops)
        means = {}
        if o.dino_global_weight > 0:
            means["dino_global"] = losses.dino_global * (1 + local) / o.dino_global_weight
        if o.dino_local_weight > 0 and local:
            means["dino_local"] = losses.dino_local * (1 + local) / (local * o.dino_local_weight)
        if o.ibot_weight > 0:
            masked_crops = (batch.masks.sum(dim=1) > 0).float().mean()  # the others count as zero
            means["ibot"] = losses.ibot / (o.ibot_weight * masked_crops)
        return {name: mean.detach() for name, mean in means.items()}

    def _teacher_tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's cls tokens [2B, D] and, if a loss reads them, masked patches [M, D]."""
        masked = batch.masked if self.objective.has_ibot else batch.masked[:0]
        backbone = cast(VisionTransformer, self.teacher["backbone"])
        ((cls, patches),) = backbone.encode_some([batch.global_crops], [None], [masked])
        return cls, patches

    @torch.no_grad()
    def look_at_parts(
        self,
        batches: Sequence[Batch],
        kept: Sequence[Sequence[KeptSamples] | None],
        *,
        teacher_temp: float,
        diagnostics: Diagnostics | None = None,
    ) -> list[OtherParts]:
        """What each of this rank's micro-batches of a step has to know of the others: a look at all of them.

        The teacher sees them all first, since targets are made over the global batch. So does the student, a second
        time and without gradients, if KoLeo looks beyond a micro-batch.

        Args:
            batches: equally many images each; together, this rank's part of the global batch.
            kept, teacher_temp: as for ``forward``.
            diagnostics: filled with what the features of the first micro-batch say.
        """
        o = self.objective
        tokens = [self._teacher_tokens(batch) for batch in batches] if o.has_dino or o.has_ibot else []
        if diagnostics is not None and tokens:
            diagnostics.add_features(*tokens[0], batches[0].masks)
        dino: Parts | None = None
        ibot: Parts | None = None
        if o.has_dino:
            of_cls = [cls for cls, _ in tokens]
            dino = self._parts("dino_head", of_cls, teacher_temp, "cls targets")
            dino_scales = self._scales(dino, o.dino_targets, "dino_center", o.dino_center_momentum, by_count=False)
        if o.has_ibot:
            of_patches = [patches for _, patches in tokens]
            ibot = self._parts(self.ibot_head_name, of_patches, teacher_temp, "patch targets")
            ibot_scales = self._scales(
                ibot, o.ibot_targets, "ibot_center", o.ibot_center_momentum, by_count=o.ibot_center_by_count
            )
        cls = None
        if o.koleo_weight > 0 and o.koleo_scope != "rank":
            seen = [self._global_cls(*each) for each in zip(batches, kept, strict=True)]
            views = zip(*(each.float().chunk(2) for each in seen), strict=True)
            cls = torch.stack([distributed.rows_of_all_ranks(torch.cat(view)) for view in views])

        def targets_of(part: int) -> TargetsOfBoth:
            own = None if dino is None else dino.targets(part, dino_scales)
            return own, None if ibot is None else ibot.targets(part, ibot_scales)

        first, images = distributed.rank() * len(batches), len(batches[0].indices)
        return [OtherParts(partial(targets_of, i), cls, (first + i) * images) for i in range(len(batches))]

    def _global_cls(self, batch: Batch, kept: Sequence[KeptSamples] | None) -> Tensor:
        """The student's cls tokens of the global crops [2B, D]."""
        backbone = cast(VisionTransformer, self.student["backbone"])
        of_globals = None if kept is None else [block.of([(0, slice(0, len(batch.masks)))]) for block in kept]
        ((cls, _),) = backbone.encode_some([batch.global_crops], [batch.masks], [None], of_globals)
        return cls

    def _parts(self, head_name: str, tokens: list[Tensor], temp: float, name: str) -> Parts:
        head = cast(DINOHead, self.teacher[head_name])
        return Parts([head.embed(each) for each in tokens], *head.last_layer.parts(), temp, self._scratch, name)

    def _scales(self, parts: Parts, kind: str, center_name: str, momentum: float, *, by_count: bool) -> Tensor:
        """What the logits are shifted by [K]; moves the centre, if there is one."""
        if kind != "centering":
            return sinkhorn_knopp_scales(parts, self.objective.sinkhorn_iterations)
        center = self.get_buffer(center_name)
        before = center.clone()
        center.copy_(updated_center(center, parts.logits(), parts.temp, momentum, by_count=by_count))
        return -before / parts.temp

    def _teacher_logits(self, head_name: str, tokens: Tensor, temp: float, name: str) -> Tensor:
        head = cast(DINOHead, self.teacher[head_name])
        return teacher_logits(head.embed(tokens), *head.last_layer.parts(), temp, scratch=self._scratch, name=name)

    def _largest_logit(self, head_name: str, temp: float) -> float | None:
        weight_g = distributed.whole(cast(DINOHead, self.teacher[head_name]).last_layer.weight_g)
        return largest_logit(weight_g, temp)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """``teacher = momentum · teacher + (1 - momentum) · student``, for every parameter."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(distributed.shards(teacher), distributed.shards(student), 1 - momentum)

    @torch.no_grad()
    def cancel_last_layer_gradients(self) -> None:
        """Drops the gradients of the heads' last layers, so that the optimizer passes over them."""
        for name, parameter in self.student.named_parameters():
            if ".last_layer." in name:
                parameter.grad = None


def _prototypes(networks: nn.ModuleDict, head: str) -> int:
    return len(cast(DINOHead, networks[head]).last_layer.weight_g)
