"""TIFFs of rasters and microscopes: the values that must come out, of files made here."""

import contextlib
import gc
import io
import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinoforge.data.decode import decode
from dinoforge.data.headers import channels_said, size_and_kind
from dinoforge.data.looks import look_at
from dinoforge.errors import ImageError
from tiffs import DEEP, PLACE, PLANES, nodata, packed_twelve, pages, tiff

RNG = np.random.default_rng(0)


def levels(data: bytes, channels: int | None = None, **rules: Any) -> Any:
    """The levels of the first row."""
    return decode(data, channels=channels, **rules)[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"planarconfig": "separate"},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"byteorder": ">", "bigtiff": True, "planarconfig": "separate"},
        {"tile": (16, 32)},
        {"tile": (16, 32), "planarconfig": "separate", "compression": "zlib", "predictor": True},
        {"compression": "lzw", "predictor": True},
        {"compression": "zstd", "predictor": True, "rowsperstrip": 7},
        {"compression": "lerc"},
        {"compression": "jpeg2000"},
        {"compression": "lzma"},
        {"photometric": "rgb"},
    ],
)
def test_sixteen_bit_bands_are_exact(options: dict[str, Any]) -> None:
    values = np.moveaxis(DEEP, -1, 0) if options.get("planarconfig") == "separate" else DEEP
    if options.get("compression") == "jpeg2000":
        options = {**options, "compressionargs": {"level": 0}}
    data = tiff(values, **options)
    assert np.array_equal(decode(data, channels=5), np.rint(DEEP / 257))
    assert np.array_equal(decode(data, channels=None), np.rint(DEEP / 257))
    assert size_and_kind(data)[:2] == (50, 40)
    assert channels_said(size_and_kind(data)[2]) == 5
    for channels in (1, 2, 3, 4, 6):
        with pytest.raises(ImageError, match=rf"has 5 channels .*expected {channels}.*student\.in_chans=5"):
            decode(data, channels=channels)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_number_of_bands(bands: int, dtype: type) -> None:
    values = RNG.integers(0, 256, (12, 20, bands), dtype=np.uint8)
    stored = values.astype(dtype) * dtype(257 if dtype == np.uint16 else 1)
    files = [tiff(stored if bands > 1 else stored[:, :, 0])]
    if bands > 1:
        files.append(tiff(np.moveaxis(stored, -1, 0), planarconfig="separate"))
    for data in files:
        assert np.array_equal(decode(data, channels=bands), values)
        assert np.array_equal(decode(data, channels=None), values)


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("place", [None, PLACE])
def test_infrared_is_never_laid_over_white(extra: int, depth: int, place: Any) -> None:
    values = np.full((8, 8, 4), (40, 60, 30, 128), np.uint8)
    values[4:, :, 3] = 0
    stored = values if depth == 8 else values.astype(np.uint16) * 257
    data = tiff(stored, photometric="rgb", extrasamples=[extra], extratags=place)
    assert decode(data, channels=3)[0, 0].tolist() == [40, 60, 30]
    assert decode(data, channels=4)[0, 0].tolist() == [40, 60, 30, 128]
    assert decode(data, channels=1)[0, 0].tolist() == [51]
    assert np.array_equal(decode(Image.open(io.BytesIO(tiff(values, photometric="rgb"))), channels=3), values[:, :, :3])
    assert "RGB and 1 more band" in size_and_kind(data)[2]


def test_infrared_in_pillows_own_file() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (40, 60, 30, 128)).save(buffer, "TIFF")
    assert decode(buffer.getvalue(), channels=3)[0, 0].tolist() == [40, 60, 30]
    assert decode(Image.open(buffer), channels=3)[0, 0].tolist() == [40, 60, 30]


def test_bands_of_unknown_colours_are_not_dropped() -> None:
    for bands in (2, 4):
        data = tiff(DEEP[:, :, :bands])
        for channels in (1, 3):
            with pytest.raises(ImageError, match=rf"student\.in_chans={bands}"):
                decode(data, channels=channels)
    grey = tiff(DEEP[:, :, :2], extrasamples=[2])  # grey with transparency
    assert np.array_equal(decode(grey, channels=1), np.rint(DEEP[:, :, :1] / 257))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": 3}, {"byteorder": ">"}])
