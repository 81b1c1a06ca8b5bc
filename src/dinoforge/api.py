"""dinoforge in Python: what the command line calls."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from dinoforge import checkpoint, features, weights
from dinoforge.config import Eval, Recipe, dump, load_recipe
from dinoforge.data.batch import Batch, prepare
from dinoforge.data.loader import STOP_SIGNALS, Skipped, inspect, make_loader
from dinoforge.data.sources import Source, open_source, read_labels
from dinoforge.errors import DataError, RecipeError, TrainingError
from dinoforge.evaluation.knn import KnnResult, run_knn
from dinoforge.files import write_atomically
from dinoforge.models.vit import VisionTransformer
from dinoforge.training import bench as benchmarks
from dinoforge.training import build, loop
from dinoforge.training import device as devices
from dinoforge.training import plan as plans
from dinoforge.training.metrics import Display, JsonLines, MetricsHook, Sink, TensorBoard, check_writable, duration
from dinoforge.training.run import DataIdentity, RunDirectory


@dataclass(frozen=True)
class RunResult:
    """How a call of ``train`` ended."""

    out: Path
    steps: int
    total_steps: int
    stopped_by: str | None = None  # None: finished; SIGINT, SIGTERM or max_minutes
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.steps >= self.total_steps


def train(
    data: Any,
    recipe: str | Path | Recipe = "small",
    out: str | Path | None = None,
    *,
    dry_run: bool = False,
    console: Console | None = None,
    **keys: Any,
) -> RunResult:
    """Pretrains a backbone on images without labels; calling it again with the same arguments continues the run.

    Args:
        data: a folder of images, walked recursively; or any object with ``__len__`` and ``__getitem__`` that gives
            images (arrays [H, W, C], tensors [C, H, W], PIL images, paths, bytes) or (image, label).
        recipe: a name, a YAML file, or a recipe.
        out: the run directory; by default ``runs/`` with the names of folder and recipe.
        dry_run: only say what would run; writes nothing.
        console: where to print; by default the terminal.
        keys: recipe keys: sections as mappings (``train={"steps": 1000}``), or dotted ``**{"train.steps": 1000}``.

    Raises:
        RecipeError: a key or value that cannot be; before work starts.
        DataError: no usable images; too many unreadable ones.
        RunError: ``out`` is another run's, or cannot be written.
        TrainingError: a loss or gradient that is not finite.
    """
    console = console or Console()
    resolved, ignored = load_recipe(recipe, _flat_keys(keys))
    source = open_source(data)
    data_name = str(data) if isinstance(data, str | os.PathLike) else type(data).__name__
    if out is None:
        recipe_name = "custom" if isinstance(recipe, Recipe) else Path(recipe).stem
        out = Path("runs", f"{Path(os.path.abspath(data_name)).name}-{recipe_name}")
    run = RunDirectory(Path(out))
    identity = DataIdentity(os.path.abspath(data_name), len(source), source.fingerprint())
    run.require_free_or_same(resolved, identity)

    plan = _plan(resolved, source)
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    say(plans.render(plan, data_path=data_name, out=str(run.path)))
    if ignored:
        say(f"ignored  {'; '.join(f'{key}: {reason}' for key, reason in ignored.items())}")
    if dry_run:
        say(f"\n{plans.render_schedules(plan)}\n\n{dump(resolved)}", end="")
        return RunResult(run.path, 0, plan.length.steps)

    finished = run.exists and run.read_summary().get("finished")
    if finished:
        result = RunResult(run.path, plan.length.steps, plan.length.steps, summary=run.read_summary())
        say(f"\nThis run is finished: the backbone is {run.teacher}. For another one, choose another --out.")
        return result
    with _threads(plan.threads):
        return _train(plan, source, run, identity, console)


def _train(
    plan: plans.Plan,
    source: Source,
    run: RunDirectory,
    identity: DataIdentity,
    console: Console,
) -> RunResult:
    recipe, device = plan.recipe, plan.device
    image = _image_input(recipe)
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    check_writable(run.path)
    run.require_space(int((recipe.checkpoint.keep_last + 1) * _checkpoint_bytes(plan)))
    devices.keep_freed_memory(device)
    state = build.build_state(recipe, device, images=len(source))
    saved, damage = checkpoint.load_newest(run.path, device)
    for sentence in damage:
        say(f"\n{sentence}. It is set aside; continuing from the one before it.")
    if saved is None and recipe.init.weights is not None:
        given = load(recipe.init.weights)
        reshaped = build.initialise(state.student_teacher, given.network, recipe.init.in_chans)
        for note in (f"from {recipe.init.weights}", *given.notes, *reshaped):
            say(f"init     {note}")
    if saved is not None:
        state.load_state_dict(saved)
        say(f"\nContinuing at step {state.step:,} of {plan.length.steps:,}.")
    run.list_skipped(state.bad_images.skipped.values(), first=True)
    run.record_start(recipe, identity, device=device, precision=plan.precision, step=state.step)

    saver = _Saver(run, state, plan, image)
    limit = recipe.train.max_minutes
    first_step = state.step
    batches = make_loader(
        build.build_data(recipe, source),
        start_step=first_step,
        end_step=plan.length.steps,
        num_workers=plan.num_workers,
        pin_memory=device.type == "cuda",
    )
    metrics_file = JsonLines(run.metrics, first_step=first_step)
    sinks: list[Sink] = [metrics_file]
    board = TensorBoard(run.path / "tensorboard", first_step=first_step) if recipe.log.tensorboard else None
    if board:
        sinks.append(board)
    say("")
    with _Stop(limit) as stop, Display(console, total_steps=plan.length.steps, first_step=first_step) as display:
        metrics_hook = MetricsHook(
            sinks,
            display,
            every_steps=recipe.log.every_steps,
            total_steps=plan.length.steps,
            batch_size=plan.length.batch_size,
            device=device,
        )
        try:
            loop.train(
                state,
                batches,
                plan.schedules,
                seed=recipe.train.seed,
                samples_per_step=plan.length.batch_size,
                drop_path_rates=build.build_drop_path_rates(recipe),
                clip_grad=recipe.optim.clip_grad,
                prepare=partial(prepare, device=device, mean=image.mean, std=image.std),
                autocast=partial(devices.autocast, device, plan.precision),
                hooks=[metrics_hook, saver],
                should_stop=stop,
                on_skipped=lambda new: _tell_skipped(run, say, new),
                on_non_finite=partial(_stop_on_non_finite, run),
            )
            saver.save()
        finally:
            batches.close()  # ends the workers
            metrics_file.close()
            if board:
                board.close()

    result = RunResult(run.path, state.step, plan.length.steps, stop.reason, run.read_summary())
    trained = duration(state.seconds)
    if result.finished:
        say(f"\nDone: {state.step:,} steps in {trained}. The backbone is {run.teacher}")
    else:
        why = f"after {limit:g} minutes (train.max_minutes)" if stop.reason == "max_minutes" else f"by {stop.reason}"
        say(
            f"\nStopped {why} at step {state.step:,} of {plan.length.steps:,}, with a checkpoint. "
            "Run the same command again to continue."
        )
    return result


def bench(data: Any, recipe: str | Path | Recipe = "small", *, seconds: float = 10.0, **keys: Any) -> benchmarks.Report:
    """Measures what limits a run on this machine, data or step; writes nothing.

    Args:
        data, recipe, keys: as for ``train``.
        seconds: for each of three measurements, roughly.

    Raises:
        RecipeError: a key or value that cannot be.
        DataError: no usable images.
    """
    resolved, _ = load_recipe(recipe, _flat_keys(keys))
    source = open_source(data)
    plan = _plan(resolved, source)
    with _threads(plan.threads):
        return benchmarks.measure(plan, source, seconds=seconds)


def _plan(recipe: Recipe, source: Source) -> plans.Plan:
    image = _image_input(recipe)
    summary = inspect(source, channels=image.in_chans, sixteen_bit=image.sixteen_bit, max_pixels=image.max_pixels)
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

    ``load(path).network(images)`` takes normalised float32 images [B, C, H, W] and gives ``Tokens``.

    Args:
        path: a run; a file in the official, timm's or Hugging Face's layout; a Hugging Face folder.
        given: arguments of ``VisionTransformer`` that a foreign file cannot say, such as ``num_heads=6``.

    Raises:
        WeightsError: there is none, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir() and (file := RunDirectory(path).teacher).exists():
        path = file
    return weights.load_backbone(path, given)


def embed(model: str | Path | weights.Backbone, data: Any, **keys: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The cls token of every image, as an array [N, D], in the order of the source.

    Args:
        model: a run directory, a weights file, or what ``load`` gave.
        data: as for ``train``.
        keys: ``eval`` keys, such as ``eval={"size": 224}``.

    Raises:
        DataError: an image cannot be read; the row of each must be where it is expected.
    """
    backbone = model if isinstance(model, weights.Backbone) else load(model)
    source = open_source(data)
    reading = _reading(backbone, _eval_keys(Eval(), keys))
    found = features.extract(backbone.network, source, range(len(source)), **reading)
    if found.skipped:
        first = found.skipped[0]
        raise DataError(f"{len(found.skipped)} images cannot be read, first {first.name}: {first.reason}")
    return found.cls.numpy()


