"""16-bit PNG's sisters: JPEG 2000, AVIF, JPEG XL, Netpbm, .npy, HEIC."""

import builtins
import contextlib
import io
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image, features

from dinoforge.data.decode import decode
from dinoforge.data.headers import size_and_kind
from dinoforge.errors import ImageError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = np.ascontiguousarray(COLOUR[:, :, 0])
DEEP = RNG.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
TWELVE = DEEP >> 4
SMOOTH = Image.fromarray(COLOUR).resize((64, 48), Image.Resampling.BICUBIC)


def jpeg_2000(values: np.ndarray, **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(values, level=0, **options))


@pytest.mark.parametrize("container", ["jp2", "j2k"])
def test_jpeg_2000(container: str) -> None:
    data = jpeg_2000(COLOUR, codecformat=container)
    assert size_and_kind(data) == (30, 20, "uint8 x3, JPEG 2000, 8 bits")
    assert np.array_equal(decode(data, channels=3), COLOUR)
    assert np.array_equal(decode(jpeg_2000(GREY, codecformat=container), channels=1)[:, :, 0], GREY)
    assert np.array_equal(decode(jpeg_2000(DEEP, codecformat=container), channels=3), np.rint(DEEP / 257))
    twelve = jpeg_2000(TWELVE, codecformat=container, bitspersample=12)
    assert np.array_equal(decode(twelve, channels=3), np.rint(TWELVE / 4095 * 255))
    assert np.array_equal(decode(twelve, channels=3, value_range=(0, 4095)), np.rint(TWELVE / 4095 * 255))


def test_the_fourth_band_of_jpeg_2000_may_be_infrared() -> None:
    bands = np.dstack([COLOUR, GREY // 2])
    data = jpeg_2000(bands)
    assert np.array_equal(decode(data, channels=4), bands)
    assert np.array_equal(decode(data, channels=3), COLOUR)


def jpeg_xl(values: np.ndarray, **options: Any) -> bytes:
    return bytes(imagecodecs.jpegxl_encode(values, lossless=True, **options))


@pytest.mark.skipif(not imagecodecs.JPEGXL.available, reason="imagecodecs without JPEG XL")
@pytest.mark.parametrize("container", [False, True])
def test_jpeg_xl(container: bool) -> None:
    assert np.array_equal(decode(jpeg_xl(COLOUR, usecontainer=container), channels=3), COLOUR)
    assert np.array_equal(decode(jpeg_xl(DEEP, usecontainer=container), channels=3), np.rint(DEEP / 257))
    assert np.array_equal(decode(jpeg_xl(GREY, usecontainer=container), channels=1)[:, :, 0], GREY)
    rgba = np.dstack([COLOUR, np.full_like(GREY, 128)])
    half = COLOUR * (128 / 255) + 255 * (127 / 255)
    assert np.abs(decode(jpeg_xl(rgba, usecontainer=container), channels=3) - half).max() <= 1


@pytest.mark.skipif(not imagecodecs.JPEGXL.available, reason="imagecodecs without JPEG XL")
@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (64, 64), (100, 300), (513, 31), (256, 1024), (90, 160)])
def test_the_size_of_jpeg_xl_is_in_its_header(height: int, width: int) -> None:
    data = jpeg_xl(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    assert size_and_kind(data)[:2] == (width, height)
    assert size_and_kind(data[:64])[:2] == (width, height)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif() -> None:
    buffer = io.BytesIO()
    SMOOTH.save(buffer, "AVIF", quality=100, subsampling="4:4:4")
    pixels = decode(buffer.getvalue(), channels=3)
    assert np.abs(pixels.astype(int) - np.asarray(SMOOTH)).max() <= 4
    assert size_and_kind(buffer.getvalue()) == (64, 48, "RGB")


def test_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(SMOOTH).save(buffer, quality=100, chroma=444)
    data = buffer.getvalue()
    assert np.abs(decode(data, channels=3).astype(int) - np.asarray(SMOOTH)).mean() <= 3
    assert size_and_kind(data) == (64, 48, "RGB, HEIC")
    with pytest.raises(ImageError, match=r"data\.max_pixels"):
        decode(data, channels=3, max_pixels=100)

    real = builtins.__import__

    def without(name: str, *args: Any, **keys: Any) -> Any:
        if name == "pillow_heif":
            raise ImportError(name)
        return real(name, *args, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    for read in (lambda image: decode(image, channels=3), size_and_kind):
        with pytest.raises(ImageError, match=r"is HEIC.*dinoforge\[heic\]"):
            read(data)


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        (b"P1\n# a comment\n2 1\n1 0\n", "bool x1, Netpbm", [[0], [255]]),
        (b"P1 2 1\n10", "bool x1, Netpbm", [[0], [255]]),
        (b"P4 2 1\n\x80", "bool x1, Netpbm", [[0], [255]]),
        (b"P2 3 1 15\n0 5 15", "uint8 x1, Netpbm, 0 to 15", [[0], [85], [255]]),
        (b"P3 1 1\n255 # comment\n1 2 3\n", "uint8 x3, Netpbm", [[1, 2, 3]]),
        (b"P5\n#one\n#two\n3 1\n255\n\n\x0b\x0c", "uint8 x1, Netpbm", [[10], [11], [12]]),
        (b"P5 2 1 4095 \x0f\xff\x08\x00", "uint16 x1, Netpbm, 0 to 4095", [[255], [128]]),
        (b"P5 2 1 65535 \xff\xff\x01\x01", "uint16 x1, Netpbm", [[255], [1]]),
        (b"P6 1 1 255\n#$%", "uint8 x3, Netpbm", [[35, 36, 37]]),
        (b"P6 1 1 65535\n\x01\x01\x02\x02\xff\xff", "uint16 x3, Netpbm", [[1, 2, 255]]),
    ],
)
def test_netpbm(data: bytes, kind: str, expected: list[list[int]]) -> None:
    assert size_and_kind(data) == (len(expected), 1, kind)
    assert decode(data, channels=None)[0].tolist() == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"P6 1 1 255\n\0\0", "truncated: 2 of 3"),
        (b"P5 2 1 4095 \0\1\2", "truncated: 1 of 2"),
        (b"P5 1 1 15\n\x20", "a value of 32 where 15"),
        (b"P2 2 1 255\n9", "truncated: 1 of 2"),
        (b"P5 1 1 70000\n\0\0", "largest value 70000"),
        (b"P5 99999 99999 255\n\0", r"data\.max_pixels"),
    ],
)
def test_bad_netpbm(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decode(data, channels=None)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [COLOUR, np.asfortranarray(COLOUR), np.moveaxis(COLOUR, -1, 0), COLOUR.astype(">u2") * 257, COLOUR / 255],
)
def test_npy(array: np.ndarray) -> None:
    assert np.array_equal(decode(npy(array), channels=3), COLOUR)
    assert size_and_kind(npy(array)) == (30, 20, f"{array.dtype.name} x3, NumPy array")


