"""One optimizer step."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinoforge.data.batch import Batch
from dinoforge.health.numbers import Diagnostics
from dinoforge.method.dinov2 import Losses
from dinoforge.optim.clipping import clip_gradients
from dinoforge.optim.movement import sampled, update_ratios
from dinoforge.optim.param_groups import set_hyperparameters
from dinoforge.optim.schedules import Hyperparameters
from dinoforge.system import distributed
from dinoforge.system.phases import phase
from dinoforge.training.parallel import Parallel
from dinoforge.training.pieces import Kept, Piece, kept_samples, pieces
from dinoforge.training.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """The result of a step, still on the device.

    Args:
        losses: The losses of the global batch, the same on every rank.
        grad_norms: The gradient norm of each sub-network before clipping; empty after an overflow.
        diagnostics: Diagnostics of this rank's first micro-batch and of its part of the weights, if the step was
            measured.
        finite: False if the loss is not finite, or the gradients are not finite at any loss scale. Then nothing was
            updated.
        overflowed: Whether gradients were too large for float16. Then only the loss scale was updated.
    """

    losses: Losses
    grad_norms: dict[str, Tensor]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    finite: bool = True
    overflowed: bool = False

    def values(self) -> dict[str, float]:
        """Return losses, gradient norms and the finite diagnostics as numbers; waits for the device."""
        terms = vars(self.losses) | {f"grad_norm.{name}": norm for name, norm in self.grad_norms.items()}
        every = terms | self.diagnostics
        numbers = torch.stack([t.detach().float() for t in every.values()]).tolist()
        named = dict(zip(every, numbers, strict=True))
        return {name: value for name, value in named.items() if name in terms or math.isfinite(value)}


@dataclass(frozen=True)
class Stepper:
    """Makes steps: forward, backward, clipping, AdamW, moving average.

    Args:
        clip_grad: The maximum gradient norm of each sub-network; 0 for none.
        autocast: Makes the context of the forward pass.
        seed: The seed of stochastic depth, which is a function of (seed, number of the batch).
        drop_path_rates: The rate of stochastic depth of each block of the student; empty for none.
        accumulate: The number of micro-batches that each rank cuts its part of the global batch into.
        least_tokens: The minimum number of tokens in a piece, if the student sees crops in turn to save memory; None:
            all crops at once.
        parallel: How the networks are distributed over ranks; None for one process.
    """

    clip_grad: float
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    seed: int = 0
    drop_path_rates: Sequence[float] = ()
    accumulate: int = 1
    least_tokens: int | None = None
    parallel: Parallel | None = None

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        hyper: Hyperparameters,
        *,
        measure: bool = False,
        kept: Sequence[Kept | None] | None = None,
    ) -> StepResult:
        """Make a step; the state's networks, optimizer and loss scale are updated in place.

        Args:
            state: The state to update.
            batch: This rank's part of the global batch: normalised crops on the networks' device.
            hyper: The schedules' values for this step.
            measure: Whether the result has diagnostics; the weights are the same either way.
            kept: Stochastic depth of each micro-batch; None: draw it for batch ``state.next_batch``.
        """
        networks, optimizer = state.student_teacher, state.optimizer
        centers = [center.clone() for center in networks.buffers()]  # computing targets updates them
        set_hyperparameters(
            optimizer,
            lr=hyper.lr,
            last_layer_lr=hyper.last_layer_lr,
            weight_decay=hyper.weight_decay,
            backbone_lr_mult=hyper.backbone_lr_mult,
        )
        diagnostics = Diagnostics() if measure else None
        losses = self._compute_gradients(state, batch, hyper, kept, diagnostics)
        with phase("clipping"):
            grad_norms = clip_gradients(networks.student.parts, self.clip_grad)
        # Both are equal on every rank, so all ranks decide alike. This is an ordinary step's only wait for the device.
        checked = torch.stack([losses.total, torch.stack(list(grad_norms.values())).sum()])
        loss_is_finite, gradients_are_finite = torch.isfinite(checked).tolist()
        if not (loss_is_finite and gradients_are_finite):
            return _undo(state, centers, losses, grad_norms, loss_is_finite=loss_is_finite)
        before = sampled(networks.student.parts) if measure else {}
        _update(state, hyper)
        result = StepResult(losses, grad_norms)
        if diagnostics is not None:
            ratios = update_ratios(before, sampled(networks.student.parts))
            result.diagnostics.update(diagnostics.values | {f"diag.update_ratio.{k}": v for k, v in ratios.items()})
        return result

    def _compute_gradients(
        self,
        state: TrainState,
        batch: Batch,
        hyper: Hyperparameters,
        kept: Sequence[Kept | None] | None,
        diagnostics: Diagnostics | None,
    ) -> Losses:
        """Run the forward and backward pass of each piece; return the losses of the global batch."""
        networks, scaler = state.student_teacher, state.scaler
        parallel = self.parallel or Parallel("none", networks)
        if kept is None:
            rates, parts = self.drop_path_rates, self.accumulate
            kept = kept_samples(networks, batch, rates, seed=self.seed, number=state.next_batch, parts=parts)
        every: Iterator[Piece] = pieces(
            networks,
            batch,
            teacher_temp=hyper.teacher_temp,
            kept=kept,
            least_tokens=self.least_tokens,
            autocast=self.autocast,
            diagnostics=diagnostics,
        )
        terms: list[Tensor] = []
        for piece in every:
            with nullcontext() if piece.is_last else parallel.accumulating():
                with self.autocast():
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
        if scaler is not None:
            scaler.unscale_(state.optimizer)
        return Losses(*distributed.mean_over_ranks(torch.stack(terms).sum(dim=0)))


def _update(state: TrainState, hyper: Hyperparameters) -> None:
    """Update the student by its gradients, then move the teacher towards the student."""
    networks, optimizer, scaler = state.student_teacher, state.optimizer, state.scaler
    if hyper.last_layer_frozen:
        networks.student.drop_last_layer_gradients()
    with phase("optimizer"):
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
    with phase("moving average"):
        networks.update_teacher(hyper.momentum)


def _undo(
    state: TrainState,
    centers: Sequence[Tensor],
    losses: Losses,
    grad_norms: dict[str, Tensor],
    *,
    loss_is_finite: bool,
) -> StepResult:
    """Drop the gradients and restore the centres; report an overflow if a smaller loss scale may suffice."""
    state.optimizer.zero_grad(set_to_none=True)
    for center, before in zip(state.student_teacher.buffers(), centers, strict=True):
        center.copy_(before)
    if state.scaler is not None and _overflowed(state.scaler, loss_is_finite):
        return StepResult(losses, {}, overflowed=True)
    return StepResult(losses, grad_norms, finite=False)


def _overflowed(scaler: torch.amp.GradScaler, loss_is_finite: bool) -> bool:
    """Return whether non-finite gradients may only be due to the loss scale; if so, halve the scale.

    The scale is not to blame if the loss itself is not finite, or if the scale is 1. In any case, the scaler is ready
    for the next step.
    """
    before = scaler.get_scale()
    scaler.update(None if loss_is_finite and before > 1 else before)
    return scaler.get_scale() < before
