"""What a look at a few images tells; what decoding takes in memory, by the header."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from dinoforge.data.decode import decode
from dinoforge.data.decoding_memory import working_bytes
from dinoforge.data.planes import PlanesOf
from dinoforge.data.sources import OnePlane, SequenceSource
from dinoforge.data.statistics import read_sizes
from dinoforge.data.summary import Depth, summarize
from dinoforge.planning.auto import facts_of


def tif(values: Any, **keys: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **({"metadata": None, "photometric": "minisblack"} | keys))
    return stream.getvalue()


def picture(mode: str, size: tuple[int, int], format: str = "PNG", **keys: Any) -> bytes:
    stream = io.BytesIO()
    colour = {"L": 90, "RGB": (200, 30, 40), "RGBA": (200, 30, 40, 128), "I;16": 900}[mode]
    Image.new(mode, size, colour).save(stream, format, **keys)
    return stream.getvalue()


STACK = tif(np.arange(12 * 30, dtype=np.uint16).reshape(12, 5, 6), ome=True, metadata={"axes": "ZYX"})


def test_planes_transparency_profiles_and_rotation_are_counted() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    see_through = Image.new("RGBA", (6, 5), (9, 9, 9, 0))
    stream = io.BytesIO()
    see_through.save(stream, "PNG")
    found = summarize(
        SequenceSource(
            [
                STACK,
                picture("RGBA", (6, 5)),
                stream.getvalue(),  # alpha is 0 everywhere: it is dropped and not laid over white
                picture("RGB", (6, 5), "JPEG", exif=exif),
                picture("RGB", (6, 5), icc_profile=lab),
                picture("RGB", (6, 5), icc_profile=srgb),
            ]
        )
    )
    assert found.planes == ((12, "z"),)
    assert found.transparent == 1
    assert list(found.profiles.values()) == [1]
    assert "lab" in next(iter(found.profiles)).lower()
    assert found.turned == 1
    assert (found.widths, found.heights) == ((5, 6), (5, 6))
    assert found.depths["uint16"] == Depth(1, 0, 29, 65535)
    assert found.depths["uint8"].images == 5
    assert found.apart == ""
    assert "plane" not in " ".join(mode for mode, _ in found.modes)


def test_one_panorama_is_not_the_typical_side_and_blank_images_are_counted() -> None:
    ramp = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)
    data = [*[ramp] * 9, np.full((64, 48), 7, np.uint8), np.zeros((1500, 4000), np.uint8)]
    found = summarize(SequenceSource(data), channels=1)
    assert (found.side, found.blank) == (48, 2)
    looked = read_sizes(SequenceSource(data), 1, {})
    assert looked is not None
    assert looked.side == 48
    facts = [facts_of(one, "cpu") for one in (found, looked)]
    assert [one.side for one in facts] == [48, 48]


def test_a_source_taken_apart_says_so() -> None:
    found = summarize(PlanesOf(SequenceSource([STACK]), 1), channels=1, decoding={"plane": "each"})
    assert found.count == 12
    assert found.apart.startswith("each is an image: 12 in 1 files")


def test_depths_know_no_data_and_declared_bits() -> None:
    values = np.array([[0.0, 0.5], [np.nan, 0.25]], np.float32)
    found = summarize(SequenceSource([values, np.array([[-9999.0, 0.75]], np.float32)]), decoding={"nodata": -9999.0})
    assert found.depths == {"float32": Depth(2, 0.0, 0.75, 1.0)}
    bits = tif(np.full((4, 4), 700, np.uint16), extratags=[(281, "H", 1, 4095, True)])
    assert summarize(SequenceSource([bits])).depths == {"uint16": Depth(1, 700, 700, 4095)}


# --- what decoding takes ---------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import numpy as np
from dinoforge.data.decode import decode
import imagecodecs, tifffile
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024
decode(np.zeros((8, 8, 1), np.float32), channels=1)
decode(Path(sys.argv[2]).read_bytes(), channels=None)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
data = Path(sys.argv[1]).read_bytes()
image = decode(data, channels=None if sys.argv[3] == "None" else int(sys.argv[3]))
print(status("VmHWM") - before)
"""


