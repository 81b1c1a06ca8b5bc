"""A run as a report sees it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dinoforge.data.batches import TrainingData
from dinoforge.errors import DataError
from dinoforge.report.analysis import Seen, seen_crops
from dinoforge.report.learned import EXAMPLES, Learned, study, within
from dinoforge.report.verdict import Verdict, judge
from dinoforge.weights.backbone import Backbone


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    page: Path
    figures: list[Path]
    missing: list[str]  # figures that could not be made, and why


@dataclass(frozen=True)
class ReportedRun:
    """A run as its report needs it; what the run does not have (yet) is None or empty.

    Args:
        name: Name of the run directory.
        recipe: Values of the recipe by dotted key.
        base: Name of the recipe that the run's was made from.
        differences: Values in which the recipe differs from ``base``, by key: (there, here).
        info: Content of ``run.json``.
        summary: Content of ``summary.json``.
        metrics: Columns of ``metrics.jsonl``, as ``runs.metrics.read_metrics`` returns them.
        checkpoints: Steps of the checkpoints that are kept.
        findings: Step and sentence of each thing that is wrong.
        groups: Parameter groups at the last step, each a mapping from column to value.
        masks: What was measured on the masks, in words.
        skipped: A line for each image that could not be read.
        data: Batches of the training.
        labels: Labels of the images, where the data itself has none; None for an image without one.
        backbone: The teacher of the newest checkpoint.
        device: The device that computes.
        seconds: Seconds that reading images may take.
        missing: Sentences on what is missing.
    """

    name: str
    recipe: Mapping[str, Any]
    base: str
    differences: Mapping[str, tuple[Any, Any]]
    info: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Mapping[str, Sequence[float | None]]
    checkpoints: tuple[int, ...] = ()
    findings: tuple[tuple[int, str], ...] = ()
    groups: tuple[Mapping[str, str], ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    data: TrainingData | None = None
    labels: Sequence[str | None] | None = None
    backbone: Backbone | None = None
    device: torch.device | None = None
    seconds: float | None = None
    missing: tuple[str, ...] = ()

    @property
    def shown_channels(self) -> tuple[int, ...] | None:
        """The channels that pictures show; see ``dinoforge.report.analysis.displayed``."""
        chosen = self.recipe.get("report.channels")
        return None if chosen is None else tuple(chosen)

    @cached_property
    def verdict(self) -> Verdict:
        """Whether it learns, as far as that was measured."""
        step = self.backbone.step if self.backbone else None
        return judge(self.metrics, self.summary, checkpoints=self.checkpoints, teacher_step=step)

    @cached_property
    def seen(self) -> list[Seen]:
        """Crops and masks of the first images of the run's first step.

        Raises:
            DataError: The images are not there, or none of them can be read.
        """
        data = self.data
        if data is None:
            raise DataError(f"{self.name}: the images are not there")
        places = range(min(EXAMPLES, data.batch_size))
        look = partial(seen_crops, data, 0)
        found = within(self.seconds, lambda: [look(place) for place in places], "images of the first step were")
        kept = [seen for seen in found if seen is not None]
        if not kept:
            raise DataError("the images of the first step cannot be read")
        return kept

    @cached_property
    def learned(self) -> Learned:
        """The EMA teacher's features of a sample of the images, analysed.

        Raises:
            DataError: There is no teacher yet, or the images are not there.
            WeightsError: The teacher's features are not finite.
        """
        if self.data is None or self.backbone is None:
            raise DataError(f"{self.name}: " + ("the images are not there" if self.backbone else "no checkpoint yet"))
        return study(self.backbone, self.data.source, labels=self.labels, device=self.device, seconds=self.seconds)
