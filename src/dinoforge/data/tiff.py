"""TIFF as rasters and microscopes write it: any bands, bits and sample formats, planes, pages, masks.

tifffile reads them; it is imported when the first such file is opened. Plain 8-bit pictures are left to Pillow, which
is faster: `read` and `describe` return None for them. Values that plainly lie in the file are viewed without tifffile:
see ``dinoforge.data.tiff_plain``.

- Nothing is laid over white: in a TIFF the fourth band marked as alpha may as well be infrared.
- Channels: the samples of a pixel, the planes of a planar file, and the axis C of OME and ImageJ metadata. Pages
  without metadata could be anything: they are channels where exactly so many are wanted, else the first page is the
  image (8-bit pages are the sheets of a document where three channels are wanted).
- z, time and whatever else: one plane, `plane` in the file's order, or the brightest value of all of them.
- Pages that say that they are a reduced image or a mask are not the image.
- No data: GDAL's tag, its internal mask, and NaN.
- Bits: those of the file, also where OME's SignificantBits or a MaxSampleValue of 2^n - 1 says that fewer are used.
- Where white is 0, levels are turned over; ranges and numbers that are no data are meant as the file has them.
"""

import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinoforge.data import tiff_headers as headers
from dinoforge.data import tiff_plain
from dinoforge.data.values import Bool, Samples, Scaling, check_size, to_levels
from dinoforge.errors import ImageError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

Plane = int | Literal["max"] | None
Values = npt.NDArray[Any]

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as TIFF or BigTIFF does."""
    return data[:4] in _MAGIC


def read(data: bytes, *, channels: int | None, plane: Plane, max_pixels: int) -> Samples | None:
    """Read a TIFF's values, or return None for a picture that Pillow reads right.

    Args:
        data: The file.
        channels: Channels wanted: they decide what pages without metadata are. None: the first page.
        plane: Index of the plane along z, time and unknown axes; ``max``: the largest value of all planes; None: 0.
        max_pixels: Largest H·W.

    Raises:
        ImageError: Truncated, too large, no such plane, or of a kind that is not read.
    """
    head = headers.first_directory(data)
    if head is not None and head.plain and not head.more:
        check_plane(plane, 1)
        return None
    lying = None if head is None else tiff_plain.find(data, head, channels)
    if lying is not None:
        check_size(lying.shape[1], lying.shape[0], max_pixels)
        check_plane(plane, 1)
        return lying.samples(data)
    with _opened(data) as file:
        found = _find(file, head, channels)
        if found.for_pillow and plane in (None, 0):
            return None
        check_size(found.key.imagewidth, found.key.imagelength, max_pixels)
        return _samples(found, data, channels, plane)


def describe(data: bytes, channels: int | None = None) -> tuple[int, int, str] | None:
    """Tell a TIFF's upright width, height and kind from its headers; None for a picture that Pillow reads right.

    Raises:
        ImageError: No image in it.
    """
    head = headers.first_directory(data)
    if head is not None and head.plain and not head.more:
        return None
    lying = None if head is None else tiff_plain.find(data, head, channels)
    if lying is not None:
        return lying.shape[1], lying.shape[0], lying.kind
    with _opened(data) as file:
        found = _find(file, head, channels)
        width, height = found.key.imagewidth, found.key.imagelength
        if _orientation(found.key) >= 5:
            width, height = height, width
        return width, height, _kind(found)


@dataclass(frozen=True)
class Stored:
    """Values as `read` gives them.

    Args:
        dtype: Their type.
        count: Their number.
        channels: Channels that they have.
        planar: Whether they lie channel by channel.
        held: Bytes that they take, beside those of the file.
        peak: Bytes that reading them takes at most.
    """

    dtype: np.dtype[Any]
    count: int
    channels: int
    planar: bool
    held: int
    peak: int


def count_planes(file: BinaryIO, channels: int | None = None) -> tuple[int, str]:
    """Count the planes of an open TIFF from its headers: along z, time, pages and unknown axes.

    Args:
        file: Seekable; only what is needed of it is read.
        channels: Channels wanted: they decide what pages without metadata are, as for ``read``.

    Returns:
        Their number, and along what they lie, such as ``z, t``; '' for one.

    Raises:
        ImageError: No image in it. What else tifffile raises of damaged files comes as it is.
    """
    quick = count_quickly(file, channels)
    if quick is not None:
        return quick
    head = headers.first_directory(headers.OnDisk.of(file))
    file.seek(0)
    with _opened(file) as opened:
        return _along(_find(opened, head, channels))


def count_quickly(file: BinaryIO, channels: int | None = None) -> tuple[int, str] | None:
    """As ``count_planes`` where neither OME, ImageJ nor others say what the pages are, else None; for any thread."""
    data = headers.OnDisk.of(file)
    head = headers.first_directory(data)
    if head is not None and (head.alone or (head.plain and not head.more)):
        return 1, ""
    pages = headers.equal_pages(data)
    return (pages, "page") if pages is not None and pages > 1 and pages != channels else None


def stored(data: bytes, channels: int | None, plane: Plane) -> Stored | None:
    """Tell from the headers what `read` will hold in memory; None for a picture that Pillow reads.

    Raises:
        ImageError: No image in it.
    """
    head = headers.first_directory(data)
    if head is not None and head.plain and not head.more:
        return None
    with _opened(data) as file:
        found = _find(file, head, channels)
        if found.for_pillow and plane in (None, 0):
            return None
        key, series = found.key, found.pages
        dtype = np.dtype(key.dtype)
        size = key.imagewidth * key.imagelength * found.channels * dtype.itemsize
        planar = int(key.planarconfig) == 2 or any(found.axes[i] != "S" for i in found.channel_axes)
        lies_there = key.is_contiguous if series is None else series.dataoffset is not None
        if lies_there and dtype.newbyteorder(key.parent.byteorder).isnative:
            held = peak = 0
        elif lies_there or series is None:
            held = peak = size
        elif math.prod(found.shape[: len(found.shape) - len(key.shape)]) == len(series):
            held, peak = size, 2 * size  # pages, and then all in one array
        else:
            held = peak = math.prod(found.shape) * dtype.itemsize  # every plane
        if plane == "max" and found.planes > 1:
            held, peak = size, max(peak, held) + 2 * size
        if int(key.photometric) in (headers.PALETTE, headers.SEPARATED):
            pixels = key.imagewidth * key.imagelength
            return Stored(np.dtype(np.uint8), 3 * pixels, 3, planar, 3 * pixels, max(peak, held + 14 * pixels))
        return Stored(dtype, size // dtype.itemsize, found.channels, planar, held, peak)


def _along(found: "_Found") -> tuple[int, str]:
    """The number of planes, and their axes in words."""
    letters = [found.axes[i] for i in found.plane_axes if found.shape[i] > 1]
    if set(letters) <= set("QI"):
        return found.planes, "page" if letters else ""
    return found.planes, ", ".join(letter.lower() for letter in letters)


@contextmanager
def _opened(data: bytes | BinaryIO) -> "Iterator[TiffFile]":
    import tifffile  # not before it is needed

    logger = logging.getLogger("tifffile")
    before = logger.disabled
    logger.disabled = True  # what matters is raised
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        # Not _multifile: no file leads to another one.
        with tifffile.TiffFile(stream, _multifile=False) as file:
            yield file
    finally:
        logger.disabled = before
        if isinstance(data, bytes):
            stream.close()  # tifffile's objects refer to each other, and would keep the file until they are collected


@dataclass(frozen=True)
class _Found:
    """The image of a file."""

    key: "TiffPage"
    pages: Any  # the series that it belongs to; None: this page alone
    axes: str
    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]  # C before S
    plane_axes: tuple[int, ...]
    mask: "TiffPage | None"
    family: str
    for_pillow: bool

    @property
    def planes(self) -> int:
        return math.prod(self.shape[i] for i in self.plane_axes)

    @property
    def channels(self) -> int:
        return math.prod(self.shape[i] for i in self.channel_axes)


def _find(file: "TiffFile", head: headers.Directory | None, channels: int | None) -> _Found:
    """Find the image: not a thumbnail, not a mask; and what its axes are."""
    key: TiffPage = file.pages.first
    pages, axes, shape, mask = None, key.axes, key.shape, None
    if head is None or not head.alone:
        if head is None or head.more:
            mask = _mask(file)
        whole = [
            s
            for s in file.series
            if s.keyframe is not None and not s.keyframe.subfiletype & (headers.REDUCED | headers.MASK)
        ]
        if not whole:
            whole = [s for s in file.series if s.keyframe is not None and not s.keyframe.subfiletype & headers.MASK]
        if not whole:
            raise ImageError("a TIFF without an image")
        pages = whole[0]
        key, axes, shape = pages.keyframe, pages.axes, pages.shape
        if sorted(a for a in axes if a in "YX") != ["X", "Y"]:
            pages, axes, shape = None, key.axes, key.shape
    if mask is not None and (mask.imagewidth, mask.imagelength) != (key.imagewidth, key.imagelength):
        mask = None
    if file.is_ome:
        family = "OME-TIFF"
    elif file.is_imagej:
        family = "ImageJ TIFF"
    else:
        family = "GeoTIFF" if any(tag in key.tags for tag in headers.GEO) else "BigTIFF" if file.is_bigtiff else "TIFF"
    known = tuple(sorted((i for i, a in enumerate(axes) if a in "CS"), key=lambda i: axes[i]))
    planes = tuple(i for i, a in enumerate(axes) if a not in "CSYX")
    if math.prod(shape[i] for i in known) == 1 and math.prod(shape[i] for i in planes) == channels:
        unknown = tuple(i for i in planes if shape[i] > 1)
        document = channels == 3 and key.dtype is not None and key.dtype.itemsize == 1
        if len(unknown) == 1 and axes[unknown[0]] in "QI" and not document:
            known, planes = unknown, tuple(i for i in planes if i not in unknown)
    for_pillow = (
        head is not None
        and head.plain
        and mask is None
        and key.index == 0
        and file.pages.first.offset == key.offset
        and not any(axes[i] in "CQI" and shape[i] > 1 for i in known)
        and math.prod(shape[i] for i in known) in (1, 3, 4)
    )
    return _Found(key, pages, axes, shape, known, planes, mask, family, for_pillow)


def _mask(file: "TiffFile") -> "TiffPage | None":
    """Find GDAL's internal mask, which is a page of its own."""
    handle = file.filehandle
    if not headers.may_have_mask(headers.OnDisk(handle, handle.size)):  # type: ignore[arg-type]  # it seeks and reads like a file
        return None
    for page in file.pages:
        found = page.aspage()
        if found.subfiletype & (headers.REDUCED | headers.MASK) == headers.MASK:
            return found
    return None


