"""Values that lie in a TIFF are viewed without tifffile: the result is the same, or that way is not taken."""

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest

from dinoforge.data import tiff as tiffs
from dinoforge.data import tiff_plain
from dinoforge.data.decode import decode
from tiffs import DEEP, PLACE, nodata, tiff


def both_ways(data: bytes, channels: int | None, **rules: Any) -> tuple[Any, Any, bool]:
    """What is read with and without the short way, as values and words or as an error; whether it was taken."""
    taken = []

    def found(short: bool) -> Any:
        short_way = tiff_plain.find
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiff_plain, "find", lambda *a: (taken.append(short_way(*a)), taken[-1])[1] if short else None)
            try:
                values = tiffs.read(data, channels=channels, plane=rules.get("plane"), max_pixels=10**7)
                if values is None:
                    return "left to Pillow"
                told = tiffs.size_and_kind(data, channels)
                shown = values.values
                return (
                    told,
                    *(getattr(values, name) for name in ("limit", "colour", "alpha", "nodata", "valid", "kind")),
                    shown.dtype,
                    shown.tobytes(),
                    decode(data, channels=channels, **rules).tobytes(),
                )
            except Exception as error:  # tifffile raises whatever a damaged file brings about
                return type(error), str(error)

    return found(True), found(False), any(one is not None for one in taken)


def test_the_short_way_is_taken_for_plain_files() -> None:
    planar = np.ascontiguousarray(np.moveaxis(DEEP, -1, 0))
    plain = [
        tiff(DEEP),
        tiff(DEEP, rowsperstrip=1),
        tiff(DEEP, byteorder=">"),
        tiff(DEEP, bigtiff=True),
        tiff(planar, planarconfig="separate", rowsperstrip=3),
        tiff(DEEP, extratags=PLACE + nodata("0")),
        tiff(planar, ome=True, metadata={"axes": "CYX"}),
        tiff(planar, imagej=True, metadata={"axes": "CYX"}),
        tiff(planar, metadata={"axes": "CYX"}),
        tiff(planar, metadata=None),
        tiff(planar, metadata={}),
    ]
    for i, data in enumerate(plain):
        with_it, without, taken = both_ways(data, 5)
        assert taken, i
        assert with_it == without
        assert with_it[-1] == np.rint(DEEP / 257).astype(np.uint8).tobytes() or i == 5


def made_files() -> list[bytes]:
    """Files of many layouts, most of them plain."""
    rng = np.random.default_rng(1)
    files = []
    types = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
    for dtype, channels, (height, width) in itertools.product(types, (1, 2, 3, 5), ((7, 1), (17, 11))):
        values = rng.integers(0, 100, (height, width, channels)).astype(dtype)
        values = values / np.dtype(dtype).type(128) if values.dtype.kind == "f" else values
        bands = np.ascontiguousarray(np.moveaxis(values, -1, 0))
        order = {"byteorder": "<>"[len(files) % 2], "bigtiff": len(files) % 3 == 0}
        more: list[dict[str, Any]] = [{"rowsperstrip": 2}, {"extratags": PLACE + nodata("7")}, {"software": "other"}]
        for options in ({}, more[len(files) % 3]):
            files.append(tiff(values[:, :, 0] if channels == 1 else values, **order, **options))
            if channels > 1:
                files.append(tiff(bands, planarconfig="separate", **order, **options))
                files.append(tiff(bands, metadata=None, **order))
        if channels > 1:
            said = {"axes": ("CYX", "ZYX", "TYX", "QYX")[len(files) % 4]}
            files.append(tiff(bands, metadata=said, **order))
            if height > 1 < width and dtype != "float16":
                with contextlib.suppress(ValueError):  # ImageJ has few types
                    files.append(tiff(bands, imagej=True, metadata={"axes": said["axes"].replace("Q", "C")}))
                files.append(tiff(bands, ome=True, metadata=said))
                files.append(tiff(bands, ome=True, metadata={"axes": "CYX", "SignificantBits": 6}))
    grey, rgb = DEEP[:, :, 0], DEEP[:, :, :3]
    for options in (
        {"tile": (16, 16)},
        {"compression": "zlib", "predictor": True},
        {"photometric": "miniswhite"},
        {"extratags": [(274, "H", 1, 6, True)]},
        {"extratags": [(281, "H", 1, 4095, True)]},
        {"extratags": [(266, "H", 1, 2, True)]},
        {"extratags": [(254, "I", 1, 4, True)]},
        {"extratags": [(254, "I", 1, 1, True)]},
        {"extratags": [(339, "H", 1, 2, True)]},
        {"extratags": [(65000, "I", 1, 1, True)]},
        {"extratags": nodata("-9999")},
        {"extratags": nodata("nan")},
        {"extratags": nodata("")},
        {"description": "anything"},
    ):
        files.append(tiff(grey, **options))
    files += [
        tiff(rgb, photometric="rgb"),
        tiff(DEEP, photometric="rgb"),
        tiff(DEEP[:, :, :4], photometric="rgb", extrasamples=["unassalpha"]),
        tiff(DEEP[:, :, :4], photometric="rgb", extrasamples=["unspecified"], bigtiff=True),
        tiff(DEEP[:, :, :2], extrasamples=["assocalpha"]),
        tiff(np.moveaxis(rgb, -1, 0), photometric="rgb", planarconfig="separate"),
        tiff(np.moveaxis(DEEP, -1, 0).reshape(5, 40, 50)[:, None], ome=True, metadata={"axes": "TCYX"}),
        tiff(np.stack([grey, grey, grey, grey]).reshape(2, 2, 40, 50), ome=True, metadata={"axes": "ZCYX"}),
    ]
    return files


def test_both_ways_give_the_same() -> None:
    taken = 0
    files = made_files()
    for i, data in enumerate(files):
        for channels in (None, 1, 3, 5):
            with_it, without, was_taken = both_ways(data, channels)
            assert with_it == without, (i, channels)
            taken += was_taken
    assert taken > len(files)  # of four times as many


@pytest.mark.parametrize("seed", range(8))
def test_both_ways_give_the_same_of_damaged_files(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 65536, (9, 8, 3), dtype=np.uint16)
    bands = np.ascontiguousarray(np.moveaxis(values, -1, 0))
    files = [
        tiff(values, rowsperstrip=2),
        tiff(values, bigtiff=True),
        tiff(bands, planarconfig="separate"),
        tiff(bands, metadata=None),
        tiff(bands, ome=True, metadata={"axes": "CYX"}),
        tiff(bands, imagej=True, metadata={"axes": "CYX"}),
    ]
    for data in files:
        for size in rng.integers(8, len(data), 12):
            with_it, without, _ = both_ways(data[: int(size)], 3)
            assert with_it == without, (len(data), size)
        start = int.from_bytes(data[4:8], "little") if data[2] == 42 else int.from_bytes(data[8:16], "little")
        for place in rng.integers(start, min(start + 260, len(data)), 60):
            damaged = bytearray(data)
            damaged[place] = rng.choice([0, 1, 2, 3, 4, 255, damaged[place] ^ 1, damaged[place] ^ 128])
            with_it, without, taken = both_ways(bytes(damaged), 3)
            if taken:  # what the short way does not take cannot differ
                assert with_it == without, (files.index(data), place, damaged[place])
