"""A look at a bounded sample of a data set: one decode of each image, of which everything is learned."""

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoforge.config import Recipe, converted, load_recipe
from dinoforge.data import duplicates
from dinoforge.data.duplicates import Fingerprint, fingerprint
from dinoforge.data.kinds import EMPTY, IMAGE_EXTENSIONS, extension, kind_of
from dinoforge.data.labels import Labels, label_table, labels_of
from dinoforge.data.loader import DataSummary
from dinoforge.data.looks import Look, look
from dinoforge.data.names import printable
from dinoforge.data.planes import taken_apart
from dinoforge.data.sources import FolderSource, Item, OnePlane, RawImage, Source, open_source
from dinoforge.data.statistics import PixelStatistics
from dinoforge.data.survey import MeasuredRange, measure_range
from dinoforge.data.values import Decoding, plane_of
from dinoforge.errors import DataError, ImageError
from dinoforge.inspection import advice, copies, troubles
from dinoforge.inspection.gather import Array, Gathered, Seen, Unread, seen
from dinoforge.inspection.result import (
    Copies,
    Cost,
    Crops,
    Extreme,
    Inspection,
    LabelsFound,
    Pixels,
    Sampling,
    Sizes,
    Spread,
)
from dinoforge.inspection.sample import FIRST, places
from dinoforge.report import figures
from dinoforge.report.page import picture
from dinoforge.training import auto, build
from dinoforge.training.device import resolve_device

IMAGES, SECONDS = 1024, 15.0
"""By default so many images are looked at, in so many seconds."""

_FOR_FILES, _FOR_RANGE, _FOR_CROPS = 0.3, 0.2, 0.2  # shares of the seconds
_SHEETS = 12  # images whose crops are shown
_SHOWN = 256  # pixels along the longer side of a shown image


def inspect(
    data: Any,
    *,
    labels: str | Path | None = None,
    keys: Mapping[str, Any] | None = None,
    images: int = IMAGES,
    seconds: float = SECONDS,
    with_crops: bool = False,
) -> Inspection:
    """Look at a bounded sample of a data set; see docs/inspect.md.

    Args:
        data: As `open_source` takes it.
        labels: A table of labels; by default the names of sub-folders.
        keys: The recipe's keys, dotted.
        images: That are looked at, at most, at least 1.
        seconds: That looking may take, above 0; listing the names of a folder, and the image at which time is up, come
            on top.
        with_crops: Also make pictures of crops.

    Raises:
        DataError: The data cannot be used at all. What is wrong with some images is a finding.
        RecipeError: Keys that cannot be.
    """
    if images < 1 or seconds <= 0:
        raise DataError(f"expected at least 1 image and more than 0 seconds, got {images} and {seconds:g}")
    start = time.monotonic()
    said = converted(dict(keys or {}))
    files = open_source(data)
    quick = start + seconds * _FOR_RANGE
    given = said.get("student.in_chans")
    why = auto.Channels(given, "as given") if given else auto.channels_of(_Quick(files, quick))
    channels = why.count
    source = taken_apart(files, said.get("data.plane"), channels)
    base, measured = _with_range(said, channels, source, quick)
    decoding = build.image_input(base).decoding
    same_files: list[copies.Group] = []
    compared, total = 0, None
    if isinstance(files, FolderSource):
        same_files, compared, total = copies.same_files(files, time.monotonic() + seconds * _FOR_FILES)
    end = start + seconds * (1 - _FOR_CROPS * with_crops)
    pass_ = _Pass(source, channels, decoding, images)
    pass_.run(end)

    known = _labels(labels, source)
    found = _told(files, source, known, same_files, compared, pass_)
    pixels = pass_.pixels()
    choices = _choices(pass_, said, why, measured)
    recipe, _ = load_recipe(auto.BASE, {key: one.value for key, one in choices.items()} | dict(keys or {}))
    sheets, shown = _sheets(recipe, source, time.monotonic() + max(seconds * _FOR_CROPS, 1)) if with_crops else ((), "")
    values = pass_.gathered.values()
    advised = [
        *advice.from_auto(choices),
        *advice.further(pass_.seen, len(pass_.unread), values, pixels, recipe, said, choices),
    ]
    called = printable(os.fspath(data)) if isinstance(data, str | os.PathLike) else type(data).__name__
    names = [source.name(index) for index in range(len(source))]
    odd = [text for name in names if (text := printable(name)) != name]
    labelled = _labels_found(known, names)
    facts = troubles.Facts(
        seen=pass_.seen,
        unread=pass_.unread,
        values=values,
        labels=labelled,
        copies=found,
        left_out=dict(getattr(source, "left_out", {})),
        odd_names=len(odd),
        odd_examples=tuple(odd[:5]),
        channels=channels,
        plane=base.data.plane,
        fill=base.data.fill,
        measured="" if base.data.range is None else f"data.range={advice.in_words(base.data.range)}",
        range_by="given" if measured is None else "measured",
        is_minmax=base.data.sixteen_bit == "minmax" and base.data.range is None,
        side=recipe.crops.global_crops_size,
    )
    return Inspection(
        data=called,
        images=len(source),
        bytes=total,
        sampling=Sampling(
            images=len(pass_.seen) + len(pass_.unread),
            of=len(source),
            limit=images,
            seconds=round(time.monotonic() - start, 2),
            seconds_limit=seconds,
            time_was_up=pass_.time_was_up,
        ),
        ends=_counted(f".{printable(extension(_file_name(name)))}" for name in names),
        kinds=_counted([*(one.kind for one in pass_.seen), *(one.kind or "unknown" for one in pass_.unread)]),
        modes=_counted(one.mode for one in pass_.seen),
        left_out=facts.left_out,
        unreadable=tuple((one.name, one.reason) for one in pass_.unread),
        refused=tuple((one.name, one.refused) for one in pass_.seen if one.refused),
        profiles=_counted(one.profile for one in pass_.seen if one.profile),
        orientations=_counted(str(one.orientation) for one in pass_.seen if one.orientation is not None),
        sizes=_sizes(pass_.seen),
        values=values,
        no_data=pass_.gathered.no_data,
        labels=labelled,
        copies=found,
        pixels=pixels,
        cost=_cost(pass_),
        troubles=troubles.find(facts),
        channels=recipe.student.in_chans,
        advice=advice.with_notes(advised),
        command=advice.command(called, said, advised),
        crops=sheets,
        shown_channels=shown,
    )


