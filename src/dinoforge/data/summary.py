"""What a look at a few images tells about a data set, before any work starts."""

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
from dinoforge.data.sources import Source, printable
from dinoforge.data.statistics import median_side
from dinoforge.data.values import Decoding, Samples, extent, missing
from dinoforge.errors import DataError, ImageError


@dataclass(frozen=True)
class Depth:
    """The stored values of the images of one type among those that were looked at.

    Args:
        images: Their number.
        low, high: Smallest and largest value where there is data.
        top: What full brightness is: 255, 65535, 1.0 of floats, or less where files say that they have fewer bits.
    """

    images: int
    low: float
    high: float
    top: float


@dataclass(frozen=True)
class DataSummary:
    """What a look at a few images tells about a source.

    Args:
        count: Images in the source.
        sampled: Images that were looked at.
        widths, heights: Smallest and largest, pixels, of those that could be read.
        modes: Kinds of pixels before decoding and their number, most frequent first, e.g. ``(("RGB", 15), ("L", 1))``.
        values: Smallest and largest pixel value after decoding, over all of them.
        failures: Index, printable name and reason of those that could not be read.
        left_out: Kinds of other files beside the images, in words, and their number.
        depths: Type of the stored values -> what they are.
        planes: Of each image with several planes (z, time, pages, frames) their number, and what they are.
        apart: How files were taken apart into planes, in words; '' where they were not.
        transparent: Images with transparency that is laid over white.
        profiles: Embedded colour profiles that are not applied, but sRGB and grey -> number of images.
        turned: Images that are turned as their EXIF orientation says.
        working_bytes: That decoding takes at most, by the estimate of `dinoforge.data.decode.working_bytes`.
        side: Median of the shorter sides, pixels; 0: not known.
        blank: Images of one single colour.
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
        channels: Wanted.
        decoding: Further keywords of `decode`.
        samples: Images to look at.
        reduction: (width, height) -> the least by which training reduces large JPEG files while it decodes them.

    Raises:
        DataError: None of them can be read.
    """
    shapes: list[tuple[int, ...]] = []
    modes: Counter[str] = Counter()
    values: list[int] = []
    failures: list[Skipped] = []
    depths: dict[str, Depth] = {}
    planes: list[tuple[int, str]] = []
    profiles: Counter[str] = Counter()
    transparent = turned = most = blank = 0
    indices = np.unique(np.linspace(0, len(source) - 1, samples).round().astype(int)).tolist()

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
    """A kind of `size_and_kind` without the number of planes, which differs from file to file."""
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
