"""The training loop. It knows no recipe: ``build`` makes what it is given."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoforge import distributed
from dinoforge.data.batch import Batch
from dinoforge.data.loader import BadImages, Skipped
from dinoforge.models.vit import KeptSamples, draw_kept_samples
from dinoforge.optim.schedules import Hyperparameters, Schedules
from dinoforge.student_teacher import StudentTeacher
from dinoforge.training.parallel import Parallel
from dinoforge.training.step import NonFiniteError, StepResult, train_step


@dataclass
class TrainState:
    """All that changes while training: what a checkpoint holds, and nothing else."""

    student_teacher: StudentTeacher
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    bad_images: BadImages
    step: int = 0  # steps done, or skipped
    seconds: float = 0.0  # spent in them, over all parts of the run
    skipped_steps: int = 0  # whose loss or gradients were not finite
    skipped_in_a_row: int = 0  # of them, the last ones
    rollbacks: int = 0
    passed_over: int = 0  # batches that rollbacks left out: step n takes batch n + passed_over
    overflows: int = 0  # steps whose gradients were too large for float16 at the loss scale of then
    overflows_in_a_row: int = 0  # of them, the last ones

    @property
    def next_batch(self) -> int:
        """Number of the batch that the next step takes."""
        return self.step + self.passed_over

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as it is kept: writing to one changes the state."""
        named: dict[str, Tensor] = dict(self.student_teacher.state_dict())
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, tensor in self.optimizer.state[parameter].items():
                    named[f"optimizer.{group['module']}.{name}.{key}"] = tensor
        return named

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON has it."""
        return {name: getattr(self, name) for name in _NUMBERS} | {
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "bad_images": self.bad_images.state_dict(),
        }

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Sets what ``values`` gave."""
        for name in _NUMBERS:
            setattr(self, name, values.get(name, 0))  # checkpoints of earlier versions have fewer of them
        if self.scaler and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        self.bad_images.load_state_dict(values["bad_images"])

    def go_back(self, values: Mapping[str, Any]) -> None:
        """Sets what ``values`` gave earlier in this run, but keeps count, and goes on with batches not seen since."""
        next_batch, rollbacks, skipped = self.next_batch, self.rollbacks, self.skipped_steps
        overflows = self.overflows
        known = self.bad_images.state_dict()
        self.load_values(values)
        self.passed_over = next_batch - self.step
        self.rollbacks, self.skipped_steps, self.skipped_in_a_row = rollbacks + 1, skipped, 0
        self.overflows, self.overflows_in_a_row = overflows, 0
        self.bad_images.load_state_dict(known)


_NUMBERS = (
    *("step", "seconds", "skipped_steps", "skipped_in_a_row", "rollbacks", "passed_over"),
    *("overflows", "overflows_in_a_row"),
)


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
    batches: Iterator[Batch | None],
    schedules: Schedules,
    *,
    seed: int,
    samples_per_step: int,
    drop_path_rates: Sequence[float],
    clip_grad: float,
    prepare: Callable[[Batch], Batch],
    autocast: Callable[[], AbstractContextManager[None]],
    hooks: Sequence[Hook],
    is_measured: Callable[[int], bool],
    should_stop: Callable[[], bool],
    on_skipped: Callable[[list[Skipped]], None],
    on_non_finite: Callable[[Batch, dict[str, float]], None],
    accumulate: int = 1,
    parallel: Parallel | None = None,
    turn_tokens: int | None = None,
) -> None:
    """Steps until the schedules end or ``should_stop`` says so.

    Args:
        state: moved forward in place.
        batches: from number ``state.next_batch`` on; None where a signal ended the waiting, which stops all ranks.
        seed: of stochastic depth, which is a function of (seed, number of the batch).
        samples_per_step: images of the global batch.
        drop_path_rates: per block of the student.
        clip_grad: largest gradient norm per sub-network; 0 for none.
        prepare: brings a batch to the device, normalised.
        autocast: makes the context of the forward pass.
        hooks: called after each step that was not skipped, on every rank.
        is_measured: says which steps' results have diagnostics, given the number of steps that will then be done.
        should_stop: asked before each batch is fetched; all ranks stop when one says so.
        on_skipped: given the images that newly turned out to be unreadable, on any rank.
        on_non_finite: given the batch and the terms of a step that was skipped since a loss or gradient is not
            finite; the state already counts it. What it raises ends the training.
        accumulate: micro-batches that each rank cuts its part of the global batch into.
        parallel: how the networks are laid over ranks; None for one process.
        turn_tokens: as for ``train_step``.
    """
    while state.step < schedules.total_steps:
        started = time.perf_counter()
        batch = None if should_stop() else next(batches)
        if distributed.any_over_ranks(batch is None):
            break
        assert batch is not None
        waited = time.perf_counter() - started
        batch = prepare(batch)
        skipped = _skipped_on_any_rank(batch)
        on_skipped(state.bad_images.update(skipped, (state.next_batch + 1) * samples_per_step))

        hyper = schedules(state.step)
        kept = kept_samples(
            state.student_teacher, batch, drop_path_rates, seed=seed, number=state.next_batch, parts=accumulate
        )
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
                measure=is_measured(state.step + 1),
                parallel=parallel,
                turn_tokens=turn_tokens,
            )
        except NonFiniteError as error:
            state.step += 1
            state.seconds += time.perf_counter() - started
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            on_non_finite(batch, error.values)
            continue
        state.step += 1
        state.skipped_in_a_row = 0
        state.overflows += result.overflowed
        state.overflows_in_a_row = state.overflows_in_a_row + 1 if result.overflowed else 0
        seconds = time.perf_counter() - started
        state.seconds += seconds
        report = StepReport(state, hyper, result, batch, seconds, waited)
        for hook in hooks:
            hook(report)


def _skipped_on_any_rank(batch: Batch) -> list[Skipped]:
    if not distributed.any_over_ranks(bool(batch.skipped)):
        return []
    return [image for skipped in distributed.all_ranks(batch.skipped) for image in skipped]


def kept_samples(
    student_teacher: StudentTeacher,
    batch: Batch,
    drop_path_rates: Sequence[float],
    *,
    seed: int,
    number: int,
    parts: int = 1,
    rank: int | None = None,
) -> list[list[KeptSamples] | None]:
    """Stochastic depth of each micro-batch of a batch, whatever happened before; None where no block has any.

    Args:
        student_teacher: the networks.
        batch: of one rank, on any device.
        drop_path_rates: per block of the student.
        seed: of the run.
        number: of the batch; see ``TrainState.next_batch``.
        parts: micro-batches that the batch is cut into.
        rank: whose batch it is; None: this one's.
    """
    if not any(drop_path_rates):
        return [None] * parts
    # By its place in the global batch, so that it is the same on two ranks and in two micro-batches.
    first = parts * (distributed.rank() if rank is None else rank)
    sizes = [len(crops) // parts for crops in student_teacher.student_crops(batch)]
    mixed = [((seed * 1_000_003 + number) * 65_537 + first + part) % 2**63 for part in range(parts)]
    return [draw_kept_samples(drop_path_rates, sizes, torch.Generator().manual_seed(m)) for m in mixed]
