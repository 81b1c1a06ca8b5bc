"""The image that a TIFF holds among thumbnails and masks, and its tags, as tifffile reads them."""

import io
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dinoforge.data import tiff_headers as headers
from dinoforge.data import tiff_plain
from dinoforge.errors import ImageError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage


@contextmanager
def open_tiff(data: bytes | BinaryIO) -> "Iterator[TiffFile]":
    """Open the bytes of a TIFF, or its file, by tifffile, which logs nothing meanwhile."""
    import tifffile  # not before it is needed

    logger = logging.getLogger("tifffile")
    before = logger.disabled
    logger.disabled = True  # errors that matter are raised
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
class TiffImage:
    """The image that a TIFF holds, with its tags.

    Args:
        key: The first page of the image, whose tags hold for all pages.
        pages: The series of pages that it belongs to; None where it is the first page alone.
        axes: Letters of its axes, such as ``TZCYX``.
        shape: The lengths of the axes.
        channel_axes: Indices of the axes along which channels lie, C before S.
        plane_axes: Indices of the axes along which planes lie: z, time, and axes of unknown meaning.
        mask: The page of GDAL's internal mask.
        family: The kind of TIFF in words, such as ``GeoTIFF``.
        for_pillow: Whether Pillow reads its first plane right.
    """

    key: "TiffPage"
    pages: Any
    axes: str
    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    plane_axes: tuple[int, ...]
    mask: "TiffPage | None"
    family: str
    for_pillow: bool

    @property
    def planes(self) -> int:
        return math.prod(self.shape[i] for i in self.plane_axes)

    @property
    def along(self) -> str:
        """The axes along which the planes lie, such as ``z, t`` or ``page``; '' for one plane."""
        letters = [self.axes[i] for i in self.plane_axes if self.shape[i] > 1]
        if set(letters) <= set("QI"):
            return "page" if letters else ""
        return ", ".join(letter.lower() for letter in letters)

    @property
    def channels(self) -> int:
        return math.prod(self.shape[i] for i in self.channel_axes)

    @property
    def photometric(self) -> int:
        return int(self.key.photometric) if self.key.photometric is not None else headers.BLACK_IS_ZERO

    @property
    def has_alpha(self) -> bool:
        return len(self.key.extrasamples) == 1 and int(self.key.extrasamples[0]) in (1, 2)

    @property
    def orientation(self) -> int:
        """The EXIF orientation, 1…8."""
        tag = self.key.tags.get(headers.ORIENTATION)
        return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1

    @property
    def nodata(self) -> tuple[float, ...]:
        """The values that stand for no data, by GDAL's tag."""
        tag = self.key.tags.get(headers.GDAL_NODATA)
        return () if tag is None else tiff_plain.nodata_said(str(tag.value))

    @property
    def limit(self) -> int | None:
        """The largest value, where fewer bits are used than the type has."""
        key, dtype = self.key, self.key.dtype
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

    @property
    def kind(self) -> str:
        """Type and number of channels, and what else is worth telling, such as ``uint16 x5, OME-TIFF, axes CYX``."""
        channels = 3 if self.photometric in (headers.PALETTE, headers.SEPARATED) else self.channels
        words = [f"{self.key.dtype} x{channels}", self.family]
        if set(self.axes) - set("YXS"):
            axes = (a for a, n in zip(self.axes, self.shape, strict=True) if n > 1 or a in "YX")
            words.append(f"axes {''.join(axes)}")
        if self.photometric == headers.RGB and self.channels > 3 and self.channels == self.key.samplesperpixel:
            words.append(tiff_plain.more_bands(self.channels))
        elif self.photometric == headers.PALETTE:
            words.append("palette")
        elif self.photometric == headers.SEPARATED:
            words.append("CMYK")
        elif self.photometric == headers.WHITE_IS_ZERO:
            words.append("white is 0")
        if (limit := self.limit) is not None:
            words.append(f"{limit.bit_length()} bits")
        words += [f"nodata {number:.10g}" for number in self.nodata]
        if self.mask is not None:
            words.append("mask")
        if self.planes > 1 and self.along == "page":
            words.append(f"page 1 of {self.planes}")
        elif self.planes > 1:
            words.append(f"plane 1 of {self.planes} ({self.along})")
        return ", ".join(words)


def find_image(file: "TiffFile", head: headers.Directory | None, channels: int | None) -> TiffImage:
    """Find the image of a TIFF, which is neither a thumbnail nor a mask, and what its axes are.

    Args:
        file: The opened file.
        head: The first directory of the file, where that could be read.
        channels: The number of channels wanted, which decides what pages without metadata are; None for the first
            page.

    Raises:
        ImageError: There is no image in it.
    """
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
    return TiffImage(key, pages, axes, shape, known, planes, mask, family, for_pillow)


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