def bands(number: int, dtype: Any = np.uint16) -> Any:
    rows, columns = np.mgrid[:2000, :1500]
    scale = 1.0 if np.dtype(dtype).kind == "f" else 4000.0
    one = (np.sin(columns / 97) + np.cos(rows / 71) + 2) / 4 * scale
    return np.stack([one / (i + 1) for i in range(number)], axis=2).astype(dtype)


LARGE: dict[str, tuple[Any, int | None]] = {
    "uncompressed bands": (lambda: tif(bands(5), planarconfig="contig"), None),
    "planes of channels": (lambda: tif(np.moveaxis(bands(5), -1, 0), ome=True, metadata={"axes": "CYX"}), 5),
    "compressed pages": (
        lambda: tif(np.moveaxis(bands(5), -1, 0), ome=True, metadata={"axes": "CYX"}, compression="zlib"),
        5,
    ),
    "compressed tiles": (lambda: tif(bands(5), planarconfig="contig", compression="zlib", tile=(256, 256)), 5),
    "floats": (lambda: tif(bands(5, np.float32), planarconfig="contig"), 5),
    "JPEG": (lambda: picture("RGB", (3000, 2500), "JPEG"), 3),
    "grey JPEG": (lambda: picture("L", (4000, 2500), "JPEG"), 3),
    "PNG": (lambda: picture("RGB", (3000, 2500)), 3),
    "transparent PNG": (lambda: picture("RGBA", (3000, 2500)), 3),
    "16-bit PNG": (lambda: picture("I;16", (4000, 3000)), 1),
}


@pytest.mark.processes
@pytest.mark.parametrize("kind", LARGE)
def test_memory_of_decoding_is_estimated_from_headers(kind: str, tmp_path: Path) -> None:
    make, channels = LARGE[kind]
    data = make()
    (tmp_path / "large").write_bytes(data)
    (tmp_path / "small").write_bytes(picture("RGB", (8, 8), "JPEG"))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small"), str(channels)]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert working_bytes(data, channels=channels) == pytest.approx(measured, rel=0.25)


def test_memory_of_planes_arrays_and_reduced_pictures() -> None:
    stack = tif(np.zeros((20, 100, 100), np.uint16), metadata=None, compression="zlib")
    one = working_bytes(stack, channels=1)
    assert one < working_bytes(stack, channels=1, decoding={"plane": "max"}) < one + 3 * 20_000
    assert working_bytes(OnePlane(stack, 7), channels=1, decoding={"plane": "each"}) == one
    array = np.zeros((300, 200, 3), np.uint16)
    assert working_bytes(array, channels=3) == array.nbytes + array.size
    photo = picture("RGB", (800, 800), "JPEG")
    assert working_bytes(photo, channels=3) == len(photo) + 10 * 800 * 800
    assert working_bytes(photo, channels=3, reduction=4) == len(photo) + 10 * 200 * 200
    assert working_bytes(photo, channels=3, reduction=3) == len(photo) + 10 * 400 * 400
    decode(photo, channels=3, reduction=3)


def test_levels_of_floats_are_made_a_block_at_a_time() -> None:
    """The same levels as at once, in any shape."""
    rng = np.random.default_rng(0)
    for shape in ((1, 700_000, 1), (700_000, 1, 1), (1000, 700, 1), (3, 3, 2)):
        values = rng.uniform(-2, 3, shape).astype(np.float32)
        expected = np.rint(np.clip((values.astype(np.float64) + 1) / 3 * 255, 0, 255)).astype(np.uint8)
        assert np.array_equal(decode(values, channels=shape[2], value_range=(-1, 2)), expected)
