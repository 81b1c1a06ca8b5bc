"""Report what a run has learned, and diagnose its problems."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinoforge.builders.data import build_data
from dinoforge.builders.lengths import in_one
from dinoforge.commands.backbone import load, ways_to_embed
from dinoforge.data.labels import label_table
from dinoforge.data.planes import taken_apart
from dinoforge.data.preflight import refuse_second_start
from dinoforge.data.sources import Source, open_source
from dinoforge.errors import DinoforgeError, RunError, WeightsError
from dinoforge.health.rules import Finding, diagnose
from dinoforge.planning.explain import tables
from dinoforge.recipe.checks import require_shown_channels
from dinoforge.recipe.load import load_recipe, recipe_names
from dinoforge.recipe.schema import differences, flatten
from dinoforge.report import page as pages
from dinoforge.report import plots
from dinoforge.report.run import ReportedRun, Written
from dinoforge.runs import checkpoint
from dinoforge.runs.directory import RunDirectory
from dinoforge.runs.metrics import read_metrics
from dinoforge.system import device as devices
from dinoforge.system.files import write_text
from dinoforge.system.out_of_memory import out_of_memory_in_words


def doctor(path: str | Path) -> list[Finding]:
    """Diagnose a run from its metrics and its recipe alone; an empty list means that no problem was found.

    Args:
        path: The run directory.

    Raises:
        RunError: There is no run, or the run has not logged any metrics yet.
    """
    run = RunDirectory(Path(path))
    if not run.exists:
        raise RunError(f"{run.path} holds no run: expected a folder with recipe.yaml and run.json, as train makes it")
    metrics, _ = read_metrics(run.metrics)
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
) -> Written:
    """Write ``report.html`` into a run, or ``comparison.html`` into the first of several runs.

    Args:
        paths: The run directories.
        data: The images, if they are no longer where the run found them.
        labels: A CSV file with names and labels; by default, the names of sub-folders.
        figures: A folder for the figures of a single run, as PNG and SVG.
        channels: The channels that pictures show, from 0: one as grey, or three as red, green and blue; by default, the
            recipe's ``report.channels``.
        device: The device of the network; ``auto``: CUDA, then MPS, then the CPU.

    Raises:
        RunError: A folder holds no run, or cannot be written.
        DataError: The labels do not fit the images.
        DinoforgeError: ``figures`` is given, but matplotlib is missing.
        RecipeError: The images do not have these channels.
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
    with devices.in_use(where), out_of_memory_in_words(where, partial(ways_to_embed, where)):
        write_text(out, pages.page(runs))
        written, missing = plots.write(runs[0], Path(figures)) if figures is not None else ([], [])
    return Written(out, written, missing)


def open_run(
    path: str | Path,
    *,
    data: Any = None,
    labels: str | Path | list[str | None] | None = None,
    pictures: bool = True,
    device: torch.device | None = None,
    seconds: float | None = None,
) -> ReportedRun:
    """Open a run for ``dinoforge.report.plots``: its recipe, metrics, findings, images and network.

    Args:
        path: The run directory.
        data: The images, as for ``report``.
        labels: The labels, as for ``report``, or as a list in the order of the images.
        pictures: Whether to open the images and the network, too.
        device: The device of the network; by default CUDA, then MPS, then the CPU.
        seconds: The time limit for reading images; None for no limit.

    Raises:
        RunError: The directory holds no run.
        DataError: The labels do not fit the images.
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
    metrics, unreadable = read_metrics(run.metrics)
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
        groups, masks = tables(recipe, images=info["data"]["images"], batch=batch)
    except DinoforgeError as error:
        missing.append(f"Parameter groups and masks are left out: {error}.")
    known = labels if isinstance(labels, list) else None
    if source is not None and isinstance(labels, str | Path):
        known = label_table(labels, source).values
    return ReportedRun(
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
        data=None if source is None else build_data(in_one(recipe, run.batch_size()), source),
        labels=known,
        backbone=backbone,
        device=device or devices.resolve_device("auto"),
        seconds=seconds,
        missing=tuple(missing),
    )