@dataclass
class _Pass:
    """One pass over the sample."""

    source: Source
    channels: int
    decoding: Decoding
    images: int  # at most
    seen: list[Seen] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    fingerprints: list[tuple[int, Fingerprint]] = field(default_factory=list)
    extremes: tuple[int, int] = (255, 0)  # of the pixels
    time_was_up: bool = False

    def __post_init__(self) -> None:
        self.order = places(len(self.source), self.images)
        self.gathered = Gathered(len(self.order), self.decoding)
        self.statistics = PixelStatistics()
        self.peak = Extreme("", 0.0)

    def run(self, end: float) -> None:
        """Look at one image after the other until time is up, at one at least."""
        for number, index in enumerate(self.order):
            if number and time.monotonic() > end:
                self.time_was_up = True
                return
            self._look_at(index)

    def _look_at(self, index: int) -> None:
        name, start = _file_name(self.source.name(index)), time.perf_counter()
        image: RawImage | OnePlane | None = None
        try:
            image = self.source.item(index).image
            fetched = time.perf_counter() - start
            found = look(image, channels=self.channels, decoding=self.decoding)
        except ImageError as error:
            self.unread.append(_unread(index, self.source.name(index), image, str(error)))
            return
        gone = self.gathered.add(found.samples)
        taken = found.size + found.samples.values.nbytes + (0 if found.pixels is None else found.pixels.nbytes)
        if taken > self.peak.value:
            self.peak = Extreme(printable(self.source.name(index)), taken)
        seconds = fetched + found.seconds
        one = seen(index, self.source.name(index), name, found, gone, seconds=seconds, channels=self.channels)
        self.seen.append(one)
        if found.pixels is not None:
            self._add_pixels(index, found, found.pixels, gone)

    def _add_pixels(self, index: int, found: Look, pixels: np.ndarray[Any, Any], gone: Array | None) -> None:
        valid = None
        if gone is not None:
            same = gone.shape[2] in (1, pixels.shape[2])
            valid = np.logical_not(gone if same else gone.any(axis=2, keepdims=True))
        self.statistics.add(pixels, valid)
        self.fingerprints.append((index, fingerprint(pixels)))
        self.extremes = min(self.extremes[0], int(pixels.min())), max(self.extremes[1], int(pixels.max()))

    def pixels(self) -> Pixels | None:
        """Mean, deviation and symmetry; None where no image has any."""
        if not self.statistics.images:
            return None
        symmetry = self.statistics.symmetry()
        return Pixels(
            images=self.statistics.images,
            mean=self.statistics.mean,
            std=self.statistics.std,
            upside_down=symmetry.upside_down,
            mirrored=symmetry.mirrored,
            quarter_turns=symmetry.quarter_turns,
            symmetry=symmetry.reason,
        )

    def summary(self) -> DataSummary | None:
        """What a run's own look before it starts would say; None where nothing of it could be read."""
        first = set(self.order[:FIRST])
        seen = [one for one in self.seen if one.index in first and not one.refused] or self.seen
        if not seen:
            return None
        widths, heights = [one.width for one in seen], [one.height for one in seen]
        return DataSummary(
            count=len(self.source),
            sampled=len(first),
            widths=(min(widths), max(widths)),
            heights=(min(heights), max(heights)),
            modes=tuple(Counter(one.mode for one in seen).most_common()),
            values=self.extremes,
            failures=tuple((one.index, one.name, one.reason) for one in self.unread if one.index in first),
            left_out=dict(getattr(self.source, "left_out", {})),
        )


