"""Values of a file or array to levels 0…255, by ranges, significant bits and values that mean no data."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

import cv2
import numpy as np
import numpy.typing as npt

from dinoforge.errors import ImageError

BLOCK = 2**18
"""The number of values that are doubles at once while they become levels."""

_HUGE, _ROUNDED = 1e30, 1e-5  # a number that no measurement reaches, and the error by which a tag may round such

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Pair = tuple[float, float]


class Decoding(TypedDict, total=False):
    """Keywords of ``dinoforge.data.decode.decode`` that hold for all images of a data set."""

    sixteen_bit: str
    max_pixels: int
    value_range: Pair | tuple[Pair, ...] | None
    nodata: float | None
    fill: int
    plane: int | Literal["max", "each"] | None


@dataclass(frozen=True)
class Samples:
    """One image before its values are scaled.

    Args:
        values: The values as stored, upright, [H, W, C].
        limit: The value of full brightness, such as 4095 for 12 bits; None for the type's largest.
        colour: The number of leading channels that are a picture: 3 for RGB, 1 for grey, 0 for bands of any meaning.
        alpha: Whether the last channel is transparency, which viewers lay over white.
        nodata: Values that mean no data.
        valid: A mask [H, W] or [H, W, C], False where there is no data; None where every value is valid.
        kind: Type and number of channels and what else was found, such as ``uint16 x5, GeoTIFF``.
        white_is_zero: Whether small values are bright, so that levels are turned over, whatever the range.
    """

    values: npt.NDArray[Any]
    limit: int | None = None
    colour: int = 0
    alpha: bool = False
    nodata: tuple[float, ...] = ()
    valid: Bool | None = None
    kind: str = ""
    white_is_zero: bool = False

    def take(self, channels: int) -> "Samples":
        """Keep the leading channels alone."""
        valid = self.valid if self.valid is None or self.valid.ndim == 2 else self.valid[:, :, :channels]
        return replace(self, values=self.values[:, :, :channels], valid=valid, alpha=False)


@dataclass(frozen=True)
class Scaling:
    """The rules by which values become levels; see ``dinoforge.data.decode``."""

    sixteen_bit: Literal["full", "minmax"] = "full"
    value_range: Pair | tuple[Pair, ...] | None = None
    nodata: float | None = None
    fill: int = 0
    _pairs: tuple[Pair, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        assert self.sixteen_bit in ("full", "minmax"), self.sixteen_bit
        assert 0 <= self.fill <= 255, self.fill
        if self.value_range is not None:
            object.__setattr__(self, "_pairs", _pairs(self.value_range))

    def pairs(self, channels: int) -> tuple[Pair, ...]:
        """The range of each channel, or one for all; empty where none was given.

        Raises:
            ImageError: There are several ranges, but not one for each channel.
        """
        if len(self._pairs) > 1 and len(self._pairs) != channels:
            raise ImageError(f"has {channels} channels, but data.range gives {len(self._pairs)} ranges")
        return self._pairs

    @property
    def plain(self) -> bool:
        """Whether 8-bit values pass unchanged."""
        return not self._pairs and self.nodata is None


def _pairs(given: Any) -> tuple[Pair, ...]:
    """Make a tuple of pairs of one range, or of one for each channel."""
    several = given if isinstance(given[0], tuple | list) else (given,)
    pairs = tuple((float(low), float(high)) for low, high in several)
    assert all(-math.inf < low < high < math.inf for low, high in pairs), given
    return pairs


def pairs_of(flat: Sequence[float] | None) -> Pair | tuple[Pair, ...] | None:
    """Turn the recipe's low and high, or such pairs one after the other, into ranges as ``decode`` takes them."""
    if flat is None:
        return None
    pairs: tuple[Pair, ...] = tuple(zip(flat[::2], flat[1::2], strict=True))
    return pairs[0] if len(pairs) == 1 else pairs


def plane_of(text: str | None) -> int | Literal["max", "each"] | None:
    """Turn the recipe's plane into one as ``decode`` takes it."""
    if text is None:
        return None
    return "max" if text == "max" else "each" if text == "each" else int(text)


