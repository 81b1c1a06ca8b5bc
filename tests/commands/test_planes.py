"""Runs on stacks of which every plane is an image."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dinoforge.commands import train as train_command
from dinoforge.commands.backbone import load
from dinoforge.commands.bench import bench
from dinoforge.commands.embed import embed, write_features
from dinoforge.commands.evaluate import evaluate_knn
from dinoforge.commands.recipe import auto_recipe
from dinoforge.commands.report import report
from dinoforge.commands.run import RunResult
from dinoforge.errors import RunError
from dinoforge.runs import directory
from tiny import TINY

EACH = TINY | {"data.plane": "each", "train.steps": 6, "checkpoint.every_steps": 3, "report.every_minutes": None}


@pytest.fixture
def stacks(tmp_path: Path) -> Path:
    """Two classes, of 6 stacks of 5 planes each, an animation and a flat picture."""
    rng = np.random.default_rng(0)
    for label, level in (("dark", 600), ("bright", 3000)):
        folder = tmp_path / "stacks" / label
        folder.mkdir(parents=True)
        for index in range(6):
            values = rng.integers(level, level + 1000, (5, 40, 40), dtype=np.uint16)
            tifffile.imwrite(folder / f"{index}.ome.tif", values, ome=True, metadata={"axes": "ZYX"})
    Image.fromarray(np.full((40, 40), 90, np.uint8)).save(tmp_path / "stacks/dark/flat.png")
    frames = [Image.fromarray(np.full((40, 40), 80 * i, np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / "stacks/bright/moving.gif", save_all=True, append_images=frames[1:])
    return tmp_path / "stacks"


def train(images: Path, out: Path, **keys: Any) -> RunResult:
    return train_command.train(images, out=out, **EACH | {"data.range": [0, 4095]} | keys)


def losses(run: Path) -> list[str]:
    return re.findall(r'"loss": ([\d.]+)', (run / "metrics.jsonl").read_text())


def test_a_run_on_planes_from_the_plan_to_the_features(stacks: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    train(stacks, run, **{"probe.every_steps": 6})
    out = capsys.readouterr().out
    assert "data     64 images in " in out
    assert (
        "planes   each is an image: 64 in 14 files, up to 5 in one; 13 files with several (z in 12, frame in 1)" in out
    )
    assert "labels   2 classes from sub-folders" in out
    assert "probe.knn" in (run / "metrics.jsonl").read_text()
    assert directory.RunDirectory(run).info()["data"]["images"] == 64
    features = embed(run, stacks)
    assert features.shape[0] == 64
    write_features(run, stacks, tmp_path / "f.npy")
    names = (tmp_path / "f.names.txt").read_text().splitlines()
    assert names[:5] == [f"bright/0.ome.tif#{plane}" for plane in range(5)]
    assert names[-1] == "dark/flat.png"
    # The plane that a name says, by itself.
    alone = tmp_path / "alone"
    alone.mkdir()
    tifffile.imwrite(alone / "x.tif", tifffile.imread(stacks / "bright/0.ome.tif")[3], metadata=None)
    assert np.allclose(embed(run, alone)[0], features[3], atol=1e-5)
    result, skipped = evaluate_knn(run, stacks)
    assert result["n"] == 64
    assert skipped == []
    assert report(run).page.exists()


@pytest.mark.processes
def test_a_run_on_planes_continues_exactly(stacks: Path, tmp_path: Path) -> None:
    train(stacks, tmp_path / "whole")
    train(stacks, tmp_path / "parts", **{"train.max_minutes": 1e-6})
    train(stacks, tmp_path / "parts", **{"train.num_workers": 2})
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_run_is_not_continued_on_other_planes(stacks: Path, tmp_path: Path) -> None:
    train(stacks, tmp_path / "run", **{"train.max_minutes": 1e-6})
    values = tifffile.imread(stacks / "dark/0.ome.tif")[:4]
    tifffile.imwrite(stacks / "dark/0.ome.tif", values, ome=True, metadata={"axes": "ZYX"})
    with pytest.raises(RunError, match=r"other images: 64 in .* there, 63 in"):
        train(stacks, tmp_path / "run")


def test_auto_and_bench_count_planes(stacks: Path) -> None:
    keys: dict[str, Any] = {"data.plane": "each"}
    recipe, _ = auto_recipe(stacks, **keys)
    assert recipe.data.plane == "each"
    flat, _ = auto_recipe(stacks)
    assert flat.train.batch_size_per_gpu < recipe.train.batch_size_per_gpu  # 14 images, or 64
    assert bench(stacks, "small", seconds=0.2, **EACH).batch_size == 8