def _unread(index: int, name: str, image: RawImage | OnePlane | None, reason: str) -> Unread:
    data = image.image if isinstance(image, OnePlane) else image
    kind = kind_of(data) if isinstance(data, bytes) else EMPTY if reason == "empty file" else None
    end = extension(_file_name(name))
    is_foreign = kind is not None and kind is not EMPTY and not kind.is_image and end in IMAGE_EXTENSIONS
    is_named = kind is None or not (is_foreign or (kind.is_image and not kind.is_named(_file_name(name))))
    return Unread(index, printable(name), printable(end), kind.name if kind else "", is_named, reason)


def _file_name(name: str) -> str:
    """The name of the file that an image is a plane of."""
    stem, mark, number = name.rpartition("#")
    return stem if mark and number.isdecimal() and "." in stem else name


def _with_range(
    said: Mapping[str, Any], channels: int, source: Source, deadline: float
) -> tuple[Recipe, MeasuredRange | None]:
    """How values become pixels, with the range that a run would measure where the keys give none."""
    of_values = {key: value for key, value in said.items() if key in _OF_VALUES}
    base, _ = load_recipe(auto.BASE, of_values | {"student.in_chans": channels, "data.mean": 0.5, "data.std": 0.5})
    if base.data.range is not None or base.data.sixteen_bit == "minmax":
        return base, None
    measured = measure_range(
        _Quick(source, deadline),
        channels=channels,
        max_pixels=base.data.max_pixels,
        nodata=base.data.nodata,
        plane=plane_of(base.data.plane),
    )
    if measured is None:
        return base, None
    return replace(base, data=replace(base.data, range=(measured.low, measured.high))), measured


_OF_VALUES = tuple(f"data.{key}" for key in ("range", "sixteen_bit", "nodata", "fill", "plane", "max_pixels"))


class _Quick:
    """A source that has no more images when time is up: as if they could not be read."""

    def __init__(self, source: Source, deadline: float) -> None:
        self._source, self._deadline = source, deadline

    def __len__(self) -> int:
        return len(self._source)

    def item(self, index: int) -> Item:
        if time.monotonic() > self._deadline:
            raise ImageError("time is up")
        return self._source.item(index)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def labels(self) -> list[str | None] | None:
        return self._source.labels()

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def _choices(
    pass_: _Pass, said: Mapping[str, Any], channels: auto.Channels, measured: MeasuredRange | None
) -> dict[str, auto.Choice]:
    """What the recipe auto would choose; nothing where no image could be read."""
    summary = pass_.summary()
    if summary is None:
        return {}
    device = resolve_device(said.get("device", "auto"))
    facts = auto.facts_of(summary, str(device), channels=channels, statistics=pass_.statistics)
    found = auto.choose(facts, said)
    if measured is not None:
        found["data.range"] = auto.Choice((measured.low, measured.high), str(measured).partition(" (data.range")[0])
    return found