def test_npy_of_bands() -> None:
    bands = RNG.integers(0, 256, (13, 20, 30), dtype=np.uint8)
    for array in (bands, np.moveaxis(bands, 0, -1)):
        assert np.array_equal(decode(npy(array), channels=13), np.moveaxis(bands, 0, -1))
        assert np.array_equal(decode(npy(array), channels=None), np.moveaxis(bands, 0, -1))
    assert np.array_equal(decode(npy(GREY), channels=1)[:, :, 0], GREY)
    square = RNG.integers(0, 256, (40, 30, 13), dtype=np.uint8)
    assert np.array_equal(decode(npy(square), channels=13), square)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[{}]], object), "Python objects"),
        (np.zeros((2, 2), [("a", "u1")]), "records"),
        (np.zeros((2, 3, 4, 5)), r"shape \[2, 3, 4, 5\]"),
        (np.zeros(5), r"shape \[5\]"),
        (np.zeros((50, 50)), r"data\.max_pixels"),
    ],
)
def test_bad_npy(array: np.ndarray, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decode(npy(array), channels=1, max_pixels=2000)


FILES = {
    "jpeg 2000": jpeg_2000(COLOUR),
    "jpeg xl": jpeg_xl(COLOUR) if imagecodecs.JPEGXL.available else b"",
    "netpbm": b"P6 30 20 255\n" + COLOUR.tobytes(),
    "npy": npy(COLOUR),
    "png": bytes(imagecodecs.png_encode(DEEP)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.03, 0.5, 0.9])
def test_truncated(name: str, kept: float) -> None:
    data = FILES[name]
    if not data:
        pytest.skip("imagecodecs without JPEG XL")
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * kept)], channels=3)


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_raise_nothing_else(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = FILES[name] or FILES["npy"]
    rng = np.random.default_rng(1)
    for _ in range(100):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(min(len(data), 300), size=3)] = rng.integers(0, 256, 3)
        for read in (lambda image: decode(image, channels=3, max_pixels=10**5), size_and_kind):
            with contextlib.suppress(ImageError):
                read(damaged.tobytes())
    assert capfd.readouterr().out == ""
