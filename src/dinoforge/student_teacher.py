"""The two networks, the losses between them, and the moving average: batch to named losses."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dinoforge.data.batch import Batch
from dinoforge.losses.dino import dino_loss
from dinoforge.losses.ibot import ibot_loss
from dinoforge.losses.koleo import koleo_loss
from dinoforge.losses.targets import Targets, centering, sinkhorn_knopp, updated_center
from dinoforge.models.head import DINOHead
from dinoforge.models.vit import KeptSamples, VisionTransformer


@dataclass(frozen=True)
class Losses:
    """The terms as they enter the optimised sum, already weighted, and the sum; scalars."""

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

    @property
    def has_dino(self) -> bool:
        return self.dino_global_weight > 0 or self.dino_local_weight > 0

    @property
    def has_ibot(self) -> bool:
        return self.ibot_weight > 0


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
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if objective.has_dino and objective.dino_targets == "centering":
            self.register_buffer("dino_center", torch.zeros(_prototypes(self.student, "dino_head")))
        if objective.has_ibot and objective.ibot_targets == "centering":
            self.register_buffer("ibot_center", torch.zeros(_prototypes(self.student, self.ibot_head_name)))

    @property
    def ibot_head_name(self) -> str:
        return "ibot_head" if "ibot_head" in self.student else "dino_head"

    def forward(self, batch: Batch, *, teacher_temp: float, kept: Sequence[KeptSamples] | None = None) -> Losses:
        """The losses of a batch of normalised crops.

        Args:
            batch: crops float32 on the networks' device; see ``Batch`` for the order of crops.
            teacher_temp: temperature of the teacher's targets.
            kept: stochastic depth of the student: per block, the images that each branch keeps.
        """
        o = self.objective
        dino_targets, ibot_targets = self._targets(batch, teacher_temp)

        crops = self.student_crops(batch)
        masks: list[Tensor | None] = [batch.masks, None]  # also without the iBOT loss, as in the reference
        student = cast(VisionTransformer, self.student["backbone"]).encode(crops, masks[: len(crops)], kept)
        student_global = student[0]
        student_local_cls = student[1].cls if len(student) > 1 else student_global.cls[:0]
        heads = {name: cast(DINOHead, network) for name, network in self.student.items() if name != "backbone"}
        prototypes = {name: head.last_layer.weight() for name, head in heads.items()}

        zero = torch.zeros((), device=batch.global_crops.device)
        dino_global = dino_local = ibot = koleo = zero
        if dino_targets is not None:
            dino_global, dino_local = dino_loss(
                heads["dino_head"].embed(student_global.cls),
                heads["dino_head"].embed(student_local_cls),
                prototypes["dino_head"],
                dino_targets,
                local_crops_number=len(batch.local_crops) * 2 // len(batch.global_crops),
                student_temp=o.dino_student_temp,
            )
            dino_global, dino_local = o.dino_global_weight * dino_global, o.dino_local_weight * dino_local
        if ibot_targets is not None:
            patches = student_global.patches.flatten(0, 1)[batch.masked]  # [M, D]
            ibot = o.ibot_weight * ibot_loss(
                heads[self.ibot_head_name].embed(patches),
                prototypes[self.ibot_head_name],
                ibot_targets,
                batch.masks,
                o.ibot_student_temp,
            )
        if o.koleo_weight > 0:
            # Each view by itself: two views of one image should be close, not apart.
            koleo = o.koleo_weight * sum((koleo_loss(view) for view in student_global.cls.chunk(2)), zero)
        return Losses(dino_local, dino_global, ibot, koleo, total=dino_local + dino_global + ibot + koleo)

    def student_crops(self, batch: Batch) -> list[Tensor]:
        """The groups of crops that the student reads: local ones only if a loss does."""
        has_local = self.objective.dino_local_weight > 0 and len(batch.local_crops) > 0
        return [batch.global_crops, batch.local_crops] if has_local else [batch.global_crops]

    @torch.no_grad()
    def _targets(self, batch: Batch, temp: float) -> tuple[Targets | None, Targets | None]:
        """Targets of the cls tokens [2B] and of the masked patches [M]; None where the loss is off."""
        o = self.objective
        if not (o.has_dino or o.has_ibot):
            return None, None
        tokens = cast(VisionTransformer, self.teacher["backbone"])(batch.global_crops)
        dino: Targets | None = None
        ibot: Targets | None = None
        if o.has_dino:
            logits = self.teacher["dino_head"](tokens.cls)
            if o.dino_targets == "centering":
                dino = centering(logits, temp, self.dino_center)
                self.dino_center.copy_(updated_center(self.dino_center, logits, o.dino_center_momentum))
            else:
                dino = sinkhorn_knopp(logits, temp, o.sinkhorn_iterations)
        if o.has_ibot:
            logits = self.teacher[self.ibot_head_name](tokens.patches.flatten(0, 1)[batch.masked])
            if o.ibot_targets == "centering":
                ibot = centering(logits, temp, self.ibot_center)
                self.ibot_center.copy_(updated_center(self.ibot_center, logits, o.ibot_center_momentum))
            else:
                ibot = sinkhorn_knopp(logits, temp, o.sinkhorn_iterations)
        return dino, ibot

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """``teacher = momentum · teacher + (1 - momentum) · student``, for every parameter."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, student, alpha=1 - momentum)

    @torch.no_grad()
    def cancel_last_layer_gradients(self) -> None:
        """Drops the gradients of the heads' last layers, so that the optimizer passes over them."""
        for name, parameter in self.student.named_parameters():
            if ".last_layer." in name:
                parameter.grad = None


def _prototypes(networks: nn.ModuleDict, head: str) -> int:
    return len(cast(DINOHead, networks[head]).last_layer.weight_g)