def test_floats(dtype: str, options: dict[str, Any]) -> None:
    data = tiff(np.array([[0, 0.25, 1]], dtype), **options)
    assert levels(data) == [[0], [64], [255]]
    data = tiff(np.array([[-25, -10, 5]], dtype), **options)
    assert levels(data, value_range=(-25, 5)) == [[0], [128], [255]]
    with pytest.raises(ImageError, match=r"values -25 to 5 .*data\.range"):
        decode(data, channels=1)


def test_integers_by_their_true_type() -> None:
    wide = tiff(np.array([[0, 2**31, 2**32 - 1]], np.uint32))
    assert levels(wide, sixteen_bit="minmax") == [[0], [128], [255]]
    assert levels(wide, value_range=(0, 2**32 - 1)) == [[0], [128], [255]]
    with pytest.raises(ImageError, match="values 0 to 4294967295"):
        decode(wide, channels=1)
    small = tiff(np.array([[-128, 0, 127]], np.int8))
    assert levels(small, sixteen_bit="minmax") == [[0], [128], [255]]
    assert levels(small, value_range=(-128, 127)) == [[0], [128], [255]]
    assert levels(tiff(np.array([[0, 5, 127]], np.int8))) == [[0], [5], [127]]
    with pytest.raises(ImageError, match="values -128 to 127"):
        decode(small, channels=1)
    signed = tiff(np.array([[-1000, 0, 3000]], np.int16))
    assert levels(signed, value_range=(-1000, 3000)) == [[0], [64], [255]]


def test_white_is_zero_at_any_depth() -> None:
    for dtype in (np.uint8, np.uint16, np.uint32):
        top = np.iinfo(dtype).max
        data = tiff(np.array([[0, top]], dtype), photometric="miniswhite")
        assert levels(data, sixteen_bit="minmax") == [[255], [0]]
    sixteen = tiff(np.array([[0, 1000, 65535]], np.uint16), photometric="miniswhite")
    assert levels(sixteen) == [[255], [251], [0]]
    tagged = tiff(np.array([[0, 1000, 65535]], np.uint16), photometric="miniswhite", extratags=nodata("65535"))
    assert levels(tagged, sixteen_bit="minmax", fill=9) == [[255], [0], [9]]
    with pytest.raises(ImageError, match="white is said to be 0"):
        decode(tiff(np.array([[0.0, 1.0]]), photometric="miniswhite"), channels=1)


def test_a_range_is_of_the_stored_values_where_white_is_zero() -> None:
    twelve = tiff(np.array([[0, 1000, 4095, 60000]], np.uint16), photometric="miniswhite")
    assert levels(twelve, value_range=(0, 4095)) == [[255], [193], [0], [0]]
    assert levels(twelve, value_range=(0, 4095), nodata=1000, fill=7) == [[255], [7], [0], [0]]
    tagged = tiff(np.array([[0, 1000, 4095]], np.uint16), photometric="miniswhite", extratags=nodata("0"))
    assert levels(tagged, value_range=(0, 4095), fill=7) == [[7], [193], [0]]
    assert levels(tagged, fill=7) == [[7], [251], [239]]
    eight = tiff(np.array([[0, 25, 50]], np.uint8), photometric="miniswhite")
    assert levels(eight) == [[255], [230], [205]]
    assert levels(eight, value_range=(0, 50)) == [[255], [127], [0]]  # 255 - rint(127.5)


@pytest.mark.parametrize("end", [-3.4028234663852886e38, 1.7014118346046923e38])
def test_the_end_of_a_type_may_be_rounded_in_the_tag(end: float) -> None:
    values = np.array([[end, 0.0, 1.0]], np.float32)
    for text in (f"{end!r}", f"{end:.6g}"):
        assert levels(tiff(values, extratags=nodata(text)), fill=9) == [[9], [0], [255]], text
    infinite = tiff(np.array([[math.copysign(math.inf, end), 1.0]], np.float32), extratags=nodata(f"{end:.6g}"))
    with pytest.raises(ImageError, match="not finite"):
        decode(infinite, channels=1)


