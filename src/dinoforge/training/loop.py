"""The training loop. It knows no recipe; the builders make its arguments."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dinoforge.data.bad_images import Skipped
from dinoforge.data.batch import Batch
from dinoforge.optim.schedules import Hyperparameters, Schedules
from dinoforge.system import distributed
from dinoforge.training.state import TrainState
from dinoforge.training.step import Stepper, StepResult


@dataclass(frozen=True)
class StepReport:
    """The information that hooks receive after a step."""

    state: TrainState
    hyper: Hyperparameters
    result: StepResult
    batch: Batch
    seconds: float  # duration of the step, including the wait for data
    waited: float  # seconds of the step spent waiting for data


Hook = Callable[[StepReport], None]
End = Literal["finished", "stopped", "to go back"]


def train(
    state: TrainState,
    batches: Iterator[Batch | None],
    schedules: Schedules,
    stepper: Stepper,
    *,
    samples_per_step: int,
    prepare: Callable[[Batch], Batch],
    hooks: Sequence[Hook],
    is_measured: Callable[[int], bool],
    should_stop: Callable[[], bool],
    on_skipped: Callable[[list[Skipped]], None],
    on_non_finite: Callable[[Batch, dict[str, float]], bool],
) -> End:
    """Make steps until the schedules end, ``should_stop`` returns true, or ``on_non_finite`` asks to go back.

    Args:
        state: The state to train, updated in place.
        batches: The batches from number ``state.next_batch`` on. A None means that a signal ended the wait for data;
            then all ranks stop.
        schedules: The schedules of learning rates, weight decay, momentum and temperatures.
        stepper: The callable that makes a step.
        samples_per_step: The number of images in the global batch.
        prepare: A function that moves a batch to the device and normalises it.
        hooks: Functions called on every rank after each step that was not skipped.
        is_measured: A function that says whether a step's result has diagnostics, given the number of steps done after
            that step.
        should_stop: A function called before each batch is fetched; all ranks stop when it returns true on any rank.
        on_skipped: A function called with the newly found unreadable images of all ranks.
        on_non_finite: A function called with the batch and the loss terms of a step that was skipped because a loss or
            gradient is not finite; the state already counts the step. It returns whether to go back to an earlier
            state.

    Returns:
        Why the loop ended.
    """
    while state.step < schedules.total_steps:
        started = time.perf_counter()
        batch = None if should_stop() else next(batches)
        if distributed.any_over_ranks(batch is None):
            return "stopped"
        assert batch is not None
        waited = time.perf_counter() - started
        batch = prepare(batch)
        skipped = _skipped_on_any_rank(batch)
        on_skipped(state.bad_images.update(skipped, (state.next_batch + 1) * samples_per_step))

        hyper = schedules(state.step)
        result = stepper(state, batch, hyper, measure=is_measured(state.step + 1))
        seconds = time.perf_counter() - started
        state.count(seconds=seconds, finite=result.finite, overflowed=result.overflowed)
        if result.finite:
            report = StepReport(state, hyper, result, batch, seconds, waited)
            for hook in hooks:
                hook(report)
        elif on_non_finite(batch, result.values()):
            return "to go back"
    return "finished"


def _skipped_on_any_rank(batch: Batch) -> list[Skipped]:
    if not distributed.any_over_ranks(bool(batch.skipped)):
        return []
    return [image for skipped in distributed.all_ranks(batch.skipped) for image in skipped]
