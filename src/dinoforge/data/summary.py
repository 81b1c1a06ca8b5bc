"""A summary of a data set from a few of its images, before any work starts."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from dinoforge.data.bad_images import Skipped, by_reason
from dinoforge.data.decoding_memory import working_bytes
from dinoforge.data.looks import look_at
from dinoforge.data.planes import PlanesOf
from dinoforge.data.sampling import spaced
from dinoforge.data.sources import Source, printable
from dinoforge.data.statistics import median_side
from dinoforge.data.values import Decoding, Samples, extent, missing
from dinoforge.errors import DataError, ImageError


@dataclass(frozen=True)
class Depth:
    """The stored values of images of one type.

    Args:
        images: The number of images.
        low: The smallest value where there is data.
        high: The largest value where there is data.
        top: The value of full brightness: 255, 65535, 1.0 of floats, or less where files say that they have fewer bits.
    """

    images: int
    low: float
    high: float
    top: float


@dataclass(frozen=True)
class DataSummary:
    """A summary of a data set from a few of its images.

    Args:
        count: The number of images in the data set.
        sampled: The number of images that were looked at.
        widths: The smallest and largest width in pixels of the images that could be read.
        heights: The smallest and largest height, likewise.
        modes: Kinds of pixels before decoding and their number, most frequent first, e.g. ``(("RGB", 15), ("L", 1))``.
        values: The smallest and largest pixel value after decoding, over all images.
        failures: Index, printable name and reason of the images that could not be read.
        left_out: The number of other files beside the images, by kind in words.
        depths: The stored values of the images, by type.
        planes: The number and the kind of planes (z, time, pages, frames) of each image with several.
        apart: The planes into which files were taken apart, in words; '' where they were not.
        transparent: The number of images with transparency that is laid over white.
        profiles: The number of images by embedded colour profile that is not applied, without sRGB and grey.
        turned: The number of images that are turned by their EXIF orientation.
        working_bytes: The most bytes that decoding takes, by `dinoforge.data.decoding_memory.working_bytes`.
        side: The median of the shorter sides in pixels; 0 where it is not known.
        blank: The number of images of one single colour.
    """

    count: int
    sampled: int
    widths: tuple[int, int]
    heights: tuple[int, int]
    modes: tuple[tuple[str, int], ...]
    values: tuple[int, int]
    failures: tuple[Skipped, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    depths: Mapping[str, Depth] = field(default_factory=dict)
    planes: tuple[tuple[int, str], ...] = ()
    apart: str = ""
    transparent: int = 0
    profiles: Mapping[str, int] = field(default_factory=dict)
    turned: int = 0
    working_bytes: int = 0
    side: int = 0
    blank: int = 0


def summarize(
    source: Source,
    *,
    channels: int = 3,
    decoding: Decoding | None = None,
    samples: int = 16,
    reduction: Callable[[int, int], int] = lambda width, height: 1,
) -> DataSummary:
    """Decode a few evenly spaced images, before any work starts.

    Args:
        source: The images.
        channels: The number of channels wanted.
        decoding: Further keywords of `decode`.
        samples: The number of images to look at.
        reduction: A function of width and height: the least divisor at which training decodes large JPEG files.

    Raises:
        DataError: None of the images can be read.
    """
    shapes: list[tuple[int, ...]] = []
    modes: Counter[str] = Counter()
    values: list[int] = []
    failures: list[Skipped] = []
    depths: dict[str, Depth] = {}
    planes: list[tuple[int, str]] = []
    profiles: Counter[str] = Counter()
    transparent = turned = most = blank = 0
    indices = spaced(len(source), samples)

    def note(index: int) -> None:
        nonlocal transparent, turned, most, blank
        image = source.item(index).image
        seen = look_at(image, channels=channels, decoding=decoding)
        if seen.pixels is None:
            raise ImageError(seen.refused)
        size = reduction(seen.width, seen.height)
        most = max(most, working_bytes(image, channels=channels, decoding=decoding, reduction=size))
        modes[_without_planes(seen.mode)] += 1
        shapes.append(seen.pixels.shape)
        values.extend((int(seen.pixels.min()), int(seen.pixels.max())))
        _note_depth(depths, seen.samples, (decoding or {}).get("nodata"))
        if seen.header.planes > 1:
            planes.append((seen.header.planes, seen.header.along))
        is_laid_over_white = channels in (1, 3) and bool(seen.transparent)  # but for alpha that is 0 everywhere
        transparent += is_laid_over_white and bool(seen.samples.values[:, :, -1].any())
        if seen.header.profile and not _PLAIN_PROFILES.search(seen.header.profile):
            profiles[seen.header.profile] += 1
        turned += seen.header.orientation in range(2, 9)
        blank += bool((seen.pixels == seen.pixels[0, 0]).all())

    for index in indices:
        try:
            note(index)
        except ImageError as error:
            failures.append((index, printable(source.name(index)), str(error)))
    if not shapes:
        raise DataError(f"none of {len(indices)} images that were tried could be read: {by_reason(failures)}")
    heights, widths, _ = zip(*shapes, strict=True)
    return DataSummary(
        count=len(source),
        sampled=len(indices),
        widths=(min(widths), max(widths)),
        heights=(min(heights), max(heights)),
        modes=tuple(modes.most_common()),
        values=(min(values), max(values)),
        failures=tuple(failures),
        left_out=dict(getattr(source, "left_out", {})),
        depths=depths,
        planes=tuple(planes),
        apart=str(source) if isinstance(source, PlanesOf) else "",
        transparent=transparent,
        profiles=dict(profiles),
        turned=turned,
        working_bytes=most,
        side=median_side([(width, height) for height, width, _ in shapes]),
        blank=blank,
    )


_PLAIN_PROFILES = re.compile("srgb|gr[ae]y|dot gain|^c2", re.IGNORECASE)  # c2: Facebook's small sRGB


def _without_planes(mode: str) -> str:
    """Take the number of planes, which differs from file to file, out of a kind of `size_and_kind`."""
    return re.sub(r", (?:plane|page) 1 of \d+(?: \(.*?\))?", "", mode)


def _note_depth(depths: dict[str, Depth], samples: Samples, nodata: float | None) -> None:
    """Add the values of an image to those of its type."""
    values = samples.values[:, :, :-1] if samples.alpha else samples.values
    own = replace(samples, values=values, alpha=False)
    kind = str(values.dtype)
    gone = missing(own, nodata)
    if values.dtype.kind == "f" and not np.isfinite(values.sum(dtype=np.float64)):
        infinite = np.isinf(values)
        gone = infinite if gone is None else infinite | gone
    found = extent(values, gone)
    if found is None:
        return
    top = samples.limit or (1.0 if values.dtype.kind in "fb" else 255 if values.dtype.itemsize == 1 else 65535)
    before = depths.get(kind, Depth(0, math.inf, -math.inf, 0))
    depths[kind] = Depth(before.images + 1, min(before.low, found[0]), max(before.high, found[1]), max(before.top, top))
