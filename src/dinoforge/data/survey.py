"""The range of values in a whole data set, measured on some of its images."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dinoforge.data.decode import MAX_PIXELS, read_values
from dinoforge.data.sampling import spaced
from dinoforge.data.sources import Source
from dinoforge.data.values import Pair, Samples, missing
from dinoforge.errors import ImageError

_FIRST = 8  # images, evenly spaced, that show whether any has more than 8 bits
_IMAGES = 64  # images, evenly spaced, that are measured then
_VALUES = 2**15  # values of each image
_TAIL = 0.1  # per cent of the values at either end that do not count, such as hot pixels
_MARGIN = 0.05  # the share of the range that is added at either end where its ends are not round
_FEW = 16  # levels of 255: a channel that one range for all would leave as dark gets its own


@dataclass(frozen=True)
class MeasuredRange:
    """The values that become black and white in all images of a data set.

    Args:
        low: The value that becomes 0.
        high: The value that becomes 255.
        found: The lowest and highest value that was found, without the tails.
        kind: The type of the values.
        images: The number of measured images.
        channels: The low and high value of each channel, where one range would leave some of them dark; else empty.
        turned_over: The number of images in which white is 0, so that low becomes 255 and high 0.
    """

    low: float
    high: float
    found: tuple[float, float]
    kind: str
    images: int
    channels: tuple[Pair, ...] = ()
    turned_over: int = 0

    @property
    def range(self) -> tuple[float, ...]:
        """The value of ``data.range``: low and high, or both of each channel in turn."""
        return tuple(end for pair in self.channels for end in pair) or (self.low, self.high)

    @property
    def key(self) -> str:
        """The key and its value as they are pasted on the command line."""
        return f"data.range=[{','.join(f'{end:.7g}' for end in self.range)}]"

    def __str__(self) -> str:
        low, high = self.found
        said = f"{self.kind}, {low:,.5g} to {high:,.5g} in {self.images} sampled images: "
        if self.channels:
            ends = ", ".join(f"{low:,.7g} to {high:,.7g}" for low, high in self.channels)
            said += f"one range would leave some channels dark, so these become 0 and 255 of each: {ends}"
        else:
            said += f"{self.low:,.7g} becomes 0 and {self.high:,.7g} becomes 255"
        if self.turned_over:
            said += f", turned over in {self.turned_over} whose files say that white is 0"
        return f"{said} ({self.key}; give another to change it)"


def measure_range(
    source: Source,
    *,
    channels: int | None = None,
    max_pixels: int = MAX_PIXELS,
    nodata: float | None = None,
    plane: int | Literal["max", "each"] | None = None,
) -> MeasuredRange | None:
    """Measure which values of a data set should become 0 and 255; one range, so that images stay comparable.

    Integers that are not negative get the smallest number of bits that holds them: 0 to 4,095 where the largest is
    3,900. Other values get the range that is found, without 0.1 % at either end, and a twentieth beyond. A band that
    would become no more than 16 dark levels, as a weak stain beside a strong one, gets a range of its own; the colours
    of a picture do not.

    Args:
        source: The images.
        channels: The number of channels wanted, as for ``decode``.
        max_pixels: The largest H·W, as for ``decode``.
        nodata: A value that means no data, as for ``decode``.
        plane: The plane wanted, as for ``decode``.

    Returns:
        The range; None where the type's own range serves (8 bits, bits that files declare, integers of 16 bits that
        fill a quarter of their range or more, floats from 0 to 1 likewise), or where no image could be read.
    """
    values: list[npt.NDArray[Any]] = []
    kinds: Counter[str] = Counter()
    limits: set[int | None] = set()
    bands: list[list[npt.NDArray[Any]]] = []  # [images][channels], while all images are of so many bands
    are_bands, turned_over = True, 0
    for samples in _looked_at(source, channels, max_pixels, plane):
        if samples is None:  # an image of 8 bits, which may be grey
            are_bands = False
            continue
        kept = _kept(samples, nodata)
        are_bands = are_bands and not samples.colour and channels in (None, samples.values.shape[2])
        if are_bands:
            bands.append(_kept_of_each(samples, nodata))
        if len(kept):
            values.append(kept)
            kinds[str(samples.values.dtype)] += 1
            limits.add(samples.limit)
            turned_over += samples.white_is_zero
    if not values:
        return None
    low, high = (float(x) for x in np.percentile(np.concatenate(values), [_TAIL, 100 - _TAIL], method="nearest"))
    is_float = all(kind.startswith("float") for kind in kinds)
    if is_float:
        chosen = _of_floats(low, high)
    elif None not in limits and high <= max(limit for limit in limits if limit is not None):
        chosen = None
    else:
        chosen = _of_integers(low, high)
    kind = kinds.most_common(1)[0][0]
    own: tuple[Pair, ...] = ()
    if are_bands and len({len(image) for image in bands}) == 1 and len(bands[0]) > 1:
        whole = chosen or (0.0, 1.0 if is_float else float(max(limit or 65535 for limit in limits)))
        own = _of_each(bands, whole, is_float)
    if chosen is None and not own:
        return None
    return MeasuredRange(*(chosen or whole), (low, high), kind, len(values), own, turned_over)


def _of_each(bands: list[list[npt.NDArray[Any]]], whole: Pair, is_float: bool) -> tuple[Pair, ...]:
    """Choose the range of each channel: its own where the whole range leaves it dark; none where that serves all."""
    found: list[Pair] = []
    for channel in range(len(bands[0])):
        values = np.concatenate([image[channel] for image in bands])
        found.append(whole)
        if not len(values):
            continue
        low, high = (float(x) for x in np.percentile(values, [_TAIL, 100 - _TAIL], method="nearest"))
        if low < high and (high - whole[0]) * 255 < _FEW * (whole[1] - whole[0]):
            found[-1] = (_of_floats if is_float else _of_integers)(low, high) or whole
    return tuple(found) if set(found) != {whole} else ()


def _looked_at(
    source: Source, channels: int | None, max_pixels: int, plane: int | Literal["max", "each"] | None
) -> Iterator[Samples | None]:
    """Yield the values of some images, None for images of 8 bits; nothing where all have 8 bits."""

    def values_at(index: int) -> Samples | Literal["unread"] | None:
        try:
            found = read_values(source.item(index).image, channels=channels, max_pixels=max_pixels, plane=plane)
        except ImageError:
            return "unread"  # training reports it when it comes to it
        return found if found is not None and found.values.dtype.itemsize > 1 else None

    if not any(isinstance(values_at(index), Samples) for index in spaced(len(source), _FIRST)):
        return
    for index in spaced(len(source), _IMAGES):
        if (found := values_at(index)) != "unread":
            yield found


def _kept(samples: Samples, nodata: float | None) -> npt.NDArray[Any]:
    """Take some of the finite values where there is data."""
    gone = missing(samples, nodata)
    values = samples.values if gone is None else samples.values[~np.broadcast_to(gone, samples.values.shape)]
    values = values.reshape(-1)
    some = np.asarray(values[:: max(1, -(-len(values) // _VALUES))], np.float64)
    return np.asarray(some[np.isfinite(some)])


def _kept_of_each(samples: Samples, nodata: float | None) -> list[npt.NDArray[Any]]:
    """Take some of the finite values of each channel where there is data."""
    gone = missing(samples, nodata)
    found = []
    for channel in range(samples.values.shape[2]):
        values = samples.values[:, :, channel]
        if gone is not None:
            values = values[~gone[:, :, min(channel, gone.shape[2] - 1)]]
        values = values.reshape(-1)
        some = np.asarray(values[:: max(1, -(-len(values) * samples.values.shape[2] // _VALUES))], np.float64)
        found.append(some[np.isfinite(some)])
    return found


def _of_integers(low: float, high: float) -> tuple[float, float] | None:
    if low >= 0 and (low < high / 2 or high == 0):
        bits = max(1, math.ceil(math.log2(high + 1)))
        return None if bits in (15, 16) else (0.0, float(2**bits - 1))
    if low >= 0 and high <= 65535 and (high - low) * 4 >= 65535:
        return None
    return _widened(low, high)


def _of_floats(low: float, high: float) -> tuple[float, float] | None:
    if low >= 0 and high <= 1 and high - low >= 0.25:
        return None
    if low >= 0 and 128 <= high <= 255:  # levels of 8 bits that a program has made floats of
        return 0.0, 255.0
    return _widened(low, high)


def _widened(low: float, high: float) -> tuple[float, float]:
    """Widen a range by a margin, so that it is not empty; it begins at 0 where it begins near 0."""
    if high <= low:
        return low - 0.5, low + 0.5
    margin = _MARGIN * (high - low)
    starts_at_zero = 0 <= low <= 0.25 * high
    first, last = (0.0 if starts_at_zero else low - margin), high + margin
    digits = 2 - math.floor(math.log10(last - first))  # three that count
    return round(first, digits), round(last, digits)
