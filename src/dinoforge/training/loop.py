"""The training loop. It knows no recipe: ``build`` makes what it is given."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dinoforge.data.bad_images import Skipped
from dinoforge.data.batch import Batch
from dinoforge.optim.schedules import Hyperparameters, Schedules
from dinoforge.system import distributed
from dinoforge.training.parallel import Parallel
from dinoforge.training.pieces import kept_samples
from dinoforge.training.state import TrainState
from dinoforge.training.step import NonFiniteError, StepResult, train_step


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
