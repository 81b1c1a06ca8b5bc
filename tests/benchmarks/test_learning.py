"""The benchmark of learning, short: recipes start to learn, cells are stored once, tables say what is stored."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "learning.py"
IMAGES = Path("/usr/share/datasets/fashion-mnist")
BUDGET = ["--steps", "60", "--train-images", "2000", "--test-images", "500", "--seeds", "0", "--data", "fashion"]


KEYS = ["train.threads=1", "train.batch_size_per_gpu=64"]


def run(folder, *rows):
    places = ["--out", folder / "results", "--runs", folder / "runs"]
    command = [sys.executable, SCRIPT, *KEYS, *BUDGET, *places, "--rows", *rows]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=280).stdout


@pytest.fixture(scope="module")
def learned(require_system, tmp_path_factory):
    """Where pixels, the untrained network and short runs of two recipes have been measured."""
    require_system(IMAGES, "dataset-fashion-mnist")
    folder = tmp_path_factory.mktemp("learning")
    run(folder, "pixels", "untrained", "small", "auto")
    return folder


def cell_of(folder, cell):
    return json.loads((folder / "results" / f"fashion-{cell}.json").read_text())


@pytest.mark.parametrize(("row", "left"), [("small", 0.97), ("auto", 1.0)])
def test_the_loss_leaves_its_plateau(learned, row, left):
    """Too soft targets keep the terms at those of a uniform output, log K, for thousands of steps."""
    losses = cell_of(learned, f"{row}-60steps-seed0")["losses"]
    uniform = math.log(256) * 2 / 3  # of 4 of 6 pairs of crops
    assert losses["dino_local"] < left * uniform
    assert losses["dino_local"] > 0.5 * uniform  # a collapse would be faster


def test_cells_are_measured_once(learned):
    files = {path: path.stat().st_mtime_ns for path in (learned / "results").iterdir()}
    assert not list((learned / "runs").iterdir())  # what a finished cell leaves behind is its result
    said = run(learned, "pixels", "small")
    assert {path: path.stat().st_mtime_ns for path in (learned / "results").iterdir()} == files
    pixels = cell_of(learned, "pixels-seed0")["scores"]
    assert f"| raw pixels | {100 * pixels['knn']:.1f} |" in said


def test_seeds_take_as_many_steps(require_system, tmp_path, monkeypatch):
    require_system(IMAGES, "dataset-fashion-mnist")
    learning = runpy.run_path(str(SCRIPT))
    there = learning["measure_cell"].__globals__

    def refuse(*_):
        pytest.fail("the step was timed again")

    monkeypatch.setitem(there, "seconds_per_step", refuse)
    (tmp_path / "fashion-small-15min-seed7.json").write_text('{"steps": 2}')
    keys = {"train.batch_size_per_gpu": 8, "train.threads": 1, "train.num_workers": 0}
    budget = learning["Budget"](15.0, None)
    settings = learning["Settings"](budget, tmp_path, tmp_path / "runs", keys, 300, 50)
    assert learning["measure_cell"]("small", "fashion", 0, settings)["steps"] == 2


def test_a_scattered_image_is_fixed_by_its_index(require_system):
    require_system(IMAGES, "dataset-fashion-mnist")
    learning = runpy.run_path(str(SCRIPT))
    few, more = (learning["load_data"]("scattered", n, 5) for n in (3, 6))
    assert np.array_equal(few.train, more.train[:3])
    assert few.train.shape == (3, 48, 48)
    assert np.array_equal(few.images[3:], more.images[6:])
    assert not np.array_equal(few.train[0], few.train[1])
