"""Files that Pillow reads with too few bits, or not at all: 16-bit PNG, JPEG 2000, JPEG XL, Netpbm, .npy, HEIC.

Content tells each. The libraries that read them are imported when the first such file is opened.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from dinoforge.data import kinds
from dinoforge.data.values import Samples, check_size, upright
from dinoforge.errors import ImageError

Values = npt.NDArray[Any]

# (width, height, kind)
Header = tuple[int, int, str]


def read(data: bytes, *, channels: int | None, max_pixels: int) -> Samples | Image.Image | None:
    """Read the values of a file of these formats, or its picture where no more can be read; None for other formats.

    Args:
        data: The file.
        channels: The number of channels wanted, which may decide which axis of a .npy file holds them.
        max_pixels: The largest H·W.

    Raises:
        ImageError: The file is too large or damaged, or a package is missing.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data, max_pixels)
    kind = kinds.kind_of(data[:4096])
    if kind is kinds.JPEG_2000:
        return _jpeg_2000(data, max_pixels)
    if kind is kinds.JPEG_XL:
        return _jpeg_xl(data, max_pixels)
    if kind is kinds.NETPBM:
        return _netpbm(data, max_pixels)
    if kind is kinds.NUMPY:
        return _npy(data, channels, max_pixels)
    if kind is kinds.HEIC:
        picture = _heic(data)
        width, height = picture.size
        check_size(width, height, max_pixels)
        loaded: Image.Image = picture.to_pillow()
        return loaded
    return None


def size_and_kind(data: bytes, channels: int | None = None) -> Header | None:
    """Read width, height and kind from the header of these formats; None for other formats.

    Args:
        data: The file, or its beginning.
        channels: The number of channels wanted, as for `read`.

    Raises:
        ImageError: The header is damaged, or a package is missing.
    """
    kind = kinds.kind_of(data[:4096])
    if kind is kinds.JPEG_2000:
        head = _jpeg_2000_header(data)
        return None if head is None else (head[0], head[1], f"{head[2]} x{head[3]}, JPEG 2000, {head[4]} bits")
    if kind is kinds.JPEG_XL:
        width, height = _jpeg_xl_size(data)
        return width, height, "JPEG XL"
    if kind is kinds.NETPBM:
        _, width, height, depth, top, _ = _netpbm_header(data)
        dtype = "bool" if top == 1 else "uint16" if top > 255 else "uint8"
        said = "" if top in (1, 255, 65535) else f", 0 to {top}"
        return width, height, f"{dtype} x{depth}, Netpbm{said}"
    if kind is kinds.NUMPY:
        _, shape, of = _npy_header(data)
        height, width, depth = (shape[i] if i is not None else 1 for i in _npy_axes(shape, channels))
        return width, height, f"{of.newbyteorder('=')} x{depth}, NumPy array"
    if kind is kinds.HEIC:
        picture = _heic(data)
        width, height = picture.size
        return width, height, f"{picture.mode}, HEIC"
    return None


# PNG: Pillow hands over 16-bit colour with 8 bits, and knows neither sBIT nor a colour key of 16-bit grey.


def is_deep_png(data: bytes) -> bool:
    """Whether a PNG has more than Pillow reads."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10" and (data[25:26] != b"\0" or _has_more(data))


def _has_more(data: bytes) -> bool:
    return any(name in (b"sBIT", b"tRNS") for name, _ in _png_chunks(data))


def _png_chunks(data: bytes, *, to_the_end: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and body of each chunk before the pixels, or of every chunk that is not pixels."""
    place = 8
    while place + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        if name != b"IDAT":
            yield name, data[place + 8 : place + 8 + size]
        elif not to_the_end:
            return
        place += size + 12


def _png(data: bytes, max_pixels: int) -> Samples | None:
    if not is_deep_png(data):
        return None
    width, height = struct.unpack_from(">II", data, 16)
    check_size(width, height, max_pixels)
    import imagecodecs

    if data[-12:-4] != b"\0\0\0\0IEND" and b"IEND" not in data[-4096:]:
        raise ImageError("truncated: its end is missing")
    values = imagecodecs.png_decode(data)
    values = values[:, :, np.newaxis] if values.ndim == 2 else values
    chunks = dict(_png_chunks(data))
    bands = {0: 1, 2: 3, 4: 2, 6: 4}[data[25]]
    if b"tRNS" in chunks and bands in (1, 3):
        key = np.array(struct.unpack_from(f">{bands}H", chunks[b"tRNS"]), np.uint16)
        shown = (values[:, :, :bands] != key).any(axis=2, keepdims=True)
        values = np.concatenate([values[:, :, :bands], shown * np.uint16(65535)], axis=2)
    alpha = values.shape[2] in (2, 4)
    values = upright(values, _png_orientation(data))
    limit = None
    said = [b for b in chunks.get(b"sBIT", b"")[: 1 if bands < 3 else 3] if 0 < b <= 16]
    if said and max(said) < 16:
        values, limit = _significant(values, bands - (bands in (2, 4)), max(said), alpha)
    return Samples(values, limit, 3 if bands > 2 else 1, alpha, kind=f"uint16 x{values.shape[2]}")


def _png_orientation(data: bytes) -> int:
    """Read the EXIF orientation, 1…8, from any chunk in which Pillow finds it, before or after the pixels."""
    chunks = _png_chunks(data, to_the_end=True)
    if not any(
        name == b"eXIf" or body.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp")) for name, body in chunks
    ):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata costs the rotation, not the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _significant(values: Values, colours: int, bits: int, alpha: bool) -> tuple[Values, int | None]:
    """Take the significant bits.

    The standard has them on top, with the rest filled by zeros or by the top bits again. Many writers leave them at
    the bottom: values that are no larger than so many bits, and do not look like filled ones.
    """
    colour = values[:, :, :colours]
    top = colour >> (16 - bits)
    rest = colour & ((1 << (16 - bits)) - 1)
    if colour.max() < 1 << bits and not ((rest == 0) | (rest == top >> max(2 * bits - 16, 0))).all():
        top = colour
    if not alpha:
        return top, (1 << bits) - 1
    # Transparency keeps all of its bits: brought to as many as the colours have.
    opaque = np.rint(values[:, :, -1:] / 65535 * ((1 << bits) - 1)).astype(np.uint16)
    return np.concatenate([top, opaque], axis=2), (1 << bits) - 1


# JPEG 2000


def _jpeg_2000_header(data: bytes) -> tuple[int, int, str, int, int] | None:
    """Read width, height, type, channels and bits; None for files left to Pillow: palettes, YCC, unequal channels."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0:
        raise ImageError("damaged: JPEG 2000 without a code stream")
    x, y, x0, y0 = struct.unpack_from(">4I", data, start + 8)
    count = struct.unpack_from(">H", data, start + 40)[0]
    parts = [struct.unpack_from("3B", data, start + 42 + 3 * i) for i in range(count)]
    boxes = data[:start]
    colour = boxes.find(b"colr\x01")
    is_ycc = colour >= 0 and boxes[colour + 7 : colour + 11] == b"\0\0\0\x12"
    if b"pclr" in boxes or is_ycc or len(set(parts)) != 1 or parts[0][1:] != (1, 1):
        return None
    bits, signed = (parts[0][0] & 127) + 1, parts[0][0] > 127
    dtype = f"{'' if signed else 'u'}int{8 if bits <= 8 else 16 if bits <= 16 else 32}"
    return x - x0, y - y0, dtype, count, bits


def _jpeg_2000(data: bytes, max_pixels: int) -> Samples | None:
    head = _jpeg_2000_header(data)
    if head is None:
        return None
    width, height, dtype, count, bits = head
    check_size(width, height, max_pixels)
    import imagecodecs

    values = imagecodecs.jpeg2k_decode(data, numthreads=1)
    if values.shape[:2] != (height, width) or values.size != height * width * count:
        raise ImageError(f"damaged: {values.shape} values, {height} x {width} x {count} expected")
    limit = (1 << bits) - 1 if dtype.startswith("u") and bits not in (8, 16, 32) else None
    kind = f"{dtype} x{count}, JPEG 2000, {bits} bits"
    return Samples(values.reshape(height, width, count), limit, {1: 1, 3: 3, 4: 3}.get(count, 0), kind=kind)


# JPEG XL


def _jpeg_xl(data: bytes, max_pixels: int) -> Samples:
    check_size(*_jpeg_xl_size(data), max_pixels)
    import imagecodecs

    values = imagecodecs.jpegxl_decode(data, numthreads=1)
    if values.ndim > 3:  # an animation
        values = values[0]
    values = values[:, :, np.newaxis] if values.ndim == 2 else values
    bands = values.shape[2]
    colour, alpha = {1: (1, False), 2: (1, True), 3: (3, False), 4: (3, True)}.get(bands, (0, False))
    return Samples(values, None, colour, alpha, kind=f"{values.dtype} x{bands}, JPEG XL")


def _jpeg_xl_size(data: bytes) -> tuple[int, int]:
    """Read the upright size from the first bits of the code stream (ISO/IEC 18181-1, SizeHeader and ImageMetadata)."""
    start = data.find(b"\xff\x0a", 0, 65536)
    if start < 0:
        raise ImageError("damaged: JPEG XL without a code stream")
    stream, place = int.from_bytes(data[start + 2 : start + 34], "little"), 0

    def bits(count: int) -> int:
        nonlocal place
        place += count
        return stream >> (place - count) & ((1 << count) - 1)

    def length() -> int:
        return bits((9, 13, 18, 30)[bits(2)]) + 1

    small = bits(1)
    height = (bits(5) + 1) * 8 if small else length()
    ratio = bits(3)
    if ratio:
        over, under = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
        width = height * over // under
    else:
        width = (bits(5) + 1) * 8 if small else length()
    turned = not bits(1) and bits(1) and bits(3) >= 4  # not all_default, extra_fields, orientation - 1
    return (height, width) if turned else (width, height)


# Netpbm


def _netpbm_header(data: bytes) -> tuple[int, int, int, int, int, int]:
    """Read the number after the P, width, height, channels, largest value, and the place where the values start."""
    kind = data[1] - ord("0")
    field = rb"(?:\s|#[^\n\r]*[\n\r])+(\d+)"
    found = re.match(rb"P[1-6]" + field * (2 if kind in (1, 4) else 3) + rb"(?:#[^\n\r]*[\n\r])?\s?", data[:65536])
    if not found:
        raise ImageError("damaged: a Netpbm header without width, height or largest value")
    width, height = int(found[1]), int(found[2])
    top = 1 if kind in (1, 4) else int(found[3])
    if not 0 < top < 65536:
        raise ImageError(f"damaged: a Netpbm file with the largest value {top}, expected 1 to 65535")
    return kind, width, height, 3 if kind in (3, 6) else 1, top, found.end()


def _netpbm(data: bytes, max_pixels: int) -> Samples:
    kind, width, height, depth, top, start = _netpbm_header(data)
    check_size(width, height, max_pixels)
    count = height * width * depth
    values: Values
    if kind == 4:
        row = -(-width // 8)
        packed = np.frombuffer(data[start : start + row * height], np.uint8)
        _check_count(packed.size, row * height)
        values = np.unpackbits(packed.reshape(height, row), axis=1)[:, :width] == 0
    elif kind == 1:
        digits = np.frombuffer(re.sub(rb"#[^\n\r]*|\s+", b"", data[start:]), np.uint8)[:count]
        _check_count(digits.size, count)
        values = digits == ord("0")
    elif kind in (2, 3):
        numbers = re.sub(rb"#[^\n\r]*", b"", data[start:]).split()[:count]
        _check_count(len(numbers), count)
        values = np.array(numbers, np.int64)
    else:
        dtype = np.dtype(">u2" if top > 255 else "u1")
        stored = data[start : start + count * dtype.itemsize]
        _check_count(len(stored) // dtype.itemsize, count)
        values = np.frombuffer(stored, dtype)
    if kind not in (1, 4):
        if int(values.max()) > top or int(values.min()) < 0:
            raise ImageError(f"damaged: a value of {int(values.max())} where {top} is said to be the largest")
        values = values.astype(np.uint16 if top > 255 else np.uint8)
    limit = None if kind in (1, 4) else top
    return Samples(values.reshape(height, width, depth), limit, depth, kind=f"{values.dtype} x{depth}, Netpbm")


def _check_count(found: int, expected: int) -> None:
    if found < expected:
        raise ImageError(f"truncated: {found} of {expected} values are there")


# NumPy


def _npy_header(data: bytes) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Read the place where the values start, their shape and their type."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject or dtype.names:
        raise ImageError("an array of Python objects or records, which is not read: save its numbers alone")
    return stream.tell(), shape, dtype


def _npy_axes(shape: tuple[int, ...], channels: int | None) -> tuple[int, int, int | None]:
    """Find height, width and channels among the axes: channels are the last or the first axis, by its length."""
    if len(shape) == 2:
        return 0, 1, None
    if len(shape) != 3:
        raise ImageError(f"an array of shape {list(shape)}, expected [H, W], [H, W, C] or [C, H, W]")
    first, last = shape[0], shape[2]
    is_first = first == channels if (first == channels) != (last == channels) else first < last
    return (1, 2, 0) if is_first else (0, 1, 2)


def _npy(data: bytes, channels: int | None, max_pixels: int) -> Samples:
    _, shape, _ = _npy_header(data)
    height, width, depth = _npy_axes(shape, channels)
    check_size(shape[width], shape[height], max_pixels)
    values = np.load(io.BytesIO(data), allow_pickle=False)
    values = values[:, :, np.newaxis] if depth is None else values.transpose(height, width, depth)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    bands = values.shape[2]
    return Samples(values, None, bands if bands in (1, 3) else 0, kind=f"{values.dtype} x{bands}, NumPy array")


# HEIC


def _heic(data: bytes) -> Any:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError('is HEIC, which takes a package: pip install "dinoforge[heic]"') from error
    return pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
