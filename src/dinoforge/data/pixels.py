"""Values and pictures to uint8 pixels with the channels wanted, by the rules of ``dinoforge.data.decode``."""

import functools

import numpy as np
from PIL import Image, ImageCms

from dinoforge.data.values import Samples, Scaling, UInt8, to_levels
from dinoforge.errors import ImageError


def to_pixels(samples: Samples, channels: int | None, scaling: Scaling) -> UInt8:
    """Choose channels, scale values to levels, and make grey of colour or colour of grey.

    Args:
        samples: The values of an image.
        channels: The number of channels wanted; None for as many as there are.
        scaling: The rules by which values become levels.

    Returns:
        uint8 [H, W, channels].

    Raises:
        ImageError: The image has another number of channels, or values that the rules refuse.
    """
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
    return array_of(to_bands(_picture_of(pixels), channels))


def to_bands(picture: Image.Image, channels: int | None) -> Image.Image:
    """Convert a PIL image of any 8-bit mode to the mode with `channels` bands; with all its bands for None.

    Raises:
        ImageError: The image has another number of bands, which could mean anything.
    """
    if channels is not None and picture.mode == {1: "L", 3: "RGB"}.get(channels) and not picture.has_transparency_data:
        return picture  # the common case, without a copy
    picture = to_plain_mode(picture)
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


def to_plain_mode(picture: Image.Image) -> Image.Image:
    """Convert a PIL image of any 8-bit mode to the one of L, LA, RGB and RGBA that holds all of it."""
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
    """Lay a picture of mode L, LA, RGB or RGBA over white, which gives L or RGB."""
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


def _picture_of(pixels: UInt8) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)  # L, LA, RGB or RGBA


def array_of(picture: Image.Image) -> UInt8:
    """Take the pixels of an 8-bit picture, [H, W, C]."""
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels
