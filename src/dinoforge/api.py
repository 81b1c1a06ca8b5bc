"""dinoforge in Python: what the command line calls."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from dinoforge import checkpoint, distributed, embedding, features, weights
from dinoforge.config import (
    Eval,
    Recipe,
    base_of,
    converted,
    differences,
    dump,
    flatten,
    load_recipe,
    recipe_names,
    require_shown_channels,
)
from dinoforge.data.bad_images import BadImages, BadImagesError, by_reason
from dinoforge.data.batch import normalize, prepare
from dinoforge.data.crops import resize
from dinoforge.data.decode import decode
from dinoforge.data.labels import Labels, label_table, labels_of
from dinoforge.data.loader import Skipped, make_loader
from dinoforge.data.loader import inspect as look_at_some
from dinoforge.data.planes import taken_apart
from dinoforge.data.preflight import refuse_second_start
from dinoforge.data.sources import Source, open_source, printable
from dinoforge.data.stamps import stamps_of
from dinoforge.data.survey import MeasuredRange, measure_range
from dinoforge.data.values import plane_of
from dinoforge.diagnosis import Finding, diagnose
from dinoforge.errors import DataError, DinoforgeError, ImageError, RecipeError, RunError, WeightsError
from dinoforge.evaluation import overlap
from dinoforge.evaluation.classifiers import ClassifierResult, Method, run_classifier
from dinoforge.evaluation.knn import KnnResult, run_knn
from dinoforge.evaluation.probe import Probe
from dinoforge.export import make as exports
from dinoforge.files import write_text
from dinoforge.inspection import page as inspection_pages
from dinoforge.inspection import run as inspections
from dinoforge.inspection.result import Inspection
from dinoforge.models.vit import VisionTransformer
from dinoforge.report import figures as report_figures
from dinoforge.report import page as pages
from dinoforge.report import plots
from dinoforge.report import run as reports
from dinoforge.report.live import Live
from dinoforge.student_teacher import StudentTeacher
from dinoforge.terminal import patient
from dinoforge.training import auto, build, explain, loop
from dinoforge.training import bench as benchmarks
from dinoforge.training import device as devices
from dinoforge.training import plan as plans
from dinoforge.training import replay as replays
from dinoforge.training.last_step import LastStep
from dinoforge.training.lock import RunLock
from dinoforge.training.memory import ways_to_save
from dinoforge.training.metrics import (
    Alarm,
    Display,
    JsonLines,
    MetricsHook,
    TensorBoard,
    check_writable,
    duration,
)
from dinoforge.training.non_finite import NonFinitePolicy, OverflowAlarm, RollBackError
from dinoforge.training.out_of_memory import out_of_memory_in_words
from dinoforge.training.parallel import Parallel, turn_tokens, wrap
from dinoforge.training.probes import Probes
from dinoforge.training.run import DataIdentity, RunDirectory
from dinoforge.training.saver import Saver
from dinoforge.training.stopping import Interruptible, Stop

_LIVE_REPORT_SECONDS = 20.0  # for reading images: training waits
_TOLD_AT_ONCE = 20  # unreadable images of a step


@dataclass(frozen=True)
class RunResult:
    """How a call of ``train`` ended."""

    out: Path
    steps: int
    total_steps: int
    stopped_by: str | None = None  # None: finished; SIGINT, SIGTERM, max_minutes or probe.patience
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.steps >= self.total_steps


def train(
    images: Any = None,
    recipe: str | Path | Recipe = "small",
    out: str | Path | None = None,
    *,
    labels: str | Path | None = None,
    dry_run: bool = False,
    console: Console | None = None,
    **keys: Any,
) -> RunResult:
    """Pretrains a backbone on images without labels; calling it again with the same arguments continues the run.

    Args:
        images: a folder of them, walked recursively; or any object with ``__len__`` and ``__getitem__`` that gives
            images (arrays [H, W, C], tensors [C, H, W], PIL images, paths, bytes) or (image, label). ``data=`` takes
            them, too.
        recipe: a name, a YAML file, or a recipe.
        out: the run directory; by default ``runs/`` with the names of folder and recipe.
        labels: a CSV file with names and labels; by default the names of sub-folders. Training never sees them: where
            there are some, the teacher is measured while it trains; see docs/evaluation.md.
        dry_run: only say what would run; writes nothing.
        console: where to print; by default the terminal.
        keys: recipe keys: sections as mappings (``train={"steps": 1000}``, ``data={"sixteen_bit": "minmax"}``), or
            dotted ``**{"train.steps": 1000}``.

    Raises:
        RecipeError: a key or value that cannot be; before work starts.
        DataError: no usable images; too many unreadable ones.
        RunError: ``out`` is another run's, or cannot be written.
        TrainingError: losses or gradients that stay non-finite; see docs/reliability.md.
        OutOfMemoryError: what the device has does not do; what was done until then is saved if there is one process.
        LostRankError: another rank failed, was killed, or cannot be reached.
        KeyboardInterrupt: a signal stopped it, after it has saved a checkpoint: what follows in a script does not run.
    """
    result = _train_here(images, recipe, out, labels, keys, dry_run=dry_run, console=console, is_program=False)
    if (result.stopped_by or "").startswith("SIG"):
        raise KeyboardInterrupt(f"{result.stopped_by} at step {result.steps:,}, which is saved in {result.out}")
    return result


def train_as_program(
    images: Any,
    recipe: str | Path | Recipe = "small",
    out: str | Path | None = None,
    *,
    labels: str | Path | None = None,
    dry_run: bool = False,
    **keys: Any,
) -> RunResult:
    """``train`` where this process is ours to end: a second Ctrl-C ends it at once, and a signal is no exception.

    Args:
        images, recipe, out, labels, dry_run, keys: as for ``train``.

    Raises:
        As ``train``, but for KeyboardInterrupt.
    """
    return _train_here(images, recipe, out, labels, keys, dry_run=dry_run, console=None, is_program=True)


def _train_here(
    images: Any,
    recipe: str | Path | Recipe,
    out: str | Path | None,
    labels: str | Path | None,
    keys: dict[str, Any],
    *,
    dry_run: bool,
    console: Console | None,
    is_program: bool,
) -> RunResult:
    """``train`` on the device of this rank, with the others if there are any."""
    refuse_second_start()
    images, keys = _images_and_keys(images, keys)
    said = _said(recipe, _flat_keys(keys))
    device, patience = devices.rank_device(said["device"]), timedelta(minutes=said["parallel.timeout_minutes"])
    devices.use_expandable_segments(device)
    with (
        distributed.process_group(device, said["parallel.backend"], patience),
        devices.in_use(device, allow_tf32=said["allow_tf32"]),
    ):
        if console is None or not distributed.is_first():
            console = Console(quiet=not distributed.is_first())
        try:
            with patient(console):
                return _train_together(
                    images, recipe, keys, out, labels, dry_run=dry_run, console=console, is_program=is_program
                )
        except RuntimeError as error:
            if distributed.is_active() and distributed.is_lost_connection(error):
                raise distributed.lost_rank() from error
            raise


def _images_and_keys(images: Any, keys: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Images that came by name as ``data=``, and the other keys: ``data`` as a mapping is a section of these."""
    if images is None and "data" in keys and not isinstance(keys["data"], Mapping):
        keys = dict(keys)
        images = keys.pop("data")
    return images, keys