@pytest.mark.parametrize("tag", [281, 341])
def test_bits_that_are_used(tag: int) -> None:
    values = np.array([[0, 2048, 4095]], np.uint16)
    assert levels(tiff(values)) == [[0], [8], [16]]
    said = tiff(values, extratags=[(tag, "H", 1, 4095, True)])
    assert levels(said) == [[0], [128], [255]]
    assert "12 bits" in size_and_kind(said)[2]
    # The largest value of one image is no number of bits.
    assert levels(tiff(values, extratags=[(tag, "H", 1, 4000, True)])) == [[0], [8], [16]]
    beyond = tiff(np.array([[0, 5000]], np.uint16), extratags=[(tag, "H", 1, 4095, True)])
    with pytest.raises(ImageError, match="values 0 to 5000 lie outside 0 to 4095"):
        decode(beyond, channels=1)


def test_twelve_bits_packed() -> None:
    data = packed_twelve(np.array([[0, 4095, 2048, 100]]))
    assert levels(data) == [[0], [255], [128], [6]]
    assert size_and_kind(data)[2] == "uint16 x1, TIFF, 12 bits"


def test_significant_bits_of_ome() -> None:
    data = tiff(np.full((2, 4, 4), 4095, np.uint16), ome=True, metadata={"axes": "CYX", "SignificantBits": 12})
    assert b"SignificantBits" in data
    assert (decode(data, channels=2) == 255).all()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.array([[-9999, 0, 50, 100]], np.float32), "-9999"),
        (np.array([[-32768, 0, 50, 100]], np.int16), "-32768"),
        (np.array([[65535, 0, 50, 100]], np.uint16), "65535"),
        (np.array([[np.nan, 0, 50, 100]], np.float32), "nan"),
        (np.array([[-3.4028234663852886e38, 0, 50, 100]], np.float32), "-3.4028234663852886e+38"),
    ],
)
def test_nodata_is_filled_and_counts_in_no_range(values: np.ndarray, text: str) -> None:
    data = tiff(values, extratags=nodata(text))
    assert levels(data, sixteen_bit="minmax") == [[0], [0], [128], [255]]
    assert levels(data, sixteen_bit="minmax", fill=77) == [[77], [0], [128], [255]]
    assert levels(data, value_range=(0, 200), fill=77) == [[77], [0], [64], [128]]
    if text != "nan":
        assert "nodata" in size_and_kind(data)[2]


def test_nodata_of_eight_bits_and_of_palettes() -> None:
    grey = tiff(np.array([[0, 7]], np.uint8), extratags=nodata("0"))
    assert levels(grey, fill=200) == [[200], [7]]
    rgb = tiff(np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8), photometric="rgb", extratags=nodata("0"))
    assert levels(rgb, fill=200) == [[255, 0, 0], [200, 200, 200]]
    colours = np.zeros((3, 256), np.uint16)
    colours[:, 1] = 65535, 32768, 0
    palette = tiff(np.array([[0, 1]], np.uint8), photometric="palette", colormap=colours, extratags=nodata("0"))
    assert levels(palette, fill=200) == [[200, 200, 200], [255, 128, 0]]


def test_two_numbers_for_no_data() -> None:
    data = tiff(np.array([[-9999, -1, 0, 10]], np.int16), extratags=nodata("-9999"))
    assert levels(data, sixteen_bit="minmax", nodata=-1, fill=9) == [[9], [9], [0], [255]]


def test_all_is_no_data() -> None:
    data = tiff(np.full((1, 2), -9999, np.float32), extratags=nodata("-9999"))
    for rules in ({}, {"sixteen_bit": "minmax"}, {"value_range": (0, 1)}):
        assert levels(data, fill=3, **rules) == [[3], [3]]


