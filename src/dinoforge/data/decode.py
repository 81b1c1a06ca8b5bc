"""Encoded bytes, PIL images, arrays and tensors to uint8 pixels, by stated rules.

Files: JPEG, PNG, WebP, TIFF, BMP, GIF, told by their content and not by their name; of several frames or pages the
first. No other format is tried, so no file can start an external interpreter.

Orientation: the EXIF rotation is applied.

Colour: palette, 1-bit, CMYK, YCbCr, LAB (D50) and HSV become RGB; embedded colour profiles are not applied.
- ``channels=3``: RGB; grey is repeated.
- ``channels=1``: ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B; grey is taken as it is.
- ``channels=4``: files with transparency, as RGBA; ``channels=2``: grey files with transparency.
- Arrays and tensors: exactly `channels` channels, except that grey becomes RGB and RGB becomes luma. Two or four
  channels could mean anything, so they are never reduced.

Transparency (alpha, colour keys, transparent palette entries) with ``channels`` 1 or 3: the image is laid over white,
as viewers show it. An alpha channel that is 0 everywhere carries no picture and is dropped.

Depth: 8-bit values are never rescaled. Deeper ones are, by the rule `sixteen_bit`:
- ``full``: integers 0…65535 become round(value / 257), so 65535 → 255; floats 0…1 become round(255 · value).
  Values outside are refused, never clipped.
- ``minmax``: each image's own minimum…maximum, over all channels, becomes 0…255. A constant image becomes 0.
NaN and infinity are refused. Of 16-bit *colour* files, Pillow hands over the upper 8 bits of each value: at most one
level from ``full``, and too little for ``minmax``, which refuses them; arrays of 16-bit colour have no such limit.
"""

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError

from dinoforge.errors import ImageError

MAX_PIXELS = 178_956_970
"""Beyond this Pillow takes a file for a decompression bomb: 512 MB as RGB."""

UInt8 = npt.NDArray[np.uint8]

_PLANAR_CONFIGURATION = 284  # TIFF tag

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")

# EXIF orientation (tag 0x0112) -> the upright image, for arrays [H, W, C].
_UPRIGHT: dict[int, Callable[[UInt8], UInt8]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


def decode(
    image: bytes | Image.Image | npt.NDArray[np.generic] | torch.Tensor,
    *,
    channels: int,
    sixteen_bit: str = "full",
    max_pixels: int = MAX_PIXELS,
    reduction: int = 1,
) -> UInt8:
    """Decode one image by the rules of this module.

    Args:
        image: Encoded bytes, a PIL image, an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W].
        channels: Channels wanted, C.
        sixteen_bit: ``full`` or ``minmax``: how values deeper than 8 bits are scaled.
        max_pixels: Largest H·W that is decoded at all.
        reduction: JPEG files may be decoded at 1/2, 1/4 or 1/8 of their edges, the smallest that is no less than
            1 / `reduction`. That leaves out most of the work.

    Returns:
        uint8 [H, W, C], C-contiguous, writable. H and W are the image's, but for `reduction`.

    Raises:
        ImageError: Not a readable image, truncated, empty, larger than `max_pixels`, or with a number of channels or
            a range of values that the rules refuse.
    """
    assert sixteen_bit in ("full", "minmax"), sixteen_bit
    if isinstance(image, bytes | Image.Image):
        with _reading(max_pixels):
            pixels = _decode_picture(image, channels, sixteen_bit, max_pixels, reduction)
    else:
        values = _as_array(image)
        _check_size(values.shape[1], values.shape[0], max_pixels)
        pixels = _scale(values, sixteen_bit)
        if pixels.shape[2] != channels:
            if not {pixels.shape[2], channels} <= {1, 3}:
                raise ImageError(f"has {pixels.shape[2]} channels, expected {channels}")
            pixels = _picture_to_array(_match(_array_to_picture(pixels), channels))
    return np.require(pixels, requirements=["C", "W"])


def describe(image: bytes | Image.Image | npt.NDArray[np.generic] | torch.Tensor) -> tuple[int, int, str]:
    """Tell an image's upright width, height and kind of pixels from its header, without decoding it.

    Args:
        image: As for `decode`.

    Returns:
        Width, height, and Pillow's name of the mode (``RGB``, ``I;16``…; ``RGB;16`` for 16-bit colour), or type and
        number of channels of an array (``uint16 x1``).

    Raises:
        ImageError: Not an image, or with a damaged header.
    """
    if not isinstance(image, bytes | Image.Image):
        values = _as_array(image)
        return values.shape[1], values.shape[0], f"{values.dtype} x{values.shape[2]}"
    with _reading(max_pixels=None):
        picture = _open(image) if isinstance(image, bytes) else image
        mode = f"{picture.mode};16" if _is_deep_colour(picture) else picture.mode
        width, height = picture.size
        # Pillow reports the upright size of a TIFF by itself, and would decode a PNG in search of late EXIF data.
        known = picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info)
        if not known and _orientation(picture) >= 5:
            width, height = height, width
        return width, height, mode


