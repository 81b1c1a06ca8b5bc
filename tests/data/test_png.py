"""16-bit PNG: colours, significant bits, colour keys and EXIF data, on files made here."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dinoforge.data.decode import decode
from dinoforge.data.headers import size_and_kind
from dinoforge.errors import ImageError
from pictures import png

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("colour_type", "bands", "channels"), [(2, 3, 3), (6, 4, 4), (4, 2, 1)])
def test_sixteen_bit_colour_png(colour_type: int, bands: int, channels: int) -> None:
    rows = RNG.integers(0, 65536, (6, 5, bands), dtype=np.uint16)
    rows[0, :2] = [[65535], [0]]
    if colour_type == 4:
        rows[..., 1] = 65535
    data = png(rows, bits=16, colour_type=colour_type)
    assert size_and_kind(data)[2].endswith(";16")
    colours = bands - (bands in (2, 4))
    for image in (data, Image.open(io.BytesIO(data))):
        pixels = decode(image, channels=channels)
        assert np.array_equal(pixels, np.rint(rows[:, :, :channels] / 257))
        assert np.array_equal(decode(image, channels=None), np.rint(rows / 257))
        # Of 1/16 of the range, no more than 16 levels would come out of the upper 8 bits.
        dark = png(rows >> 4, bits=16, colour_type=colour_type)
        few = decode(dark, channels=None, sixteen_bit="minmax")[:, :, :colours]
        low, high = (rows >> 4)[:, :, :colours].min(), (rows >> 4)[:, :, :colours].max()
        assert np.array_equal(few, np.rint(((rows >> 4)[:, :, :colours] - float(low)) / (high - low) * 255))


def test_sixteen_bit_colour_values_are_exact() -> None:
    rows = np.array([[[3100, 10_000, 0], [4095, 12_000, 5000]]], np.uint16)
    data = png(rows, bits=16, colour_type=2)
    assert decode(data, channels=3, value_range=(0, 10_000)).tolist() == [[[79, 255, 0], [104, 255, 128]]]
    pairs = ((0, 4095), (0, 12_000), (2500, 5000))
    assert decode(data, channels=3, value_range=pairs).tolist() == [[[193, 212, 0], [255, 255, 255]]]
    with pytest.raises(ImageError, match="2 ranges"):
        decode(data, channels=3, value_range=pairs[:2])


def sbit(data: bytes, *bits: int) -> bytes:
    body = b"sBIT" + bytes(bits)
    chunk = struct.pack(">I", len(bits)) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize(("colour_type", "bands"), [(0, 1), (2, 3)])
def test_significant_bits_of_png(colour_type: int, bands: int) -> None:
    twelve = RNG.integers(0, 4096, (6, 5, bands), dtype=np.uint16)
    twelve[0, 0] = 4095
    expected = np.rint(twelve / 4095 * 255)
    said = [12] * bands
    for stored in (twelve, twelve << 4, (twelve << 4) | (twelve >> 8)):  # at the bottom; on top, filled in two ways
        data = sbit(png(stored, bits=16, colour_type=colour_type), *said)
        assert np.array_equal(decode(data, channels=bands), expected)
    dark = (twelve & 255) << 4  # no larger than 4095, and yet on top
    data = sbit(png(dark, bits=16, colour_type=colour_type), *said)
    assert np.array_equal(decode(data, channels=bands), np.rint((twelve & 255) / 4095 * 255))
    plain = png(twelve, bits=16, colour_type=colour_type)
    assert np.array_equal(decode(plain, channels=bands), np.rint(twelve / 257))


def test_colour_key_of_sixteen_bit_png() -> None:
    rows = np.array([[[500], [40_000]]], np.uint16)
    body = b"tRNS" + struct.pack(">H", 500)
    data = png(rows, bits=16, colour_type=0)
    data = data[:33] + struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    assert decode(data, channels=1).ravel().tolist() == [255, 156]
    assert decode(data, channels=2).tolist() == [[[2, 0], [156, 255]]]


def inserted(data: bytes, name: bytes, body: bytes, *, at: int = 33) -> bytes:
    """A PNG with one more chunk, by default behind the first."""
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize(("colour_type", "bands"), [(2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_png_is_turned_as_its_exif_data_says(colour_type: int, bands: int, orientation: int) -> None:
    values = RNG.integers(0, 65536, (12, 20, bands), dtype=np.uint16)
    data = png(values, bits=16, colour_type=colour_type)
    exif = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    upright = decode(data, channels=None)
    turned = upright.swapaxes(0, 1) if orientation >= 5 else upright
    turned = turned[::-1] if orientation in (3, 4, 7, 8) else turned
    turned = turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned
    for at in (33, len(data) - 12):  # before the pixels, and after them
        assert np.array_equal(decode(inserted(data, b"eXIf", exif, at=at), channels=None), turned)
    assert np.array_equal(decode(inserted(data, b"eXIf", b"damaged"), channels=None), upright)
    assert size_and_kind(inserted(data, b"eXIf", exif))[:2] == turned.shape[1::-1]
