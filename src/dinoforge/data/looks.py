"""A close look at one image: the kind of its file, the values that it stores, and the pixels that training gets.

The file is decoded once: `Look.samples` are its values before they are scaled, `Look.pixels` those that ``decode``
gives.
"""

import io
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageCms

from dinoforge.data import formats, kinds
from dinoforge.data.decode import MAX_PIXELS, decode, read_values
from dinoforge.data.headers import count_planes, size_and_kind
from dinoforge.data.kinds import Kind, kind_of
from dinoforge.data.pictures import AnImage
from dinoforge.data.pixels import to_pixels
from dinoforge.data.sources import OnePlane
from dinoforge.data.values import Decoding, Samples, Scaling, UInt8, check_plane, upright
from dinoforge.errors import ImageError

OBJECT = Kind("object in memory", is_image=True, article="an")
"""The kind of arrays, tensors and PIL images, which come from no file."""

_ICC_PROFILE, _ORIENTATION = 34675, 274  # tags of a TIFF
_PICTURES = frozenset({kinds.JPEG, kinds.WEBP, kinds.BMP, kinds.GIF, kinds.AVIF, kinds.HEIC})  # always of 8 bits
_PILLOW = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")


@dataclass(frozen=True)
class Header:
    """The header of a file, beside the size.

    Args:
        profile: The name of the embedded colour profile; '' where there is none.
        orientation: The EXIF orientation as written, even where it is none of the eight; None where there is none.
        planes: The number of planes (z, time), pages or frames.
        along: The axes along which planes lie, such as ``z, t``, ``page`` or ``frame``; '' for one plane.
        bare_cmyk: Whether the file is a CMYK JPEG without Adobe's marker.
    """

    profile: str = ""
    orientation: int | None = None
    planes: int = 1
    along: str = ""
    bare_cmyk: bool = False


@dataclass(frozen=True)
class Look:
    """One image, looked at closely.

    Args:
        kind: The kind of the file by its content.
        size: The bytes of the file; of the values for objects in memory.
        width: The upright width in pixels.
        height: The upright height in pixels.
        mode: The kind of pixels, as `size_and_kind` tells it.
        header: The rest of the header.
        samples: The values as stored, upright [H, W, C].
        pixels: The pixels that training gets, uint8 [H, W, channels]; None where it refuses the image.
        refused: The reason why training refuses the image; '' where it does not.
        repaired: Whether the file is a JPEG that lacks its end, with all rows there.
        seconds: The time that decoding took.
    """

    kind: Kind
    size: int
    width: int
    height: int
    mode: str
    header: Header
    samples: Samples
    pixels: UInt8 | None
    refused: str
    repaired: bool
    seconds: float

    @property
    def transparent(self) -> float | None:
        """The share of the pixels that are not wholly opaque; None where there is no transparency."""
        if not self.samples.alpha:
            return None
        alpha = self.samples.values[:, :, -1]
        return float(np.mean(alpha < (self.samples.limit or _top(alpha.dtype))))


def look_at(image: AnImage, *, channels: int, decoding: Decoding | None = None) -> Look:
    """Read one image, with everything that can be said about it.

    An image that can be read and that training refuses all the same gives a look without pixels.

    Args:
        image: An image as for `decode`.
        channels: The number of channels that training wants.
        decoding: Further keywords of `decode`.

    Raises:
        ImageError: The image cannot be read.
    """
    keys = decoding or Decoding()
    plane, max_pixels = keys.get("plane"), keys.get("max_pixels", MAX_PIXELS)
    whole = image.image if isinstance(image, OnePlane) else image
    data = whole if isinstance(whole, bytes) else b""
    kind = kind_of(data) if data else OBJECT
    header = _header(data, kind) if data else Header()
    planes, along = count_planes(whole, channels)
    header = replace(header, planes=planes, along=along)
    start = time.perf_counter()
    samples = None
    if kind not in _PICTURES:
        samples = read_values(image, channels=channels, max_pixels=max_pixels, plane=plane)
        if samples is not None and kind is kinds.PNG and not formats.is_deep_png(data):  # Pillow's, as it lies
            check_plane(None if plane == "each" else plane, 1)
            samples = replace(samples, values=upright(samples.values, _valid(header.orientation)))
    is_picture = samples is None
    if samples is None:
        stored = decode(image, channels=None, max_pixels=max_pixels, plane=plane)
        bands = stored.shape[2]
        samples = Samples(stored, None, 3 if bands > 2 else 1, alpha=bands in (2, 4))
    pixels, refused = None, ""
    try:
        if is_picture and planes > 1 and plane == "max":  # the brightest frame has to be found among frames made grey
            pixels = decode(image, channels=channels, **keys)
        else:
            pixels = to_pixels(samples, channels, _scaling(keys))
    except ImageError as error:
        refused = _why_not(image, channels, keys) if is_picture else str(error)
    seconds = time.perf_counter() - start
    height, width = samples.values.shape[:2]
    mode = size_and_kind(image, channels)[2]
    return Look(
        kind=kind,
        size=len(data) or samples.values.nbytes,
        width=width,
        height=height,
        mode=mode,
        header=header,
        samples=samples,
        pixels=pixels,
        refused=refused,
        repaired=kind is kinds.JPEG and _lacks_end(data),
        seconds=seconds,
    )


