"""Facts about each image of the sample and its values; memory does not grow with the images' size."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoforge.data.kinds import extension
from dinoforge.data.looks import Look
from dinoforge.data.names import printable
from dinoforge.data.values import Decoding, Samples, missing
from dinoforge.inspection.result import Channel, Histogram, Values

_VALUES = 2**21  # values that are kept of each type
_PER_IMAGE = 2**15  # values of an image and channel
_TYPES = 16  # most types that are told apart
_BINS = 64
_PERCENTS = (0.1, 1.0, 50.0, 99.0, 99.9)
_GOLDEN = (math.sqrt(5) - 1) / 2  # steps of it fill 0…1 evenly, whatever their number, and no column twice in a row

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Seen:
    """One image that could be read, without its pixels."""

    index: int
    name: str  # printable
    end: str  # ending of the name, printable
    kind: str
    is_named: bool
    seconds: float  # reading and decoding
    bytes: int
    width: int
    height: int
    mode: str
    type: str
    bits: int
    channels: int  # number of channels of the values, without transparency
    colour: int
    transparent: float | None  # share of the pixels
    laid_over_white: bool
    no_data: float  # share of the values
    no_data_by: str  # what says so
    planes: int
    along: str
    profile: str
    orientation: int | None
    repaired: bool
    bare_cmyk: bool
    is_blank: bool
    low: float  # nearly all values lie between these; both nan where there is none
    high: float
    refused: str


@dataclass(frozen=True)
class Unread:
    """One image that could not be read."""

    index: int
    name: str  # printable
    end: str  # ending of its file's name, printable
    kind: str  # kind by content; '' where nothing is known
    is_named: bool
    reason: str


def seen(index: int, name: str, file: str, look: Look, gone: Array | None, *, seconds: float, channels: int) -> Seen:
    """Keep the facts of a look at an image.

    Args:
        index: Index of the image.
        name: Name of the image.
        file: Name of its file, which is another one where it is a plane of several.
        look: The look.
        gone: Mask of where there is no data, from `Gathered.add`.
        seconds: Seconds that reading and decoding took.
        channels: Number of channels that training wants.
    """
    samples = colours(look.samples)
    low, high = _most(samples.values, gone)
    share = 0.0 if gone is None else float(np.mean(np.broadcast_to(gone, samples.values.shape)))
    transparent = look.transparent
    return Seen(
        index=index,
        name=printable(name),
        end=printable(extension(file)),
        kind=look.kind.name,
        is_named=look.kind.is_named(file),
        seconds=seconds,
        bytes=look.size,
        width=look.width,
        height=look.height,
        mode=look.mode,
        type=str(samples.values.dtype),
        bits=bits(samples),
        channels=samples.values.shape[2],
        colour=samples.colour,
        transparent=transparent,
        laid_over_white=channels in (1, 3) and bool(transparent) and bool(look.samples.values[:, :, -1].any()),
        no_data=share,
        no_data_by=_no_data_by(samples, gone),
        planes=look.header.planes,
        along=look.header.along,
        profile=look.header.profile,
        orientation=look.header.orientation,
        repaired=look.repaired,
        bare_cmyk=look.header.bare_cmyk,
        is_blank=look.pixels is not None and bool((look.pixels == look.pixels[0, 0]).all()),
        low=low,
        high=high,
        refused=look.refused,
    )


def colours(samples: Samples) -> Samples:
    """The samples without transparency."""
    return samples.take(samples.values.shape[2] - 1) if samples.alpha else samples


def bits(samples: Samples) -> int:
    """The number of bits that count."""
    if samples.values.dtype == np.bool_:
        return 1
    return samples.values.dtype.itemsize * 8 if samples.limit is None else samples.limit.bit_length()


def _most(values: Array, gone: Array | None) -> tuple[float, float]:
    """The values between which nearly all of an image lie."""
    kept = values if gone is None else values[~np.broadcast_to(gone, values.shape)]
    some = _some(kept.reshape(-1), _PER_IMAGE).astype(np.float64)
    some = some[np.isfinite(some)]
    if not some.size:
        return math.nan, math.nan
    low, high = np.percentile(some, (_PERCENTS[0], _PERCENTS[-1]), method="nearest")
    return float(low), float(high)


def _no_data_by(samples: Samples, gone: Array | None) -> str:
    """What marks the pixels without data, where there are any."""
    if gone is None or not gone.any():
        return ""
    said = [f"the tag {number:.10g}" for number in samples.nodata]
    said += ["a mask"] if samples.valid is not None and not samples.valid.all() else []
    said += ["NaN"] if samples.values.dtype.kind == "f" and bool(np.isnan(samples.values).any()) else []
    return ", ".join(said) or "data.nodata"


@dataclass
class _Type:
    """Values of one type: extremes of all of them, and some of them."""

    images: int = 0
    low: list[float] = field(default_factory=list)  # [C]
    high: list[float] = field(default_factory=list)
    some: list[list[Array]] = field(default_factory=list)  # [C] of one for each image


class Gathered:
    """The values of all images that were looked at, by type and number of channels.

    Args:
        images: How many there will be, at most.
        decoding: How values become pixels.
    """

    def __init__(self, images: int, decoding: Decoding) -> None:
        self._images = images
        self._decoding = decoding
        self._types: defaultdict[tuple[str, int, int | None], _Type] = defaultdict(_Type)
        self._values = self._gone = 0

    @property
    def no_data(self) -> float:
        """Share of the values that are no data."""
        return self._gone / max(self._values, 1)

    def add(self, samples: Samples) -> Array | None:
        """Add an image; returns where it has no data, [H, W, C] or [H, W, 1]."""
        samples = colours(samples)
        values = samples.values
        gone = missing(samples, self._decoding.get("nodata"))
        self._values += values.size
        if gone is not None:
            self._gone += int(np.broadcast_to(gone, values.shape).sum())
        key = (str(values.dtype), values.shape[2], samples.limit)
        if key not in self._types and len(self._types) == _TYPES:
            return gone
        found = self._types[key]
        if not found.some:
            found.low, found.high = [math.inf] * values.shape[2], [-math.inf] * values.shape[2]
            found.some = [[] for _ in range(values.shape[2])]
        found.images += 1
        number = min(max(_VALUES // (self._images * values.shape[2]), 64), _PER_IMAGE)
        for channel in range(values.shape[2]):
            one = values[:, :, channel]
            if gone is not None:
                one = one[~gone[:, :, min(channel, gone.shape[2] - 1)]]
            one = one.reshape(-1)
            if one.dtype.kind == "f" and not np.isfinite(one).all():
                one = one[np.isfinite(one)]
            if one.size:
                found.low[channel] = min(found.low[channel], one.min().item())
                found.high[channel] = max(found.high[channel], one.max().item())
                found.some[channel].append(_some(one, number))
        return gone

    def values(self) -> tuple[Values, ...]:
        """The values of each type, the most frequent type first."""
        types = sorted(self._types.items(), key=lambda item: (-item[1].images, item[0][:2]))
        return tuple(made for key, found in types if (made := self._of_type(key, found)) is not None)

    def _of_type(self, key: tuple[str, int, int | None], found: _Type) -> Values | None:
        dtype, limit = np.dtype(key[0]), key[2]
        ends = ends_of(dtype, limit, key[1], self._decoding)
        channels = []
        for number, some in enumerate(found.some):
            if not some:  # no data anywhere
                return None
            values = np.concatenate(some).astype(np.float64)
            black, white = ends[number]
            low, *middle, high = (float(x) for x in np.percentile(values, _PERCENTS, method="nearest"))
            channels.append(
                Channel(
                    min=found.low[number],
                    max=found.high[number],
                    percentiles=(low, *middle, high),  # type: ignore[arg-type]
                    black=black,
                    white=white,
                    below=0.0 if black is None else float(np.mean(values < black)),
                    above=0.0 if white is None else float(np.mean(values > white)),
                    histogram=_histogram(values, dtype, low, high),
                )
            )
        first, last = type_range(dtype, limit)
        lowest, highest = min(c.percentiles[0] for c in channels), max(c.percentiles[-1] for c in channels)
        width = dtype.itemsize * 8 if limit is None else limit.bit_length()
        return Values(
            type=key[0],
            bits=1 if dtype == np.bool_ else width,
            images=found.images,
            channels=tuple(channels),
            fills=(highest - lowest) / (last - first),
            is_within=min(found.low) >= first and max(found.high) <= last,
            levels=_levels(channels),
        )


def _levels(channels: list[Channel]) -> float:
    """Share of the levels 0 to 255 that nearly all values become, over all channels."""
    spans = [
        tuple(min(max((c.percentiles[end] - c.black) / (c.white - c.black), 0.0), 1.0) for end in (0, -1))
        for c in channels
        if c.black is not None and c.white is not None
    ]
    return max(high for _, high in spans) - min(low for low, _ in spans) if spans else 1.0


def type_range(dtype: np.dtype[Any], limit: int | None) -> tuple[float, float]:
    """The values that become 0 and 255 under ``data.sixteen_bit=full`` without a range."""
    if dtype.kind in "fb":
        return 0.0, 1.0
    return 0.0, float(limit or {1: 127 if dtype.kind == "i" else 255}.get(dtype.itemsize, 65535))


def ends_of(
    dtype: np.dtype[Any], limit: int | None, channels: int, decoding: Decoding
) -> list[tuple[float, float] | tuple[None, None]]:
    """The values that become 0 and 255 in each channel; None, None: each image's own minimum and maximum."""
    given: Any = decoding.get("value_range")
    if given is not None and dtype != np.bool_:
        pairs = list(given) if isinstance(given[0], tuple) else [given]
        if not (dtype == np.uint8 and max(high for _, high in pairs) > 255):
            return [pairs[min(number, len(pairs) - 1)] for number in range(channels)]
    elif decoding.get("sixteen_bit") == "minmax" and dtype not in (np.uint8, np.bool_):
        return [(None, None)] * channels
    return [type_range(dtype, limit)] * channels


def _some(values: Array, number: int) -> Array:
    """A limited number of the values, evenly spread."""
    if values.size <= number:
        return values.copy()
    where = (np.arange(1, number + 1) * _GOLDEN) % 1.0
    return np.asarray(values[(where * values.size).astype(np.int64)])


def _histogram(values: npt.NDArray[np.float64], dtype: np.dtype[Any], low: float, high: float) -> Histogram:
    if dtype == np.uint8:
        low, high = 0.0, 256.0
    elif high <= low:
        low, high = low - 0.5, low + 0.5
    counts, _ = np.histogram(np.clip(values, low, high), bins=_BINS, range=(low, high))
    return Histogram(low, high, tuple(counts.tolist()))
