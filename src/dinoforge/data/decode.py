"""Encoded bytes, PIL images, arrays and tensors to uint8 pixels, by stated rules.

Files: JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000, AVIF, JPEG XL, Netpbm, .npy, and HEIC with the extra ``heic``; told
by their content and not by their name. No other format is tried, so no file can start an external interpreter. The
first of several frames is the image; for planes and pages of a TIFF see ``dinoforge.data.tiff``.

Orientation: the EXIF rotation is applied; a number that is none of the eight is ignored.

Colour: palette, 1-bit, CMYK, YCbCr, LAB (D50) and HSV become RGB; embedded colour profiles are not applied.
- ``channels=3``: RGB; grey is repeated. A further band beside RGB in a TIFF (infrared, alpha) is left out.
- ``channels=1``: ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B; grey is taken as it is.
- ``channels=4``: files with transparency, as RGBA; ``channels=2``: grey files with transparency.
- ``channels=None``: as many as there are.
- Other numbers, and arrays and tensors: exactly `channels` channels, except that grey becomes RGB and RGB becomes
  luma. Two or four channels could mean anything, so they are never reduced.

Transparency (alpha, colour keys, transparent palette entries) with ``channels`` 1 or 3: the image is laid over white,
as viewers show it. An alpha channel that is 0 everywhere carries no picture and is dropped. TIFF and JPEG 2000 are
never laid over white: the last of their four bands is as often infrared.

No data: NaN, the file's own tag or mask, the mask of a masked array, the number `nodata`. Pixels without data get the
level `fill` and count in no range.

Depth: 8-bit values are not rescaled. Deeper ones are, by the rule `sixteen_bit`:
- ``full``: integers 0…65535 become round(value / 257), so 65535 → 255; a file that says that it has 12 bits has 4095 →
  255; floats 0…1 become round(255 · value). Values outside are refused, never clipped.
- ``minmax``: each image's own minimum…maximum, over all channels, becomes 0…255. A constant image becomes 0.
- A `value_range`, of all channels or of each, wins over both. It describes a whole data set, so values outside are
  clipped to it, infinite ones as well; without a range infinity is refused. It holds for 8-bit values, too, unless it
  goes beyond 255: then it is meant for the deeper images of the data set.
"""

from typing import Literal

import numpy as np
from PIL import Image

from dinoforge.data import formats, tiff
from dinoforge.data.headers import count_planes
from dinoforge.data.pictures import (
    AnImage,
    count_frames,
    file_behind,
    load_picture,
    open_picture,
    orientation_of,
    reading,
    samples_of_array,
)
from dinoforge.data.pixels import array_of, to_bands, to_pixels, to_plain_mode
from dinoforge.data.sources import OnePlane, RawImage
from dinoforge.data.values import Samples, Scaling, UInt8, check_plane, check_size, upright
from dinoforge.errors import ImageError