def _why_not(image: AnImage, channels: int, keys: Decoding) -> str:
    """Find training's reason for refusing a picture, which names its mode."""
    try:
        decode(image, channels=channels, **keys)
    except ImageError as error:
        return str(error)
    raise AssertionError("refused, and yet decoded")


def _scaling(keys: Decoding) -> Scaling:
    rule: Literal["full", "minmax"] = "minmax" if keys.get("sixteen_bit") == "minmax" else "full"
    return Scaling(rule, keys.get("value_range"), keys.get("nodata"), keys.get("fill", 0))


def _top(dtype: np.dtype[Any]) -> float:
    return 1.0 if dtype.kind in "fb" else float(np.iinfo(dtype).max)


def _valid(orientation: int | None) -> int:
    return orientation if orientation is not None and 1 <= orientation <= 8 else 1


def _header(data: bytes, kind: Kind) -> Header:
    """Read the header; damaged parts of it count as missing."""
    read = {"TIFF": _of_tiff, "HEIC": _of_heic}.get(kind.name, _of_picture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(data)
        except Exception:  # parsers raise whatever they meet; whether the image can be read shows when it is decoded
            return Header()


def _of_picture(data: bytes) -> Header:
    with Image.open(io.BytesIO(data), formats=[name for name in _PILLOW if name in Image.OPEN]) as picture:
        orientation = picture.getexif().get(ExifTags.Base.Orientation) if _has_exif(picture) else None
        return Header(
            profile=_profile(picture.info.get("icc_profile")),
            orientation=orientation if isinstance(orientation, int) else None,
            bare_cmyk=picture.mode == "CMYK" and picture.format == "JPEG" and "adobe" not in picture.info,
        )


def _has_exif(picture: Image.Image) -> bool:
    """Whether asking for EXIF data is cheap: of a PNG without any, Pillow would decode the pixels in search of some."""
    return picture.format != "PNG" or "exif" in picture.info


def _of_tiff(data: bytes) -> Header:
    import tifffile  # not before it is needed

    with io.BytesIO(data) as stream, tifffile.TiffFile(stream, _multifile=False) as file:
        page = file.pages.first
        profile, orientation = page.tags.get(_ICC_PROFILE), page.tags.get(_ORIENTATION)
        return Header(
            profile="" if profile is None else _profile(bytes(profile.value)),
            orientation=None if orientation is None else int(orientation.value),
        )


def _of_heic(data: bytes) -> Header:
    import pillow_heif

    return Header(profile=_profile(pillow_heif.open_heif(io.BytesIO(data)).info.get("icc_profile")))


def _profile(icc: bytes | None) -> str:
    if not icc:
        return ""
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc))).strip()
    except (ImageCms.PyCMSError, OSError):
        return "a profile that cannot be read"
    return name or "a profile without a name"


def _lacks_end(data: bytes) -> bool:
    """Whether nothing marks the end of a JPEG after its first scan; a thumbnail, which lies before, has its own."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        if data[place + 1] == 0xDA:
            return data.find(b"\xff\xd9", place) < 0
        place += 1 if data[place + 1] == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False