def test_the_mask_inside_a_file() -> None:
    values = np.full((16, 16, 3), (200, 20, 90), np.uint8)
    mask = np.ones((16, 16), np.bool_)
    mask[:8] = False
    for reverse in (False, True):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as file:
            if not reverse:
                file.write(values, photometric="rgb", metadata=None)
            file.write(mask, photometric="minisblack", subfiletype=4, metadata=None)
            if reverse:
                file.write(values, photometric="rgb", metadata=None)
        pixels = decode(buffer.getvalue(), channels=3, fill=9)
        assert (pixels[:8] == 9).all()
        assert (pixels[8:] == (200, 20, 90)).all()
        assert "mask" in size_and_kind(buffer.getvalue())[2]


@pytest.mark.parametrize("made", [{"ome": True}, {"imagej": True}, {"metadata": {"axes": "TZCYX"}}])
def test_axes_of_microscopes(made: dict[str, Any]) -> None:
    """Time, z and channels: level 12 t + 4 z + c."""
    data = tiff(PLANES, **{"metadata": {"axes": "TZCYX"}, **made})
    assert size_and_kind(data)[:2] == (9, 8)
    assert size_and_kind(data)[2].startswith("uint16 x4")
    assert size_and_kind(data)[2].endswith("axes TZCYX, plane 1 of 6 (t, z)")
    assert decode(data, channels=4)[0, 0].tolist() == [0, 1, 2, 3]
    assert decode(data, channels=None, plane=4)[0, 0].tolist() == [16, 17, 18, 19]
    assert decode(data, channels=4, plane="max")[7, 8].tolist() == [20, 21, 22, 23]
    with pytest.raises(ImageError, match=r"has 6 planes.*data\.plane=6"):
        decode(data, channels=4, plane=6)
    with pytest.raises(ImageError, match=r"has 4 channels .*student\.in_chans=4"):
        decode(data, channels=3)


