"""Train a backbone: resolve the arguments of the call, then run the training on all ranks."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dinoforge.builders.lengths import with_batch_cut
from dinoforge.builders.networks import build_student_teacher
from dinoforge.commands.given import flat_keys, images_and_keys
from dinoforge.commands.recipe import choose_recipe, plan_of, resolve, source_for_auto, with_range
from dinoforge.commands.run import RunResult, run_training
from dinoforge.commands.start import take_weights
from dinoforge.data.labels import Labels, label_table, labels_of
from dinoforge.data.planes import taken_apart
from dinoforge.data.preflight import refuse_second_start
from dinoforge.data.sources import Source, open_source
from dinoforge.planning import auto
from dinoforge.planning.dry_run import plan_text, schedules_text, ways_to_train
from dinoforge.recipe.load import base_of, converted, dump, load_recipe
from dinoforge.recipe.schema import Recipe, flatten
from dinoforge.runs.directory import DataIdentity, RunDirectory, check_writable
from dinoforge.runs.lock import RunLock
from dinoforge.runs.stopping import Stop
from dinoforge.system import device as devices
from dinoforge.system import distributed
from dinoforge.system.device import threads
from dinoforge.system.out_of_memory import out_of_memory_in_words
from dinoforge.system.terminal import patient


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
    """Pretrain a backbone on images without labels; calling again with the same arguments continues the run.

    Args:
        images: A folder of images, walked recursively; or any object with ``__len__`` and ``__getitem__`` that returns
            images (arrays [H, W, C], tensors [C, H, W], PIL images, paths, bytes) or pairs (image, label). The images
            can also be passed as ``data=``.
        recipe: A recipe's name, a YAML file, or a recipe.
        out: The run directory; by default ``runs/`` with the names of folder and recipe.
        labels: A CSV file with names and labels; by default, the names of sub-folders. Training never sees labels. If
            there are labels, the teacher is measured during training; see docs/evaluation.md.
        dry_run: Whether to only print what would run. Then nothing is written.
        console: The console to print to; by default, the terminal.
        keys: The recipe keys, with sections as mappings (``train={"steps": 1000}``, ``data={"sixteen_bit": "minmax"}``)
            or dotted (``**{"train.steps": 1000}``).

    Raises:
        RecipeError: A key or value is invalid; raised before work starts.
        DataError: There are no usable images, or too many unreadable ones.
        RunError: ``out`` belongs to another run, or cannot be written.
        TrainingError: Losses or gradients stay non-finite; see docs/reliability.md.
        OutOfMemoryError: The device has too little memory. If there is one process, the finished steps are saved.
        LostRankError: Another rank failed, was killed, or cannot be reached.
        KeyboardInterrupt: A signal stopped the run, after it saved a checkpoint. The rest of a script does not run.
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
    """Run ``train`` as a program: a second Ctrl-C ends the process at once, and a signal raises no exception.

    Args:
        images, recipe, out, labels, dry_run, keys: See ``train``.

    Raises:
        The errors of ``train``, except KeyboardInterrupt.
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
    """Run ``train`` on the device of this rank, in a process group with the other ranks if there are any."""
    refuse_second_start()
    images, keys = images_and_keys(images, keys)
    said = _said(recipe, flat_keys(keys))
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


def _said(recipe: str | Path | Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe by dotted keys, before the images are known."""
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
    """Run ``train`` on all ranks of the process group."""
    data_name = str(images) if isinstance(images, str | os.PathLike) else type(images).__name__
    if out is None:
        recipe_name = "custom" if isinstance(recipe, Recipe) else Path(recipe).stem
        out = Path("runs", f"{Path(os.path.abspath(data_name)).name}-{recipe_name}")
    run = RunDirectory(Path(out).expanduser())
    choices: dict[str, auto.Choice] = {}
    if recipe == "auto":
        source = source_for_auto(images, keys)
        resolved, ignored, choices = choose_recipe(source, flat_keys(keys), run)
    else:
        resolved, ignored = distributed.from_first(lambda: resolve(recipe, keys, run))
        source = open_source(images)
    source = taken_apart(source, resolved.data.plane, resolved.student.in_chans)
    resolved = with_batch_cut(resolved, world_size=distributed.world_size())
    resolved, measured = distributed.from_first(lambda: with_range(resolved, source, run))
    identity = DataIdentity(os.path.abspath(data_name), len(source), source.fingerprint())
    plan = plan_of(resolved, source)
    # Only the first rank checks, since the other ranks could see files that it writes.
    distributed.from_first(lambda: run.require_free_or_same(resolved, identity, batch_size=plan.length.batch_size))
    known = distributed.from_first(lambda: _labels(labels, source, resolved))
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    say(plan_text(plan, data_path=data_name, out=str(run.path)))
    if measured is None and "data.range" in choices and not run.exists:
        say(f"values   {choices['data.range'].reason}")
    elif measured is not None:
        say(f"values   {measured}")
    for text in filter(None, (known.said, *known.notes)):
        say(f"labels   {text}")
    if choices and dry_run:
        say(f"\n{auto.choices_text(choices)}\n")
    if ignored:
        say(f"ignored  {'; '.join(f'{key}: {reason}' for key, reason in ignored.items())}")
    if dry_run:
        with torch.device("meta"):
            networks = build_student_teacher(resolved)
        take_weights(networks, resolved, say)
        say(f"\n{schedules_text(plan)}\n\n{dump(resolved)}", end="")
        return RunResult(run.path, 0, plan.length.steps)

    finished = distributed.from_first(lambda: run.exists and run.read_summary().get("finished"))
    if finished:
        result = RunResult(run.path, plan.length.steps, plan.length.steps, summary=run.read_summary())
        say(f"\nThis run is finished: the backbone is {run.teacher}. For another one, choose another --out.")
        return result
    with threads(plan.threads), out_of_memory_in_words(plan.device, partial(ways_to_train, plan)):
        base = auto.BASE if choices else base_of(recipe)
        with _only_writer(run, say) as lock:
            # Another process may have started or continued the run since the first check.
            distributed.from_first(
                lambda: run.require_free_or_same(plan.recipe, identity, batch_size=plan.length.batch_size)
            )
            stop = Stop(plan.recipe.train.max_minutes, is_program=is_program)
            return run_training(plan, source, known.values, run, identity, base, console, lock, stop)


@contextmanager
def _only_writer(run: RunDirectory, say: Callable[[str], object]) -> Iterator[RunLock | None]:
    """Hold the run's lock on the first rank; yield None on the others."""
    with ExitStack() as stack:
        lock = RunLock(run.path, say)

        def enter() -> None:
            check_writable(run.path)
            stack.enter_context(lock)

        distributed.from_first(enter)
        yield lock if distributed.is_first() else None


def _labels(labels: str | Path | None, source: Source, recipe: Recipe) -> Labels:
    """Read the labels of the images, if there is a table of labels or the probe needs them."""
    if labels is not None:
        return label_table(labels, source)
    return labels_of(source) if recipe.probe.is_on else Labels(None, "")