def _samples(found: _Found, data: bytes, channels: int | None, plane: Plane) -> Samples:
    check_plane(plane, found.planes)
    key = found.key
    photometric = int(key.photometric) if key.photometric is not None else headers.BLACK_IS_ZERO
    _check_photometric(found, photometric)
    nodata = _nodata(key)
    limit = _limit(key)
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
    elif values.shape[2] == 1 or (values.shape[2] == 2 and _is_alpha(key)):
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
    orientation = _orientation(key)
    values = upright(values, orientation)
    valid = None if valid is None else upright(valid, orientation)
    return Samples(values, limit, colour, False, nodata, valid, _kind(found), white_is_zero)


def upright(array: Values, orientation: int) -> Values:
    """Turn an array [H, W, …] as its EXIF orientation, 1…8, says."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def check_plane(plane: Plane, planes: int) -> None:
    """Refuse the index of a plane that a file does not have.

    Raises:
        ImageError: As said.
    """
    if isinstance(plane, int) and not 0 <= plane < planes:
        have = "1 plane" if planes == 1 else f"{planes} planes"
        raise ImageError(f"has {have}, counted from 0, but data.plane={plane}")


def _check_photometric(found: _Found, photometric: int) -> None:
    key = found.key
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


def _plane(found: _Found, data: bytes, number: int) -> Values:
    """The values of one plane: [H, W, C]."""
    index = np.unravel_index(number, [found.shape[i] for i in found.plane_axes]) if found.plane_axes else ()
    where: list[Any] = [slice(None)] * len(found.axes)
    for axis, at in zip(found.plane_axes, index, strict=True):
        where[axis] = int(at)
    values = _values(found, data, tuple(where))
    kept = [i for i in range(len(found.axes)) if i not in found.plane_axes]
    order = [found.axes.index("Y"), found.axes.index("X"), *found.channel_axes]
    values = values.transpose([kept.index(i) for i in order])
    return values.reshape(*values.shape[:2], -1)


def _values(found: _Found, data: bytes, where: tuple[Any, ...]) -> Values:
    """What stands at an index of the image's axes; only the pages that it needs are decoded."""
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