@pytest.mark.parametrize("axes", ["CYX", "CZYX", "YXC", "ZYX", "TYX", "TCYX"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_each_order_of_axes(axes: str, compression: str | None) -> None:
    sizes = {"C": 5, "Z": 3, "T": 2, "Y": 8, "X": 9}
    values = RNG.integers(0, 65536, [sizes[a] for a in axes], dtype=np.uint16)
    made = [{"metadata": {"axes": axes}, "photometric": "minisblack"}]
    if axes != "YXC":
        made.append({**made[0], "ome": True})
    for options in made:
        data = tiff(values, compression=compression, **options)
        for plane in range(3 if "Z" in axes else 2 if "T" in axes else 1):
            where = tuple(plane if a in "ZT" else slice(None) for a in axes)
            kept = [a for a in axes if a not in "ZT"]
            expected = values[where].transpose([kept.index(a) for a in "YXC" if a in kept]).reshape(8, 9, -1)
            assert np.array_equal(decode(data, channels=None, plane=plane), np.rint(expected / 257))


def test_the_brightest_leaves_out_what_is_no_data() -> None:
    planes = np.array([[[-9999, -9999, 5]], [[-9999, -20, 3]]], np.float32)
    data = tiff(planes, metadata={"axes": "ZYX"}, extratags=nodata("-9999"))
    assert levels(data, plane="max", value_range=(-20, 5), fill=9) == [[9], [0], [255]]
    high = np.array([[[65535, 40]], [[10, 30]]], np.uint16)
    data = tiff(high, metadata={"axes": "ZYX"}, extratags=nodata("65535"))
    assert levels(data, plane="max", value_range=(0, 40)) == [[64], [255]]


def test_pages_without_metadata() -> None:
    values = np.moveaxis(DEEP, -1, 0)
    data = pages(values)
    assert np.array_equal(decode(data, channels=5), np.rint(DEEP / 257))
    assert np.array_equal(decode(data, channels=1), np.rint(DEEP[:, :, :1] / 257))
    assert np.array_equal(decode(data, channels=3), np.rint(DEEP[:, :, :1] / 257).repeat(3, 2))
    assert np.array_equal(decode(data, channels=1, plane=3), np.rint(DEEP[:, :, 3:4] / 257))
    assert size_and_kind(data)[2].endswith("page 1 of 5")
    assert size_and_kind(data, channels=5)[2].startswith("uint16 x5")
    sheets = pages((values[:3] >> 8).astype(np.uint8))
    assert np.array_equal(decode(sheets, channels=3), (DEEP[:, :, :1] >> 8).repeat(3, 2))
    assert np.array_equal(decode(pages(values[:3]), channels=3), np.rint(DEEP[:, :, :3] / 257))


def test_a_thumbnail_is_not_the_image() -> None:
    colour = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for image, photometric in ((DEEP[:, :, 0], "minisblack"), (colour, "rgb")):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as file:
            file.write(image[::4, ::4], photometric=photometric, subfiletype=1, metadata=None)
            file.write(image, photometric=photometric, metadata=None)
        data = buffer.getvalue()
        assert size_and_kind(data)[:2] == (50, 40)
        expected = np.rint(image / 257) if photometric == "minisblack" else image
        assert np.array_equal(decode(data, channels=None).squeeze(), expected)


def test_a_pyramid_gives_its_largest_level() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=True) as file:
        file.write(np.moveaxis(DEEP, -1, 0), subifds=1, photometric="minisblack", metadata={"axes": "CYX"})
        file.write(np.moveaxis(DEEP, -1, 0)[:, ::2, ::2], subfiletype=1, photometric="minisblack")
    assert np.array_equal(decode(buffer.getvalue(), channels=5), np.rint(DEEP / 257))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    upright = DEEP[:24, :40, 0]
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    data = tiff(np.ascontiguousarray(stored), extratags=[(274, "H", 1, orientation, True)])
    assert np.array_equal(decode(data, channels=1)[:, :, 0], np.rint(upright / 257))
    assert size_and_kind(data)[:2] == (40, 24)


def test_sixteen_bit_palette_and_cmyk() -> None:
    colours = np.zeros((3, 65536), np.uint16)
    colours[:, 300] = 65535, 32768, 0
    palette = tiff(np.array([[300, 0]], np.uint16), photometric="palette", colormap=colours)
    assert levels(palette, 3) == [[255, 128, 0], [0, 0, 0]]
    ink = np.array([[[0, 65535, 65535, 0]]], np.uint16)
    assert levels(tiff(ink, photometric="separated"), 3) == [[255, 0, 0]]


def test_plain_pictures_stay_as_pillow_reads_them() -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for options, image in itertools.product(
        ({}, {"compression": "jpeg"}, {"compression": "tiff_lzw"}), (picture, picture.convert("L"))
    ):
        buffer = io.BytesIO()
        image.save(buffer, "TIFF", **options)
        expected = np.asarray(Image.open(buffer))
        assert np.array_equal(decode(buffer.getvalue(), channels=None).squeeze(), expected)
        assert size_and_kind(buffer.getvalue()) == (50, 40, image.mode)
        several = io.BytesIO()
        image.save(several, "TIFF", save_all=True, append_images=[image.rotate(180)], **options)
        assert np.array_equal(decode(several.getvalue(), channels=None).squeeze(), expected)
        assert size_and_kind(several.getvalue())[2].endswith("page 1 of 2")


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"planarconfig": "separate"}])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.97])
def test_truncated(options: dict[str, Any], kept: float) -> None:
    values = np.moveaxis(DEEP, -1, 0) if "planarconfig" in options else DEEP
    data = tiff(values, **options)
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * kept)], channels=5)


def test_truncated_pages() -> None:
    data = tiff(PLANES, ome=True, metadata={"axes": "TZCYX"})
    stack = tiff(PLANES, imagej=True, metadata={"axes": "TZCYX"})
    for whole in (data, stack):
        assert decode(whole, channels=4, plane=5).max() == 23
        with pytest.raises(ImageError):
            decode(whole[:-100], channels=4, plane=5)


