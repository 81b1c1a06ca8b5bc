"""The memory that decoding an image takes, estimated from its header."""

import struct
from typing import Any

import numpy as np
from PIL import Image

from dinoforge.data import formats, kinds, tiff
from dinoforge.data.headers import channels_said
from dinoforge.data.pictures import AnImage, as_array, file_behind, open_picture, reading
from dinoforge.data.sources import OnePlane
from dinoforge.data.values import BLOCK, Decoding

_OF_JPEG_2000 = 4  # bytes of each value that its decoder takes beside these
_OF_DECODERS = 5  # bytes of each value that other decoders take, these included


def working_bytes(image: AnImage, *, channels: int | None, decoding: Decoding | None = None, reduction: int = 1) -> int:
    """Estimate from its header the bytes of memory that decoding an image takes at its peak, its encoded ones included.

    Args:
        image: An image as for `decode`.
        channels: The number of channels wanted, as for `decode`.
        decoding: Further keywords of `decode`.
        reduction: The divisor of edges at which a JPEG is decoded, as for `decode`.

    Raises:
        ImageError: The image is none, or its header is damaged.
    """
    keys = decoding or Decoding()
    plane = image.number if isinstance(image, OnePlane) else keys.get("plane")
    whole = file_behind(image.image if isinstance(image, OnePlane) else image)
    if not isinstance(whole, bytes | Image.Image):
        values = as_array(whole)
        planar = np.moveaxis(values, -1, 0).flags.c_contiguous
        return values.nbytes + _of_levels(values.dtype, values.size, values.shape[2], planar, channels, keys)
    data = whole if isinstance(whole, bytes) else b""
    with reading(max_pixels=None, data=data):
        if tiff.is_tiff(data):
            stored = tiff.stored(data, channels, None if plane == "each" else plane)
            if stored is not None:
                levels = _of_levels(stored.dtype, stored.count, stored.channels, stored.planar, channels, keys)
                return len(data) + max(stored.peak, stored.held + levels)
        elif data and (head := formats.size_and_kind(data, channels)):
            bands = channels_said(head[2])
            if bands is None:  # HEIC and JPEG XL, whose decoders keep all of a picture in types of their own
                return len(data) + head[0] * head[1] * (channels or 3) * _OF_DECODERS
            dtype = np.dtype(head[2].partition(" x")[0])
            count = head[0] * head[1] * bands
            own = count * (_OF_JPEG_2000 if kinds.kind_of(data[:4096]) is kinds.JPEG_2000 else 0)
            levels = _of_levels(dtype, count, bands, False, channels, keys)
            return len(data) + count * dtype.itemsize + max(own, levels)
        elif data and formats.is_deep_png(data):
            width, height = struct.unpack_from(">II", data, 16)
            bands = {0: 1, 2: 3, 4: 2, 6: 4}[data[25]]
            count = int(width * height * bands)
            return len(data) + 2 * count + _of_levels(np.dtype(np.uint16), count, bands, False, channels, keys)
        picture = open_picture(whole) if isinstance(whole, bytes) else whole
        width, height = picture.size
        if picture.format in ("JPEG", "MPO"):
            scale: int = max(n for n in (1, 2, 4, 8) if n <= reduction)
            width, height = -(-width // scale), -(-height // scale)
        return len(data) + width * height * _of_picture(picture, channels, keys)


def _of_picture(picture: Image.Image, channels: int | None, keys: Decoding) -> int:
    """Bytes per pixel that reading a picture with Pillow takes, which keeps three and four bands in four bytes."""
    own = {"L": 1, "P": 1, "1": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}.get(picture.mode, 4)
    own += {"WEBP": 8, "AVIF": 8, "GIF": 4}.get(str(picture.format), 0)
    if picture.mode.startswith("I") or picture.mode == "F":
        size = 2 if picture.mode.startswith("I;16") else 4
        dtype = np.dtype({"F": np.float32, "I": np.int32}.get(picture.mode, np.uint16))
        return max(own + 2 * size, own + size + _of_levels(dtype, 1, 1, False, channels, keys))
    bands = 1 if picture.mode in ("1", "L") else 3
    alpha = picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info
    wanted = channels if channels is not None else bands + alpha
    is_wanted = picture.mode == {1: "L", 3: "RGB"}.get(wanted) and not alpha
    laid = 0 if is_wanted else (1 if wanted == 1 else 4)  # converted, beside the first
    return own + laid + 2 * wanted  # Pillow's bytes are put together of parts


def _of_levels(dtype: np.dtype[Any], count: int, have: int, planar: bool, channels: int | None, keys: Decoding) -> int:
    """Bytes that making levels of values takes beside the values."""
    levels = count * (2 if planar and have > 1 else 1)
    if dtype.kind == "f" or keys.get("nodata") is not None:
        levels += count  # the mask of pixels without data
    if dtype not in (np.uint8, np.uint16):
        levels += min(16 * count, BLOCK * 24)
    if channels is not None and channels != have and channels in (1, 3):
        levels += count // have * (8 + 2 * channels)
    return levels