def check_size(width: int, height: int, max_pixels: int | None) -> None:
    """Refuse an image without pixels, or with too many.

    Raises:
        ImageError: It has none, or more than `max_pixels`.
    """
    if width * height == 0:
        raise ImageError(f"has no pixels ({width} x {height})")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(f"{width} x {height} is more than {max_pixels} pixels; the limit is data.max_pixels")


def upright(array: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn an array [H, W, …] upright by its EXIF orientation, 1…8."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def check_plane(plane: int | Literal["max"] | None, planes: int) -> None:
    """Refuse the index of a plane that a file does not have.

    Raises:
        ImageError: There are not as many planes.
    """
    if isinstance(plane, int) and not 0 <= plane < planes:
        have = "1 plane" if planes == 1 else f"{planes} planes"
        raise ImageError(f"has {have}, counted from 0, but data.plane={plane}")


def to_levels(samples: Samples, scaling: Scaling) -> UInt8:
    """Scale values [H, W, C] of any real type to levels 0…255.

    Raises:
        ImageError: Values are infinite, outside the range of the rule, or of no real type.
    """
    if not samples.alpha:
        return _levels(samples, scaling)
    colour = samples.take(samples.values.shape[2] - 1)
    alpha = Samples(samples.values[:, :, -1:], limit=samples.limit)
    return np.concatenate([_levels(colour, scaling), _levels(alpha, Scaling())], axis=2)


def _levels(samples: Samples, scaling: Scaling) -> UInt8:
    values = samples.values
    if values.dtype == np.bool_:
        levels = values.astype(np.uint8) * np.uint8(255)
        return _filled(_turned_over(levels, samples), missing(samples), scaling.fill, values)
    if values.dtype.kind not in "iuf":
        raise ImageError(f"expected integer or float values, got {values.dtype}")
    quick = _sixteen_bits_without(samples, scaling)
    if quick is not None:
        return quick
    gone = missing(samples, scaling.nodata)
    pairs = scaling.pairs(values.shape[2])
    if pairs and not (values.dtype == np.uint8 and max(high for _, high in pairs) > 255):
        levels = _by_ranges(values, pairs)
    elif scaling.sixteen_bit == "minmax" and values.dtype != np.uint8:
        levels = _by_own_range(values, gone)
    else:
        levels = _by_type(values, gone, samples.limit)
    return _filled(_turned_over(levels, samples), gone, scaling.fill, values)


def _turned_over(levels: UInt8, samples: Samples) -> UInt8:
    return np.uint8(255) - levels if samples.white_is_zero else levels


def _filled(levels: UInt8, gone: Bool | None, fill: int, image: npt.NDArray[Any]) -> UInt8:
    if gone is None:
        return levels
    if not levels.flags.owndata or not levels.flags.writeable or levels is image:
        levels = levels.copy()  # not the image itself
    np.copyto(levels, np.uint8(fill), where=gone)
    return levels


def missing(samples: Samples, nodata: float | None = None) -> Bool | None:
    """Find where there is no data: bool [H, W, C] or [H, W, 1], or None where every value is data.

    A value that means no data counts channel by channel. In a picture of integers, where it may well be a level of a
    colour, it counts only where all colours have it.
    """
    values = samples.values
    gone: Bool | None = None
    if samples.valid is not None:
        gone = ~(samples.valid if samples.valid.ndim == 3 else samples.valid[:, :, np.newaxis])
    if values.dtype.kind == "f":
        nan = np.isnan(values)
        if nan.any():
            gone = nan if gone is None else gone | nan
    for number in {*samples.nodata, *(() if nodata is None else (nodata,))}:
        same = _equal(values, number)
        if same is None:
            continue
        if samples.colour == 3 and values.dtype.kind != "f":
            same[:, :, :3] = same[:, :, :3].all(axis=2, keepdims=True)
        gone = same if gone is None else gone | same
    return gone


def _equal(values: npt.NDArray[Any], number: float) -> Bool | None:
    """Find where values are a number, as their type rounds it; None where the type cannot hold it."""
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            if _HUGE < abs(number) < math.inf:  # -3.40282e+38: the end of a type, which some writers round
                ends = number * (1 - _ROUNDED), number * (1 + _ROUNDED)
                return np.asarray(np.isfinite(values) & (min(ends) <= values) & (values <= max(ends)))
            return np.asarray(values == np.asarray(number).astype(values.dtype))
    if values.dtype == np.bool_ or not math.isfinite(number) or number != int(number):
        return None
    info = np.iinfo(values.dtype)
    if not info.min <= int(number) <= info.max:
        return None
    return np.asarray(values == np.asarray(int(number)).astype(values.dtype))


def extent(values: npt.NDArray[Any], gone: Bool | None = None) -> Pair | None:
    """Find the lowest and the highest value where there is data; None where there is none at all."""
    if gone is None:
        return values.min().item(), values.max().item()
    kept = values[~np.broadcast_to(gone, values.shape)]
    return (kept.min().item(), kept.max().item()) if kept.size else None


def _by_type(values: npt.NDArray[Any], gone: Bool | None, limit: int | None) -> UInt8:
    if values.dtype == np.uint8 and limit in (None, 255):
        return values
    if values.dtype == np.uint16 and limit in (None, 65535):
        return _sixteen_bits(values)
    found = extent(values, gone)
    if found is None:
        return np.zeros(values.shape, np.uint8)
    low, high = found
    top = 1 if values.dtype.kind == "f" else limit or (127 if values.dtype == np.int8 else 65535)
    if low < 0 or high > top:  # NaN is gone already
        infinite = not math.isfinite(low) or not math.isfinite(high)
        raise ImageError(
            f"values {low:.10g} to {high:.10g} {'are not finite and ' if infinite else ''}lie outside 0 to {top}: "
            "say in data.range what becomes black and white, or scale each image by its own range with "
            "data.sixteen_bit=minmax"
        )
    if values.dtype == np.int8:  # its values pass unchanged, like other 8-bit values
        return values.astype(np.uint8)
    return _linear(values, 0.0, float(top))


def _sixteen_bits(values: npt.NDArray[Any]) -> UInt8:
    """Compute round(value / 257); 257 is odd, so there are no ties, and single precision is exact."""
    return _by_rows(lambda rows: cv2.convertScaleAbs(rows, alpha=1 / 257), values)


def _sixteen_bits_without(samples: Samples, scaling: Scaling) -> UInt8 | None:
    """Make levels of 16 bits with values that mean no data, equal to those of `_by_type` and `_filled`; or None.

    It goes plane by plane and multiplies, since writing where a mask of all channels is true takes ten times as long.
    """
    values = samples.values
    numbers = {*samples.nodata, *(() if scaling.nodata is None else (scaling.nodata,))}
    is_plain = scaling.value_range is None and scaling.sixteen_bit == "full" and samples.limit in (None, 65535)
    has_more = samples.valid is not None or samples.white_is_zero or samples.colour == 3
    if values.dtype != np.uint16 or not is_plain or not numbers or has_more:
        return None
    there = [int(n) for n in numbers if math.isfinite(n) and n == int(n) and 0 <= n <= 65535]

    def change(rows: npt.NDArray[Any]) -> UInt8:
        levels = np.asarray(cv2.convertScaleAbs(rows, alpha=1 / 257), np.uint8)
        for number in there:
            has = (rows != np.uint16(number)).view(np.uint8)  # 0 or 1
            levels *= has
            if scaling.fill:
                levels += (1 - has) * np.uint8(scaling.fill)
        return levels

    return _by_rows(change, values)


def _by_rows(change: Callable[[npt.NDArray[Any]], Any], values: npt.NDArray[Any]) -> UInt8:
    """Turn every value of [H, W, C] into a level by a function of an array of two axes.

    Values that lie plane by plane are taken in that order, since interleaving their levels takes half as long.
    """
    height, width, channels = values.shape
    planes = np.moveaxis(values, -1, 0)
    if channels > 1 and planes.flags.c_contiguous:
        return interleaved(np.asarray(change(planes.reshape(-1, width)), np.uint8).reshape(planes.shape))
    rows = np.ascontiguousarray(values).reshape(height, width * channels)
    return np.asarray(change(rows), np.uint8).reshape(values.shape)


def interleaved(planes: UInt8) -> UInt8:
    """Put planes [C, H, W] together as [H, W, C].

    OpenCV uses instructions of the processor for up to four planes. More planes go in groups of four, two and one, each
    written as one number of as many bytes, which takes half as long.
    """
    if len(planes) <= 4:
        return np.asarray(cv2.merge(list(planes)), np.uint8).reshape(*planes[0].shape, len(planes))
    pixels = np.empty((*planes[0].shape, len(planes)), np.uint8)
    start = 0
    while start < len(planes):
        together = next(n for n in (4, 2, 1) if n <= len(planes) - start)
        number = {4: np.uint32, 2: np.uint16, 1: np.uint8}[together]
        group = cv2.merge(list(planes[start : start + together])) if together > 1 else planes[start]
        where: npt.NDArray[Any] = np.ndarray(planes[0].size, number, pixels, start, (len(planes),))
        where[:] = group.reshape(-1).view(number)
        start += together
    return pixels


def _by_own_range(values: npt.NDArray[Any], gone: Bool | None) -> UInt8:
    found = extent(values, gone)
    if found is None:
        return np.zeros(values.shape, np.uint8)
    if not all(map(math.isfinite, found)):
        raise ImageError("has values that are not finite: name them in data.nodata, or give data.range")
    low, high = found
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return _linear(values, float(low), float(high))


def _by_ranges(values: npt.NDArray[Any], pairs: tuple[Pair, ...]) -> UInt8:
    if len(pairs) == 1:
        return _linear(values, *pairs[0])
    return np.concatenate([_linear(values[:, :, i : i + 1], *pair) for i, pair in enumerate(pairs)], axis=2)


def _linear(values: npt.NDArray[Any], low: float, high: float) -> UInt8:
    """Scale `low` to 0 and `high` to 255, to the nearest level, and clip values beyond; NaN gives any level."""
    if values.dtype in (np.uint8, np.uint16):
        return _look_up(values, _table(values.dtype.str, low, high))
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK * len(values) // max(values.size, 1))
    for start in range(0, len(values), rows):  # doubles take eight times the memory
        levels[start : start + rows] = _linear_doubles(values[start : start + rows], low, high)
    return levels


def _linear_doubles(values: npt.NDArray[Any], low: float, high: float) -> UInt8:
    scaled = values.astype(np.float64)
    if not math.isfinite(high - low):  # the extremes of a double
        scaled, low, high = scaled / 4, low / 4, high / 4
    with np.errstate(over="ignore"):  # values that overflow are clipped all the same
        scaled -= low
        scaled /= high - low
        scaled *= 255.0
    np.clip(scaled, 0.0, 255.0, out=scaled)
    return np.rint(np.nan_to_num(scaled, copy=False)).astype(np.uint8)


@functools.lru_cache(maxsize=32)
def _table(dtype: str, low: float, high: float) -> UInt8:
    """Make a table of the level of every value that an unsigned type holds."""
    every = np.arange(np.iinfo(dtype).max + 1, dtype=np.float64)
    table = np.rint(np.clip((every - low) / (high - low) * 255.0, 0.0, 255.0)).astype(np.uint8)
    table.flags.writeable = False
    return table


def _look_up(values: npt.NDArray[Any], table: UInt8) -> UInt8:
    if values.dtype == np.uint16 and not _cv2_has_wide_tables():
        return np.asarray(table[values])
    return _by_rows(lambda rows: cv2.LUT(rows, table), values)


@functools.cache
def _cv2_has_wide_tables() -> bool:
    """Whether OpenCV has tables of 65,536 entries, which are twice as fast as NumPy's; older versions have none."""
    try:
        found = cv2.LUT(np.array([[0, 65535]], np.uint16), np.arange(65536, dtype=np.uint32).astype(np.uint8))
    except cv2.error:
        return False
    return bool(np.array_equal(found, [[0, 255]]))
