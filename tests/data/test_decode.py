"""Every rule that decode.py states, each on an image made here."""

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoforge.data.decode import decode
from dinoforge.data.headers import size_and_kind
from dinoforge.errors import ImageError
from pictures import COLOUR, DEEP, GREY, encoded

RNG = np.random.default_rng(0)


def deep_tiff(planes: np.ndarray, *, planar: int) -> bytes:
    """An uncompressed little-endian 16-bit RGB TIFF of [H, W, 3] (planar 1) or [3, H, W] (planar 2)."""
    height, width = planes.shape[:2] if planar == 1 else planes.shape[1:]
    strips = 1 if planar == 1 else 3
    data = planes.astype("<u2").tobytes()
    entries = [(256, 3, [width]), (257, 3, [height]), (258, 3, [16] * 3), (259, 3, [1]), (262, 3, [2])]
    after = 8 + 2 + 12 * 10 + 4
    bits_at, offsets_at, counts_at, data_at = after, after + 6, after + 18, after + 30
    size = len(data) // strips
    entries += [(273, 4, [data_at + i * size for i in range(strips)]), (277, 3, [3]), (278, 3, [height])]
    entries += [(279, 4, [size] * strips), (284, 3, [planar])]
    places = {258: bits_at, 273: offsets_at, 279: counts_at}
    body = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    tail = dict.fromkeys(places.values(), b"")
    for tag, kind, values in entries:
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            tail[places[tag]] = packed
            packed = struct.pack("<I", places[tag])
        body += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    body += struct.pack("<I", 0) + tail[bits_at].ljust(6, b"\0")
    return body + tail[offsets_at].ljust(12, b"\0") + tail[counts_at].ljust(12, b"\0") + data


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_eight_bits_pass_unchanged(format: str) -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(COLOUR), format), channels=3), COLOUR)
    assert np.array_equal(decode(encoded(Image.fromarray(GREY), format), channels=1)[:, :, 0], GREY)
    assert np.array_equal(decode(encoded(Image.fromarray(GREY), format), channels=3), GREY[:, :, None].repeat(3, 2))


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_compressed_formats_are_read(format: str, options: dict[str, Any]) -> None:
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    pixels = decode(encoded(Image.fromarray(smooth), format, **options), channels=3)
    assert np.abs(pixels.astype(int) - smooth).max() <= 12


def test_result_is_contiguous_and_writable() -> None:
    for image in (encoded(Image.fromarray(COLOUR)), Image.fromarray(GREY), COLOUR, COLOUR[::-1, ::2], GREY):
        for channels in (1, 3):
            pixels = decode(image, channels=channels)
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == channels
            assert pixels.flags.c_contiguous
            assert pixels.flags.writeable


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_rotation(orientation: int, format: str) -> None:
    upright = np.zeros((24, 40), np.uint8)
    upright[:8, :8] = 255  # top left
    upright[:8, -8:] = 128  # top right
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the inverse of what undoes it
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif)
    pixels = decode(data, channels=1)
    assert np.abs(pixels[:, :, 0].astype(int) - upright).max() < 40
    assert size_and_kind(data)[:2] == (40, 24)
    assert np.array_equal(decode(Image.open(io.BytesIO(data)), channels=1), pixels)


def test_broken_exif_costs_nothing_but_the_rotation() -> None:
    data = encoded(Image.fromarray(COLOUR), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode(data, channels=3), COLOUR)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_full_range(format: str) -> None:
    expected = np.rint(DEEP / 257).astype(np.uint8)
    assert expected[0, 2] == 255
    for image in (encoded(Image.fromarray(DEEP), format), DEEP, DEEP.astype(np.int64), torch.from_numpy(DEEP)):
        assert np.array_equal(decode(image, channels=1)[:, :, 0], expected)
    assert np.array_equal(decode(DEEP, channels=3), expected[:, :, None].repeat(3, 2))


def test_every_sixteen_bit_value_is_rounded_to_nearest() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode(every, channels=1)[:, :, 0].astype(int)
    assert (np.abs(pixels * 257 - every.astype(int)) <= 128).all()