def _labels(labels: str | Path | None, source: Source) -> Labels:
    """The labels as a run would read them; why not, where it would refuse."""
    try:
        return labels_of(source) if labels is None else label_table(labels, source)
    except DataError as error:
        return Labels(None, f"none: {error}")


def _labels_found(labels: Labels, names: Sequence[str]) -> LabelsFound:
    values = labels.values or []
    parts = Counter(part for part in map(copies.part_of, names) if part)
    return LabelsFound(
        said=labels.said,
        notes=labels.notes,
        classes=_counted(label for label in values if label is not None),
        without=values.count(None),
        parts=dict(sorted(parts.items())),
    )


def _told(
    files: Source, source: Source, labels: Labels, same_files: list[copies.Group], compared: int, pass_: _Pass
) -> Copies:
    """What is there more than once, by files, by pixels, and nearly."""
    prints = [one for _, one in pass_.fingerprints]

    def indices(groups: list[list[int]]) -> list[copies.Group]:
        return [sorted(pass_.fingerprints[place][0] for place in group) for group in groups]

    pixels, near = indices(duplicates.same(prints)), indices(duplicates.groups(prints))
    known_files = same_files if source is files else []
    of_files = labels.values if source is files else None
    return Copies(
        files_compared=compared,
        files_complete=compared == len(files),
        found=(
            copies.told("files", same_files, files.name, of_files),
            copies.told("pixels", copies.without(pixels, known_files), source.name, labels.values),
            copies.told("near", copies.without(near, [*known_files, *pixels]), source.name, labels.values),
        ),
    )


def _counted(things: Iterable[str]) -> dict[str, int]:
    """Each thing and its number, the most frequent first."""
    return dict(sorted(Counter(things).items(), key=lambda item: (-item[1], item[0])))


def _sizes(seen: Sequence[Seen]) -> Sizes | None:
    if not seen:
        return None

    def spread(values: list[int]) -> Spread:
        return Spread(min(values), float(np.median(values)), max(values))

    def flatness(one: Seen) -> float:
        return max(one.width, one.height) / min(one.width, one.height)

    flattest = max(seen, key=flatness)
    smallest, largest = (end(seen, key=lambda one: one.width * one.height) for end in (min, max))
    return Sizes(
        width=spread([one.width for one in seen]),
        height=spread([one.height for one in seen]),
        side=spread([min(one.width, one.height) for one in seen]),
        bytes=spread([one.bytes for one in seen]),
        flattest=Extreme(flattest.name, round(flatness(flattest), 2)),
        smallest=Extreme(smallest.name, smallest.width * smallest.height),
        largest=Extreme(largest.name, largest.width * largest.height),
    )


def _cost(pass_: _Pass) -> Cost | None:
    if not pass_.seen:
        return None
    slowest = max(pass_.seen, key=lambda one: one.seconds)
    seconds = [one.seconds for one in pass_.seen]
    return Cost(
        median_seconds=float(np.median(seconds)),
        slowest=Extreme(slowest.name, slowest.seconds),
        images_per_second=len(seconds) / max(sum(seconds), 1e-9),
        peak_bytes=pass_.peak,
    )


def _sheets(recipe: Recipe, source: Source, end: float) -> tuple[tuple[Crops, ...], str]:
    """Crops of the first images of a run, and which channels are shown."""
    batch = min(recipe.train.batch_size_per_gpu, len(source))
    data = build.build_data(build.in_one(recipe, batch), source)
    channels = recipe.report.channels
    found: list[Crops] = []
    shown: set[int] = set()
    for number in range(min(2 * _SHEETS, len(source))):
        if len(found) == _SHEETS or time.monotonic() > end:
            break
        made = figures.seen_crops(data, number // batch, number % batch)
        if made is None or made.index in shown:
            continue
        shown.add(made.index)
        height, width, _ = made.image.shape
        scale = min(1.0, _SHOWN / max(height, width))
        small = figures.resized(made.image, max(1, round(height * scale)), max(1, round(width * scale)))
        found.append(
            Crops(
                name=printable(source.name(made.index)),
                size=(height, width),
                image=picture(small, channels),
                crops=tuple(picture(crop, channels) for crop in made.after),
            )
        )
    return tuple(found), figures.false_colour(data.channels, channels) or ""
