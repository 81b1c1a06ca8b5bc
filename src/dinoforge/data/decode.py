"""Encoded bytes, PIL images, arrays and tensors to uint8 pixels, by stated rules.

Files: JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000, AVIF, JPEG XL, Netpbm, .npy, and HEIC with the extra ``heic``; told
by their content and not by their name. No other format is tried, so no file can start an external interpreter. Of
several frames the first; for planes and pages of a TIFF see ``dinoforge.data.tiff``.

Orientation: the EXIF rotation is applied; a number that is none of the eight is ignored.

Colour: palette, 1-bit, CMYK, YCbCr, LAB (D50) and HSV become RGB; embedded colour profiles are not applied.
- ``channels=3``: RGB; grey is repeated. Of RGB with one more band (infrared, alpha) in a TIFF, RGB alone.
- ``channels=1``: ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B; grey is taken as it is.
- ``channels=4``: files with transparency, as RGBA; ``channels=2``: grey files with transparency.
- ``channels=None``: as many as there are.
- Else, and for arrays and tensors: exactly `channels` channels, except that grey becomes RGB and RGB becomes luma. Two
  or four channels could mean anything, so they are never reduced.

Transparency (alpha, colour keys, transparent palette entries) with ``channels`` 1 or 3: the image is laid over white,
as viewers show it. An alpha channel that is 0 everywhere carries no picture and is dropped. In TIFF, and in JPEG 2000,
nothing is laid over white: there the last of four bands is as often infrared.

No data: NaN, the file's own tag or mask, the mask of a masked array, the number `nodata`. It becomes the level `fill`
and counts in no range.

Depth: 8-bit values are not rescaled. Deeper ones are, by the rule `sixteen_bit`:
- ``full``: integers 0…65535 become round(value / 257), so 65535 → 255; a file that says that it has 12 bits has 4095 →
  255; floats 0…1 become round(255 · value). Values outside are refused, never clipped.
- ``minmax``: each image's own minimum…maximum, over all channels, becomes 0…255. A constant image becomes 0.
- A `value_range`, of all channels or of each, wins over both. It is that of a whole data set, so values outside are
  clipped to it, infinite ones as well; without it infinity is refused. It holds for 8-bit values, too, unless it goes
  beyond 255: then it is meant for the deeper images among them.
"""

import functools
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from dinoforge.data import formats, jpeg, kinds, tiff
from dinoforge.data.sources import OnePlane, RawImage
from dinoforge.data.values import BLOCK, Decoding, Samples, Scaling, check_size, to_levels
from dinoforge.errors import ImageError

MAX_PIXELS = 178_956_970
"""Beyond this Pillow takes a file for a decompression bomb: 512 MB as RGB."""

UInt8 = npt.NDArray[np.uint8]
AnImage = bytes | Image.Image | npt.NDArray[np.generic] | torch.Tensor | OnePlane

_FRAMES = frozenset({"GIF", "WEBP", "PNG", "AVIF"})  # formats with animations


def decode(
    image: AnImage,
    *,
    channels: int | None,
    sixteen_bit: str = "full",
    max_pixels: int = MAX_PIXELS,
    reduction: int = 1,
    value_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = None,
    nodata: float | None = None,
    fill: int = 0,
    plane: int | Literal["max", "each"] | None = None,
) -> UInt8:
    """Decode one image by the rules of this module.

    Args:
        image: Encoded bytes, a PIL image, an array [H, W] or [H, W, C], a tensor [H, W] or [C, H, W], or one plane of
            such an image, which then wins over `plane`.
        channels: Channels wanted, C; None: as many as the image has.
        sixteen_bit: ``full`` or ``minmax``: how values deeper than 8 bits are scaled.
        max_pixels: Largest H·W that is decoded at all.
        reduction: JPEG files may be decoded at 1/2, 1/4 or 1/8 of their edges, the smallest that is no less than
            1 / `reduction`. That leaves out most of the work.
        value_range: The values that become 0 and 255, for all channels or for each; see above.
        nodata: A further value that means no data, beside the file's own.
        fill: The level 0…255 of what has no data.
        plane: Index of the plane (z, time, page, frame) of a file with several, or ``max``: the brightest value of all
            of them; None: the first; ``each``: the only one, for which `dinoforge.data.planes` takes files apart.

    Returns:
        uint8 [H, W, C], C-contiguous, writable. H and W are the image's, but for `reduction`.

    Raises:
        ImageError: Not a readable image, truncated, empty, larger than `max_pixels`, or with a number of channels or
            a range of values that the rules refuse.
    """
    assert sixteen_bit in ("full", "minmax"), sixteen_bit
    scaling = Scaling("minmax" if sixteen_bit == "minmax" else "full", value_range, nodata, fill)
    image, plane = _one_plane(image, channels, plane)
    if isinstance(image, Image.Image):
        image = _file_behind(image)
    if isinstance(image, bytes):
        with _reading(max_pixels, image):
            found = _read(image, channels, plane, max_pixels)
            if isinstance(found, Samples):
                pixels = finish(found, channels, scaling)
            else:
                pixels = _decode_picture(found, channels, scaling, max_pixels, reduction, plane, image)
    elif isinstance(image, Image.Image):
        with _reading(max_pixels):
            pixels = _decode_picture(image, channels, scaling, max_pixels, reduction, plane)
    else:
        samples = _of_array(image)
        check_size(samples.values.shape[1], samples.values.shape[0], max_pixels)
        pixels = finish(samples, channels, scaling)
    return np.require(pixels, requirements=["C", "W"])


