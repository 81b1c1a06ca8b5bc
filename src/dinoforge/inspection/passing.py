"""The pass over the sample: every image is decoded once, and everything is learned of it then."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dinoforge.data import statistics
from dinoforge.data.decoding_memory import working_bytes
from dinoforge.data.duplicates import Fingerprint, fingerprint
from dinoforge.data.kinds import EMPTY, IMAGE_EXTENSIONS, extension, kind_of
from dinoforge.data.looks import Look, look_at
from dinoforge.data.names import printable
from dinoforge.data.sources import OnePlane, RawImage, Source
from dinoforge.data.values import Decoding
from dinoforge.errors import ImageError
from dinoforge.inspection.gather import Array, Gathered, Seen, Unread, seen
from dinoforge.inspection.result import Cost, Extreme, Pixels, Sizes, Spread
from dinoforge.inspection.sample import FIRST, places


@dataclass
class Pass:
    """One pass over the sample.

    Args:
        source: The images.
        channels: Number of channels that training wants.
        decoding: How values become pixels.
        images: Most images to look at.
    """

    source: Source
    channels: int
    decoding: Decoding
    images: int
    seen: list[Seen] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    fingerprints: list[tuple[int, Fingerprint]] = field(default_factory=list)
    time_was_up: bool = False

    def __post_init__(self) -> None:
        self.order = places(len(self.source), self.images)
        self.gathered = Gathered(len(self.order), self.decoding)
        self.statistics = statistics.PixelStatistics()
        self.peak = Extreme("", 0.0)

    def run(self, end: float) -> None:
        """Look at one image after the other until time is up, at one at least."""
        for number, index in enumerate(self.order):
            self.time_was_up = number > 0 and time.monotonic() > end
            if self.time_was_up:
                break
            self._look_at(index)
        self.seen.sort(key=lambda one: one.index)
        self.unread.sort(key=lambda one: one.index)

    def _look_at(self, index: int) -> None:
        name, start = file_name(self.source.name(index)), time.perf_counter()
        image: RawImage | OnePlane | None = None
        try:
            image = self.source.item(index).image
            fetched = time.perf_counter() - start
            found = look_at(image, channels=self.channels, decoding=self.decoding)
        except ImageError as error:
            self.unread.append(_unread(index, self.source.name(index), image, str(error)))
            return
        gone = self.gathered.add(found.samples)
        with suppress(ImageError):  # an image that training refuses takes no memory
            taken = working_bytes(image, channels=self.channels, decoding=self.decoding)
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

    def first(self) -> statistics.Sizes | None:
        """Sizes and kinds of the images that a run looks at before it starts; None where none of all can be read."""
        first = set(self.order[:FIRST])
        seen = [one for one in self.seen if one.index in first and not one.refused] or self.seen
        if not seen:
            return None
        widths, heights = [one.width for one in seen], [one.height for one in seen]
        modes = tuple(Counter(one.mode for one in seen).most_common())
        ends = (min(widths), max(widths)), (min(heights), max(heights))
        side = statistics.median_side(list(zip(widths, heights, strict=True)))
        return statistics.Sizes(len(self.source), *ends, modes, side)


def _unread(index: int, name: str, image: RawImage | OnePlane | None, reason: str) -> Unread:
    data = image.image if isinstance(image, OnePlane) else image
    kind = kind_of(data) if isinstance(data, bytes) else EMPTY if reason == "empty file" else None
    end = extension(file_name(name))
    is_foreign = kind is not None and kind is not EMPTY and not kind.is_image and end in IMAGE_EXTENSIONS
    is_named = kind is None or not (is_foreign or (kind.is_image and not kind.is_named(file_name(name))))
    return Unread(index, printable(name), printable(end), kind.name if kind else "", is_named, reason)


def file_name(name: str) -> str:
    """The name of the file that an image is a plane of."""
    stem, mark, number = name.rpartition("#")
    return stem if mark and number.isdecimal() and "." in stem else name


def sizes_of(seen: Sequence[Seen]) -> Sizes | None:
    """Sizes of the images that could be read; None where none could."""
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


def cost_of(pass_: Pass) -> Cost | None:
    """The cost of reading; None where nothing could be read."""
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