def _as_it_lies(found: _Found, data: bytes, start: int, where: tuple[Any, ...]) -> Values:
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
    """The brighter of two planes, value by value, or the one that has data."""
    brighter = (np.fmin if smaller else np.fmax)(values, other)  # NaN only where both are
    for number in nodata:
        brighter = np.where(values == number, other, np.where(other == number, values, brighter))
    return brighter


def _both(valid: Bool | None, nodata: tuple[float, ...], values: Values) -> Bool | None:
    """The mask, less what is no data by its number in all channels: before values become others."""
    for number in nodata:
        has = (values != number).any(axis=2)
        valid = has if valid is None else valid & has
    return valid


def _valid(found: _Found, data: bytes) -> Bool | None:
    if found.mask is None:
        return None
    _check_complete([found.mask], data)
    mask = np.asarray(found.mask.asarray(maxworkers=1)) != 0
    return np.asarray(mask if mask.ndim == 2 else mask.any(axis=mask.shape.index(min(mask.shape))))


def _nodata(key: "TiffPage") -> tuple[float, ...]:
    tag = key.tags.get(headers.GDAL_NODATA)
    if tag is None:
        return ()
    return tiff_plain.nodata_said(str(tag.value))


def _limit(key: "TiffPage") -> int | None:
    """The largest value, where fewer bits are used than the type has."""
    dtype = key.dtype
    if dtype is None or dtype.kind != "u":
        return None
    bits = max(np.ravel(key.bitspersample))
    limits = [2 ** int(bits) - 1] if bits < dtype.itemsize * 8 else []
    for tag in (headers.MAX_SAMPLE_VALUE, headers.S_MAX_SAMPLE_VALUE):
        said = key.tags.get(tag)
        if said is None:
            continue
        numbers = [int(v) for v in np.ravel(said.value) if isinstance(v, int | float | np.number)]
        top = max(numbers, default=0)
        if 255 < top < np.iinfo(dtype).max and top & (top + 1) == 0:  # 2^n - 1, not the largest of this image
            limits.append(top)
    if key.is_ome:
        bits_said = re.search(r'<Pixels\b[^>]*\bSignificantBits="(\d+)"', key.description)
        if bits_said and 8 < int(bits_said[1]) < dtype.itemsize * 8:
            limits.append(2 ** int(bits_said[1]) - 1)
    return min(limits, default=None)


def _is_alpha(key: "TiffPage") -> bool:
    return len(key.extrasamples) == 1 and int(key.extrasamples[0]) in (1, 2)


def _orientation(key: "TiffPage") -> int:
    tag = key.tags.get(headers.ORIENTATION)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _kind(found: _Found) -> str:
    key = found.key
    photometric = int(key.photometric) if key.photometric is not None else headers.BLACK_IS_ZERO
    channels = found.channels
    if photometric in (headers.PALETTE, headers.SEPARATED):
        channels = 3
    words = [f"{key.dtype} x{channels}", found.family]
    if set(found.axes) - set("YXS"):
        words.append(f"axes {''.join(a for a, n in zip(found.axes, found.shape, strict=True) if n > 1 or a in 'YX')}")
    if photometric == headers.RGB and found.channels > 3 and found.channels == key.samplesperpixel:
        words.append(tiff_plain.more_bands(found.channels))
    elif photometric == headers.PALETTE:
        words.append("palette")
    elif photometric == headers.SEPARATED:
        words.append("CMYK")
    elif photometric == headers.WHITE_IS_ZERO:
        words.append("white is 0")
    limit = _limit(key)
    if limit is not None:
        words.append(f"{limit.bit_length()} bits")
    words += [f"nodata {number:.10g}" for number in _nodata(key)]
    if found.mask is not None:
        words.append("mask")
    if found.planes > 1:
        letters = [found.axes[i] for i in found.plane_axes if found.shape[i] > 1]
        if set(letters) <= set("QI"):
            words.append(f"page 1 of {found.planes}")
        else:
            words.append(f"plane 1 of {found.planes} ({', '.join(a.lower() for a in letters)})")
    return ", ".join(words)