def describe(image: AnImage, channels: int | None = None) -> tuple[int, int, str]:
    """Tell an image's upright width, height and kind of pixels from its header, without decoding it.

    Args:
        image: As for `decode`.
        channels: Channels wanted, where it depends on that what is read; see ``dinoforge.data.tiff``.

    Returns:
        Width, height, and Pillow's name of the mode (``RGB``, ``I;16``…; ``RGB;16`` for 16-bit colour), or type and
        number of channels of arrays (``uint16 x1``), rasters and microscopes' files, with what else was found
        (``uint16 x5, OME-TIFF, axes CYX``).

    Raises:
        ImageError: Not an image, or with a damaged header.
    """
    image, _ = _one_plane(image, channels, None)
    if isinstance(image, Image.Image):
        image = _file_behind(image)
    if not isinstance(image, bytes | Image.Image):
        values = _as_array(image)
        return values.shape[1], values.shape[0], f"{values.dtype} x{values.shape[2]}"
    with _reading(max_pixels=None, data=image if isinstance(image, bytes) else b""):
        if isinstance(image, bytes):
            found = tiff.describe(image, channels) if tiff.is_tiff(image) else formats.describe(image, channels)
            if found:
                return found
        picture = _open(image) if isinstance(image, bytes) else image
        mode = f"{picture.mode};16" if _is_deep_png(picture) else picture.mode
        width, height = picture.size
        # Pillow reports the upright size of a TIFF by itself, and would decode a PNG in search of late EXIF data.
        known = picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info)
        if not known and _orientation(picture) >= 5:
            width, height = height, width
        return width, height, mode


def raw(
    image: AnImage,
    *,
    channels: int | None = None,
    max_pixels: int = MAX_PIXELS,
    plane: int | Literal["max", "each"] | None = None,
) -> Samples | None:
    """The values of an image before they become levels; None for a picture of 8 bits.

    Args:
        image, channels, max_pixels, plane: As for `decode`.

    Raises:
        ImageError: As `decode`.
    """
    image, plane = _one_plane(image, channels, plane)
    if isinstance(image, Image.Image):
        image = _file_behind(image)
    if not isinstance(image, bytes | Image.Image):
        return _of_array(image)
    with _reading(max_pixels, image if isinstance(image, bytes) else b""):
        found = _read(image, channels, plane, max_pixels) if isinstance(image, bytes) else image
        if isinstance(found, Samples):
            return found
        if not (found.mode.startswith("I") or found.mode == "F"):
            return None
        check_size(*found.size, max_pixels)
        return Samples(np.asarray(found)[:, :, np.newaxis], colour=1)


def count_planes(image: AnImage | BinaryIO, channels: int | None = None) -> tuple[int, str]:
    """Count the planes of an image from its headers, without decoding it.

    Args:
        image: As for `decode`, or an open file, of which only what is needed is read.
        channels: Channels wanted, on which it may depend; see ``dinoforge.data.tiff``.

    Returns:
        Their number, and along what they lie, such as ``z, t``, ``page`` or ``frame``; '' for one.

    Raises:
        ImageError: Not an image, or with a damaged header.
        OSError: An open file that cannot be read.
    """
    if isinstance(image, Image.Image):
        image = _file_behind(image)
    if isinstance(image, Image.Image):
        return _frames(image)
    if isinstance(image, OnePlane | np.ndarray | torch.Tensor):
        return 1, ""
    if isinstance(image, bytes):
        with io.BytesIO(image) as file:
            return _count_planes(file, channels)
    return _count_planes(image, channels)


