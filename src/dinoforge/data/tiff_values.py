"""The values of a TIFF's image, plane by plane, decoded by tifffile and refused where the file lacks some."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinoforge.data import tiff_headers as headers
from dinoforge.data.tiff_image import TiffImage
from dinoforge.data.values import Bool, Samples, Scaling, check_plane, to_levels, upright
from dinoforge.errors import ImageError

Plane = int | Literal["max"] | None
Values = npt.NDArray[Any]


def samples_of(found: TiffImage, data: bytes, channels: int | None, plane: Plane) -> Samples:
    """Read the values of a TIFF's image, upright, with palettes and inks made RGB.

    Args:
        found: The image.
        data: The file.
        channels: The number of channels wanted: inks stay inks where exactly so many are.
        plane: The index of the plane; ``max`` for the brightest value of all planes, None for the first plane.

    Raises:
        ImageError: The file has no such plane or is truncated, or its colours are of a kind that is not read.
    """
    check_plane(plane, found.planes)
    key = found.key
    photometric, nodata, limit = found.photometric, found.nodata, found.limit
    _check_photometric(found)
    white_is_zero = photometric == headers.WHITE_IS_ZERO
    numbers = range(found.planes) if plane == "max" else [plane or 0]
    values: Values | None = None
    for number in numbers:
        one = _plane(found, data, number)
        values = one if values is None else _larger(values, one, nodata, smaller=white_is_zero)
    assert values is not None
    valid = _valid(found, data)
    colour = 0
    if (
        photometric in (headers.RGB, headers.YCBCR)
        and key.samplesperpixel >= 3
        and values.shape[2] == key.samplesperpixel
    ):
        colour = 3
    elif values.shape[2] == 1 or (values.shape[2] == 2 and found.has_alpha):
        colour = 1
    if white_is_zero and values.dtype.kind not in "bu":
        raise ImageError(f"white is said to be 0 of {values.dtype} values, which has no black: save it with black as 0")
    if photometric == headers.PALETTE and key.colormap is not None and values.shape[2] == 1:
        valid = _both(valid, nodata, values)
        colours = np.asarray(key.colormap)  # [3, 2^bits]
        # 16 bits; but some programs write 8 of them, which libtiff tells in the same way.
        table = (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)
        values, colour, nodata, limit = np.moveaxis(table[:, values[:, :, 0]], 0, -1), 3, (), None
    elif photometric == headers.SEPARATED and channels != values.shape[2]:
        ink = to_levels(Samples(values[:, :, :4], limit=limit), Scaling())
        valid = _both(valid, nodata, values)
        picture = Image.frombytes("CMYK", ink.shape[1::-1], ink.tobytes())
        values, colour, nodata, limit = np.asarray(picture.convert("RGB")), 3, (), None
    orientation = found.orientation
    values = upright(values, orientation)
    valid = None if valid is None else upright(valid, orientation)
    return Samples(values, limit, colour, False, nodata, valid, found.kind, white_is_zero)


def _check_photometric(found: TiffImage) -> None:
    """Refuse colours that are not read."""
    key, photometric = found.key, found.photometric
    name = getattr(key.photometric, "name", str(photometric))
    if photometric in (
        headers.WHITE_IS_ZERO,
        headers.BLACK_IS_ZERO,
        headers.RGB,
        headers.PALETTE,
        headers.TRANSPARENCY,
    ):
        return
    if photometric == headers.YCBCR and int(key.compression) in headers.JPEG:
        return
    ink_set = key.tags.get(headers.INK_SET)
    if photometric == headers.SEPARATED and key.samplesperpixel >= 4 and (ink_set is None or ink_set.value == 1):
        return
    if photometric in (32803, 34892):
        raise ImageError("a camera's raw data in TIFF, which is not read: develop it to TIFF or JPEG")
    raise ImageError(f"a TIFF of {key.bitspersample}-bit {name} colours, which is not read: save it as RGB")


def _plane(found: TiffImage, data: bytes, number: int) -> Values:
    """Read the values of one plane, [H, W, C]."""
    index = np.unravel_index(number, [found.shape[i] for i in found.plane_axes]) if found.plane_axes else ()
    where: list[Any] = [slice(None)] * len(found.axes)
    for axis, at in zip(found.plane_axes, index, strict=True):
        where[axis] = int(at)
    values = _values(found, data, tuple(where))
    kept = [i for i in range(len(found.axes)) if i not in found.plane_axes]
    order = [found.axes.index("Y"), found.axes.index("X"), *found.channel_axes]
    values = values.transpose([kept.index(i) for i in order])
    return values.reshape(*values.shape[:2], -1)


def _values(found: TiffImage, data: bytes, where: tuple[Any, ...]) -> Values:
    """Read the values at an index of the image's axes, and decode only the pages that it needs."""
    key, series = found.key, found.pages
    if series is None:
        _check_complete([key], data)
        if key.is_contiguous:
            return _as_it_lies(found, data, key.dataoffsets[0], where)
        values: Values = np.asarray(key.asarray(maxworkers=1))[where]
        return values
    if series.dataoffset is not None:
        return _as_it_lies(found, data, series.dataoffset, where)
    pages = [series[i] for i in range(len(series))]
    if any(page is None for page in pages):
        raise ImageError("its metadata names planes that are not in the file: keep each image in a file of its own")
    tail = key.shape
    lead = found.shape[: len(found.shape) - len(tail)]
    if math.prod(lead) != len(pages) or found.shape[len(lead) :] != tail:
        _check_complete(pages, data)
        values = np.asarray(series.asarray(maxworkers=1)).reshape(found.shape)
        return values[where]  # type: ignore[no-any-return]
    chosen = np.arange(len(pages)).reshape(lead)[where[: len(lead)]]
    flat = [pages[i] for i in np.ravel(chosen)]
    _check_complete(flat, data)
    values = np.stack([np.asarray(page.asarray(maxworkers=1)) for page in flat])
    values = values.reshape(*np.shape(chosen), *tail)
    return values[(..., *where[len(lead) :])]


def _as_it_lies(found: TiffImage, data: bytes, start: int, where: tuple[Any, ...]) -> Values:
    """View values that are stored without compression, one after the other, at an index of the image's axes."""
    dtype = np.dtype(found.key.dtype).newbyteorder(found.key.parent.byteorder)
    size = math.prod(found.shape)
    if start + size * dtype.itemsize > len(data):
        raise ImageError(f"truncated: {len(data)} bytes, {start + size * dtype.itemsize} expected")
    values: Values = np.frombuffer(data, dtype, size, start).reshape(found.shape)[where]
    if dtype.isnative and values.flags.aligned:
        return values
    return values.astype(dtype.newbyteorder("="))


def _check_complete(pages: Sequence[Any], data: bytes) -> None:
    """Refuse a file whose strips or tiles lie beyond its end: they would be read as zeros."""
    for page in pages:
        spans = list(zip(page.dataoffsets, page.databytecounts, strict=False))
        lost = sum(offset + count > len(data) for offset, count in spans)
        if lost:
            raise ImageError(f"truncated: {lost} of {len(spans)} strips or tiles lie beyond the end of the file")
        if not spans:
            raise ImageError("damaged: a page without data")
        if int(page.compression) == 1 and not any(offset == 0 for offset, _ in spans):
            stored = sum(count for _, count in spans) * 8
            bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
            needed = page.imagewidth * page.imagelength * page.samplesperpixel * bits
            if stored < needed and int(page.photometric) != headers.YCBCR:
                raise ImageError(f"damaged: {stored // 8} bytes of data, {-(-needed // 8)} expected")


def _larger(values: Values, other: Values, nodata: tuple[float, ...], smaller: bool) -> Values:
    """Take the brighter of two planes, value by value, or the one that has data."""
    brighter = (np.fmin if smaller else np.fmax)(values, other)  # NaN only where both are
    for number in nodata:
        brighter = np.where(values == number, other, np.where(other == number, values, brighter))
    return brighter


def _both(valid: Bool | None, nodata: tuple[float, ...], values: Values) -> Bool | None:
    """Take pixels out of a mask whose channels all have a value that means no data, before values become others."""
    for number in nodata:
        has = (values != number).any(axis=2)
        valid = has if valid is None else valid & has
    return valid


def _valid(found: TiffImage, data: bytes) -> Bool | None:
    """Read the internal mask, [H, W], False where there is no data."""
    if found.mask is None:
        return None
    _check_complete([found.mask], data)
    mask = np.asarray(found.mask.asarray(maxworkers=1)) != 0
    return np.asarray(mask if mask.ndim == 2 else mask.any(axis=mask.shape.index(min(mask.shape))))
