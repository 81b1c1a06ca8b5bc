"""Headers of images, read without decoding: size, kind and planes."""

import io
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from dinoforge.data import formats, tiff
from dinoforge.data.pictures import (
    AnImage,
    as_array,
    count_frames,
    file_behind,
    is_deep_png,
    open_picture,
    orientation_of,
    reading,
)
from dinoforge.data.sources import OnePlane


def size_and_kind(image: AnImage, channels: int | None = None) -> tuple[int, int, str]:
    """Read an image's upright width, height and kind of pixels from its header, without decoding it.

    Args:
        image: An image as for `decode`.
        channels: The number of channels wanted, on which the pages that are read may depend; see
            ``dinoforge.data.tiff``.

    Returns:
        Width and height in pixels, and Pillow's name of the mode (``RGB``, ``I;16``…; ``RGB;16`` for 16-bit colour),
        or type and number of channels of arrays (``uint16 x1``), rasters and microscopes' files, with what else was
        found (``uint16 x5, OME-TIFF, axes CYX``).

    Raises:
        ImageError: The image is none, or its header is damaged.
    """
    image = file_behind(image.image if isinstance(image, OnePlane) else image)
    if not isinstance(image, bytes | Image.Image):
        values = as_array(image)
        return values.shape[1], values.shape[0], f"{values.dtype} x{values.shape[2]}"
    with reading(max_pixels=None, data=image if isinstance(image, bytes) else b""):
        if isinstance(image, bytes):
            read = tiff.size_and_kind if tiff.is_tiff(image) else formats.size_and_kind
            if found := read(image, channels):
                return found
        picture = open_picture(image) if isinstance(image, bytes) else image
        mode = f"{picture.mode};16" if is_deep_png(picture) else picture.mode
        width, height = picture.size
        # Pillow reports the upright size of a TIFF by itself, and would decode a PNG in search of late EXIF data.
        known = picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info)
        if not known and orientation_of(picture) >= 5:
            width, height = height, width
        return width, height, mode


def channels_said(kind: str) -> int | None:
    """The number of channels in a kind of `size_and_kind`: 5 in ``uint16 x5, GeoTIFF``; None for Pillow's modes."""
    _, found, rest = kind.partition(" x")
    return int(rest.partition(",")[0]) if found else None


def count_planes(image: AnImage | BinaryIO, channels: int | None = None) -> tuple[int, str]:
    """Count the planes of an image from its headers, without decoding it.

    Args:
        image: An image as for `decode`, or an open file, of which only what is needed is read.
        channels: The number of channels wanted, on which the count may depend; see ``dinoforge.data.tiff``.

    Returns:
        The number of planes, and the axes along which they lie, such as ``z, t``, ``page`` or ``frame``; '' for one.

    Raises:
        ImageError: The image is none, or its header is damaged.
        OSError: An open file cannot be read.
    """
    if isinstance(image, Image.Image):
        image = file_behind(image)
    if isinstance(image, Image.Image):
        return count_frames(image)
    if isinstance(image, OnePlane | np.ndarray | torch.Tensor):
        return 1, ""
    if isinstance(image, bytes):
        with io.BytesIO(image) as file:
            return _count_planes(file, channels)
    return _count_planes(image, channels)


def _count_planes(file: BinaryIO, channels: int | None) -> tuple[int, str]:
    head = file.read(4096)
    with reading(max_pixels=None, data=head):
        if tiff.is_tiff(head):
            return tiff.count_planes(file, channels)
        if not may_move(head):
            return 1, ""
        file.seek(0)
        return count_frames(open_picture(file))


def may_move(head: bytes) -> bool:
    """Whether a file may be an animation of which each frame can be read, by its first 4096 bytes."""
    if head.startswith(b"\x89PNG"):
        # Of 16-bit colour the first picture alone is read. What makes a PNG move stands before its pixels.
        is_deep = head[24:25] == b"\x10" and head[25:26] != b"\0"
        return not is_deep and (b"acTL" in head or b"IDAT" not in head)
    if head[8:12] == b"WEBP":
        return head[12:16] == b"VP8X" and bool(head[20] & 2)
    return head.startswith(b"GIF8") or head[4:11] == b"ftypavi"