def _count_planes(file: BinaryIO, channels: int | None) -> tuple[int, str]:
    head = file.read(4096)
    with _reading(max_pixels=None, data=head):
        if tiff.is_tiff(head):
            return tiff.count_planes(file, channels)
        if not may_move(head):
            return 1, ""
        file.seek(0)
        return _frames(Image.open(file, formats=_formats()))


def working_bytes(image: AnImage, *, channels: int | None, decoding: Decoding | None = None, reduction: int = 1) -> int:
    """Estimate from its header what decoding an image takes at its peak, with its encoded bytes, beside the process.

    Args:
        image, channels, reduction: As for `decode`.
        decoding: Its further keywords.

    Returns:
        Bytes.

    Raises:
        ImageError: Not an image, or with a damaged header.
    """
    keys = decoding or Decoding()
    plane = image.number if isinstance(image, OnePlane) else keys.get("plane")
    whole = image.image if isinstance(image, OnePlane) else image
    if isinstance(whole, Image.Image):
        whole = _file_behind(whole)
    if not isinstance(whole, bytes | Image.Image):
        values = _as_array(whole)
        planar = np.moveaxis(values, -1, 0).flags.c_contiguous
        return values.nbytes + _of_levels(values.dtype, values.size, values.shape[2], planar, channels, keys)
    data = whole if isinstance(whole, bytes) else b""
    with _reading(max_pixels=None, data=data):
        if tiff.is_tiff(data):
            stored = tiff.stored(data, channels, None if plane == "each" else plane)
            if stored is not None:
                levels = _of_levels(stored.dtype, stored.count, stored.channels, stored.planar, channels, keys)
                return len(data) + max(stored.peak, stored.held + levels)
        elif data and (head := formats.describe(data, channels)):
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
        picture = _open(whole) if isinstance(whole, bytes) else whole
        width, height = picture.size
        if picture.format in ("JPEG", "MPO"):
            scale: int = max(n for n in (1, 2, 4, 8) if n <= reduction)
            width, height = -(-width // scale), -(-height // scale)
        return len(data) + width * height * _of_picture(picture, channels, keys)


_OF_JPEG_2000 = 4  # bytes of each value that its decoder takes beside these
_OF_DECODERS = 5  # likewise of others, with the values


def _of_picture(picture: Image.Image, channels: int | None, keys: Decoding) -> int:
    """Bytes of a pixel that reading a picture with Pillow takes: it keeps three and four bands in four bytes."""
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
    """Bytes that it takes to make levels of values, beside these."""
    levels = count * (2 if planar and have > 1 else 1)
    if dtype.kind == "f" or keys.get("nodata") is not None:
        levels += count  # where there is no data
    if dtype not in (np.uint8, np.uint16):
        levels += min(16 * count, BLOCK * 24)
    if channels is not None and channels != have and channels in (1, 3):
        levels += count // have * (8 + 2 * channels)
    return levels


def may_move(head: bytes) -> bool:
    """Whether a file that begins so, 4096 bytes of it, may be an animation of which each frame can be read."""
    if head.startswith(b"\x89PNG"):
        # Of 16-bit colour the first picture alone is read. What makes a PNG move stands before its pixels.
        is_deep = head[24:25] == b"\x10" and head[25:26] != b"\0"
        return not is_deep and (b"acTL" in head or b"IDAT" not in head)
    if head[8:12] == b"WEBP":
        return head[12:16] == b"VP8X" and bool(head[20] & 2)
    return head.startswith(b"GIF8") or head[4:11] == b"ftypavi"


def _frames(picture: Image.Image) -> tuple[int, str]:
    frames = getattr(picture, "n_frames", 1) if picture.format in _FRAMES else 1
    return frames, "frame" if frames > 1 else ""


def _one_plane(
    image: AnImage, channels: int | None, plane: int | Literal["max", "each"] | None
) -> tuple[RawImage, int | Literal["max"] | None]:
    """The image with all planes, and which of them is wanted."""
    if isinstance(image, OnePlane):
        return image.image, image.number
    if plane != "each":
        return image, plane
    planes, along = count_planes(image, channels)
    if planes > 1:
        raise ImageError(
            f"has {planes} planes ({along}), and data.plane=each makes an image of each, which one image alone cannot "
            "be: give a number from 0, or max"
        )
    return image, None


def channels_said(kind: str) -> int | None:
    """The number of channels that a kind of `describe` names, such as 5 of ``uint16 x5, GeoTIFF``; None for modes."""
    _, found, rest = kind.partition(" x")
    return int(rest.partition(",")[0]) if found else None


def _file_behind(picture: Image.Image) -> bytes | Image.Image:
    """The file of a picture that was opened and not read yet, where Pillow alone would read less than is in it."""
    is_lazy = isinstance(picture, ImageFile.ImageFile) and picture.tile and picture.fp and picture.tell() == 0
    if not is_lazy or not (picture.format == "TIFF" or _is_deep_png(picture)):
        return picture
    assert isinstance(picture, ImageFile.ImageFile)
    assert picture.fp
    place = picture.fp.tell()
    picture.fp.seek(0)
    data = picture.fp.read()
    picture.fp.seek(place)
    return data if tiff.is_tiff(data) or formats.is_deep_png(data) else picture


def _read(
    data: bytes, channels: int | None, plane: int | Literal["max"] | None, max_pixels: int
) -> Samples | Image.Image:
    """The values of a file, or a picture that Pillow will read right."""
    found: Samples | Image.Image | None = None
    if tiff.is_tiff(data):
        found = tiff.read(data, channels=channels, plane=plane, max_pixels=max_pixels)
    elif not data.startswith(b"\xff\xd8"):
        found = formats.read(data, channels=channels, max_pixels=max_pixels)
        if isinstance(found, Samples):
            tiff.check_plane(plane, 1)
    return _open(data) if found is None else found


def finish(samples: Samples, channels: int | None, scaling: Scaling) -> UInt8:
    """Choose channels, scale values to levels, and make grey of colour or colour of grey."""
    have = samples.values.shape[2]
    if channels in (1, 3) and not samples.alpha:
        if (samples.colour, have) == (3, 4):
            samples = samples.take(3)
        elif (samples.colour, have) == (1, 2):
            samples = samples.take(1)
    count = samples.values.shape[2]
    if channels is not None and channels != count:
        to_colour = channels == 3 and count == 1
        to_grey = channels == 1 and count == 3 and samples.colour == 3
        if not (to_colour or to_grey or (samples.alpha and channels in (1, 3))):
            what = f"{have} channel{'s' * (have != 1)}"
            if not samples.kind and samples.values.shape[0] == channels:
                raise ImageError(
                    f"has {what} by its last axis, but {channels} by its first: give arrays as [H, W, C], or tensors "
                    "as [C, H, W]"
                )
            raise ImageError(
                f"has {what}{f' ({samples.kind})' * bool(samples.kind)}, expected {channels}: the recipe has to say "
                f"student.in_chans={have}"
            )
    pixels = to_levels(samples, scaling)
    if channels is None or channels == count:
        return pixels
    return _picture_to_array(_match(_array_to_picture(pixels), channels))


def _decode_picture(
    picture: Image.Image,
    channels: int | None,
    scaling: Scaling,
    max_pixels: int,
    reduction: int,
    plane: int | Literal["max"] | None,
    data: bytes | None = None,
) -> UInt8:
    check_size(*picture.size, max_pixels)
    if plane not in (None, 0):
        frames = getattr(picture, "n_frames", 1) if picture.format in _FRAMES else 1
        if frames > 1 and plane == "max":
            every = []
            for frame in range(frames):
                picture.seek(frame)
                every.append(_decode_picture(picture, channels, scaling, max_pixels, 1, None))
            return np.asarray(np.maximum.reduce(every), np.uint8)
        tiff.check_plane(plane, frames)
        if plane != "max":
            picture.seek(int(plane))
    picture = _loaded(picture, reduction, data)
    orientation = _orientation(picture)  # a loaded TIFF is upright already, and says so
    if picture.mode.startswith("I") or picture.mode == "F":
        pixels = finish(Samples(np.asarray(picture)[:, :, np.newaxis], colour=1), channels, scaling)
    elif scaling.plain:
        pixels = _picture_to_array(_match(picture, channels))
    else:
        picture = _plain(picture)
        alpha = picture.mode in ("LA", "RGBA")
        values = _picture_to_array(picture)
        pixels = finish(Samples(values, None, 3 if values.shape[2] > 2 else 1, alpha), channels, scaling)
    return tiff.upright(pixels, orientation)


def _loaded(picture: Image.Image, reduction: int, data: bytes | None) -> Image.Image:
    def load(picture: Image.Image) -> Image.Image:
        if reduction > 1:  # Pillow picks the scale; formats other than JPEG have none
            picture.draft(None, (picture.width // reduction, picture.height // reduction))
        picture.load()
        return picture

    try:
        return jpeg.plain_cmyk(load(picture))
    except OSError:
        if data is None or picture.format not in ("JPEG", "MPO"):
            raise
        return jpeg.plain_cmyk(jpeg.without_end(data, lambda mended: load(jpeg.opened(mended))))


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read; AVIF and JPEG 2000 where this Pillow has them."""
    Image.init()
    return tuple(f for f in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000") if f in Image.OPEN)


@contextmanager
def _reading(max_pixels: int | None, data: bytes = b"") -> Iterator[None]:
    """Turn whatever reading a bad file raises into ImageError, with our limit in place of Pillow's, and no warnings."""
    pillow_limit = Image.MAX_IMAGE_PIXELS
    # Pillow warns at its limit and raises at twice that.
    Image.MAX_IMAGE_PIXELS = None if max_pixels is None else (max_pixels + 1) // 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        kind = kinds.kind_of(data)
        unread = jpeg.unread_kind(data) if kind is kinds.JPEG else ""
        raise ImageError(unread or (f"damaged {kind.name}" if kind.is_image else kind.refusal)) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {max_pixels} pixels; the limit is data.max_pixels") from error
    except MemoryError as error:
        raise ImageError("not enough memory to decode it") from error
    except Exception as error:  # Pillow's readers raise whatever their parsing meets
        raise ImageError(f"damaged or unsupported: {str(error).splitlines()[0] if str(error) else error!r}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def _of_array(image: npt.NDArray[np.generic] | torch.Tensor) -> Samples:
    """The values of an array or tensor; where a masked array, as rasterio gives, is masked there is no data."""
    values = _as_array(image)
    valid = None
    if isinstance(values, np.ma.MaskedArray):
        valid = None if values.mask is np.ma.nomask else ~np.ma.getmaskarray(values)
        values = np.asarray(values.data)
    return Samples(values, colour=3 if values.shape[2] == 3 else 0, valid=valid)


def _as_array(image: npt.NDArray[np.generic] | torch.Tensor) -> npt.NDArray[np.generic]:
    """View an array or tensor as [H, W, C]."""
    values: npt.NDArray[np.generic]
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
        values = np.moveaxis(image.numpy(), 0, -1) if image.ndim == 3 else image.numpy()
        expected = "tensor [H, W] or [C, H, W]"
    else:
        values, expected = image, "array [H, W] or [H, W, C]"
    if values.ndim not in (2, 3):
        raise ImageError(f"expected an {expected}, got shape {list(values.shape)}")
    return values[:, :, np.newaxis] if values.ndim == 2 else values


def _is_deep_png(picture: Image.Image) -> bool:
    """Whether a PNG that is not read yet holds 16-bit colour, for which Pillow has no mode of its own."""
    if picture.mode.startswith("I") or not isinstance(picture, ImageFile.ImageFile) or not picture.tile:
        return False
    return picture.format == "PNG" and ";16" in str(picture.tile[0][3])


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata costs the rotation, not the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _match(picture: Image.Image, channels: int | None) -> Image.Image:
    """Convert a PIL image of any 8-bit mode to the mode with `channels` bands; None: with all that it has."""
    if channels is not None and picture.mode == {1: "L", 3: "RGB"}.get(channels) and not picture.has_transparency_data:
        return picture  # the common case, without a copy
    picture = _plain(picture)
    if channels is None:
        return picture
    if channels in (1, 3):
        return _over_white(picture).convert("L" if channels == 1 else "RGB")
    if len(picture.getbands()) != channels:
        count = len(picture.getbands())
        raise ImageError(
            f"has {count} channel{'s' * (count != 1)} ({picture.mode}), expected {channels}: the recipe has to say "
            f"student.in_chans={count if count in (1, 3) else 3}"
        )
    return picture


def _plain(picture: Image.Image) -> Image.Image:
    """Convert to the one of L, LA, RGB, RGBA that holds everything."""
    premultiplied = {"La": "LA", "RGBa": "RGBA"}
    if picture.mode in premultiplied:
        return picture.convert(premultiplied[picture.mode])
    if picture.mode == "LAB":
        converted = ImageCms.applyTransform(picture, _lab_to_srgb())
        assert converted is not None
        return converted
    if picture.mode in ("LA", "RGBA"):
        return picture
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _over_white(picture: Image.Image) -> Image.Image:
    """Lay L, LA, RGB or RGBA over white; L or RGB out."""
    if picture.mode in ("L", "RGB"):
        return picture
    colour = picture.convert("L" if picture.mode == "LA" else "RGB")
    alpha = picture.getchannel("A")
    lowest, highest = alpha.getextrema()
    if lowest == 255 or highest == 0:
        return colour
    canvas = Image.new(colour.mode, colour.size, "white")
    canvas.paste(colour, mask=alpha)
    return canvas


def _array_to_picture(pixels: UInt8) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)  # L, LA, RGB or RGBA


def _picture_to_array(picture: Image.Image) -> UInt8:
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels
