"""One range for a whole data set, so that brightness stays comparable."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image
from rich.console import Console

import dinoforge
from dinoforge.builders.data import image_input
from dinoforge.data.decode import decode
from dinoforge.data.sources import FolderSource, SequenceSource
from dinoforge.data.survey import MeasuredRange, measure_range
from dinoforge.errors import RecipeError
from dinoforge.recipe.load import load_recipe
from dinoforge.runs.directory import RunDirectory
from tiny import TINY

Values = npt.NDArray[np.generic]


def images(low: float, high: float, dtype: str, number: int = 20) -> list[Values]:
    """Images whose values fill a range evenly, from its first to its last."""
    return [np.linspace(low, high, 40 * 40).reshape(40, 40).astype(dtype) for _ in range(number)]


def found(data: list[Values], **keys: float) -> tuple[float, float] | None:
    measured = measure_range(SequenceSource(data), **keys)  # type: ignore[arg-type]
    return None if measured is None else (measured.low, measured.high)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "expected"),
    [
        (0, 255, "uint8", None),
        (0, 4000, "uint16", (0, 4095)),
        (100, 4095, "uint16", (0, 4095)),
        (0, 1000, "uint16", (0, 1023)),
        (0, 16383, "uint16", (0, 16383)),
        (0, 17000, "uint16", None),  # a quarter of the type's range
        (0, 65535, "uint16", None),
        (30000, 34000, "uint16", (29800, 34200)),
        (0, 3_000_000, "uint32", (0, 4194303)),
        (-1000, 3000, "int16", (-1200, 3200)),
        (0, 1, "float32", None),
        (0, 0.1, "float32", (0, 0.105)),
        (-25, 5, "float32", (-26.5, 6.5)),
        (0, 10000, "float64", (0, 10500)),
    ],
)
def test_the_range_of_a_data_set(low, high, dtype, expected):
    range_found = found(images(low, high, dtype))
    if expected is None:
        assert range_found is None
    else:
        assert range_found == pytest.approx(expected, abs=0.005 * (expected[1] - expected[0]))


def test_hot_pixels_and_what_is_no_data_count_for_nothing():
    hot = images(0, 4000, "uint16")
    for image in hot:
        image[0, 0] = 65535
    assert found(hot) == (0, 4095)
    for missing in (np.nan, np.inf):
        holed = images(-25, 5, "float32")
        for image in holed:
            image[:4] = missing
        low, high = found(holed) or (0.0, 0.0)
        assert -27 < low < -20
        assert 5 < high < 8
    tagged = images(0, 2000, "int16")
    for image in tagged:
        image[:4] = -32768
    assert found(tagged) != (0, 2047)
    assert found(tagged, nodata=-32768) == (0, 2047)


def test_one_range_for_all_images_keeps_their_brightness():
    data = [np.full((40, 40), 100 + 200 * i, np.uint16) for i in range(20)]
    assert found(data) == (0, 4095)


def bands(*highs: float, dtype: str = "uint16", number: int = 20) -> list[Values]:
    """Images [40, 40, C] whose channels go from 0 to the highest value of each."""
    ramp = np.linspace(0, 1, 1600).reshape(40, 40)
    return [np.stack([ramp * high for high in highs], axis=-1).astype(dtype) for _ in range(number)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bands(60000, 200, 4000, 30000), (0, 65535, 0, 255, 0, 4095, 0, 65535)),
        (bands(10000, 20), (0, 16383, 0, 31)),
        (bands(10000, 3000), (0, 16383)),
        (bands(1, 0.01, dtype="float32"), (0, 1, 0, 0.0105)),
        (bands(10000, 0), (0, 16383)),  # an empty band stays empty
        (bands(60000, 60000), None),
        (bands(60000, 200, 4000), None),  # the colours of a picture, and blue may be faint
        ([*bands(60000, 200, 4000, 30000), np.zeros((40, 40), np.uint8)], None),
    ],
)
def test_a_dark_band_has_a_range_of_its_own(data, expected):
    measured = measure_range(SequenceSource(data))
    assert expected == (None if measured is None else pytest.approx(measured.range, abs=2e-4))


def test_ranges_of_channels_are_trained_with_and_said(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(bands(60000, 200, 4000, 30000)):
        file, planes = folder / f"{number:02d}.ome.tif", np.moveaxis(image, -1, 0)
        tifffile.imwrite(file, planes, photometric="minisblack", metadata={"axes": "CYX"})
    keys = {"student.in_chans": 4, "data.mean": 0.5, "data.std": 0.25}
    dinoforge.train(folder, recipe="small", out=tmp_path / "run", **TINY | keys)
    recipe = RunDirectory(tmp_path / "run").recipe()
    assert recipe.data.range == (0, 65535, 0, 255, 0, 4095, 0, 65535)
    pixels = decode((folder / "00.ome.tif").read_bytes(), channels=4, **image_input(recipe).decoding)
    assert pixels[-1, -1].tolist() == [233, 200, 249, 117]
    measured = measure_range(FolderSource(folder), channels=4)
    assert measured is not None
    assert measured.key == "data.range=[0,65535,0,255,0,4095,0,65535]"
    assert f"0 to 255, 0 to 4,095, 0 to 65,535 ({measured.key};" in str(measured)


def test_where_white_is_zero_the_range_is_of_the_stored_values(tmp_path: Path):
    for number, image in enumerate(images(0, 3900, "uint16")):
        photometric = "miniswhite" if number % 2 else "minisblack"
        tifffile.imwrite(tmp_path / f"{number:02d}.tif", image, photometric=photometric)
    measured = measure_range(FolderSource(tmp_path), channels=1)
    assert measured is not None
    assert measured.range == (0, 4095)
    assert "4,095 becomes 255, turned over in 10 whose files say that white is 0 (data.range" in str(measured)


def test_what_it_says():
    text = str(MeasuredRange(0, 4095, (3, 3912), "uint16", 64))
    assert "3 to 3,912 in 64 sampled images" in text
    assert "4,095 becomes 255" in text
    assert "data.range=[0,4095]" in text


@pytest.fixture
def twelve_bits(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(images(0, 3900, "uint16")):
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    return folder


KEYS = TINY | {"train.steps": 2, "optim.warmup_length": "50%", "report.every_minutes": None}


@pytest.mark.parametrize("recipe", ["small", "auto"])
def test_a_run_measures_it_once_and_says_so(recipe, twelve_bits, tmp_path):
    out = tmp_path / "run"
    for start in range(2):
        console = Console(record=True, width=300, file=open(tmp_path / "told", "w"))  # noqa: SIM115
        dinoforge.train(twelve_bits, recipe, out, console=console, **KEYS)
        assert ("values   uint16, " in console.export_text()) is (start == 0)
    assert RunDirectory(out).recipe().data.range == (0, 4095)
    backbone = dinoforge.load(out)
    assert backbone.image.range == (0, 4095)
    shown = backbone.preprocess(twelve_bits / "00.png") * 0.25 + 0.5  # levels over 255
    assert float(shown.max()) == pytest.approx(3900 / 4095, abs=0.01)


def test_a_run_of_an_earlier_version_keeps_what_it_had(twelve_bits, tmp_path):
    out = tmp_path / "run"
    dinoforge.train(twelve_bits, out=out, console=Console(quiet=True), **KEYS, **{"train.max_minutes": 1e-9})
    recipe = (out / "recipe.yaml").read_text()
    lines = [
        line for line in recipe.splitlines() if not line.strip().startswith(("range:", "nodata:", "fill:", "plane:"))
    ]
    lines = [line for line in lines if line.strip() not in ("- 0.0", "- 4095.0")]
    (out / "recipe.yaml").write_text("\n".join(lines) + "\n")
    assert RunDirectory(out).recipe().data.range is None
    assert dinoforge.train(twelve_bits, out=out, console=Console(quiet=True), **KEYS).finished
    assert dinoforge.load(out).image.range is None


@pytest.mark.parametrize("text", [[1.0], [2.0, 1.0], [0.0, 1.0, 5.0], [0.0, float("inf")], []])
def test_a_range_that_is_none(text):
    with pytest.raises(RecipeError, match=r"data\.range: expected"):
        load_recipe("small", {"data.range": text})


def test_ranges_of_channels(tmp_path):
    two = {"student.in_chans": 2, "data.mean": 0.5, "data.std": 0.25}
    given = {"data.range": [0.0, 10.0, 0.0, 1000.0], "data.fill": 7, "data.plane": "max"}
    with pytest.raises(RecipeError, match=r"data\.range has 2 pairs for student\.in_chans=3"):
        load_recipe("small", given)
    recipe, _ = load_recipe("small", two | given)
    decoding = image_input(recipe).decoding
    assert decoding["value_range"] == ((0, 10), (0, 1000))
    assert (decoding["fill"], decoding["plane"]) == (7, "max")
    (tmp_path / "images").mkdir()
    values = np.stack([np.full((8, 8), 5.0), np.full((8, 8), 500.0)], axis=2).astype(np.float32)
    tifffile.imwrite(tmp_path / "images" / "a.tif", values, photometric="minisblack", planarconfig="contig")
    data = FolderSource(tmp_path / "images").item(0).image
    assert decode(data, channels=2, **decoding)[0, 0].tolist() == [128, 128]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 255, (0, 255)), (3, 200, (0, 255)), (0, 1, None), (0, 300, (0, 315)), (0, 100, (0, 105))],
)
def test_floats_that_are_levels_of_eight_bits_stay_levels(low, high, expected):
    ramp = np.linspace(low, high, 4096, dtype=np.float32).reshape(64, 64)
    found = measure_range(SequenceSource([ramp] * 8))
    assert expected == (None if found is None else (found.low, round(found.high)))