def evaluate_knn(
    model: str | Path,
    data: Any,
    *,
    test: Any = None,
    labels: str | Path | None = None,
    seed: int = 0,
    **keys: Any,
) -> tuple[KnnResult, list[features.Skipped]]:
    """Weighted k-NN on frozen features, beside raw pixels and the untrained network.

    Args:
        model: a run directory, whose ``summary.json`` then gets the result, or a weights file.
        data: labelled images; without ``test``, five stratified 80/20 splits of them.
        test: images to test on, with neighbours from ``data``.
        labels: a CSV file with names and labels; by default the names of sub-folders.
        seed: of the splits and of the untrained network.
        keys: ``eval`` keys.

    Raises:
        DataError: images without labels, or fewer than two classes.
        WeightsError: no readable backbone.
    """
    backbone = load(model)
    for note in backbone.notes:
        print(f"weights  {note}", file=sys.stderr)
    run = RunDirectory(Path(model)) if Path(model).is_dir() else None
    settings = _eval_keys(run.recipe().eval if run and run.exists else Eval(), keys)

    def labelled(images: Any) -> tuple[Source, list[str] | None]:
        source = open_source(images)
        return source, source.labels() if labels is None else read_labels(labels, source)

    source, source_labels = labelled(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # At the small LayerScale that training starts from, an untrained cls token hardly depends on the image.
        fresh = backbone.architecture | ({"layerscale": 1.0} if backbone.architecture["layerscale"] else {})
        untrained = VisionTransformer(**fresh).eval()
    result, skipped = run_knn(
        backbone.network,
        untrained,
        source,
        source_labels,
        labels_from="folders" if labels is None else Path(labels).name,
        test=None if test is None else labelled(test),
        seed=seed,
        **_reading(backbone, settings),
    )
    if run and run.exists:
        run.write_summary(dict(result))
    return result, skipped


def _flat_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in keys.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _eval_keys(settings: Eval, keys: Mapping[str, Any]) -> Eval:
    flat = _flat_keys(keys)
    if other := [key for key in flat if not key.startswith("eval.")]:
        raise RecipeError(f"{', '.join(other)}: evaluation takes only eval.size and eval.crop")
    # Checked as part of a recipe whose patch divides every size; the backbone's own is checked on use.
    checked, _ = load_recipe("dinov2", flat | {"student.patch_size": 1})
    return replace(settings, **{key.removeprefix("eval."): getattr(checked.eval, key[5:]) for key in flat})


def _image_input(recipe: Recipe) -> weights.ImageInput:
    return weights.ImageInput(
        size=recipe.crops.global_crops_size,
        in_chans=recipe.student.in_chans,
        mean=recipe.data.mean,
        std=recipe.data.std,
        sixteen_bit=recipe.data.sixteen_bit,
        max_pixels=recipe.data.max_pixels,
    )


def _reading(backbone: weights.Backbone, settings: Eval) -> features.Reading:
    """How images are shown to a backbone."""
    image = backbone.image
    size = settings.size or image.size
    patch = backbone.network.patch_size
    if size % patch:
        raise RecipeError(f"eval.size={size} is not a multiple of the patch size {patch}")
    device = devices.resolve_device("auto")
    dtype = devices.resolve_precision("auto", device)
    return features.Reading(
        size=size,
        channels=image.in_chans,
        mean=image.mean,
        std=image.std,
        sixteen_bit=image.sixteen_bit,
        max_pixels=image.max_pixels,
        center_crop=settings.crop,
        device=device,
        autocast=None if dtype is torch.float32 else dtype,
        num_workers=0,
    )


def _checkpoint_bytes(plan: plans.Plan) -> float:
    return sum(plan.parameters.values()) * 4 * 4 * 1.05  # student, teacher, two moments


class _Saver:
    """Saves the run every so many steps or minutes."""

    def __init__(self, run: RunDirectory, state: loop.TrainState, plan: plans.Plan, image: weights.ImageInput) -> None:
        self.run, self.state, self.plan, self.image = run, state, plan, image
        self.settings = plan.recipe.checkpoint
        self._saved_step: int | None = None
        self._saved_time = time.monotonic()

    def __call__(self, report: loop.StepReport) -> None:
        every, minutes = self.settings.every_steps, self.settings.every_minutes
        due = (every and self.state.step % every == 0) or (
            minutes and time.monotonic() - self._saved_time >= minutes * 60
        )
        if due:
            self.save()

    def save(self) -> None:
        """Saves the state, the backbone and the summary, unless that is done for this step."""
        if self._saved_step == self.state.step:
            return
        step = self.state.step
        checkpoint.save(self.run.path, step, self.state.state_dict())
        checkpoint.prune(self.run.path, keep_last=self.settings.keep_last, keep_every=self.settings.keep_every)
        architecture = build.vit_arguments(self.plan.recipe)
        network = self.state.student_teacher.teacher["backbone"]
        assert isinstance(network, VisionTransformer)
        weights.save_backbone(self.run.teacher, weights.Backbone(network, architecture, self.image, step))
        self.run.write_summary(
            {
                "finished": step >= self.plan.length.steps,
                "steps": step,
                "total_steps": self.plan.length.steps,
                "images": self.plan.length.images,
                "batch_size": self.plan.length.batch_size,
                "train_seconds": round(self.state.seconds, 1),
                "images_per_second": round(step * self.plan.length.batch_size / max(self.state.seconds, 1e-9), 1),
                "skipped_images": len(self.state.bad_images.skipped),
            }
        )
        self._saved_step, self._saved_time = step, time.monotonic()


class _Stop:
    """Whether training should stop: on Ctrl-C and other signals, after a time. A second Ctrl-C leaves at once."""

    def __init__(self, minutes: float | None) -> None:
        self.reason: str | None = None
        self._deadline = None if minutes is None else time.monotonic() + minutes * 60
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "max_minutes"
        return self.reason is not None

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            os._exit(130)  # files are written aside and renamed, so nothing is left half-written
        self.reason = signal.Signals(number).name


def _tell_skipped(run: RunDirectory, say: Any, new: list[Skipped]) -> None:
    for _, name, reason in new:
        say(f"skipped  {name}: {reason}")
    run.list_skipped((name, reason) for _, name, reason in new)


def _stop_on_non_finite(run: RunDirectory, batch: Batch, step: int, values: dict[str, float]) -> NoReturn:
    path = run.path / f"non_finite_step_{step}.safetensors"
    tensors = {k: v.detach().cpu().contiguous() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    raise TrainingError(
        f"loss or gradient is not finite at step {step}: {terms}. Nothing was updated; the batch is saved as {path}. "
        "A lower optim.base_lr, a longer optim.warmup_length or precision=fp32 are the usual remedies; the run "
        "continues from its last checkpoint."
    )
