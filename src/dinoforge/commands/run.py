"""Carry out a training run, from its first step or its newest checkpoint to its end."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dinoforge.builders.data import build_data
from dinoforge.builders.networks import build_stepper
from dinoforge.commands.backbone import reading_of, untrained_network
from dinoforge.commands.report import open_run
from dinoforge.commands.start import Start
from dinoforge.data.bad_images import BadImages, BadImagesError, Skipped, by_reason
from dinoforge.data.batch import Batch, prepare
from dinoforge.data.batches import make_loader
from dinoforge.data.image_input import ImageInput
from dinoforge.data.sources import Source
from dinoforge.data.stamps import stamps_of
from dinoforge.errors import DataError
from dinoforge.evaluation.probe import Probe
from dinoforge.features import extract
from dinoforge.kernels import ops
from dinoforge.models.vit import VisionTransformer
from dinoforge.planning.dry_run import Plan
from dinoforge.recipe.schema import Recipe, flatten
from dinoforge.report import page as pages
from dinoforge.report.live import Live
from dinoforge.runs import checkpoint
from dinoforge.runs.directory import DataIdentity, RunDirectory
from dinoforge.runs.display import Display, duration
from dinoforge.runs.last_step import LastStep
from dinoforge.runs.lock import RunLock
from dinoforge.runs.metrics import Alarm, JsonLines, MetricsHook, TensorBoard
from dinoforge.runs.non_finite import NonFinitePolicy, OverflowAlarm
from dinoforge.runs.probes import Probes
from dinoforge.runs.saver import Saver
from dinoforge.runs.stopping import Interruptible, Stop
from dinoforge.system import device as devices
from dinoforge.system import distributed
from dinoforge.system.files import write_text
from dinoforge.training import loop
from dinoforge.training.state import TrainState

_LIVE_REPORT_SECONDS = 20.0  # time limit for reading images, since training waits
_TOLD_AT_ONCE = 20  # maximum number of unreadable images to print per step


@dataclass(frozen=True)
class RunResult:
    """The outcome of a call of ``train``."""

    out: Path
    steps: int
    total_steps: int
    stopped_by: str | None = None  # None: finished; SIGINT, SIGTERM, max_minutes or probe.patience
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are done."""
        return self.steps >= self.total_steps


def run_training(
    plan: Plan,
    source: Source,
    labels: list[str | None] | None,
    run: RunDirectory,
    identity: DataIdentity,
    base: str,
    console: Console,
    lock: RunLock | None,
    stop: Stop,
) -> RunResult:
    """Train from the start, or from the newest checkpoint, to the end of the plan or until something stops the run.

    Args:
        plan: The plan of the run.
        source: The images.
        labels: The label of each image, for probes; None without labels.
        run: The run directory.
        identity: The identity of the images, for the run's record.
        base: The recipe that the plan's recipe is a variant of, for the run's record.
        console: The console that shows progress.
        lock: The run's lock, checked at each step; None on ranks that do not hold it.
        stop: Says when to stop.
    """
    recipe, device = plan.recipe, plan.device
    image = plan.image
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    saved, found = distributed.from_first(lambda: _open_for_writing(run, plan))
    devices.keep_freed_memory(device)
    for sentence in found:
        say(f"\n{sentence}.")
    start = Start(plan, say)
    state = start.state(images=len(source), fresh=saved is None)
    if saved is not None:
        state.load_values(checkpoint.load(run.path, saved, state.tensors(), verify=False))
        say(f"\nContinuing at step {state.step:,} of {plan.length.steps:,}.")
    first_step = state.step
    if distributed.is_first():
        _record_start(run, plan, state, source, identity, base, say)
    files, alarms = _metrics_files(run, recipe, first_step, say) if distributed.is_first() else ([], [])
    say("")
    with (
        stop,
        Display(console, total_steps=plan.length.steps, first_step=first_step) as display,
        Saver(run, state, plan, image, say) as saver,
        ops.using(recipe.parallel.kernels),
    ):
        probes = _probes(run, state, plan, image, source, labels, say)
        metrics_hook = MetricsHook(
            [*files, *alarms],
            display,
            every_steps=recipe.log.every_steps,
            total_steps=plan.length.steps,
            batch_size=plan.length.batch_size,
            device=device,
            probes=probes,
        )
        live = _live_report(run, plan, source, labels, say)
        last_step = LastStep(state)
        stepper = build_stepper(recipe, device, plan.precision, start.parallel)

        def train(batches: Iterator[Batch | None]) -> loop.End:
            return loop.train(
                state,
                batches,
                plan.schedules,
                stepper,
                samples_per_step=plan.length.batch_size,
                prepare=last_step.remembered(partial(prepare, device=device, mean=image.mean, std=image.std)),
                hooks=[hook for hook in (lock, metrics_hook, OverflowAlarm(say), saver, live) if hook],
                is_measured=metrics_hook.is_due,
                should_stop=lambda: stop() or (probes is not None and probes.should_stop()),
                on_skipped=lambda new: _tell_skipped(run, say, new),
                on_non_finite=NonFinitePolicy(run, state, plan, source, say),
            )

        try:
            while _train_or_save(train, plan, source, state, run, stop, saver, last_step, say) == "to go back":
                saver.wait()
                _roll_back(run, state, start)
                for written in (*files, probes):
                    if written:
                        written.cut(state.step)
                for alarm in alarms:
                    alarm.cut()
            saver.finish()
            reason = next((told for told in distributed.all_ranks(stop.reason) if told), None)
            hurried = reason not in (None, "max_minutes")  # the sender of a signal should not wait for a report
            reported = live is not None and not hurried and live.make()
        finally:
            for file in files:
                file.close()

    if reason is None and state.step < plan.length.steps:
        reason = "probe.patience"
    _say_end(run, plan, state, reason, saver.waited, say)
    if probes and probes.best:
        say(f"The best k-NN while training, {probes.best['knn']:.1%}, is of step {probes.best['step']:,}: {run.best}")
    if reported:
        say(f"A page that shows the run: {run.report}")
    return RunResult(run.path, state.step, plan.length.steps, reason, run.read_summary())


