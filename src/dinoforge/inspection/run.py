"""A look at a bounded sample of a data set: one decode of each image, of which everything is learned."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dinoforge.builders.data import build_data, image_input
from dinoforge.builders.lengths import in_one
from dinoforge.data import duplicates
from dinoforge.data.channels import Channels, channels_of
from dinoforge.data.decode import read_values
from dinoforge.data.kinds import extension
from dinoforge.data.labels import Labels, label_table, labels_of
from dinoforge.data.names import printable
from dinoforge.data.planes import taken_apart
from dinoforge.data.sampling import spaced
from dinoforge.data.sources import FolderSource, Item, Source, open_source
from dinoforge.data.survey import MeasuredRange, measure_range
from dinoforge.data.values import plane_of
from dinoforge.errors import DataError, ImageError
from dinoforge.inspection import advice, copies, troubles
from dinoforge.inspection.passing import Pass, cost_of, file_name, sizes_of
from dinoforge.inspection.result import Copies, Crops, Inspection, LabelsFound, Sampling
from dinoforge.planning import auto
from dinoforge.recipe.load import converted, load_recipe
from dinoforge.recipe.schema import Recipe
from dinoforge.report.analysis import false_colour, resized, seen_crops
from dinoforge.report.page import picture
from dinoforge.system.device import resolve_device

IMAGES, SECONDS = 1024, 8.0
"""By default so many images are looked at, in so many seconds."""

_FOR_CHANNELS, _FOR_RANGE, _FOR_FILES, _FOR_CROPS = 0.05, 0.15, 0.3, 0.2  # shares of the seconds
_HEADERS, _DEEP = 64, 64  # images that are asked for the number of channels, and for the range
_AT_LEAST = 2  # images that are read whatever the time
_SHORT = 0.3  # seconds
_SHEETS = 12  # images whose crops are shown
_SHOWN = 256  # pixels along the longer side of a shown image
_EXAMPLES = 5


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
        images: Most images to look at, at least 1.
        seconds: Seconds that looking may take, above 0; listing the names of a folder, and the image at which time is
            up, come on top.
        with_crops: Also make pictures of crops.

    Raises:
        DataError: The data cannot be used at all. What is wrong with some images is a finding.
        RecipeError: A key is unknown, or a value is impossible.
    """
    if images < 1 or seconds <= 0:
        raise DataError(f"expected at least 1 image and more than 0 seconds, got {images} and {seconds:g}")
    start = time.monotonic()
    looked = _looked_at(data, keys or {}, images, seconds, seconds * (1 - _FOR_CROPS * with_crops))
    pass_, source, said = looked.pass_, looked.source, looked.said
    known = _labels(labels, source)
    names = _names(source)
    choices = _choices(pass_, said, looked.why, looked.measured)
    recipe, _ = load_recipe(auto.BASE, {key: one.value for key, one in choices.items()} | dict(keys or {}))
    sheets, shown = _sheets(recipe, source, time.monotonic() + max(seconds * _FOR_CROPS, 1)) if with_crops else ((), "")
    values = pass_.gathered.values()
    advised = [
        *advice.from_auto(choices),
        *advice.further(pass_.seen, len(pass_.unread), values, recipe, said, choices),
    ]
    called = printable(os.fspath(data)) if isinstance(data, str | os.PathLike) else type(data).__name__
    facts = _facts(looked, _labels_found(known, names), _copies(looked, known), names, recipe)
    return Inspection(
        data=called,
        images=len(source),
        bytes=looked.bytes,
        sampling=Sampling(
            images=len(pass_.seen) + len(pass_.unread),
            of=len(source),
            limit=images,
            seconds=round(time.monotonic() - start, 2),
            seconds_limit=seconds,
            time_was_up=pass_.time_was_up,
        ),
        ends={printable(end): number for end, number in _counted(names.ends).items()},
        kinds=_counted(Counter([one.kind for one in pass_.seen] + [one.kind or "unknown" for one in pass_.unread])),
        modes=_counted(Counter(one.mode for one in pass_.seen)),
        left_out=facts.left_out,
        unreadable=tuple((one.name, one.reason) for one in pass_.unread),
        refused=tuple((one.name, one.refused) for one in pass_.seen if one.refused),
        profiles=_counted(Counter(one.profile for one in pass_.seen if one.profile)),
        orientations=_counted(Counter(str(one.orientation) for one in pass_.seen if one.orientation is not None)),
        sizes=sizes_of(pass_.seen),
        values=values,
        no_data=pass_.gathered.no_data,
        labels=facts.labels,
        copies=facts.copies,
        pixels=pass_.pixels(),
        cost=cost_of(pass_),
        troubles=troubles.find(facts),
        channels=recipe.student.in_chans,
        advice=advice.with_notes(advised),
        command=advice.command(called, said, advised),
        crops=sheets,
        shown_channels=shown,
    )