@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}, {"ome": True, "metadata": {"axes": "CYX"}}])
def test_damaged_bytes_raise_nothing_else(options: dict[str, Any]) -> None:
    values = DEEP[:12, :20]
    data = tiff(np.moveaxis(values, -1, 0) if "ome" in options else values, **options)
    rng = np.random.default_rng(1)
    for _ in range(200):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(min(len(data), 600), size=3)] = rng.integers(0, 256, 3)
        for read in (lambda image: decode(image, channels=5, max_pixels=10**5), size_and_kind):
            with contextlib.suppress(ImageError):
                read(damaged.tobytes())


def test_size_is_looked_at_before_decoding() -> None:
    data = tiff(DEEP, compression="zlib")
    with pytest.raises(ImageError, match=r"data\.max_pixels"):
        decode(data, channels=5, max_pixels=1999)
    assert decode(data, channels=5, max_pixels=2000).shape == (40, 50, 5)


def test_planes_that_are_not_in_the_file_are_not_made_up() -> None:
    values = np.moveaxis(DEEP[:, :, :2], -1, 0)
    data = tiff(values, ome=True, metadata={"axes": "CYX"}).replace(b'SizeC="2"', b'SizeC="3"')
    for channels in (1, 2, 3):
        with pytest.raises(ImageError, match="planes that are not in the file"):
            decode(data, channels=channels)


def test_camera_raw_in_tiff_is_refused_in_words() -> None:
    data = bytearray(tiff(DEEP[:, :, 0], metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        place = file.pages.first.tags[262].valueoffset
    data[place : place + 2] = (32803).to_bytes(2, "little")
    with pytest.raises(ImageError, match="camera's raw data"):
        decode(bytes(data), channels=3)


@pytest.mark.processes
def test_tifffile_is_imported_when_it_is_needed() -> None:
    """Most users have no such files."""
    code = "import sys, dinoforge.data.decode; print('tifffile' in sys.modules, 'imagecodecs' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(tiff(np.moveaxis(DEEP, -1, 0), ome=True, metadata={"axes": "CYX"}))
    place = data.index(b"<OME")
    data[place : place + 4] = b"<XYZ"
    with contextlib.suppress(ImageError):
        decode(bytes(data), channels=None)
    assert capfd.readouterr() == ("", "")


def test_a_file_is_let_go_when_it_has_been_read() -> None:
    """tifffile's objects refer to each other, and would keep it until Python collects them."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((5, 64, 64), np.uint16), ome=True, metadata={"axes": "CYX"}, compression="zlib")
    data = stream.getvalue()
    gc.collect()
    gc.disable()
    try:
        before = sys.getrefcount(data)
        decode(data, channels=5)
        size_and_kind(data)
        look_at(data, channels=5)
        assert sys.getrefcount(data) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("layout", [{"byteorder": ">"}, {"bigtiff": True}, {"byteorder": ">", "bigtiff": True}, {}])
def test_a_mask_is_found_behind_other_pages(layout: dict[str, Any]) -> None:
    grey = np.full((16, 16), 25700, np.uint16)
    mask = np.ones((16, 16), np.bool_)
    mask[:8] = False
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **layout) as file:
        file.write(grey, photometric="minisblack", metadata=None)
        file.write(grey[::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
        file.write(mask, photometric="minisblack", subfiletype=4, metadata=None)
    assert decode(buffer.getvalue(), channels=1, fill=7)[:, 0, 0].tolist() == [7] * 8 + [100] * 8


def test_a_palette_of_eight_bits() -> None:
    """Some programs write colours of 0 to 255 where TIFF has 0 to 65,535."""
    colours = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 7)]).astype(np.uint16)
    values = np.array([[0, 100, 255]], np.uint8)
    expected = [[[0, 255, 7], [100, 155, 7], [255, 0, 7]]]
    for colourmap in (colours, colours * 257):
        data = tiff(values, photometric="palette", colormap=colourmap, extratags=PLACE)
        assert decode(data, channels=3).tolist() == expected
        assert decode(tiff(values, photometric="palette", colormap=colourmap), channels=3).tolist() == expected
