"""One optimizer step."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinoforge.data.batch import Batch
from dinoforge.health.numbers import Diagnostics
from dinoforge.method.dinov2 import Losses, StudentTeacher
from dinoforge.models.stochastic_depth import KeptSamples
from dinoforge.optim.clipping import clip_gradients
from dinoforge.optim.movement import sampled, update_ratios
from dinoforge.optim.param_groups import set_hyperparameters
from dinoforge.optim.schedules import Hyperparameters
from dinoforge.system import distributed
from dinoforge.system.phases import phase
from dinoforge.training.parallel import Parallel
from dinoforge.training.pieces import Piece, pieces


@dataclass(frozen=True)
class StepResult:
    """What a step gave: the losses and, per sub-network, the gradient norm before clipping; still on the device."""

    losses: Losses
    grad_norms: dict[str, Tensor]  # empty after an overflow
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # of a step that was measured
    overflowed: bool = False  # gradients were too large for float16, and nothing was updated but the loss scale

    def values(self) -> dict[str, float]:
        """All of it as numbers, diagnostics where they are finite; waits for the device."""
        terms = vars(self.losses) | {f"grad_norm.{name}": norm for name, norm in self.grad_norms.items()}
        every = terms | self.diagnostics
        numbers = torch.stack([t.detach().float() for t in every.values()]).tolist()
        named = dict(zip(every, numbers, strict=True))
        return {name: value for name, value in named.items() if name in terms or math.isfinite(value)}


class NonFiniteError(Exception):
    """A loss or gradient that is not finite; nothing was updated."""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__("loss or gradient is not finite")
        self.values = values


def train_step(
    student_teacher: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    hyper: Hyperparameters,
    *,
    clip_grad: float,
    kept: Sequence[Sequence[KeptSamples] | None] = (None,),
    autocast: AbstractContextManager[None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    measure: bool = False,
    parallel: Parallel | None = None,
    turn_tokens: int | None = None,
) -> StepResult:
    """Forward, backward, clipping, AdamW, moving average.

    Args:
        batch: normalised crops on the networks' device: this rank's part of the global batch.
        hyper: what the schedules say for this step.
        clip_grad: largest gradient norm of each sub-network; 0 for none.
        kept: stochastic depth of each micro-batch, see ``StudentTeacher``; as many as there are here, the batch is cut
            into.
        autocast: precision of the forward pass; entered more than once.
        scaler: loss scaling for float16. A step whose gradients overflow halves the scale and updates nothing else;
            that is no error until the scale is 1.
        measure: whether the result has diagnostics: those of this rank's first micro-batch and of its part of the
            weights; the weights are the same either way.
        parallel: how the networks are laid over ranks; None for one process.
        turn_tokens: let the student see some of the crops at a time, with so many tokens at least, and have several
            forward and backward passes, which take less memory; None: one for all crops.

    Returns:
        Losses of the global batch, the same on every rank.

    Raises:
        NonFiniteError: a loss that is not finite, or gradients that are not at any loss scale; before anything was
            updated; on all ranks or on none.
    """
    parallel = parallel or Parallel("none", student_teacher)
    centers = [c.clone() for c in student_teacher.buffers()]  # moved in the forward pass
    set_hyperparameters(
        optimizer,
        lr=hyper.lr,
        last_layer_lr=hyper.last_layer_lr,
        weight_decay=hyper.weight_decay,
        backbone_lr_mult=hyper.backbone_lr_mult,
    )
    diagnostics = Diagnostics() if measure else None
    autocast = autocast or nullcontext()
    every = pieces(
        student_teacher,
        batch,
        teacher_temp=hyper.teacher_temp,
        kept=kept,
        least_tokens=turn_tokens,
        autocast=autocast,
        diagnostics=diagnostics,
    )
    losses = _compute_gradients(every, hyper, parallel, autocast, scaler, diagnostics)
    if scaler is not None:
        scaler.unscale_(optimizer)
    with phase("clipping"):
        grad_norms = clip_gradients(student_teacher.student.parts, clip_grad)
    result = StepResult(losses, grad_norms)

    # Both are the same on every rank, so all come to the same answer. It is what an ordinary step waits for once.
    checked = torch.stack([losses.total, torch.stack(list(grad_norms.values())).sum()])
    loss_is_finite, gradients_are_finite = torch.isfinite(checked).tolist()
    if not (loss_is_finite and gradients_are_finite):
        optimizer.zero_grad(set_to_none=True)
        for center, before in zip(student_teacher.buffers(), centers, strict=True):
            center.copy_(before)
        if scaler is not None and _overflowed(scaler, loss_is_finite):
            return StepResult(losses, {}, overflowed=True)
        raise NonFiniteError(result.values())
    weights_before = sampled(student_teacher.student.parts) if measure else {}
    _update(student_teacher, optimizer, hyper, scaler)
    if diagnostics is not None:
        ratios = update_ratios(weights_before, sampled(student_teacher.student.parts))
        result.diagnostics.update(diagnostics.values | {f"diag.update_ratio.{k}": v for k, v in ratios.items()})
    return result


def _compute_gradients(
    every: Iterator[Piece],
    hyper: Hyperparameters,
    parallel: Parallel,
    autocast: AbstractContextManager[None],
    scaler: torch.amp.GradScaler | None,
    diagnostics: Diagnostics | None,
) -> Losses:
    """Run the forward and the backward pass of each piece; the losses of the global batch, the same on every rank."""
    terms: list[Tensor] = []
    for piece in every:
        with nullcontext() if piece.is_last else parallel.accumulating():
            with autocast:
                losses = parallel.forward(
                    piece.batch,
                    teacher_temp=hyper.teacher_temp,
                    targets=piece.targets,
                    kept=piece.kept,
                    neighbours=piece.neighbours,
                    backbone_frozen=hyper.backbone_frozen,
                )
            terms.append(torch.stack([t.detach().float() for t in vars(losses).values()]))
            if diagnostics is not None:
                means = {name: vars(losses)[name].detach() * factor for name, factor in piece.to_means.items()}
                diagnostics.add_cross_entropies(means)
            with phase("backward"):
                (losses.total if scaler is None else scaler.scale(losses.total)).backward()
    return Losses(*distributed.mean_over_ranks(torch.stack(terms).sum(dim=0)))


def _update(
    student_teacher: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    hyper: Hyperparameters,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Move the student by its gradients, then the teacher towards the student."""
    if hyper.last_layer_frozen:
        for head in student_teacher.student.heads.values():
            for parameter in head.last_layer.parameters():
                parameter.grad = None  # the optimizer passes over it
    with phase("optimizer"):
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
    with phase("moving average"):
        student_teacher.update_teacher(hyper.momentum)


def _overflowed(scaler: torch.amp.GradScaler, loss_is_finite: bool) -> bool:
    """Whether gradients that are not finite may only have been scaled too much; the scale is then halved.

    They have not if the loss is not finite, either, or if the scale is 1. In any case the scaler is ready for the next
    step.
    """
    before = scaler.get_scale()
    scaler.update(None if loss_is_finite and before > 1 else before)
    return scaler.get_scale() < before