def _decode_picture(
    image: bytes | Image.Image, channels: int, sixteen_bit: str, max_pixels: int, reduction: int
) -> UInt8:
    picture = _open(image) if isinstance(image, bytes) else image
    _check_size(*picture.size, max_pixels)
    if _is_deep_colour(picture):
        if sixteen_bit == "minmax":
            raise ImageError("16-bit colour files are read with 8 bits, too few for data.sixteen_bit=minmax: use full")
        if isinstance(picture, TiffImagePlugin.TiffImageFile) and picture.tag_v2.get(_PLANAR_CONFIGURATION) == 2:
            raise ImageError("16-bit colour TIFF with separate planes: Pillow would mix up its bytes; save it as PNG")
    if reduction > 1:  # Pillow picks the scale; formats other than JPEG have none
        picture.draft(None, (picture.width // reduction, picture.height // reduction))
    picture.load()
    orientation = _orientation(picture)  # a loaded TIFF is upright already, and says so
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _array_to_picture(_scale(np.asarray(picture)[:, :, np.newaxis], sixteen_bit))
    pixels = _picture_to_array(_match(picture, channels))
    upright = _UPRIGHT.get(orientation)
    return upright(pixels) if upright else pixels


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_FORMATS)


@contextmanager
def _reading(max_pixels: int | None) -> Iterator[None]:
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
        raise ImageError("not an image in any format that is read (JPEG, PNG, WebP, TIFF, BMP, GIF)") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {max_pixels} pixels; the limit is data.max_pixels") from error
    except MemoryError as error:
        raise ImageError("not enough memory to decode it") from error
    except Exception as error:  # Pillow's readers raise whatever their parsing meets
        raise ImageError(f"damaged or unsupported: {str(error).splitlines()[0] if str(error) else error!r}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height == 0:
        raise ImageError(f"has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} is more than {max_pixels} pixels; the limit is data.max_pixels")


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


def _scale(values: npt.NDArray[np.generic], rule: str) -> UInt8:
    """Bring values [H, W, C] of any real type to 0…255."""
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise ImageError(f"expected integer or float values, got {values.dtype}")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):  # NaN carries through min and max
        raise ImageError("has values that are not finite")
    if rule == "minmax":
        span = high - low or 1.0
        return np.rint((values.astype(np.float64) - low) / span * 255.0).astype(np.uint8)
    limit = 1 if values.dtype.kind == "f" else 65535
    if low < 0 or high > limit:
        raise ImageError(
            f"values {low:g} to {high:g} lie outside 0 to {limit}: data.sixteen_bit=minmax scales each image by its own"
        )
    if values.dtype.kind == "f":
        return np.rint(values.astype(np.float64) * 255.0).astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 257 is odd: no ties


def _is_deep_colour(picture: Image.Image) -> bool:
    """Whether a file holds 16-bit colour, for which Pillow has no mode of its own."""
    if picture.mode.startswith("I") or not isinstance(picture, ImageFile.ImageFile) or not picture.tile:
        return False
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 16 in picture.tag_v2.get(ExifTags.Base.BitsPerSample, ())
    return picture.format == "PNG" and ";16" in str(picture.tile[0][3])


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata costs the rotation, not the picture
        return 1
    return value if isinstance(value, int) else 1


def _match(picture: Image.Image, channels: int) -> Image.Image:
    """Convert a PIL image of any 8-bit mode to the mode with `channels` bands."""
    if picture.mode == {1: "L", 3: "RGB"}.get(channels) and not picture.has_transparency_data:
        return picture  # the common case, without a copy
    picture = _plain(picture)
    if channels in (1, 3):
        return _over_white(picture).convert("L" if channels == 1 else "RGB")
    if len(picture.getbands()) != channels:
        raise ImageError(f"has {len(picture.getbands())} channels ({picture.mode}), expected {channels}")
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
