"""The training loop. It knows no recipe: ``build`` makes what it is given."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from dinoforge import distributed
from dinoforge.data.batch import Batch
from dinoforge.data.loader import BadImages, Skipped
from dinoforge.models.vit import draw_kept_samples
from dinoforge.optim.schedules import Hyperparameters, Schedules
from dinoforge.student_teacher import StudentTeacher
from dinoforge.training.step import NonFiniteError, StepResult, train_step


@dataclass
class TrainState:
    """All that changes while training: what a checkpoint holds, and nothing else."""

    student_teacher: StudentTeacher
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    bad_images: BadImages
    step: int = 0  # steps done
    seconds: float = 0.0  # spent in them, over all parts of the run

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "student_teacher": self.student_teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "bad_images": self.bad_images.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.student_teacher.load_state_dict(state["student_teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.bad_images.load_state_dict(state["bad_images"])


@dataclass(frozen=True)
class StepReport:
    """What hooks are told after a step."""

    state: TrainState
    hyper: Hyperparameters
    result: StepResult
    batch: Batch
    seconds: float  # of the step with its wait
    waited: float  # seconds of them waiting for data


Hook = Callable[[StepReport], None]


def train(
    state: TrainState,
    batches: Iterator[Batch],
    schedules: Schedules,
    *,
    seed: int,
    samples_per_step: int,
    drop_path_rates: Sequence[float],
    clip_grad: float,
    prepare: Callable[[Batch], Batch],
    autocast: Callable[[], AbstractContextManager[None]],
    hooks: Sequence[Hook],
    should_stop: Callable[[], bool],
    on_skipped: Callable[[list[Skipped]], None],
    on_non_finite: Callable[[Batch, int, dict[str, float]], NoReturn],
) -> None:
    """Steps until the schedules end or ``should_stop`` says so.

    Args:
        state: moved forward in place.
        batches: from step ``state.step`` on.
        seed: of stochastic depth, which is a function of (seed, step).
        samples_per_step: images of the global batch.
        drop_path_rates: per block of the student.
        clip_grad: largest gradient norm per sub-network; 0 for none.
        prepare: brings a batch to the device, normalised.
        autocast: makes the context of the forward pass.
        hooks: called after each step.
        should_stop: asked before each step.
        on_skipped: given the images that newly turned out to be unreadable.
        on_non_finite: given the batch, the step and its terms when a loss or gradient is not finite; raises.
    """
    while state.step < schedules.total_steps and not should_stop():
        started = time.perf_counter()
        batch = prepare(next(batches))
        waited = time.perf_counter() - started
        on_skipped(state.bad_images.update(batch.skipped, (state.step + 1) * samples_per_step))

        hyper = schedules(state.step)
        kept = None
        if any(drop_path_rates):
            sizes = [len(crops) for crops in state.student_teacher.student_crops(batch)]
            kept = draw_kept_samples(drop_path_rates, sizes, _generator(seed, state.step))
        try:
            result = train_step(
                state.student_teacher,
                state.optimizer,
                batch,
                hyper,
                clip_grad=clip_grad,
                kept=kept,
                autocast=autocast(),
                scaler=state.scaler,
            )
        except NonFiniteError as error:
            on_non_finite(batch, state.step, error.values)
        state.step += 1
        seconds = time.perf_counter() - started
        state.seconds += seconds
        report = StepReport(state, hyper, result, batch, seconds, waited)
        for hook in hooks:
            hook(report)


def _generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step on one rank, whatever happened before."""
    mixed = ((seed * 1_000_003 + step) * 65_537 + distributed.rank()) % 2**63
    return torch.Generator().manual_seed(mixed)