def _train_or_save(
    train: Callable[[Iterator[Batch | None]], loop.End],
    plan: Plan,
    source: Source,
    state: TrainState,
    run: RunDirectory,
    stop: Stop,
    saver: Saver,
    last_step: LastStep,
    say: Callable[[str], object],
) -> loop.End:
    """Train from the state's next batch on; on an error, save the last good step first."""
    batches = make_loader(
        build_data(plan.recipe, source, rank=distributed.rank(), world_size=distributed.world_size()),
        start_step=state.next_batch,
        end_step=plan.length.steps + state.passed_over,
        num_workers=plan.num_workers,
        pin_memory=plan.device.type == "cuda",
        timeout=plan.recipe.data.timeout,
    )
    try:
        return train(Interruptible(batches, stop))
    except Exception as error:
        last_step.save_after(error, saver, say)
        if isinstance(error, BadImagesError):
            raise _listed(error, run, state.bad_images, say) from error
        raise
    finally:
        batches.close()  # stops the workers


def _record_start(
    run: RunDirectory,
    plan: Plan,
    state: TrainState,
    source: Source,
    identity: DataIdentity,
    base: str,
    say: Callable[[str], object],
) -> None:
    """Record that the run starts or continues; report images that were replaced since the run began."""
    if changed := run.compare_stamps(stamps_of(source)):
        say(f"note     {changed}")
    run.list_skipped(state.bad_images.skipped.values(), first=True)
    run.record_start(
        plan.recipe,
        identity,
        base=base,
        look=plan.data,
        device=plan.device,
        precision=plan.precision,
        step=state.step,
        ranks=distributed.world_size(),
        mode=plan.mode,
        batch_size=plan.length.batch_size,
    )


def _metrics_files(
    run: RunDirectory, recipe: Recipe, first_step: int, say: Callable[[str], object]
) -> tuple[list[JsonLines | TensorBoard], list[Alarm]]:
    """Open the files for the metrics, and the alarms that watch them."""
    metrics_file = JsonLines(run.metrics, first_step=first_step)
    files: list[JsonLines | TensorBoard] = [metrics_file]
    if recipe.log.tensorboard:
        files.append(TensorBoard(run.path / "tensorboard", first_step=first_step))
    return files, [Alarm(flatten(recipe), metrics_file, say)]


def _say_end(
    run: RunDirectory,
    plan: Plan,
    state: TrainState,
    reason: str | None,
    waited: float,
    say: Callable[[str], object],
) -> None:
    """Print how training ended, and how to continue it."""
    total = plan.length.steps
    if state.step >= total:
        took = f"{duration(state.seconds)} and {waited:.1f} s of waiting for checkpoints"
        say(f"\nDone: {state.step:,} steps in {took}. The backbone is {run.teacher}")
        return
    why = f"by {reason}"
    if reason == "max_minutes":
        why = f"after {plan.recipe.train.max_minutes:g} minutes (train.max_minutes)"
    elif reason == "probe.patience":
        why = f"after {plan.recipe.probe.patience} probes without a better one (probe.patience)"
    say(
        f"\nStopped {why} at step {state.step:,} of {total:,}, with a checkpoint. "
        + ("Raise probe.patience" if reason == "probe.patience" else "Run the same command again")
        + " to continue."
    )


def _live_report(
    run: RunDirectory, plan: Plan, source: Source, labels: list[str | None] | None, say: Callable[[str], object]
) -> Live | None:
    """Make the hook that writes the report during training; None if the recipe disables it."""
    minutes = plan.recipe.report.every_minutes
    if minutes is None or distributed.rank() != 0:
        return None

    def write() -> None:
        opened = open_run(run.path, data=source, labels=labels, device=plan.device, seconds=_LIVE_REPORT_SECONDS)
        write_text(run.report, pages.page([opened]))

    return Live(write, every_minutes=minutes, say=say)