def test_big_endian_tiff() -> None:
    data = encoded(Image.frombytes("I;16B", (20, 12), DEEP.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(decode(data, channels=1)[:, :, 0], np.rint(DEEP / 257))


def test_minmax() -> None:
    twelve_bits = (DEEP // 16).astype(np.uint16)
    span = int(twelve_bits.max()) - int(twelve_bits.min())
    expected = np.rint((twelve_bits - twelve_bits.min().astype(float)) * 255 / span)
    for image in (encoded(Image.fromarray(twelve_bits)), twelve_bits, twelve_bits / 7.0 - 3):
        pixels = decode(image, channels=1, sixteen_bit="minmax")[:, :, 0]
        assert np.abs(pixels - expected).max() <= 1
        assert pixels.min() == 0
        assert pixels.max() == 255
    assert not decode(np.full((3, 3), 77, np.uint16), channels=1, sixteen_bit="minmax").any()
    assert np.array_equal(decode(GREY // 4, channels=1, sixteen_bit="minmax")[:, :, 0], GREY // 4)


def test_sixteen_bit_colour_tiff() -> None:
    values = RNG.integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    low, high = int(values.min()), int(values.max())
    for data in (deep_tiff(values, planar=1), deep_tiff(values.transpose(2, 0, 1), planar=2)):
        assert np.array_equal(decode(data, channels=3), np.rint(values / 257))
        stretched = np.rint((values - float(low)) / (high - low) * 255)
        assert np.array_equal(decode(data, channels=3, sixteen_bit="minmax"), stretched)
        assert np.array_equal(decode(Image.open(io.BytesIO(data)), channels=3), np.rint(values / 257))


def test_floats_and_wide_integers() -> None:
    unit = GREY / 255
    for image in (unit, unit.astype(np.float32), torch.from_numpy(unit), Image.fromarray(unit.astype(np.float32))):
        assert np.array_equal(decode(image, channels=1)[:, :, 0], GREY)
    assert np.array_equal(decode(encoded(Image.fromarray(unit.astype(np.float32)), "TIFF"), channels=1)[:, :, 0], GREY)
    assert np.abs(decode(torch.from_numpy(unit).bfloat16(), channels=1)[:, :, 0].astype(int) - GREY).max() <= 1
    assert np.array_equal(decode(GREY > 9, channels=1)[:, :, 0], (GREY > 9) * 255)
    wide = Image.fromarray(DEEP.astype(np.int32))
    assert np.array_equal(decode(encoded(wide, "TIFF"), channels=1)[:, :, 0], np.rint(DEEP / 257))


@pytest.mark.parametrize(
    "image",
    [
        np.array([[0.0, 1.5]]),
        np.array([[-0.1, 0.5]]),
        np.array([[0, 70000]]),
        np.array([[-1, 5]], np.int16),
        Image.fromarray(np.array([[0, 255]], np.float32)),
    ],
)
def test_out_of_range_is_refused_not_clipped(image: Any) -> None:
    with pytest.raises(ImageError, match=r"data\.sixteen_bit=minmax"):
        decode(image, channels=1)
    pixels = decode(image, channels=1, sixteen_bit="minmax")
    assert pixels.min() == 0
    assert pixels.max() == 255


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("rule", ["full", "minmax"])
def test_not_finite_is_refused(value: float, rule: str) -> None:
    with pytest.raises(ImageError, match="not finite"):
        decode(np.array([[0.5, value]]), channels=1, sixteen_bit=rule)


@pytest.mark.parametrize(("bands", "channels"), [(5, 5), (2, 2), (4, 4)])
def test_arrays_of_any_number_of_channels(bands: int, channels: int) -> None:
    array = RNG.integers(0, 256, (6, 7, bands), dtype=np.uint8)
    assert np.array_equal(decode(array, channels=channels), array)
    assert np.array_equal(decode(torch.from_numpy(array).permute(2, 0, 1), channels=channels), array)


@pytest.mark.parametrize(("image", "channels"), [(np.zeros((4, 4, 4), np.uint8), 3), (np.zeros((4, 4, 2)), 1)])
def test_channels_are_never_dropped_from_arrays(image: np.ndarray, channels: int) -> None:
    with pytest.raises(ImageError, match="channels, expected"):
        decode(image, channels=channels)


def test_files_with_too_few_channels() -> None:
    for channels in (2, 4, 5):
        with pytest.raises(ImageError, match=f"has 3 channels .*expected {channels}"):
            decode(encoded(Image.fromarray(COLOUR)), channels=channels)


def test_first_frame() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 200)]
    for format in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (decode(data, channels=3) == 10).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_truncated(format: str, kept: float) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format)
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * kept)], channels=3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_raise_nothing_else(format: str) -> None:
    data = encoded(Image.fromarray(COLOUR), format)
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(len(data), size=3)] = rng.integers(0, 256, 3)
        for read in (lambda image: decode(image, channels=3, max_pixels=10**6), size_and_kind):
            with contextlib.suppress(ImageError):
                read(damaged.tobytes())


