"""Pictures of any mode to the channels wanted: luma, palettes, other colour spaces, transparency."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dinoforge.data.decode import decode
from pictures import COLOUR, GREY, encoded

LUMA = np.array([0.299, 0.587, 0.114])


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None] / 255
    return colour * weight + 255 * (1 - weight)


def test_grey_is_luma() -> None:
    for image in (encoded(Image.fromarray(COLOUR)), COLOUR, torch.from_numpy(COLOUR).permute(2, 0, 1)):
        assert np.abs(decode(image, channels=1)[:, :, 0] - COLOUR @ LUMA).max() <= 0.51


def test_palette_one_bit_cmyk() -> None:
    palette = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decode(encoded(palette), channels=3), expected)
    assert np.array_equal(decode(encoded(palette, "GIF"), channels=3), expected)

    one_bit = Image.fromarray(GREY > 127)
    assert np.array_equal(decode(encoded(one_bit), channels=1)[:, :, 0], (GREY > 127) * 255)

    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    for data in (encoded(cmyk, "TIFF"), cmyk):
        assert decode(data, channels=3)[0, 0].tolist() == [255, 0, 0]
    red = decode(encoded(cmyk, "JPEG", quality=100), channels=3)[0, 0]
    assert red[0] > 240
    assert red[1:].max() < 15


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    colours = Image.fromarray(np.array([[[200, 40, 40], [40, 160, 60], [128, 128, 128], [30, 60, 150]]], np.uint8))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        other = ImageCms.applyTransform(colours, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
        assert other is not None
        assert np.abs(decode(encoded(other, "TIFF"), channels=3).astype(int) - np.asarray(colours)).max() <= 8
    else:
        other = colours.convert(mode)
    assert np.abs(decode(other, channels=3).astype(int) - np.asarray(colours)).max() <= 8


def test_alpha_is_laid_over_white() -> None:
    alpha = GREY.copy()
    rgba = Image.fromarray(np.dstack([COLOUR, alpha]))
    for image in (encoded(rgba), encoded(rgba, "WEBP", lossless=True, exact=True), rgba):
        assert np.abs(decode(image, channels=3) - over_white(COLOUR, alpha)).max() <= 1
        assert np.array_equal(decode(image, channels=4), np.dstack([COLOUR, alpha]))
    la = Image.fromarray(np.dstack([GREY, alpha]))
    assert np.abs(decode(encoded(la), channels=1) - over_white(GREY[..., None], alpha)).max() <= 1
    assert np.array_equal(decode(encoded(la), channels=2), np.dstack([GREY, alpha]))
    for premultiplied in (rgba.convert("RGBa"), la.convert("La")):
        assert decode(premultiplied, channels=3).shape == (12, 20, 3)


@pytest.mark.parametrize("level", [0, 255])
def test_uniform_alpha_hides_nothing(level: int) -> None:
    image = encoded(Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, level)])))
    assert np.array_equal(decode(image, channels=3), COLOUR)


def test_transparent_palette_and_colour_key() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    for format in ("PNG", "GIF"):
        pixels = decode(encoded(palette, format, transparency=0), channels=3)
        assert pixels[0].tolist() == [[255, 255, 255], [200, 100, 50]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [9, 8, 7]]], np.uint8))
    assert decode(encoded(keyed, transparency=(1, 2, 3)), channels=3)[0].tolist() == [[255] * 3, [9, 8, 7]]


def test_alpha_has_no_range() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    pixels = decode(encoded(Image.fromarray(rgba)), channels=4, value_range=(0, 100), nodata=255, fill=9)
    assert pixels.tolist() == [[[26, 51, 76, 255], [26, 51, 76, 0]]]


def test_channels_none_gives_all() -> None:
    assert decode(encoded(Image.fromarray(GREY)), channels=None).shape == (12, 20, 1)
    assert decode(encoded(Image.fromarray(COLOUR)), channels=None).shape == (12, 20, 3)
    assert decode(encoded(Image.fromarray(np.dstack([COLOUR, GREY]))), channels=None).shape == (12, 20, 4)
    assert decode(np.zeros((3, 4, 7), np.uint8), channels=None).shape == (3, 4, 7)