@dataclass(frozen=True)
class _Looked:
    """A look at a data set: its sample, and the keys that it was read by."""

    files: Source
    source: Source  # the same, or every plane of them
    said: Mapping[str, Any]  # the keys that are given
    why: Channels  # the channels that are read, and why
    base: Recipe  # the recipe that says how values become pixels
    measured: MeasuredRange | None
    same_files: list[copies.Group]  # indices of `files`
    compared: int  # files
    bytes: int | None  # size of all files
    pass_: Pass


def _looked_at(data: Any, keys: Mapping[str, Any], images: int, seconds: float, until: float) -> _Looked:
    """List the images, compare files, and go through the sample until so many seconds after the listing."""
    said = converted(dict(keys))
    files = open_source(data)
    start = time.monotonic()
    each = _seconds_of_one(files)
    given = said.get("student.in_chans")
    why = Channels(given, "as given") if given else channels_of(_Few(files, _HEADERS, seconds * _FOR_CHANNELS, each))
    source = taken_apart(files, said.get("data.plane"), why.count)
    base, measured = _with_range(
        said, source, partial(_Few, asked=_DEEP, seconds=seconds * _FOR_RANGE, each=each), why.count
    )
    same_files: list[copies.Group] = []
    compared, total = 0, None
    if isinstance(files, FolderSource):
        same_files, compared, total = copies.same_files(files, time.monotonic() + seconds * _FOR_FILES)
    pass_ = Pass(source, why.count, image_input(base).decoding, images)
    pass_.run(start + until)
    return _Looked(files, source, said, why, base, measured, same_files, compared, total, pass_)


def _facts(looked: _Looked, labels: LabelsFound, found: Copies, names: "_Names", recipe: Recipe) -> troubles.Facts:
    data, pass_ = looked.base.data, looked.pass_
    return troubles.Facts(
        seen=pass_.seen,
        unread=pass_.unread,
        values=pass_.gathered.values(),
        labels=labels,
        copies=found,
        left_out=dict(getattr(looked.source, "left_out", {})),
        odd_names=names.odd,
        odd_examples=tuple(names.examples),
        channels=looked.why.count,
        plane=data.plane,
        fill=data.fill,
        range="" if data.range is None else f"data.range={advice.in_words(data.range)}",
        range_by="given" if looked.measured is None else "measured",
        is_minmax=data.sixteen_bit == "minmax" and data.range is None,
        side=recipe.crops.global_crops_size,
    )


def _with_range(
    said: Mapping[str, Any], source: Source, few: Callable[[Source], Source], channels: int
) -> tuple[Recipe, MeasuredRange | None]:
    """The decoding of values, with the range that a run would measure where the keys give none."""
    of_values = {key: value for key, value in said.items() if key in _OF_VALUES}
    base, _ = load_recipe(auto.BASE, of_values | {"student.in_chans": channels, "data.mean": 0.5, "data.std": 0.5})
    if base.data.range is not None or base.data.sixteen_bit == "minmax":
        return base, None
    measured = measure_range(
        few(source),
        channels=channels,
        max_pixels=base.data.max_pixels,
        nodata=base.data.nodata,
        plane=plane_of(base.data.plane),
    )
    if measured is None:
        return base, None
    return replace(base, data=replace(base.data, range=measured.range)), measured


_OF_VALUES = tuple(f"data.{key}" for key in ("range", "sixteen_bit", "nodata", "fill", "plane", "max_pixels"))