def test_other_formats_are_not_tried() -> None:
    wanted = {
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "is PostScript, which is not read",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n": "is a git-lfs pointer, not an image",
        b"<!DOCTYPE html><html><body>404": "is an HTML page, not an image",
        b"hello": "is text, not an image",
        b"": "is an empty file, not an image",
    }
    for data, words in wanted.items():
        for read in (lambda image: decode(image, channels=3), size_and_kind):
            with pytest.raises(ImageError, match=words):
                read(data)


def test_bomb_is_refused_by_its_header(recwarn: pytest.WarningsRecorder) -> None:
    before = Image.MAX_IMAGE_PIXELS
    bomb = bytearray(encoded(Image.fromarray(GREY)))
    bomb[16:24] = struct.pack(">II", 40000, 40000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    with pytest.raises(ImageError, match=r"data\.max_pixels"):
        decode(bytes(bomb), channels=3)
    with pytest.raises(ImageError, match=r"data\.max_pixels"):
        decode(encoded(Image.fromarray(GREY)), channels=1, max_pixels=239)
    with pytest.raises(ImageError, match=r"data\.max_pixels"):
        decode(GREY, channels=1, max_pixels=239)
    assert decode(encoded(Image.fromarray(GREY)), channels=1, max_pixels=240).shape == (12, 20, 1)
    assert size_and_kind(bytes(bomb))[:2] == (40000, 40000)
    assert before == Image.MAX_IMAGE_PIXELS
    assert not recwarn.list


@pytest.mark.parametrize("image", [np.zeros((0, 5)), np.zeros(5), np.zeros((1, 2, 3, 4)), np.array([["a"]])])
def test_arrays_that_are_no_images(image: np.ndarray) -> None:
    with pytest.raises(ImageError):
        decode(image, channels=1)


def test_size_and_kind() -> None:
    assert size_and_kind(encoded(Image.fromarray(COLOUR), "JPEG")) == (20, 12, "RGB")
    assert size_and_kind(encoded(Image.fromarray(DEEP))) == (20, 12, "I;16")
    assert size_and_kind(Image.fromarray(GREY)) == (20, 12, "L")
    assert size_and_kind(np.zeros((3, 4, 5), np.uint16)) == (4, 3, "uint16 x5")
    assert size_and_kind(torch.zeros(3, 4, 5)) == (5, 4, "float32 x3")


def test_one_by_one_and_thin_images() -> None:
    for size in ((1, 1), (1, 500), (500, 1)):
        assert decode(encoded(Image.new("L", size)), channels=3).shape == (size[1], size[0], 3)


@pytest.mark.parametrize(("reduction", "edge"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (100, 8)])
def test_reduction_is_the_nearest_that_is_enough(reduction: int, edge: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    data = encoded(picture.resize((800, 400), Image.Resampling.BICUBIC), "JPEG", quality=95)
    image = decode(data, channels=3, reduction=reduction)
    whole = decode(data, channels=3).reshape(400 // edge, edge, 800 // edge, edge, 3)
    assert image.shape == (400 // edge, 800 // edge, 3)
    assert np.abs(image - whole.mean(axis=(1, 3))).mean() < 2  # as the mean of each block of pixels
    odd = encoded(picture.resize((803, 402), Image.Resampling.BICUBIC), "JPEG")
    assert decode(odd, channels=3, reduction=edge).shape == (-(-402 // edge), -(-803 // edge), 3)


def test_reduction_is_of_jpeg_only() -> None:
    picture = Image.new("RGB", (800, 400), "red")
    assert decode(encoded(picture), channels=3, reduction=8).shape == (400, 800, 3)


def test_nan_becomes_the_fill_and_counts_in_no_range() -> None:
    values = np.array([[0.25, np.nan, 0.75]])
    assert decode(values, channels=1).ravel().tolist() == [64, 0, 191]
    assert decode(values, channels=1, sixteen_bit="minmax", fill=9).ravel().tolist() == [0, 9, 255]
    assert decode(values, channels=1, value_range=(0, 0.5), fill=128).ravel().tolist() == [128, 128, 255]
    assert decode(np.full((1, 2), np.nan), channels=1, fill=7).ravel().tolist() == [7, 7]


def test_a_number_for_no_data() -> None:
    values = np.array([[-9999, 0, 50, 100]], np.int16)
    assert decode(values, channels=1, nodata=-9999, sixteen_bit="minmax").ravel().tolist() == [0, 0, 128, 255]
    assert decode(values, channels=1, nodata=-9999, value_range=(0, 100), fill=3).ravel().tolist() == [3, 0, 128, 255]
    one = np.float32(-3.4028234663852886e38)
    floats = np.array([[one, 0.0, 1.0]], np.float32)
    assert decode(floats, channels=1, nodata=-3.4028234663852886e38, fill=5).ravel().tolist() == [5, 0, 255]
    # A type that cannot hold the number has none of it.
    assert decode(np.array([[1, 255]], np.uint8), channels=1, nodata=-9999, fill=5).ravel().tolist() == [1, 255]


def test_no_data_in_colours_is_where_all_have_it() -> None:
    colours = np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8)
    for image in (colours, encoded(Image.fromarray(colours))):
        assert decode(image, channels=3, nodata=0, fill=100).tolist() == [[[255, 0, 0], [100, 100, 100]]]
    bands = np.array([[[255, 0, 0, 0, 1]]], np.uint8)
    assert decode(bands, channels=5, nodata=0, fill=100).tolist() == [[[255, 100, 100, 100, 1]]]


def test_a_range_clips_and_holds_for_eight_bits_too() -> None:
    values = np.array([[0, 100, 3100, 10_000, 65_535]], np.uint16)
    assert decode(values, channels=1, value_range=(0, 10_000)).ravel().tolist() == [0, 3, 79, 255, 255]
    assert decode(values.astype(np.float32), channels=1, value_range=(0, 10_000)).ravel().tolist() == [
        0,
        3,
        79,
        255,
        255,
    ]
    assert decode(values, channels=1, value_range=(0, 4095), sixteen_bit="minmax")[0, 2, 0] == 193
    infinite = np.array([[-np.inf, 0.5, np.inf]])
    assert decode(infinite, channels=1, value_range=(0, 1)).ravel().tolist() == [0, 128, 255]
    grey = np.array([[0, 50, 100, 255]], np.uint8)
    for image in (grey, encoded(Image.fromarray(grey))):
        assert decode(image, channels=1, value_range=(0, 100)).ravel().tolist() == [0, 128, 255, 255]
        # The range of deeper images in the same folder would make it black.
        assert decode(image, channels=1, value_range=(0, 10_000)).ravel().tolist() == [0, 50, 100, 255]


def test_errors_name_the_channels_that_are_there() -> None:
    with pytest.raises(ImageError, match=r"has 5 channels, expected 3.*student\.in_chans=5"):
        decode(np.zeros((4, 4, 5), np.uint8), channels=3)


def test_signed_bytes_are_not_darkened() -> None:
    assert decode(np.array([[0, 5, 127]], np.int8), channels=1).ravel().tolist() == [0, 5, 127]
    with pytest.raises(ImageError, match=r"values -1 to 5 .*data\.range"):
        decode(np.array([[-1, 5]], np.int8), channels=1)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_orientation_out_of_range_is_ignored(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(COLOUR).resize((160, 96))
    data = encoded(picture, format, exif=exif)
    assert size_and_kind(data)[:2] == (160, 96)
    assert np.array_equal(decode(data, channels=3), decode(encoded(picture, format), channels=3))
    assert decode(data, channels=3, reduction=2).shape[:2] == ((48, 80) if format == "JPEG" else (96, 160))


def test_frames_by_their_number() -> None:
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (10, 200, 90)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert [int(decode(data, channels=1, plane=plane).max()) for plane in (None, 0, 1, 2, "max")] == [
        10,
        10,
        200,
        90,
        200,
    ]
    with pytest.raises(ImageError, match=r"has 3 planes.*data\.plane=3"):
        decode(data, channels=1, plane=3)
    with pytest.raises(ImageError, match=r"has 1 plane,.*data\.plane=1"):
        decode(encoded(Image.fromarray(GREY)), channels=1, plane=1)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 70])
def test_planes_of_any_number_become_channels(channels: int, planar: bool) -> None:
    values = RNG.integers(0, 65536, (channels, 7, 9), dtype=np.uint16)
    image = np.moveaxis(values, 0, -1) if planar else np.ascontiguousarray(np.moveaxis(values, 0, -1))
    levels = decode(image, channels=channels)
    assert levels.flags.c_contiguous
    assert np.array_equal(levels, np.rint(np.moveaxis(values, 0, -1) / 257))


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 5, 13])
@pytest.mark.parametrize("fill", [0, 9, 255])
@pytest.mark.parametrize("number", [0, 7, 500.0, 65535, -9999, 1.5, float("inf")])
def test_no_data_of_16_bits_becomes_the_fill_channel_by_channel(
    channels: int, planar: bool, fill: int, number: float
) -> None:
    values = RNG.integers(0, 2000, (channels, 7, 9), dtype=np.uint16)
    values[0, :, 3], values[-1, 2], values[0, 5, :4], values[-1, 6, 6] = 0, 65535, 7, 500
    kept = values.copy()
    image = np.moveaxis(values, 0, -1) if planar else np.ascontiguousarray(np.moveaxis(values, 0, -1))
    expected = np.where(values == number, fill, np.rint(values / 257))
    levels = decode(image, channels=channels, nodata=number, fill=fill)
    assert np.array_equal(levels, np.moveaxis(expected, 0, -1))
    assert np.array_equal(values, kept)


def test_no_data_of_16_bit_colour_is_where_all_colours_have_it() -> None:
    values = np.array([[[0, 0, 0], [0, 0, 257], [514, 0, 0]]], np.uint16)
    assert decode(values, channels=3, nodata=0, fill=200)[0].tolist() == [[200] * 3, [0, 0, 1], [2, 0, 0]]


def test_what_a_masked_array_masks_is_no_data() -> None:
    """As rasterio reads with masked=True."""
    values = np.array([[[10, 20], [30, 40]], [[50, 60], [70, 80]]], np.uint8)
    mask = np.array([[[True, False], [False, False]], [[False, True], [True, True]]])
    masked = np.ma.MaskedArray(values, mask)
    assert decode(masked, channels=2, fill=9).tolist() == [[[9, 20], [30, 40]], [[50, 9], [9, 9]]]
    assert values.tolist()[0][0] == [10, 20]
    deep = np.ma.masked_less(np.array([[100, 65535], [0, 32896]], np.uint16), 50)
    assert decode(deep, channels=1, fill=7)[:, :, 0].tolist() == [[0, 255], [7, 128]]
    assert decode(deep, channels=1, sixteen_bit="minmax", fill=7)[:, :, 0].tolist() == [[0, 255], [7, 128]]
    three = np.ma.MaskedArray(np.full((1, 2, 3), 100, np.uint8), [[[0, 0, 0], [1, 1, 1]]])
    assert decode(three, channels=1, fill=255)[:, :, 0].tolist() == [[100, 255]]
    assert decode(np.ma.MaskedArray(values), channels=2).tolist() == values.tolist()


@pytest.mark.parametrize("channels", [3, 13])
def test_arrays_with_their_channels_first_are_told_so(channels: int) -> None:
    array = np.zeros((channels, 20, 30), np.uint8)
    with pytest.raises(ImageError, match=rf"30 channels by its last axis, but {channels} by its first: give arrays as"):
        decode(array, channels=channels)
    assert decode(torch.from_numpy(array), channels=channels).shape == (20, 30, channels)
