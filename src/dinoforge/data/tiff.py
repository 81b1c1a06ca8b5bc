"""TIFF as rasters and microscopes write it: any bands, bits and sample formats, planes, pages, masks.

tifffile reads them; it is imported when the first such file is opened. Plain 8-bit pictures are left to Pillow, which
is faster: `read` and `size_and_kind` return None for them. Values that plainly lie in the file are viewed without
tifffile: see ``dinoforge.data.tiff_plain``.

- Nothing is laid over white: in a TIFF the fourth band marked as alpha may as well be infrared.
- Channels: the samples of a pixel, the planes of a planar file, and the axis C of OME and ImageJ metadata. Pages
  without metadata could be anything: they are channels where exactly so many are wanted, else the first page is the
  image (8-bit pages are the sheets of a document where three channels are wanted).
- z, time and unknown axes: one plane, `plane` in the file's order, or the brightest value of all of them.
- Pages that say that they are a reduced image or a mask are not the image.
- No data: GDAL's tag, its internal mask, and NaN.
- Bits: as many as the file says are used, by OME's SignificantBits or a MaxSampleValue of 2^n - 1, too.
- White is 0: levels are turned over; ranges and the values that mean no data hold for values as the file has them.
"""

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from dinoforge.data import tiff_headers as headers
from dinoforge.data import tiff_plain
from dinoforge.data.tiff_image import find_image, open_tiff
from dinoforge.data.tiff_values import Plane, samples_of
from dinoforge.data.values import Samples, check_plane, check_size

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as TIFF or BigTIFF does."""
    return data[:4] in _MAGIC


def read(data: bytes, *, channels: int | None, plane: Plane, max_pixels: int) -> Samples | None:
    """Read a TIFF's values, or return None for a picture that Pillow reads right.

    Args:
        data: The file.
        channels: The number of channels wanted, which decides what pages without metadata are; None for the first
            page.
        plane: The index of the plane along z, time and unknown axes; ``max`` for the brightest value of all planes,
            None for the first plane.
        max_pixels: The largest H·W.

    Raises:
        ImageError: The file is truncated, too large, of a kind that is not read, or has no such plane.
    """
    head = headers.first_directory(data)
    if head is not None and head.for_pillow:
        check_plane(plane, 1)
        return None
    lying = None if head is None else tiff_plain.find(data, head, channels)
    if lying is not None:
        check_size(lying.shape[1], lying.shape[0], max_pixels)
        check_plane(plane, 1)
        return lying.samples(data)
    with open_tiff(data) as file:
        found = find_image(file, head, channels)
        if found.for_pillow and plane in (None, 0):
            return None
        check_size(found.key.imagewidth, found.key.imagelength, max_pixels)
        return samples_of(found, data, channels, plane)


def size_and_kind(data: bytes, channels: int | None = None) -> tuple[int, int, str] | None:
    """Read a TIFF's upright width, height and kind from its headers; None for a picture that Pillow reads right.

    Args:
        data: The file.
        channels: The number of channels wanted, as for `read`.

    Raises:
        ImageError: There is no image in it.
    """
    head = headers.first_directory(data)
    if head is not None and head.for_pillow:
        return None
    lying = None if head is None else tiff_plain.find(data, head, channels)
    if lying is not None:
        return lying.shape[1], lying.shape[0], lying.kind
    with open_tiff(data) as file:
        found = find_image(file, head, channels)
        width, height = found.key.imagewidth, found.key.imagelength
        if found.orientation >= 5:
            width, height = height, width
        return width, height, found.kind


@dataclass(frozen=True)
class Stored:
    """The memory that values take as `read` gives them.

    Args:
        dtype: The type of the values.
        count: The number of values.
        channels: The number of channels.
        planar: Whether the values lie channel by channel.
        held: The bytes that the values take beside the file's.
        peak: The most bytes that reading the values takes.
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
        file: A seekable file, of which only what is needed is read.
        channels: The number of channels wanted, as for `read`.

    Returns:
        The number of planes, and the axes along which they lie, such as ``z, t``; '' for one.

    Raises:
        ImageError: There is no image in it. Whatever else tifffile raises of damaged files comes as it is.
    """
    quick = count_quickly(file, channels)
    if quick is not None:
        return quick
    head = headers.first_directory(headers.OnDisk.of(file))
    file.seek(0)
    with open_tiff(file) as opened:
        found = find_image(opened, head, channels)
        return found.planes, found.along


def count_quickly(file: BinaryIO, channels: int | None = None) -> tuple[int, str] | None:
    """Count planes like `count_planes` where nothing says what the pages are (OME, ImageJ, others), else return None.

    It may run in any thread, since tifffile takes no part.
    """
    data = headers.OnDisk.of(file)
    head = headers.first_directory(data)
    if head is not None and (head.alone or head.for_pillow):
        return 1, ""
    pages = headers.equal_pages(data)
    return (pages, "page") if pages is not None and pages > 1 and pages != channels else None


def stored(data: bytes, channels: int | None, plane: Plane) -> Stored | None:
    """Estimate from the headers the memory that `read` takes; None for a picture that Pillow reads.

    Args:
        data: The file.
        channels: The number of channels wanted, as for `read`.
        plane: The plane wanted, as for `read`.

    Raises:
        ImageError: There is no image in it.
    """
    head = headers.first_directory(data)
    if head is not None and head.for_pillow:
        return None
    with open_tiff(data) as file:
        found = find_image(file, head, channels)
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
