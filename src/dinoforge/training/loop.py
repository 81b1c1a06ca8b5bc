"""The training loop. It knows no recipe: the builders make what it is given."""

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
    """What hooks are told after a step."""

    state: TrainState
    hyper: Hyperparameters
    result: StepResult
    batch: Batch
    seconds: float  # of the step with its wait
    waited: float  # seconds of them waiting for data


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
    """Make steps until the schedules end, ``should_stop`` says so, or ``on_non_finite`` wants to go back.

    Args:
        state: moved forward in place.
        batches: from number ``state.next_batch`` on; None where a signal ended the waiting, which stops all ranks.
        schedules: of learning rates, weight decay, momentum and temperatures.
        stepper: makes each step.
        samples_per_step: images of the global batch.
        prepare: brings a batch to the device, normalised.
        hooks: called after each step that was not skipped, on every rank.
        is_measured: says which steps' results have diagnostics, given the number of steps that will then be done.
        should_stop: asked before each batch is fetched; all ranks stop when one says so.
        on_skipped: given the images that newly turned out to be unreadable, on any rank.
        on_non_finite: given the batch and the terms of a step that was skipped since a loss or gradient is not
            finite; the state already counts it. Says whether to go back to an earlier state.
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