def _seconds_of_one(source: Source) -> float:
    """Seconds to read the values of an image: the shortest of several times, so that imports do not count."""
    shortest = math.inf
    for _ in range(4):
        start = time.monotonic()
        with suppress(ImageError):  # told when it is its turn
            read_values(source.item(len(source) // 2).image)
        shortest = min(shortest, time.monotonic() - start)
        if shortest > _SHORT:
            break
    return shortest


class _Few:
    """As many evenly spaced images of a source as can be read in the time, at most as many as asked for.

    Args:
        source: The images.
        asked: Number of images that the source would be asked for.
        seconds: Seconds for all of them; after twice as much, further images count as unreadable.
        each: Seconds that one image takes.
    """

    def __init__(self, source: Source, asked: int, seconds: float, each: float) -> None:
        self._source = source
        self._deadline = time.monotonic() + 2 * seconds
        number = int(seconds / max(each, 1e-6))
        few = number < min(asked, len(source))
        self._places = spaced(len(source), max(number, _AT_LEAST)) if few else range(len(source))
        self._read = 0

    def __len__(self) -> int:
        return len(self._places)

    def item(self, index: int) -> Item:
        self._read += 1
        if self._read > _AT_LEAST and time.monotonic() > self._deadline:
            raise ImageError("time is up")
        return self._source.item(self._places[index])

    def name(self, index: int) -> str:
        return self._source.name(self._places[index])

    def labels(self) -> list[str | None] | None:
        labels = self._source.labels()
        return None if labels is None else [labels[place] for place in self._places]

    def fingerprint(self) -> str:
        return f"{len(self)} of {self._source.fingerprint()}"


def _choices(
    pass_: Pass, said: Mapping[str, Any], channels: Channels, measured: MeasuredRange | None
) -> dict[str, auto.Choice]:
    """The choices of the recipe auto; empty where no image could be read."""
    first = pass_.first()
    if first is None:
        return {}
    device = resolve_device(said.get("device", "auto"))
    facts = auto.facts_of(first, str(device), channels=channels, statistics=pass_.statistics)
    found = auto.choose(facts, said)
    if measured is not None:
        found["data.range"] = auto.Choice(measured.range, str(measured).partition(" (data.range")[0])
    return found


def _labels(labels: str | Path | None, source: Source) -> Labels:
    """The labels as a run would read them; why not, where it would refuse."""
    try:
        return labels_of(source) if labels is None else label_table(labels, source)
    except DataError as error:
        return Labels(None, f"none: {error}")


@dataclass
class _Names:
    """Facts from the names of all images."""

    ends: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    odd: int = 0
    examples: list[str] = field(default_factory=list)


def _names(source: Source) -> _Names:
    found = _Names()
    for index in range(len(source)):
        name = source.name(index)
        found.ends[f".{extension(file_name(name))}"] += 1
        if part := copies.part_of(name):
            found.parts[part] += 1
        if name.isascii() and name.isprintable() and "\\" not in name:
            continue  # the common case
        if (shown := printable(name)) != name:
            found.odd += 1
            if len(found.examples) < _EXAMPLES:
                found.examples.append(shown)
    return found


def _labels_found(labels: Labels, names: _Names) -> LabelsFound:
    values = labels.values or []
    return LabelsFound(
        said=labels.said,
        notes=labels.notes,
        classes=_counted(Counter(label for label in values if label is not None)),
        without=values.count(None),
        parts=dict(sorted(names.parts.items())),
    )


def _copies(looked: _Looked, labels: Labels) -> Copies:
    """Find images that are there more than once: by files, by pixels, and nearly."""
    files, source, pass_ = looked.files, looked.source, looked.pass_
    prints = [one for _, one in pass_.fingerprints]

    def indices(groups: list[list[int]]) -> list[copies.Group]:
        return [sorted(pass_.fingerprints[place][0] for place in group) for group in groups]

    pixels, near = indices(duplicates.same(prints)), indices(duplicates.groups(prints))
    are_images = source is files  # false for stacks of images
    known = looked.same_files if are_images else []
    return Copies(
        files_compared=looked.compared,
        files_complete=looked.compared == len(files),
        found=(
            copies.told("files", looked.same_files, files.name, labels.values if are_images else None),
            copies.told("pixels", copies.without(pixels, known), source.name, labels.values),
            copies.told("near", copies.without(near, [*known, *pixels]), source.name, labels.values),
        ),
    )


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    """Each thing and its number, the most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _sheets(recipe: Recipe, source: Source, end: float) -> tuple[tuple[Crops, ...], str]:
    """Crops of the first images of a run, and which channels are shown."""
    batch = min(recipe.train.batch_size_per_gpu, len(source))
    data = build_data(in_one(recipe, batch), source)
    channels = recipe.report.channels
    found: list[Crops] = []
    shown: set[int] = set()
    for number in range(min(2 * _SHEETS, len(source))):
        if len(found) == _SHEETS or time.monotonic() > end:
            break
        made = seen_crops(data, number // batch, number % batch)
        if made is None or made.index in shown:
            continue
        shown.add(made.index)
        height, width, _ = made.image.shape
        scale = min(1.0, _SHOWN / max(height, width))
        small = resized(made.image, max(1, round(height * scale)), max(1, round(width * scale)))
        found.append(
            Crops(
                name=printable(source.name(made.index)),
                size=(height, width),
                image=picture(small, channels),
                crops=tuple(picture(crop, channels) for crop in made.after),
            )
        )
    return tuple(found), false_colour(data.channels, channels) or ""