MAX_PIXELS = 178_956_970
"""Beyond this Pillow takes a file for a decompression bomb: 512 MB as RGB."""


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
        channels: The number of channels wanted, C; None for as many as the image has.
        sixteen_bit: The rule by which values deeper than 8 bits are scaled, ``full`` or ``minmax``.
        max_pixels: The largest H·W that is decoded at all.
        reduction: The divisor of edges at which JPEG files may be decoded: by 1, 2, 4 or 8, the largest that is no
            more than `reduction`, which saves most of the work.
        value_range: The values that become 0 and 255, for all channels or for each; see above.
        nodata: A further value that means no data, beside the file's own.
        fill: The level 0…255 of pixels without data.
        plane: The index of the plane (z, time, page, frame) in a file with several; ``max`` for the brightest value
            of all planes, None for the first plane, ``each`` for the only one, as `dinoforge.data.planes` takes files
            apart.

    Returns:
        uint8 [H, W, C], C-contiguous, writable. H and W are the image's, but for `reduction`.

    Raises:
        ImageError: The image cannot be read, is truncated, empty or larger than `max_pixels`, or has a number of
            channels or a range of values that the rules refuse.
    """
    assert sixteen_bit in ("full", "minmax"), sixteen_bit
    scaling = Scaling("minmax" if sixteen_bit == "minmax" else "full", value_range, nodata, fill)
    image, plane = _one_plane(image, channels, plane)
    if isinstance(image, bytes):
        with reading(max_pixels, image):
            found = _read(image, channels, plane, max_pixels)
            if isinstance(found, Samples):
                pixels = to_pixels(found, channels, scaling)
            else:
                pixels = _decode_picture(found, channels, scaling, max_pixels, reduction, plane, image)
    elif isinstance(image, Image.Image):
        with reading(max_pixels):
            pixels = _decode_picture(image, channels, scaling, max_pixels, reduction, plane)
    else:
        samples = samples_of_array(image)
        check_size(samples.values.shape[1], samples.values.shape[0], max_pixels)
        pixels = to_pixels(samples, channels, scaling)
    return np.require(pixels, requirements=["C", "W"])


def read_values(
    image: AnImage,
    *,
    channels: int | None = None,
    max_pixels: int = MAX_PIXELS,
    plane: int | Literal["max", "each"] | None = None,
) -> Samples | None:
    """Read the values of an image before they become levels; None for a picture of 8 bits.

    Args:
        image: An image as for `decode`.
        channels: The number of channels wanted, as for `decode`.
        max_pixels: The largest H·W that is decoded at all.
        plane: The plane of a file with several, as for `decode`.

    Raises:
        ImageError: The image cannot be read, is truncated, empty or larger than `max_pixels`.
    """
    image, plane = _one_plane(image, channels, plane)
    if not isinstance(image, bytes | Image.Image):
        return samples_of_array(image)
    with reading(max_pixels, image if isinstance(image, bytes) else b""):
        found = _read(image, channels, plane, max_pixels) if isinstance(image, bytes) else image
        if isinstance(found, Samples):
            return found
        if not (found.mode.startswith("I") or found.mode == "F"):
            return None
        check_size(*found.size, max_pixels)
        return Samples(np.asarray(found)[:, :, np.newaxis], colour=1)


def _one_plane(
    image: AnImage, channels: int | None, plane: int | Literal["max", "each"] | None
) -> tuple[RawImage, int | Literal["max"] | None]:
    """The image with all its planes, as the file where Pillow alone would read less, and the plane that is wanted."""
    if isinstance(image, OnePlane):
        return file_behind(image.image), image.number
    if plane != "each":
        return file_behind(image), plane
    planes, along = count_planes(image, channels)
    if planes > 1:
        raise ImageError(
            f"has {planes} planes ({along}), and data.plane=each makes an image of each, which one image alone cannot "
            "be: give a number from 0, or max"
        )
    return file_behind(image), None


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
            check_plane(plane, 1)
    return open_picture(data) if found is None else found


def _decode_picture(
    picture: Image.Image,
    channels: int | None,
    scaling: Scaling,
    max_pixels: int,
    reduction: int,
    plane: int | Literal["max"] | None,
    data: bytes | None = None,
) -> UInt8:
    """Make pixels of a picture that Pillow has opened, from its file's bytes where they are at hand."""
    check_size(*picture.size, max_pixels)
    if plane not in (None, 0):
        frames, _ = count_frames(picture)
        if frames > 1 and plane == "max":
            every = []
            for frame in range(frames):
                picture.seek(frame)
                every.append(_decode_picture(picture, channels, scaling, max_pixels, 1, None))
            return np.asarray(np.maximum.reduce(every), np.uint8)
        check_plane(plane, frames)
        if plane != "max":
            picture.seek(int(plane))
    picture = load_picture(picture, reduction, data)
    orientation = orientation_of(picture)  # a loaded TIFF is upright already, and says so
    if picture.mode.startswith("I") or picture.mode == "F":
        pixels = to_pixels(Samples(np.asarray(picture)[:, :, np.newaxis], colour=1), channels, scaling)
    elif scaling.plain:
        pixels = array_of(to_bands(picture, channels))
    else:
        picture = to_plain_mode(picture)
        alpha = picture.mode in ("LA", "RGBA")
        values = array_of(picture)
        pixels = to_pixels(Samples(values, None, 3 if values.shape[2] > 2 else 1, alpha), channels, scaling)
    return upright(pixels, orientation)
