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
    """What a report has become."""

    page: Path
    figures: list[Path]
    missing: list[str]  # figures that could not be made, and why


@dataclass(frozen=True)
class Run:
    """What a report is made from. None, or what is empty, is what the run does not have (yet).

    Args:
        name: its directory.
        recipe: the flat keys.
        base: the recipe that it was made from.
        differences: from ``base``, by key: (there, here).
        info: ``run.json``.
        summary: ``summary.json``.
        metrics: see ``figures.read_metrics``.
        checkpoints: steps of those that are kept.
        findings: step and sentence of each thing that is wrong.
        groups: parameter groups at the last step: a mapping from column to value for each.
        masks: what was measured on the masks, in words.
        skipped: lines on images that could not be read.
        data: the training's batches.
        labels: of the images, where they are not in the data itself; None for those without one.
        backbone: the EMA teacher of the newest checkpoint.
        device: where to compute.
        seconds: that reading images may take.
        missing: sentences on what is not there.
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
        """The channels that pictures show; see ``figures.displayed``."""
        chosen = self.recipe.get("report.channels")
        return None if chosen is None else tuple(chosen)

    @cached_property
    def verdict(self) -> Verdict:
        """Whether it learns, as far as that was measured."""
        step = self.backbone.step if self.backbone else None
        return judge(self.metrics, self.summary, checkpoints=self.checkpoints, teacher_step=step)

    @cached_property
    def seen(self) -> list[Seen]:
        """What the network saw of the first images of its first step.

        Raises:
            DataError: the images are not there, or none of them can be read.
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
        """What the EMA teacher makes of a sample of the images.

        Raises:
            DataError: there is no teacher yet, or the images are not there.
            WeightsError: its features are not finite.
        """
        if self.data is None or self.backbone is None:
            raise DataError(f"{self.name}: " + ("the images are not there" if self.backbone else "no checkpoint yet"))
        return study(self.backbone, self.data.source, labels=self.labels, device=self.device, seconds=self.seconds)
