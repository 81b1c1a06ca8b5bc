"""Images in memory: pictures as Pillow opens them, arrays and tensors."""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from dinoforge.data import formats, jpeg, kinds, tiff
from dinoforge.data.sources import OnePlane, RawImage
from dinoforge.data.values import Samples
from dinoforge.errors import ImageError

AnImage = bytes | Image.Image | npt.NDArray[np.generic] | torch.Tensor | OnePlane

_MOVING = frozenset({"GIF", "WEBP", "PNG", "AVIF"})  # Pillow's names of the formats with animations


def open_picture(image: bytes | BinaryIO) -> Image.Image:
    """Open a picture of a format that is read, from its bytes or its file, without decoding its pixels."""
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read; AVIF and JPEG 2000 where this Pillow has them."""
    Image.init()
    return tuple(f for f in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000") if f in Image.OPEN)


def load_picture(picture: Image.Image, reduction: int, data: bytes | None) -> Image.Image:
    """Decode the pixels of an opened picture; of a JPEG that lacks its end, those that are there.

    Args:
        picture: A picture as `open_picture` gives it.
        reduction: The divisor of edges at which a JPEG may be decoded.
        data: The bytes of its file, if they are at hand; without them no JPEG is mended.
    """

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


@contextmanager
def reading(max_pixels: int | None, data: bytes = b"") -> Iterator[None]:
    """Turn whatever reading a bad file raises into ImageError, and put our limit in place of Pillow's and its warnings.

    Args:
        max_pixels: The largest H·W that is decoded; None for any.
        data: The beginning of the file, by which a refusal names its kind.
    """
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


def file_behind(image: RawImage) -> RawImage:
    """Take the file of a PIL image that is not read yet, where Pillow alone would read less; else the image itself."""
    is_lazy = isinstance(image, ImageFile.ImageFile) and image.tile and image.fp and image.tell() == 0
    if not is_lazy:
        return image
    assert isinstance(image, ImageFile.ImageFile)
    assert image.fp
    if not (image.format == "TIFF" or is_deep_png(image)):
        return image
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(place)
    return data if tiff.is_tiff(data) or formats.is_deep_png(data) else image


def is_deep_png(picture: Image.Image) -> bool:
    """Whether a PNG that is not read yet holds 16-bit colour, for which Pillow has no mode of its own."""
    if picture.mode.startswith("I") or not isinstance(picture, ImageFile.ImageFile) or not picture.tile:
        return False
    return picture.format == "PNG" and ";16" in str(picture.tile[0][3])


def orientation_of(picture: Image.Image) -> int:
    """Read the EXIF orientation, 1…8; 1 where there is none."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata costs the rotation, not the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def count_frames(picture: Image.Image) -> tuple[int, str]:
    """Count the frames of an animation, and name them for a user: ``frame``, or '' for one."""
    frames = getattr(picture, "n_frames", 1) if picture.format in _MOVING else 1
    return frames, "frame" if frames > 1 else ""


def as_array(image: npt.NDArray[np.generic] | torch.Tensor) -> npt.NDArray[np.generic]:
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


def samples_of_array(image: npt.NDArray[np.generic] | torch.Tensor) -> Samples:
    """Take the values of an array or tensor; masked pixels of a masked array, as rasterio gives, have no data."""
    values = as_array(image)
    valid = None
    if isinstance(values, np.ma.MaskedArray):
        valid = None if values.mask is np.ma.nomask else ~np.ma.getmaskarray(values)
        values = np.asarray(values.data)
    return Samples(values, colour=3 if values.shape[2] == 3 else 0, valid=valid)
