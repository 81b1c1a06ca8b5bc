"""The benchmark of data loading runs on any folder of photos, and its ratio is what it says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "data.py"


@pytest.mark.parametrize("large", [False, True])
def test_one_line_of_json(tmp_path, large):
    rng = np.random.default_rng(0)
    size = (4000, 2600) if large else (640, 480)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / name / "photo.jpg")
    command = [sys.executable, SCRIPT, "--images", tmp_path, "--rounds", "1", "--json", *["--large"] * large]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (line,) = done.stdout.splitlines()
    values = json.loads(line)
    assert values["images"] == 2
    assert values["pixels"] == [[4000, 2600] if large else [500, 375]] * 2
    assert values["reduced_decode"] == large
    assert values["ratio"] == pytest.approx(values["plain_ms_per_image"] / values["ms_per_image"])
    assert set(values["parts_ms"]) == {"decode", "geometry", "photometry"}


def test_tiffs_beside_tifffile():
    command = [sys.executable, SCRIPT, "--tiff", "--rounds", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    values = json.loads(done.stdout)
    assert {"pixel by pixel", "band by band", "OME-TIFF, CYX", "deflate"} <= set(values)
    for one in values.values():
        assert min(one.values()) > 0
        assert set(one) == {"tifffile_ms", "ms", "ratio"}