def _probes(
    run: RunDirectory,
    state: TrainState,
    plan: Plan,
    image: ImageInput,
    source: Source,
    labels: list[str | None] | None,
    say: Callable[[str], object],
) -> Probes | None:
    """Make the probes that measure the teacher during training; None without labels, or if the recipe disables them."""
    settings = plan.recipe.probe
    if labels is None or not settings.is_on or not distributed.is_first():
        return None
    if plan.mode in ("fsdp", "hsdp"):
        say(f"probe    none, since no rank has the whole teacher (parallel.mode is {plan.mode})")
        return None
    architecture = plan.architecture
    reading = reading_of(image, architecture["patch_size"], plan.recipe.eval, plan.device, plan.precision)
    seed = plan.recipe.train.seed
    try:
        probe = Probe(source, labels, max_images=settings.max_images, seed=seed, **reading)
    except DataError as error:
        say(f"probe    none, since the labels do not serve: {error}")
        return None

    told: list[extract.Skipped] = []

    def tell_skipped() -> None:
        new = probe.skipped[len(told) :]
        told.extend(new)
        if new:
            why = by_reason((0, one.name, one.reason) for one in new)
            say(f"probe      {len(new)} of its {len(new) + len(probe):,} images cannot be read and take no part: {why}")

    def measure(backbone: VisionTransformer) -> dict[str, float]:
        scores = probe.measure(backbone)
        tell_skipped()
        return dict(vars(scores))

    def baselines() -> dict[str, dict[str, float]]:
        untrained = untrained_network(architecture, seed).to(plan.device)
        found = {name: vars(scores) for name, scores in probe.baselines(untrained).items()}
        tell_skipped()
        return found

    return Probes(
        run,
        state,
        plan,
        image,
        measure=measure,
        baselines=baselines,
        fingerprint=probe.fingerprint,
        say=say,
        duplicates=lambda: probe.duplicates,
    )


def _open_for_writing(run: RunDirectory, plan: Plan) -> tuple[int | None, list[str]]:
    """Check the disk space, clean up checkpoints, and return the newest whole one with the messages to print."""
    run.require_space(int((plan.recipe.checkpoint.keep_last + 1) * _checkpoint_bytes(plan)))
    kept = checkpoint.clean(run.path)
    newest, damage = checkpoint.newest(run.path)
    return newest, [*kept, *(f"{sentence}. It is set aside; continuing from the one before it" for sentence in damage)]


def _roll_back(run: RunDirectory, state: TrainState, start: Start) -> None:
    """Restore the newest checkpoint, or else the start, and leave out the batches since."""
    tensors, batch, step, train = state.tensors(), state.next_batch, state.step, start.plan.recipe.train
    saved, damage = distributed.from_first(lambda: checkpoint.newest(run.path))
    for sentence in damage:
        start.say(f"{sentence}. It is set aside.")
    if saved is None:
        fresh = start.state(images=state.bad_images.length)
        with torch.no_grad():
            for name, tensor in fresh.tensors().items():
                tensors[name].copy_(tensor)
        values = fresh.values()
    else:
        values = checkpoint.load(run.path, saved, tensors, verify=False)
    state.go_back(values)
    start.say(
        f"rollback   at step {step:,}, the last {train.max_skips} of them skipped: back to step {state.step:,}, "
        f"and on with the batches from number {batch:,} (rollback {state.rollbacks} of {train.max_rollbacks})"
    )


def _checkpoint_bytes(plan: Plan) -> float:
    return sum(plan.parameters.values()) * 4 * 4 * 1.05  # float32 student, teacher and two moments, with 5 % to spare


def _tell_skipped(run: RunDirectory, say: Callable[[str], object], new: Sequence[Skipped]) -> None:
    if not distributed.is_first():
        return
    for _, name, reason in new[:_TOLD_AT_ONCE]:
        say(f"skipped  {name}: {reason}")
    if len(new) > _TOLD_AT_ONCE:
        say(f"skipped  and {len(new) - _TOLD_AT_ONCE:,} more, which {run.skipped} lists")
    run.list_skipped((name, reason) for _, name, reason in new)


def _listed(error: BadImagesError, run: RunDirectory, known: BadImages, say: Callable[[str], object]) -> BadImagesError:
    """List the unreadable images in the run directory, and return the error with a pointer to the list."""
    new = {index: (name, reason) for index, name, reason in error.skipped if index not in known.skipped}
    if distributed.is_first():
        _tell_skipped(run, say, [(index, *told) for index, told in new.items()])
    elif error.of_one_rank:  # the first rank does not know of these images
        run.list_skipped(new.values())
    return BadImagesError(f"{error}. Each one is listed in {run.skipped}", error.skipped)
