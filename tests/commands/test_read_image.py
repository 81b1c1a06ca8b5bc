"""``dinoforge.read_image``: what training sees of a file."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import dinoforge
from dinoforge.errors import ImageError, RecipeError

BANDS = np.array([[[0, 3100, 10_000, 65535, 5]]], np.uint16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tifffile.imwrite(tmp_path / "a.tif", BANDS, photometric="minisblack", planarconfig="contig")
    return tmp_path / "a.tif"


def test_path_and_bytes(path: Path) -> None:
    for image in (path, str(path), path.read_bytes()):
        assert dinoforge.read_image(image).tolist() == [[[0, 12, 39, 255, 0]]]
        assert dinoforge.read_image(image, 5).tolist() == [[[0, 12, 39, 255, 0]]]
    with pytest.raises(ImageError, match=r"student\.in_chans=5"):
        dinoforge.read_image(path, channels=3)


def test_keys_of_the_recipe(path: Path) -> None:
    assert dinoforge.read_image(path, range=(0, 10_000)).tolist() == [[[0, 79, 255, 255, 0]]]
    assert dinoforge.read_image(path, range=(0, 10_000), nodata=65535, fill=9).tolist() == [[[0, 79, 255, 9, 0]]]
    assert dinoforge.read_image(path, **{"data.range": [0, 10_000]}).tolist() == [[[0, 79, 255, 255, 0]]]
    each = ((0, 1), (0, 3100), (0, 20_000), (0, 65535), (0, 10))
    assert dinoforge.read_image(path, range=each).tolist() == [[[0, 255, 128, 255, 128]]]
    assert dinoforge.read_image(path, sixteen_bit="minmax", nodata=65535).tolist() == [[[0, 79, 255, 0, 0]]]
    with pytest.raises(ImageError, match=r"data\.max_pixels"):
        dinoforge.read_image(np.zeros((3, 3), np.uint8), max_pixels=8)


def test_planes(tmp_path: Path) -> None:
    planes = np.array([10, 200, 90], np.uint8)[:, None, None] * np.ones((2, 4), np.uint8)
    tifffile.imwrite(tmp_path / "z.tif", planes, photometric="minisblack", metadata={"axes": "ZYX"})
    for plane, level in ((None, 10), (0, 10), (1, 200), ("2", 90), ("max", 200)):
        assert dinoforge.read_image(tmp_path / "z.tif", plane=plane).ravel().tolist() == [level] * 8


def test_what_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="colour: expected range"):
        dinoforge.read_image(path, colour=3)
    with pytest.raises(RecipeError, match=r"data\.range"):
        dinoforge.read_image(path, range=(5, 5))
    with pytest.raises(ImageError, match="cannot be read"):
        dinoforge.read_image(tmp_path / "none.tif")


def test_a_photograph_is_read_as_ever() -> None:
    buffer = io.BytesIO()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
    picture.save(buffer, "JPEG")
    assert np.array_equal(dinoforge.read_image(buffer.getvalue()), np.asarray(Image.open(buffer)))