def _said(recipe: str | Path | Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says by dotted keys, before the images are known."""
    if recipe == "auto":
        return flatten(Recipe()) | converted(given)
    return flatten(load_recipe(recipe, given)[0])


def _train_together(
    images: Any,
    recipe: str | Path | Recipe,
    keys: Mapping[str, Any],
    out: str | Path | None,
    labels: str | Path | None,
    *,
    dry_run: bool,
    console: Console,
    is_program: bool,
) -> RunResult:
    """``train`` on the ranks that there are."""
    data_name = str(images) if isinstance(images, str | os.PathLike) else type(images).__name__
    if out is None:
        recipe_name = "custom" if isinstance(recipe, Recipe) else Path(recipe).stem
        out = Path("runs", f"{Path(os.path.abspath(data_name)).name}-{recipe_name}")
    run = RunDirectory(Path(out).expanduser())
    choices: dict[str, auto.Choice] = {}
    if recipe == "auto":
        source = _source_for_auto(images, keys)
        resolved, ignored, choices = _auto_recipe(source, _flat_keys(keys), run)
    else:
        resolved, ignored = distributed.from_first(lambda: resolve(recipe, keys, run))
        source = open_source(images)
    source = taken_apart(source, resolved.data.plane, resolved.student.in_chans)
    resolved = build.with_batch_cut(resolved, world_size=distributed.world_size())
    resolved, measured = distributed.from_first(lambda: _with_range(resolved, source, run))
    identity = DataIdentity(os.path.abspath(data_name), len(source), source.fingerprint())
    plan = _plan(resolved, source)
    # Only the first looks, since the others might see what it writes.
    distributed.from_first(lambda: run.require_free_or_same(resolved, identity, batch_size=plan.length.batch_size))
    known = distributed.from_first(lambda: _labels(labels, source, resolved))
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    say(plans.render(plan, data_path=data_name, out=str(run.path)))
    if measured is None and "data.range" in choices and not run.exists:
        say(f"values   {choices['data.range'].reason}")
    elif measured is not None:
        say(f"values   {measured}")
    for text in filter(None, (known.said, *known.notes)):
        say(f"labels   {text}")
    if choices and dry_run:
        say(f"\n{auto.render(choices)}\n")
    if ignored:
        say(f"ignored  {'; '.join(f'{key}: {reason}' for key, reason in ignored.items())}")
    if dry_run:
        with torch.device("meta"):
            networks = build.build_student_teacher(resolved)
        _initialise(networks, resolved, say)
        say(f"\n{plans.render_schedules(plan)}\n\n{dump(resolved)}", end="")
        return RunResult(run.path, 0, plan.length.steps)

    finished = distributed.from_first(lambda: run.exists and run.read_summary().get("finished"))
    if finished:
        result = RunResult(run.path, plan.length.steps, plan.length.steps, summary=run.read_summary())
        say(f"\nThis run is finished: the backbone is {run.teacher}. For another one, choose another --out.")
        return result
    with _threads(plan.threads), out_of_memory_in_words(plan.device, partial(_ways_to_train, plan)):
        base = auto.BASE if choices else base_of(recipe)
        with _only_writer(run, say) as lock:
            # It may have begun, or gone on, since it was looked at.
            distributed.from_first(
                lambda: run.require_free_or_same(plan.recipe, identity, batch_size=plan.length.batch_size)
            )
            stop = Stop(plan.recipe.train.max_minutes, is_program=is_program)
            return _train(plan, source, known.values, run, identity, base, console, lock, stop)


@contextmanager
def _only_writer(run: RunDirectory, say: Callable[[str], object]) -> Iterator[RunLock | None]:
    """Hold the run's lock on the first rank; None on the others."""
    with ExitStack() as stack:
        lock = RunLock(run.path, say)

        def enter() -> None:
            check_writable(run.path)
            stack.enter_context(lock)

        distributed.from_first(enter)
        yield lock if distributed.is_first() else None


def _ways_to_train(plan: plans.Plan) -> list[str]:
    """What makes a run take less memory, in the order to try it."""
    ranks = distributed.world_size()
    return ways_to_save(plan.recipe, ranks=ranks, mode=plan.mode, device=plan.device, precision=plan.precision)


def _ways_to_embed(device: torch.device, size: int | None = None) -> list[str]:
    """As ``_ways_to_train``, where a backbone is used on images of a size, or of a run's."""
    ways = [] if size is None else [f"eval.size below {size}"]
    return ways + ([] if device.type == "cpu" else ["device=cpu"])


def _labels(labels: str | Path | None, source: Source, recipe: Recipe) -> Labels:
    """Of each image, if there is a table or a use for them."""
    if labels is not None:
        return label_table(labels, source)
    return labels_of(source) if recipe.probe.is_on else Labels(None, "")


def _train(
    plan: plans.Plan,
    source: Source,
    labels: list[str | None] | None,
    run: RunDirectory,
    identity: DataIdentity,
    base: str,
    console: Console,
    lock: RunLock | None,
    stop: Stop,
) -> RunResult:
    recipe, device = plan.recipe, plan.device
    image = build.image_input(recipe)
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    saved, found = distributed.from_first(lambda: _open_for_writing(run, plan))
    devices.keep_freed_memory(device)
    for sentence in found:
        say(f"\n{sentence}.")
    start = _Start(plan, say)
    state = start.state(images=len(source), fresh=saved is None)
    if saved is not None:
        state.load_values(checkpoint.load(run.path, saved, state.tensors(), verify=False))
        say(f"\nContinuing at step {state.step:,} of {plan.length.steps:,}.")
    if distributed.is_first():
        if changed := run.compare_stamps(stamps_of(source)):
            say(f"note     {changed}")
        run.list_skipped(state.bad_images.skipped.values(), first=True)
        run.record_start(
            recipe,
            identity,
            base=base,
            look=plan.data,
            device=device,
            precision=plan.precision,
            step=state.step,
            ranks=distributed.world_size(),
            mode=plan.mode,
            batch_size=plan.length.batch_size,
        )

    limit = recipe.train.max_minutes
    first_step = state.step
    files: list[JsonLines | TensorBoard] = []
    alarms: list[Alarm] = []
    if distributed.is_first():
        metrics_file = JsonLines(run.metrics, first_step=first_step)
        files.append(metrics_file)
        alarms.append(Alarm(flatten(recipe), metrics_file, say))
        if recipe.log.tensorboard:
            files.append(TensorBoard(run.path / "tensorboard", first_step=first_step))
    say("")
    with (
        stop,
        Display(console, total_steps=plan.length.steps, first_step=first_step) as display,
        Saver(run, state, plan, image, say) as saver,
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
        on_non_finite = NonFinitePolicy(run, state, plan, source, say)
        live = _live_report(run, plan, source, labels, say)
        last_step = LastStep(state)
        try:
            while True:
                batches = make_loader(
                    build.build_data(recipe, source, rank=distributed.rank(), world_size=distributed.world_size()),
                    start_step=state.next_batch,
                    end_step=plan.length.steps + state.passed_over,
                    num_workers=plan.num_workers,
                    pin_memory=device.type == "cuda",
                    timeout=recipe.data.timeout,
                )
                try:
                    loop.train(
                        state,
                        Interruptible(batches, stop),
                        plan.schedules,
                        seed=recipe.train.seed,
                        samples_per_step=plan.length.batch_size,
                        accumulate=recipe.train.accumulate,
                        parallel=start.parallel,
                        turn_tokens=turn_tokens(recipe.parallel, device, start.parallel.mode),
                        drop_path_rates=build.build_drop_path_rates(recipe),
                        clip_grad=recipe.optim.clip_grad,
                        prepare=last_step.remembered(partial(prepare, device=device, mean=image.mean, std=image.std)),
                        autocast=partial(devices.autocast, device, plan.precision),
                        hooks=[hook for hook in (lock, metrics_hook, OverflowAlarm(say), saver, live) if hook],
                        is_measured=metrics_hook.is_due,
                        should_stop=lambda: stop() or (probes is not None and probes.should_stop()),
                        on_skipped=lambda new: _tell_skipped(run, say, new),
                        on_non_finite=on_non_finite,
                    )
                    break
                except RollBackError:
                    saver.wait()
                    _roll_back(run, state, start)
                    for written in (*files, probes):
                        if written:
                            written.cut(state.step)
                    for alarm in alarms:
                        alarm.cut()
                except Exception as error:
                    last_step.save_after(error, saver, say)
                    if isinstance(error, BadImagesError):
                        raise _listed(error, run, state.bad_images, say) from error
                    raise
                finally:
                    batches.close()  # ends the workers
            saver.finish()
            reason = next((told for told in distributed.all_ranks(stop.reason) if told), None)
            hurried = reason not in (None, "max_minutes")  # whoever sent a signal is in a hurry
            reported = live is not None and not hurried and live.make()
        finally:
            for file in files:
                file.close()

    if reason is None and state.step < plan.length.steps:
        reason = "probe.patience"
    result = RunResult(run.path, state.step, plan.length.steps, reason, run.read_summary())
    trained = duration(state.seconds)
    if result.finished:
        waited = f"{saver.waited:.1f} s of waiting for checkpoints"
        say(f"\nDone: {state.step:,} steps in {trained} and {waited}. The backbone is {run.teacher}")
    else:
        why = f"by {reason}"
        if reason == "max_minutes":
            why = f"after {limit:g} minutes (train.max_minutes)"
        elif reason == "probe.patience":
            why = f"after {recipe.probe.patience} probes without a better one (probe.patience)"
        say(
            f"\nStopped {why} at step {state.step:,} of {plan.length.steps:,}, with a checkpoint. "
            + ("Raise probe.patience" if reason == "probe.patience" else "Run the same command again")
            + " to continue."
        )
    if probes and probes.best:
        say(f"The best k-NN while training, {probes.best['knn']:.1%}, is of step {probes.best['step']:,}: {run.best}")
    if reported:
        say(f"A page that shows the run: {run.report}")
    return result


def _live_report(
    run: RunDirectory, plan: plans.Plan, source: Source, labels: list[str | None] | None, say: Callable[[str], object]
) -> Live | None:
    """What writes the report while the run trains; None if the recipe does not want it."""
    minutes = plan.recipe.report.every_minutes
    if minutes is None or distributed.rank() != 0:
        return None

    def write() -> None:
        opened = open_run(run.path, data=source, labels=labels, device=plan.device, seconds=_LIVE_REPORT_SECONDS)
        write_text(run.report, pages.page([opened]))

    return Live(write, every_minutes=minutes, say=say)


def _probes(
    run: RunDirectory,
    state: loop.TrainState,
    plan: plans.Plan,
    image: weights.ImageInput,
    source: Source,
    labels: list[str | None] | None,
    say: Callable[[str], object],
) -> Probes | None:
    """What measures the teacher while it trains; None without labels, or where the recipe wants none."""
    settings = plan.recipe.probe
    if labels is None or not settings.is_on or not distributed.is_first():
        return None
    if plan.mode in ("fsdp", "hsdp"):
        say(f"probe    none, since no rank has the whole teacher (parallel.mode is {plan.mode})")
        return None
    architecture = build.vit_arguments(plan.recipe)
    reading = _reading(image, architecture["patch_size"], plan.recipe.eval, plan.device, plan.precision)
    seed = plan.recipe.train.seed
    try:
        probe = Probe(source, labels, max_images=settings.max_images, seed=seed, **reading)
    except DataError as error:
        say(f"probe    none, since the labels do not serve: {error}")
        return None

    told: list[features.Skipped] = []

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
        untrained = _untrained(architecture, seed).to(plan.device)
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


def _untrained(architecture: Mapping[str, Any], seed: int) -> VisionTransformer:
    """The network with random weights, to compare with; torch's global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # At the small LayerScale that training starts from, an untrained cls token hardly depends on the image.
        fresh = dict(architecture) | ({"layerscale": 1.0} if architecture["layerscale"] else {})
        return VisionTransformer(**fresh).eval()


def _open_for_writing(run: RunDirectory, plan: plans.Plan) -> tuple[int | None, list[str]]:
    """Sees that there is room for the run; ``checkpoint.newest`` of what is there, and what else is to be told."""
    run.require_space(int((plan.recipe.checkpoint.keep_last + 1) * _checkpoint_bytes(plan)))
    kept = checkpoint.clean(run.path)
    newest, damage = checkpoint.newest(run.path)
    return newest, [*kept, *(f"{sentence}. It is set aside; continuing from the one before it" for sentence in damage)]


class _Start:
    """Makes states at step 0, laid over the ranks.

    Args:
        plan: of the run.
        say: tells the user.
    """

    parallel: Parallel
    """How the networks of the first state are laid out."""

    def __init__(self, plan: plans.Plan, say: Callable[[str], object]) -> None:
        self.plan, self.say = plan, say

    def state(self, *, images: int, fresh: bool = True) -> loop.TrainState:
        """A state; unless it is ``fresh``, its weights do not matter."""
        recipe = self.plan.recipe
        return build.build_state(
            recipe,
            self.plan.device,
            images=images,
            precision=self.plan.precision,
            initialise=lambda networks: _initialise(networks, recipe, self.say) if fresh else None,
            lay_out=self._lay_out,
        )

    def _lay_out(self, networks: StudentTeacher) -> None:
        settings = self.plan.recipe.parallel
        parallel = wrap(
            networks,
            self.plan.mode,
            self.plan.device,
            activation_checkpointing=settings.activation_checkpointing,
            shard_ranks=settings.shard_ranks,
            some_frozen=self.plan.schedules.freeze_backbone_steps > 0,
            timeout=timedelta(minutes=settings.timeout_minutes),
        )
        if not hasattr(self, "parallel"):
            self.parallel = parallel


def _initialise(networks: StudentTeacher, recipe: Recipe, say: Callable[[str], object]) -> None:
    """Puts the weights that the recipe names into fresh networks; on the meta device, only checks that they fit."""
    if recipe.init.weights is None:
        return
    heads = build.vit_arguments(recipe)["num_heads"]
    given = load(recipe.init.weights, num_heads=heads)
    if recipe.init.architecture == "file":  # what was assumed about it may have been overridden
        network = build.vit_arguments(recipe)
        rule = {key: network[key] for key in _RESAMPLING if any(n.startswith(f"assumed {key}") for n in given.notes)}
        given = load(recipe.init.weights, num_heads=heads, **rule)
    notes = [*given.notes, *build.initialise(networks, given.network, recipe.init.in_chans)]
    if recipe.init.heads == "run":
        there = next(iter(networks.parameters())).device.type != "meta"
        notes.append(build.heads_of_run(networks, Path(recipe.init.weights)) if there else "heads of its checkpoint")
    for note in (f"from {recipe.init.weights}", *notes):
        say(f"init     {note}")


def resolve(
    recipe: str | Path | Recipe, keys: Mapping[str, Any], run: RunDirectory | None = None
) -> tuple[Recipe, dict[str, str]]:
    """A recipe as ``load_recipe`` gives it, completed from the file in ``init.weights`` if it says so.

    Args:
        recipe, keys: as for ``train``.
        run: if it has begun, it knows what was taken from the file.

    Raises:
        RecipeError: a key or value that cannot be, or no ``init.weights`` where it is needed.
        WeightsError: no readable backbone there.
    """
    flat = _flat_keys(keys)
    resolved, ignored = load_recipe(recipe, flat)
    if resolved.init.architecture == "recipe":
        return resolved, ignored
    if resolved.init.weights is None:
        raise RecipeError("this recipe continues from given weights: say which by init.weights=RUN|FILE")
    if run and run.exists:  # it may have begun long ago, from a file that is gone
        beneath = {key: value for key, value in flatten(run.recipe()).items() if key in build.ADOPTED}
    else:
        heads = resolved.student.num_heads
        given = load(resolved.init.weights, **({} if heads is None else {"num_heads": heads}))
        beneath = build.adopted(given, resolved)
    return load_recipe(recipe, flat, beneath=beneath)


def _roll_back(run: RunDirectory, state: loop.TrainState, start: _Start) -> None:
    """Takes the state of the newest checkpoint, or of the start, and leaves out the batches since."""
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


def replay(
    model: str | Path, batch: str | Path, *, precision: Literal["recipe", "fp32"] = "recipe"
) -> tuple[replays.Findings, replays.SavedBatch, int]:
    """Runs a saved batch again with the weights of the newest checkpoint that is not later.

    Args:
        model: the run directory.
        batch: a file of its folder ``non_finite``.
        precision: of the forward pass; ``recipe`` as in the run.

    Returns:
        What was found, the batch, and the step of the checkpoint; 0 without one, for the weights of the start.

    Raises:
        RunError: no run.
        WeightsError: no such batch, or one that does not fit the run.
    """
    run = RunDirectory(Path(model))
    if not run.exists:
        raise RunError(f"{model} is no run directory: it has no recipe.yaml and run.json")
    recipe = run.recipe()
    device = devices.resolve_device(recipe.device)
    ways = ["CUDA_VISIBLE_DEVICES= in front of the command, which computes on the CPU if the recipe says device=auto"]
    with devices.in_use(device, allow_tf32=recipe.allow_tf32), out_of_memory_in_words(device, lambda: ways):
        return _replay(run, recipe, device, Path(batch), precision)


def _replay(
    run: RunDirectory, recipe: Recipe, device: torch.device, batch: Path, precision: Literal["recipe", "fp32"]
) -> tuple[replays.Findings, replays.SavedBatch, int]:
    saved = replays.load_batch(batch)
    dtype = torch.float32 if precision == "fp32" else _precision_of(run, recipe, saved.step, device)
    images = run.info()["data"]["images"]
    state = build.build_state(recipe, device, images=images, precision=dtype)
    steps = [step for step in checkpoint.steps(run.path) if step <= saved.step]
    if steps:
        checkpoint.load(run.path, steps[-1], state.tensors())
    else:
        _initialise(state.student_teacher, recipe, lambda text: None)
    expected = (recipe.student.in_chans, recipe.crops.global_crops_size)
    came = tuple(saved.batch.global_crops.shape[1:3])
    if came != expected:
        raise WeightsError(f"{batch} is of another run: channels and size of its crops are {came}, not {expected}")

    length = build.run_length(recipe, images=images, world_size=run.ranks())
    schedules = build.build_schedules(recipe, length)
    rates = build.build_drop_path_rates(recipe)
    (kept,) = loop.kept_samples(
        state.student_teacher, saved.batch, rates, seed=recipe.train.seed, number=saved.number, rank=saved.rank
    )
    findings = replays.find(
        state.student_teacher,
        saved.batch.to(device),
        schedules(min(saved.step, length.steps - 1)),
        kept=kept,
        autocast=partial(devices.autocast, device, dtype),
    )
    return findings, saved, steps[-1] if steps else 0


def _precision_of(run: RunDirectory, recipe: Recipe, step: int, device: torch.device) -> torch.dtype:
    """In which the run made that step, perhaps on another device, or sharded: ``auto`` may mean another one here."""
    starts = [start for start in run.info()["starts"] if start["step"] <= step]
    if recipe.precision != "auto" or not starts:
        return devices.resolve_precision(recipe.precision, device)
    dtype: torch.dtype = getattr(torch, starts[-1]["precision"])
    return dtype


def bench(
    images: Any = None, recipe: str | Path | Recipe = "small", *, seconds: float = 10.0, **keys: Any
) -> benchmarks.Report:
    """Measures what limits a run on this machine, data or step; writes nothing.

    Args:
        images, recipe, keys: as for ``train``.
        seconds: for each of three measurements, roughly.

    Raises:
        RecipeError: a key or value that cannot be.
        DataError: no usable images.
    """
    refuse_second_start()
    images, keys = _images_and_keys(images, keys)
    source = _source_for_auto(images, keys) if recipe == "auto" else open_source(images)
    resolved = auto_recipe(source, **keys)[0] if recipe == "auto" else resolve(recipe, keys)[0]
    source = taken_apart(source, resolved.data.plane, resolved.student.in_chans)
    resolved, _ = _with_range(resolved, source)
    devices.use_expandable_segments(devices.rank_device(resolved.device))
    plan = _plan(build.with_batch_cut(resolved, world_size=1), source)
    with (
        devices.in_use(plan.device, allow_tf32=plan.recipe.allow_tf32),
        _threads(plan.threads),
        out_of_memory_in_words(plan.device, partial(_ways_to_train, plan)),
    ):
        return benchmarks.measure(plan, source, seconds=seconds)


def auto_recipe(images: Any = None, **keys: Any) -> tuple[Recipe, dict[str, auto.Choice]]:
    """The recipe that ``auto`` makes of images, and what it chose, with reasons.

    Args:
        images, keys: as for ``train``; what the user gives is not chosen, and other choices follow it. With
            ``train.max_minutes`` and no other length, a step is timed and the steps are as many as fit in.

    Raises:
        RecipeError: a key or value that cannot be.
        DataError: no usable images.
    """
    images, keys = _images_and_keys(images, keys)
    recipe, _, choices = _auto_recipe(_source_for_auto(images, keys), _flat_keys(keys), None)
    return recipe, choices


def _source_for_auto(images: Any, keys: Mapping[str, Any]) -> Source:
    """The images that ``auto`` looks at: with ``data.plane=each`` every plane of a file."""
    said, source = converted(_flat_keys(keys)), open_source(images)
    if said.get("data.plane") != "each":
        return source
    return taken_apart(source, "each", said.get("student.in_chans") or auto.guess_channels(source))


def _auto_recipe(
    source: Source, given: dict[str, Any], run: RunDirectory | None
) -> tuple[Recipe, dict[str, str], dict[str, auto.Choice]]:
    said = converted(given)
    begun = distributed.from_first(lambda: flatten(run.recipe()) if run and run.exists else None)
    channels = _auto_channels(source, said, begun)
    values_said = {f"data.{key}": said[f"data.{key}"] for key in _OF_VALUES if f"data.{key}" in said}
    one_for_all = {"data.mean": 0.5, "data.std": 0.5}
    base, _ = load_recipe(auto.BASE, values_said | one_for_all | {"student.in_chans": channels.count})
    base, measured = _with_range(base, source, run)
    decoding = build.image_input(base).decoding
    # Where none can be read, the second look says why.
    summary = auto.look(source, channels.count, decoding) or look_at_some(
        source, channels=channels.count, decoding=decoding
    )
    found: dict[str, auto.Choice] = {}
    if base.data.range is not None and "data.range" not in said:
        found["data.range"] = auto.Choice(base.data.range, str(measured or "as the run began"))
    device = devices.resolve_device(said.get("device", "auto"))
    statistics = None
    if begun is None:
        statistics = distributed.from_first(lambda: auto.measure(source, channels.count, decoding))
    else:  # what was measured may have been by another version, or without one
        kept = {key: auto.Choice(begun[key], "as the run began") for key in auto.OF_PIXELS}
        found |= {key: choice for key, choice in kept.items() if key not in said}
    facts = auto.facts_of(summary, str(device), distributed.world_size(), channels=channels, statistics=statistics)
    timed: dict[str, Any] = {}
    if said.get("train.max_minutes") and not any(said.get(key) for key in auto.LENGTHS):
        if begun is not None and begun["train.steps"] is not None:
            timed = {"train.steps": begun["train.steps"]}  # a second measurement would give another number
        else:
            sample = auto.choose(facts, given | {"train.steps": auto.LONG}) | found
            values = {key: choice.value for key, choice in sample.items()}
            recipe, _ = load_recipe(auto.BASE, values | given | {"train.steps": auto.LONG})
            # All ranks time it, since a step has to do with all of them, and the slowest is waited for.
            ways = partial(ways_to_save, recipe, ranks=distributed.world_size(), mode="none", device=device)
            with out_of_memory_in_words(device, ways):
                own = benchmarks.seconds_per_step(recipe, source)
            seconds = max(distributed.all_ranks(own))
            timed = {"train.steps": max(int(60 * said["train.max_minutes"] / seconds), 1)}
    choices = auto.choose(facts, given | timed) | found
    if timed:
        choices["train.steps"] = auto.Choice(timed["train.steps"], "as many as fit into train.max_minutes")
    recipe, ignored = load_recipe(auto.BASE, {key: choice.value for key, choice in choices.items()} | given)
    return recipe, ignored, choices


def _auto_channels(source: Source, said: Mapping[str, Any], begun: Mapping[str, Any] | None) -> auto.Channels:
    """How many channels ``auto`` reads images with: as the user says, as the run began, or as most of them have."""
    if given := said.get("student.in_chans"):
        return auto.Channels(given, "as given")
    if begun is not None:
        return auto.Channels(begun["student.in_chans"], "as the run began")
    return distributed.from_first(lambda: auto.channels_of(source))


_OF_VALUES = ("range", "sixteen_bit", "nodata", "fill", "plane", "max_pixels")
"""Keys of the section ``data`` that say how values become pixels."""


def _with_range(recipe: Recipe, source: Source, run: RunDirectory | None = None) -> tuple[Recipe, MeasuredRange | None]:
    """The recipe with a ``data.range`` for images of more than 8 bits, and how it was found if it was measured now.

    A run that has begun keeps what it had, also none, as runs of earlier versions have.
    """
    data = recipe.data
    if data.range is not None or data.sixteen_bit == "minmax":
        return recipe, None
    if run is not None and run.exists:
        return replace(recipe, data=replace(data, range=run.recipe().data.range)), None
    measured = measure_range(
        source,
        channels=recipe.student.in_chans,
        max_pixels=data.max_pixels,
        nodata=data.nodata,
        plane=plane_of(data.plane),
    )
    if measured is None:
        return recipe, None
    return replace(recipe, data=replace(data, range=measured.range)), measured


def _plan(recipe: Recipe, source: Source) -> plans.Plan:
    image = build.image_input(recipe)
    reduction = partial(build.least_reduction, recipe)
    summary = look_at_some(source, channels=image.in_chans, decoding=image.decoding, reduction=reduction)
    return plans.make_plan(recipe, summary)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load(path: str | Path, **given: Any) -> weights.Backbone:
    """The backbone of a run directory, of its ``teacher.safetensors``, or of a file of another library.

    A torch module: called on images [B, C, H, W] as its ``preprocess`` makes them, it gives cls tokens [B, D];
    ``forward_features`` and ``get_intermediate_layers`` give the others. It is in evaluation mode, without gradients,
    on the CPU.

    Args:
        path: a run; a file in the official, timm's or Hugging Face's layout; a Hugging Face folder.
        given: what a foreign file cannot say: arguments of ``VisionTransformer`` such as ``num_heads=6``; ``mean`` and
            ``std``; and how values become levels: ``range``, ``sixteen_bit``, ``nodata``, ``fill``, ``plane``,
            ``max_pixels``, as the keys of ``data.`` say it.

    Raises:
        WeightsError: there is none, it cannot be read, or it says otherwise.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (file := RunDirectory(path).teacher).exists():
        path = file
    return weights.load_backbone(path, given)


def export(
    model: str | Path | weights.Backbone,
    to: str,
    out: str | Path,
    *,
    size: tuple[int, int] | int | None = None,
    bake: bool = False,
    **keys: Any,
) -> exports.Report:
    """Writes a backbone for another library, and compares that library's outputs with ours before it is there.

    Args:
        model: a run directory, on whose images it is compared if they are still there; a weights file; or what
            ``load`` gave. Those are compared on random images.
        to: ``safetensors``, ``official``, ``timm``, ``hf`` or ``onnx``.
        out: the file, or for ``hf`` the folder; it must not be there yet.
        size: height and width, or both, in pixels: a size to compare at, and what ``bake`` is for.
        bake: make position embeddings for ``size`` alone, so that no library resamples them by a rule of its own.
        keys: what a foreign file cannot say, such as ``student={"num_heads": 6}`` and ``data={"mean": 0.5}``.

    Raises:
        ExportError: the format cannot hold it, a package is missing, or outputs differ.
        WeightsError: no readable backbone.
        RunError: ``out`` is there already or cannot be written.
    """
    refuse_second_start()
    backbone, other = _opened(model, keys)
    if other:
        raise RecipeError(f"{', '.join(other)}: export takes only {', '.join(_UNSAID)}")
    images, shown = _examples(model, backbone)
    size = (size, size) if isinstance(size, int) else size
    with features.placed(backbone, torch.device("cpu")):  # where the other library's outputs are, too
        return exports.make(backbone, to, Path(out), images, shown=shown, size=size, bake=bake)


def _examples(
    model: str | Path | weights.Backbone, backbone: weights.Backbone
) -> tuple[Callable[[tuple[int, int]], torch.Tensor], str]:
    """Two normalised images [2, C, H, W] of any size, and what they are: of the run, else random."""
    image = backbone.image
    run = None if isinstance(model, weights.Backbone) else RunDirectory(Path(model))
    if run and run.exists:
        try:
            source = _images_of(image, run.info()["data"]["path"])
            pixels = []
            for index in (0, len(source) // 2):
                name = printable(source.name(index))
                pixels.append(decode(source.item(index).image, channels=image.in_chans, **image.decoding))
        except ImageError as error:
            shown = f"random images, because {name} of the run's cannot be read ({error})"
        except DataError as error:
            shown = f"random images, because the run's are not found ({error})"
        else:

            def read(size: tuple[int, int]) -> torch.Tensor:
                resized = torch.stack([torch.from_numpy(resize(p, *size)).permute(2, 0, 1) for p in pixels])
                return normalize(resized, image.mean, image.std)

            return read, "images of the run"
    else:
        shown = "random images"

    def draw(size: tuple[int, int]) -> torch.Tensor:
        return torch.randn(2, image.in_chans, *size, generator=torch.Generator().manual_seed(0))

    return draw, shown


def read_image(
    image: Any, channels: int | None = None, **keys: Any
) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """The pixels that training sees of an image, before any crop: uint8 [H, W, C].

    Args:
        image: a path, encoded bytes, an array [H, W] or [H, W, C], a tensor [C, H, W] or a PIL image.
        channels: C; by default as many as the image has.
        keys: those of the section ``data`` that say how values become pixels: ``range``, ``sixteen_bit``, ``nodata``,
            ``fill``, ``plane`` and ``max_pixels``. Without ``range`` none is measured.

    Raises:
        ImageError: no readable image, or one that the rules refuse; see ``dinoforge.data.decode``.
        RecipeError: other keys, or values that they cannot have.
    """
    said = {name.removeprefix("data."): value for name, value in _flat_keys(keys).items()}
    if other := [name for name in said if name not in _OF_VALUES]:
        raise RecipeError(f"{', '.join(other)}: expected {', '.join(_OF_VALUES)}")
    if said.get("plane") == "each":
        raise RecipeError(
            "plane='each' makes several images of a file, and this is one image: give the number of a plane from 0, "
            "or 'max'"
        )
    if said.get("range") is not None:
        said["range"] = np.ravel(said["range"]).tolist()
    if isinstance(said.get("plane"), int):
        said["plane"] = str(said["plane"])
    pairs = {"student.in_chans": max(len(said.get("range") or ()) // 2, 1), "data.mean": 0.5, "data.std": 0.5}
    checked, _ = load_recipe(auto.BASE, {f"data.{name}": value for name, value in said.items()} | pairs)
    if isinstance(image, str | Path):
        path = image
        try:
            image = Path(path).read_bytes()
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    pixels: np.ndarray[Any, Any] = decode(image, channels=channels, **build.image_input(checked).decoding)
    return pixels


def embed(
    model: str | Path | weights.Backbone, images: Any = None, **keys: Any
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The cls token of every image, as an array [N, D], in the order of the source.

    Args:
        model: a run directory, a weights file, or what ``load`` gave.
        images: as for ``train``.
        keys: ``eval`` keys, such as ``eval={"size": 224}``; ``device`` and ``precision``; what a foreign file cannot
            say, such as ``data={"mean": 0.5}``.

    Raises:
        DataError: an image cannot be read; the row of each must be where it is expected.
    """
    refuse_second_start()
    images, keys = _images_and_keys(images, keys)
    backbone, keys = _opened(model, keys)
    source = _images_of(backbone.image, images)
    _say_unused_range(backbone.image, source)
    reading = _reading(backbone.image, backbone.network.patch_size, *_eval_keys(Eval(), keys))
    ways = partial(_ways_to_embed, reading["device"], reading["size"])
    with devices.in_use(reading["device"]), out_of_memory_in_words(reading["device"], ways):
        found = features.extract(backbone.network, source, range(len(source)), **reading)
    if found.skipped:
        told = by_reason((0, one.name, one.reason) for one in found.skipped)
        raise DataError(f"{len(found.skipped)} of {len(source)} images cannot be read: {told}")
    return found.cls.numpy()


def write_features(
    model: str | Path | weights.Backbone,
    images: Any,
    out: str | Path,
    *,
    patches: bool = False,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    **keys: Any,
) -> embedding.Embedded:
    """Writes names and features of every image to a file; the same call goes on with what another one left.

    Args:
        model, images, keys: as for ``embed``.
        out: ``….parquet`` with columns ``name``, ``cls`` and, if asked, ``patches``; or ``….npy`` with the cls tokens,
            and beside it ``….names.txt`` and ``….patches.npy``.
        patches: whether patch tokens are written, too.
        on_progress: told images done and images in all, every few seconds.

    Raises:
        RunError: ``out`` is there already, was begun with something else, or cannot be written.
        ExportError: another kind of file, or pyarrow is missing.
        DataError: not one image can be read; single ones get no row and are listed in ``….skipped.txt``.
        WeightsError: no readable backbone.
    """
    refuse_second_start()
    backbone, keys = _opened(model, keys)
    settings, device, precision = _eval_keys(Eval(), keys)
    reading = _reading(backbone.image, backbone.network.patch_size, settings, device, precision)
    meaning = {
        "model": "given" if isinstance(model, weights.Backbone) else str(model),
        "step": backbone.step,
        "size": reading["size"],
        "crop": settings.crop,
        "mean": list(reading["mean"]),
        "std": list(reading["std"]),
    }
    source = _images_of(backbone.image, images)
    _say_unused_range(backbone.image, source)
    ways = partial(_ways_to_embed, device, reading["size"])
    with devices.in_use(device), out_of_memory_in_words(device, ways):
        return embedding.write_features(
            backbone.network,
            source,
            Path(out),
            patches=patches,
            meaning=meaning,
            on_progress=on_progress,
            **reading,
        )


def evaluate_knn(
    model: str | Path,
    images: Any = None,
    *,
    test: Any = None,
    labels: str | Path | None = None,
    shots: int | None = None,
    seed: int = 0,
    **keys: Any,
) -> tuple[KnnResult, list[features.Skipped]]:
    """Weighted k-NN on frozen features, beside raw pixels and the untrained network.

    Args:
        model: a run directory, whose ``summary.json`` then gets the result unless ``shots`` are given, or a weights
            file.
        images: labelled ones; without ``test``, five stratified 80/20 splits of them.
        test: images to test on, with neighbours from ``images``.
        labels: a CSV file with names and labels; by default the names of sub-folders.
        shots: at most so many labelled images of each class; by default the whole training part.
        seed: of the splits, the shots and the untrained network.
        keys: ``eval`` keys; ``device`` and ``precision``.

    Raises:
        DataError: images without labels, or fewer than two classes.
        WeightsError: no readable backbone.
    """
    run, setup = _evaluation(model, images, test, labels, shots, seed, keys)
    ways = partial(_ways_to_embed, setup["device"], setup["size"])
    with devices.in_use(setup["device"]), out_of_memory_in_words(setup["device"], ways):
        result, skipped = run_knn(**setup)
    _say_duplicates(result)
    if run and shots is None:
        try:
            run.write_summary(dict(result))
        except RunError as error:  # a run that one may only read; what was computed is not lost
            print(f"summary  not written: {error}", file=sys.stderr)
    return result, skipped


def evaluate_classifier(
    method: Method,
    model: str | Path,
    images: Any = None,
    *,
    test: Any = None,
    labels: str | Path | None = None,
    shots: int | None = None,
    seed: int = 0,
    **keys: Any,
) -> tuple[ClassifierResult, list[features.Skipped]]:
    """A linear classifier or logistic regression on frozen features, beside raw pixels and the untrained network.

    Args:
        method: ``linear`` or ``logreg``.
        model, images, test, labels, shots, seed, keys: see ``evaluate_knn``; the summary is left alone.

    Raises:
        DataError: images without labels, fewer than two classes, too few shots, or scikit-learn is missing.
        WeightsError: no readable backbone.
    """
    _, setup = _evaluation(model, images, test, labels, shots, seed, keys)
    ways = partial(_ways_to_embed, setup["device"], setup["size"])
    with devices.in_use(setup["device"]), out_of_memory_in_words(setup["device"], ways):
        result, skipped = run_classifier(method, **setup)
    _say_duplicates(result)
    return result, skipped


def _say_duplicates(result: KnnResult | ClassifierResult) -> None:
    if found := overlap.describe(result["duplicates"], splits=result["splits"]):
        print(f"test     {found}", file=sys.stderr)


def _evaluation(
    model: str | Path,
    images: Any,
    test: Any,
    labels: str | Path | None,
    shots: int | None,
    seed: int,
    keys: Mapping[str, Any],
) -> tuple[RunDirectory | None, dict[str, Any]]:
    """The run, if ``model`` is one, and the keywords of every evaluation."""
    refuse_second_start()
    if shots is not None and shots < 2:
        raise DataError(f"--shots {shots}: expected at least 2 labelled images of each class")
    images, keys = _images_and_keys(images, dict(keys))
    backbone, keys = _opened(model, keys)
    run = RunDirectory(Path(model)) if Path(model).is_dir() else None
    run = run if run and run.exists else None
    settings, device, precision = _eval_keys(run.recipe().eval if run else Eval(), keys)

    def labelled(images: Any) -> tuple[Source, list[str | None] | None]:
        source = _images_of(backbone.image, images)
        _say_unused_range(backbone.image, source)
        found = labels_of(source) if labels is None else label_table(labels, source)
        if found.values is None:
            why = found.said.removeprefix("none: ")
            raise DataError(
                f"the images have no labels: {why}. Expected a sub-folder for each class, or a labels file (--labels)"
            )
        said.extend((found.said, *found.notes))
        return source, found.values

    said: list[str] = []
    source, source_labels = labelled(images)
    setup = {
        "backbone": backbone.network,
        "untrained": _untrained(backbone.architecture, seed),
        "source": source,
        "labels": source_labels,
        "labels_from": "folders" if labels is None else Path(labels).name,
        "test": None if test is None else labelled(test),
        "shots": shots,
        "seed": seed,
        **_reading(backbone.image, backbone.network.patch_size, settings, device, precision),
    }
    for text in said:
        print(f"labels   {text}", file=sys.stderr)
    return run, setup


def inspect(
    images: Any,
    *,
    labels: str | Path | None = None,
    report: str | Path | None = None,
    sample: int = inspections.IMAGES,
    seconds: float = inspections.SECONDS,
    **keys: Any,
) -> Inspection:
    """What images are, and what training would make of them, from a bounded sample; see docs/inspect.md.

    Args:
        images: as for ``train``.
        labels: a CSV file with names and labels; by default the names of sub-folders.
        report: an HTML page to write, with crops as the network sees them.
        sample: images that are looked at, at most.
        seconds: that looking may take; listing a folder comes on top.
        keys: recipe keys, as for ``train``; what they do not say is as recipe ``auto`` chooses it.

    Raises:
        DataError: no images, or no folder. What is wrong with some of them is a finding.
        RecipeError: a key or value that cannot be.
        RunError: the page cannot be written.
    """
    refuse_second_start()
    found = inspections.inspect(
        images,
        labels=labels,
        keys=_flat_keys(keys),
        images=sample,
        seconds=seconds,
        with_crops=report is not None,
    )
    if report is not None:
        write_text(Path(report), inspection_pages.page(found))
    return found


def doctor(path: str | Path) -> list[Finding]:
    """What is wrong with a run, from its metrics and its recipe alone; an empty list means nothing.

    Raises:
        RunError: no run, or one that has logged nothing yet.
    """
    run = RunDirectory(Path(path))
    if not run.exists:
        raise RunError(f"{run.path} holds no run: expected a folder with recipe.yaml and run.json, as train makes it")
    metrics, _ = report_figures.read_metrics(run.metrics)
    if not metrics:
        raise RunError(f"{run.metrics} holds no numbers yet: the run logs every {run.recipe().log.every_steps} steps")
    return diagnose(metrics, flatten(run.recipe()))


def report(
    *paths: str | Path,
    data: Any = None,
    labels: str | Path | None = None,
    figures: str | Path | None = None,
    channels: Sequence[int] | None = None,
    device: str = "auto",
) -> reports.Written:
    """Writes ``report.html`` into a run, or ``comparison.html`` into the first of several.

    Args:
        paths: run directories.
        data: the images, where the run does not find them any more.
        labels: a CSV file with names and labels; by default the names of sub-folders.
        figures: a folder for the figures as PNG and SVG; of one run.
        channels: that pictures show, one as grey or three as red, green and blue, from 0; by default the recipe's
            ``report.channels``.
        device: where the network runs; ``auto``: CUDA, then MPS, then the CPU.

    Raises:
        RunError: a folder that is no run, or cannot be written.
        DataError: labels that do not fit the images.
        DinoforgeError: figures, but matplotlib is missing.
        RecipeError: channels that the images do not have.
    """
    refuse_second_start()
    if not paths:
        raise RunError("a report needs at least one run directory")
    alone = len(paths) == 1
    if figures is not None and not alone:
        raise RunError("figures are those of one run: give one run directory")
    where = devices.resolve_device(device)
    runs = [open_run(path, data=data, labels=labels, pictures=alone, device=where) for path in paths]
    if channels is not None:
        for run in runs:
            require_shown_channels(channels, run.recipe["student.in_chans"], "channels")
        runs = [replace(run, recipe={**run.recipe, "report.channels": tuple(channels)}) for run in runs]
    out = RunDirectory(Path(paths[0])).report if alone else Path(paths[0]) / "comparison.html"
    with devices.in_use(where), out_of_memory_in_words(where, partial(_ways_to_embed, where)):
        write_text(out, pages.page(runs))
        written, missing = plots.write(runs[0], Path(figures)) if figures is not None else ([], [])
    return reports.Written(out, written, missing)


def open_run(
    path: str | Path,
    *,
    data: Any = None,
    labels: str | Path | list[str | None] | None = None,
    pictures: bool = True,
    device: torch.device | None = None,
    seconds: float | None = None,
) -> reports.Run:
    """A run as ``dinoforge.report.plots`` draws it: its recipe, metrics, verdict, images and network.

    Args:
        path: the run directory.
        data, labels: as for ``report``; labels also as a list, in the order of the images.
        pictures: look for images and network, too.
        device: where the network runs; by default CUDA, then MPS, then the CPU.
        seconds: that reading images may take; by default as long as it takes.

    Raises:
        RunError: no run.
        DataError: labels that do not fit the images.
    """
    run = RunDirectory(Path(path))
    if not run.exists:
        raise RunError(f"{run.path} holds no run: expected a folder with recipe.yaml and run.json, as train makes it")
    recipe, info = run.recipe(), run.info()
    missing: list[str] = []
    source: Source | None = None
    if pictures:
        try:
            source = open_source(info["data"]["path"] if data is None else data)
            source = taken_apart(source, recipe.data.plane, recipe.student.in_chans)
        except DinoforgeError as error:
            missing.append(f"There are no pictures, because the images are not found: {error}.")
    backbone = None
    if pictures and run.teacher.exists():
        try:
            backbone = load(run.path)
        except WeightsError as error:
            missing.append(f"There are no maps of features: {error}.")
    elif pictures:
        missing.append("There are no maps of features: the run has no checkpoint yet.")
    metrics, unreadable = report_figures.read_metrics(run.metrics)
    if unreadable:
        missing.append(f"{unreadable} lines of metrics.jsonl cannot be read and are left out.")
    listed = run.skipped.read_text(encoding="utf-8", errors="replace") if run.skipped.exists() else ""
    skipped = [line for line in listed.split("\n") if line]
    base = str(info.get("base"))
    if base not in recipe_names():  # a run of another version
        base = "dinov2"
    groups: tuple[dict[str, str], ...] = ()
    masks: dict[str, str] = {}
    try:
        batch = run.read_summary().get("batch_size")
        groups, masks = explain.tables(recipe, images=info["data"]["images"], batch=batch)
    except DinoforgeError as error:
        missing.append(f"Parameter groups and masks are left out: {error}.")
    known = labels if isinstance(labels, list) else None
    if source is not None and isinstance(labels, str | Path):
        known = label_table(labels, source).values
    return reports.Run(
        name=str(run.path),
        recipe=flatten(recipe),
        base=base,
        differences=differences(load_recipe(base)[0], recipe, ignore=("report.",)),
        info=info,
        summary=run.read_summary(),
        metrics=metrics,
        checkpoints=tuple(checkpoint.steps(run.path)),
        findings=tuple((found.step, found.sentence) for found in diagnose(metrics, flatten(recipe))),
        groups=groups,
        masks=masks,
        skipped=tuple(skipped),
        data=None if source is None else build.build_data(build.in_one(recipe, run.batch_size()), source),
        labels=known,
        backbone=backbone,
        device=device or devices.resolve_device("auto"),
        seconds=seconds,
        missing=tuple(missing),
    )


_RESAMPLING = ("interpolate_antialias", "interpolate_offset")
_UNSAID = (
    "student.num_heads",
    *(f"student.{key}" for key in _RESAMPLING),
    *(f"data.{key}" for key in weights.IMAGE_KEYS),
)
"""Keys of what a foreign weights file cannot say."""


def _opened(model: str | Path | weights.Backbone, keys: Mapping[str, Any]) -> tuple[weights.Backbone, dict[str, Any]]:
    """The backbone, and the keys that say nothing about it; what was assumed about a file is printed."""
    flat = _flat_keys(keys)
    said = {key: flat.pop(key) for key in _UNSAID if key in flat}
    if isinstance(model, weights.Backbone):
        if said:
            raise RecipeError(f"{', '.join(said)}: give it to load(), which made this backbone")
        return model, flat
    # Checked as part of a recipe that has as many channels as there are values.
    plain = {"data.mean": 0.5, "data.std": 0.5}
    values = [len(v) for key in plain if isinstance(v := said.get(key), list | tuple)]
    if isinstance(v := said.get("data.range"), list | tuple):
        values.append(len(v) // 2)
    checked, _ = load_recipe("dinov2", plain | {"student.in_chans": max(values, default=1)} | said)
    known = flatten(checked)
    backbone = load(model, **{key.split(".")[1]: known[key] for key in said})
    for note in backbone.notes:
        print(f"weights  {note}", file=sys.stderr)
    return backbone, flat


def _say_unused_range(image: weights.ImageInput, source: Source) -> None:
    """Warn of images whose values would become a few dark levels, since the backbone's file says no range."""
    if image.range is not None or image.sixteen_bit == "minmax":
        return
    plane = plane_of(image.plane)
    found = measure_range(
        source, channels=image.in_chans, max_pixels=image.max_pixels, nodata=image.nodata, plane=plane
    )
    if found is not None:
        low, high = found.found
        print(
            f"values   {found.kind}, {low:,.5g} to {high:,.5g} in {found.images} sampled images, but this backbone's "
            f"file says no range for them: {found.key} spreads them over all levels",
            file=sys.stderr,
        )


def _images_of(image: weights.ImageInput, images: Any) -> Source:
    """Images as a backbone knows them: every plane of a file where it was trained on such."""
    return taken_apart(open_source(images), image.plane, image.in_chans)


def _flat_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in keys.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _eval_keys(settings: Eval, keys: Mapping[str, Any]) -> tuple[Eval, torch.device, torch.dtype]:
    """How images are shown, where the backbone computes, and in which precision."""
    flat = _flat_keys(keys)
    where = {key: flat.pop(key) for key in ("device", "precision") if key in flat}
    if other := [key for key in flat if not key.startswith("eval.")]:
        raise RecipeError(
            f"{', '.join(other)}: expected eval.size, eval.crop, device, precision, or one of {', '.join(_UNSAID)}"
        )
    # Checked as part of a recipe whose patch divides every size; the backbone's own is checked on use.
    checked, _ = load_recipe("dinov2", flat | where | {"student.patch_size": 1})
    device = devices.resolve_device(checked.device)
    if (note := devices.note_of_fallback(checked.device, device)) and devices.has_gpu():
        print(f"device   {note}", file=sys.stderr)
    given = {key.removeprefix("eval."): getattr(checked.eval, key[5:]) for key in flat}
    return replace(settings, **given), device, devices.resolve_precision(checked.precision, device)


def _reading(
    image: weights.ImageInput, patch: int, settings: Eval, device: torch.device, precision: torch.dtype
) -> features.Reading:
    """How images are shown to a backbone with patches of that side, and where it computes."""
    size = settings.size or image.size
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise RecipeError(
            f"eval.size={size} is not a multiple of the patch size {patch}: the nearest that is, is {near}"
        )
    return features.Reading(
        size=size,
        channels=image.in_chans,
        mean=image.mean,
        std=image.std,
        center_crop=settings.crop,
        device=device,
        autocast=None if precision is torch.float32 else precision,
        batch_size=64,
        num_workers=0,
        **image.decoding,
    )


def _checkpoint_bytes(plan: plans.Plan) -> float:
    return sum(plan.parameters.values()) * 4 * 4 * 1.05  # student, teacher, two moments


def _tell_skipped(run: RunDirectory, say: Callable[[str], object], new: Sequence[Skipped]) -> None:
    if not distributed.is_first():
        return
    for _, name, reason in new[:_TOLD_AT_ONCE]:
        say(f"skipped  {name}: {reason}")
    if len(new) > _TOLD_AT_ONCE:
        say(f"skipped  and {len(new) - _TOLD_AT_ONCE:,} more, which {run.skipped} lists")
    run.list_skipped((name, reason) for _, name, reason in new)


def _listed(error: BadImagesError, run: RunDirectory, known: BadImages, say: Callable[[str], object]) -> BadImagesError:
    """The error of too many unreadable images, after each of them was listed."""
    new = {index: (name, reason) for index, name, reason in error.skipped if index not in known.skipped}
    if distributed.is_first():
        _tell_skipped(run, say, [(index, *told) for index, told in new.items()])
    elif error.of_one_rank:  # the first does not know of them
        run.list_skipped(new.values())
    return BadImagesError(f"{error}. Each one is listed in {run.skipped}", error.skipped)
