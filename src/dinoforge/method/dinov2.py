"""DINOv2 (arXiv 2304.07193, section 4): a student learns to predict the outputs of its own moving average, the teacher.

Each step, the teacher sees two unmasked global crops of every image. The student sees the same crops with some patches
masked, and several smaller local crops. Three losses follow: DINO compares cls tokens of different crops of an image,
iBOT compares masked patches, and KoLeo spreads the features of a batch. The teacher then moves a little towards the
student.

This module is the definition. ``training/pieces.py`` computes a step in pieces, and ``kernels/ops.py`` computes it in
less memory; tests hold both to equality with this module.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dinoforge.data.batch import Batch
from dinoforge.kernels import ops
from dinoforge.method.dino import dino_terms
from dinoforge.method.ibot import ibot_term
from dinoforge.method.koleo import koleo_of_views
from dinoforge.method.targets import BatchTargets, TargetRule
from dinoforge.models.network import Network
from dinoforge.models.stochastic_depth import KeptSamples
from dinoforge.system.phases import phase


@dataclass(frozen=True)
class Losses:
    """The weighted loss terms and their sum, scalars; only ``total`` has a gradient."""

    dino_local: Tensor
    dino_global: Tensor
    ibot: Tensor
    koleo: Tensor
    total: Tensor


@dataclass(frozen=True)
class Objective:
    """The weights and constants of the losses; a term of weight 0 is not computed."""

    dino_global_weight: float = 1.0
    dino_local_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    dino_student_temp: float = 0.1
    ibot_student_temp: float = 0.1
    dino_targets: TargetRule = field(default_factory=TargetRule)
    ibot_targets: TargetRule = field(default_factory=TargetRule)
    koleo_scope: str = "rank"  # where KoLeo searches for neighbours; see koleo_of_views
    koleo_group_size: int | None = None

    @property
    def has_dino(self) -> bool:
        """Whether a DINO loss is on."""
        return self.dino_global_weight > 0 or self.dino_local_weight > 0

    @property
    def has_ibot(self) -> bool:
        """Whether the iBOT loss is on."""
        return self.ibot_weight > 0


class StudentTeacher(nn.Module):
    """The student, its teacher, and the losses between them.

    Args:
        student: The backbone and its heads; a head that no loss reads is left out. The teacher starts as a copy.
        objective: The weights and constants of the losses.
    """

    dino_center: Tensor | None
    ibot_center: Tensor | None

    def __init__(self, student: Network, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        self.workspace = ops.Scratch()
        of_cls = objective.dino_targets.first_center(student.cls_head) if objective.has_dino else None
        of_patches = objective.ibot_targets.first_center(student.patch_head) if objective.has_ibot else None
        self.register_buffer("dino_center", of_cls)
        self.register_buffer("ibot_center", of_patches)

    def forward(
        self,
        batch: Batch,
        *,
        teacher_temp: float,
        targets: BatchTargets | None = None,
        kept: Sequence[KeptSamples] | None = None,
        neighbours: Tensor | None = None,
        backbone_frozen: bool = False,
    ) -> Losses:
        """Compute the losses of normalised crops. With the defaults, this is the whole method.

        Args:
            batch: The crops, float32, on the networks' device; a piece of a batch only if ``targets`` are given.
            teacher_temp: The temperature of the teacher's targets.
            targets: The teacher's targets for the images of the batch; None: compute them.
            kept: Stochastic depth: the images that each residual branch of the student keeps, per block; None: all.
            neighbours: For KoLeo beyond this batch: the cls tokens of both views of all images [2, G, D]; None: gather
                them from the other ranks.
            backbone_frozen: Whether only the heads get gradients.
        """
        if targets is None:
            with phase("teacher"):
                targets = self.targets(batch, teacher_temp)
        return self.losses(batch, targets, kept, neighbours, backbone_frozen=backbone_frozen)

    @torch.no_grad()
    def targets(self, batch: Batch, temp: float) -> BatchTargets:
        """Compute the targets from the teacher's outputs for the unmasked global crops, and update the centres."""
        o, teacher, memory = self.objective, self.teacher, self.workspace
        if not (o.has_dino or o.has_ibot):
            return BatchTargets()
        cls, patches = self.teacher_tokens(batch)
        of_cls = of_patches = None
        if o.has_dino:
            of_cls = o.dino_targets.make(teacher.cls_head, cls, temp, self.dino_center, memory, "cls targets")
        if o.has_ibot:
            center = self.ibot_center
            of_patches = o.ibot_targets.make(teacher.patch_head, patches, temp, center, memory, "patch targets")
        return BatchTargets(of_cls, of_patches, features=(cls, patches))

    def teacher_tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the teacher's cls tokens [2B, D], and tokens of masked patches [M, D] if a loss reads them."""
        masked = batch.masked if self.objective.has_ibot else batch.masked[:0]
        cls, _, patches = self.teacher.backbone.encode_crops(batch.global_crops, masked=masked)
        return cls, patches

    def losses(
        self,
        batch: Batch,
        targets: BatchTargets,
        kept: Sequence[KeptSamples] | None = None,
        neighbours: Tensor | None = None,
        *,
        backbone_frozen: bool = False,
    ) -> Losses:
        """Compute the student's losses against given targets; for ``kept`` and ``neighbours``, see ``forward``.

        Every term is a sum over crops, and its weights do not depend on which crops the batch has. So the losses of
        the pieces of a batch add up to those of the batch, and so do the gradients.
        """
        o, share = self.objective, batch.share
        local_crops = batch.local_crops if o.dino_local_weight > 0 else batch.local_crops[:0]
        masked = batch.masked if o.has_ibot else batch.masked[:0]
        with phase("student"), torch.set_grad_enabled(torch.is_grad_enabled() and not backbone_frozen):
            global_cls, local_cls, patches = self.student.backbone.encode_crops(
                batch.global_crops, local_crops, batch.masks, masked, kept
            )  # [V·B, D], [L·B, D], [M, D]
        with phase("losses"):
            read = slice(None) if targets.cls is not None else slice(0, 0)
            cls, local, guesses = self.student.embed(global_cls[read], local_cls[read], patches)
            terms: dict[str, list[ops.Term]] = {"dino_local": [], "dino_global": [], "ibot": []}
            if targets.cls is not None:
                weights = o.dino_global_weight, o.dino_local_weight
                both = dino_terms(cls, local, targets.cls, share, o.dino_student_temp, *weights)
                terms["dino_global"], terms["dino_local"] = both
            if targets.patches is not None and share.views:
                term = ibot_term(guesses, targets.patches, batch.masks, share, o.ibot_student_temp, o.ibot_weight)
                terms["ibot"] = [term]
            each, total = self._cross_entropies(terms, targets, batch.global_crops.device)
            if o.koleo_weight > 0 and share.views:
                koleo = o.koleo_weight * koleo_of_views(
                    global_cls, share, neighbours, o.koleo_scope, o.koleo_group_size
                )
                each["koleo"], total = koleo.detach(), total + koleo
        return Losses(**each, total=total)

    def _cross_entropies(
        self, terms: dict[str, list[ops.Term]], targets: BatchTargets, device: torch.device
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Sum the terms of each loss, and all terms; the terms of one head are computed together."""
        total = torch.zeros((), device=device)
        each = dict.fromkeys((*terms, "koleo"), total)
        for name, head in self.student.heads.items():
            of_head = [(loss, term) for loss in self.student.losses_of(name) for term in terms[loss]]
            if of_head:
                summed, values = ops.cross_entropy(
                    [term for _, term in of_head],
                    *head.last_layer.parts(),
                    self.workspace,
                    targets.last_layers.get(name),
                )
                total = total + summed
                for (loss, _), value in zip(of_head, values, strict=True):
                    each[loss] = each[loss] + value
        return each, total

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Update every teacher parameter: ``teacher = momentum · teacher + (1 - momentum) · student``."""
        ops.move_towards(self.teacher.parameters(), self.student.parameters(), 1 - momentum)
