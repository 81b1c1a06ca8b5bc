"""Measure a backbone on labelled images."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dinoforge.commands.backbone import (
    eval_settings,
    images_of,
    open_backbone,
    reading_of,
    say_unused_range,
    untrained_network,
    ways_to_embed,
)
from dinoforge.commands.given import images_and_keys
from dinoforge.data.labels import label_table, labels_of
from dinoforge.data.preflight import refuse_second_start
from dinoforge.data.sources import Source
from dinoforge.errors import DataError, RunError
from dinoforge.evaluation import overlap
from dinoforge.evaluation.classifiers import ClassifierResult, Method, run_classifier
from dinoforge.evaluation.knn import KnnResult, run_knn
from dinoforge.features import extract
from dinoforge.recipe.schema import Eval
from dinoforge.runs.directory import RunDirectory
from dinoforge.system import device as devices
from dinoforge.system.out_of_memory import out_of_memory_in_words


def evaluate_knn(
    model: str | Path,
    images: Any = None,
    *,
    test: Any = None,
    labels: str | Path | None = None,
    shots: int | None = None,
    seed: int = 0,
    **keys: Any,
) -> tuple[KnnResult, list[extract.Skipped]]:
    """Evaluate weighted k-NN on frozen features, beside raw pixels and the untrained network.

    Args:
        model: A run directory or a weights file. The result is written to the ``summary.json`` of a run directory,
            unless ``shots`` are given.
        images: The labelled images. Without ``test``, the result is over five stratified 80/20 splits of them.
        test: The images to test on, with neighbours from ``images``.
        labels: A CSV file with names and labels; by default, the names of sub-folders.
        shots: The maximum number of labelled images of each class; by default, the whole training part.
        seed: The seed of the splits, the shots and the untrained network.
        keys: The ``eval`` keys; ``device`` and ``precision``.

    Returns:
        The result, and the unreadable images that were left out.

    Raises:
        DataError: Images have no labels, or there are fewer than two classes.
        WeightsError: There is no readable backbone.
    """
    run, setup = _evaluation(model, images, test, labels, shots, seed, keys)
    ways = partial(ways_to_embed, setup["device"], setup["size"])
    with devices.in_use(setup["device"]), out_of_memory_in_words(setup["device"], ways):
        result, skipped = run_knn(**setup)
    _say_duplicates(result)
    if run and shots is None:
        try:
            run.write_summary(dict(result))
        except RunError as error:  # the run may be read-only; the result must not be lost
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
) -> tuple[ClassifierResult, list[extract.Skipped]]:
    """Evaluate a linear classifier or logistic regression on frozen features, beside raw pixels and untrained features.

    The summary of a run does not change.

    Args:
        method: ``linear`` or ``logreg``.
        model, images, test, labels, shots, seed, keys: See ``evaluate_knn``.

    Returns:
        The result, and the unreadable images that were left out.

    Raises:
        DataError: Images have no labels, there are fewer than two classes or too few shots, or scikit-learn is missing.
        WeightsError: There is no readable backbone.
    """
    _, setup = _evaluation(model, images, test, labels, shots, seed, keys)
    ways = partial(ways_to_embed, setup["device"], setup["size"])
    with devices.in_use(setup["device"]), out_of_memory_in_words(setup["device"], ways):
        result, skipped = run_classifier(method, **setup)
    _say_duplicates(result)
    return result, skipped


def _say_duplicates(result: KnnResult | ClassifierResult) -> None:
    if found := overlap.duplicates_in_words(result["duplicates"], splits=result["splits"]):
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
    """Return the run, if ``model`` is one, and the keyword arguments that all evaluations share."""
    refuse_second_start()
    if shots is not None and shots < 2:
        raise DataError(f"--shots {shots}: expected at least 2 labelled images of each class")
    images, keys = images_and_keys(images, dict(keys))
    backbone, keys = open_backbone(model, keys)
    run = RunDirectory(Path(model)) if Path(model).is_dir() else None
    run = run if run and run.exists else None
    settings, device, precision = eval_settings(run.recipe().eval if run else Eval(), keys)

    def labelled(images: Any) -> tuple[Source, list[str | None] | None]:
        source = images_of(backbone.image, images)
        say_unused_range(backbone.image, source)
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
        "untrained": untrained_network(backbone.architecture, seed),
        "source": source,
        "labels": source_labels,
        "labels_from": "folders" if labels is None else Path(labels).name,
        "test": None if test is None else labelled(test),
        "shots": shots,
        "seed": seed,
        **reading_of(backbone.image, backbone.network.patch_size, settings, device, precision),
    }
    for text in said:
        print(f"labels   {text}", file=sys.stderr)
    return run, setup
