"""What lies in a folder and what labels it, through the commands: said before work starts, and measured right."""

import csv
import inspect
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import nn

import dinoforge
from dinoforge.cli.main import main
from dinoforge.commands.bench import bench
from dinoforge.commands.embed import embed, write_features
from dinoforge.commands.evaluate import evaluate_classifier, evaluate_knn
from dinoforge.commands.recipe import auto_recipe
from dinoforge.commands.report import open_run
from dinoforge.commands.train import train
from dinoforge.data.names import original_name
from dinoforge.data.sources import open_source
from dinoforge.errors import DataError, RecipeError
from dinoforge.evaluation.knn import run_knn
from dinoforge.evaluation.probe import Probe
from dinoforge.models.vit import Tokens
from dinoforge.runs.directory import RunDirectory
from tiny import TINY

READING = {"size": 8, "channels": 1, "mean": [0.5], "std": [0.5], "sixteen_bit": "full", "max_pixels": 10**6}
KEYS = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]


class Brightness(nn.Module):
    """Features that tell dark from bright, and nothing else."""

    def forward(self, images: torch.Tensor) -> Tokens:
        mean = images.mean((1, 2, 3))
        cls = torch.stack([mean, torch.ones_like(mean)], 1)
        return Tokens(cls, cls[:, None][:, :0], cls[:, None])


def put(root: Path, name: str, level: int, seed: int = 0) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).normal(level, 25, (40, 48)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/, each with classes that brightness tells: 'train' against 'val' is noise."""
    root = tmp_path_factory.mktemp("split")
    for part, count in (("train", 24), ("val", 12)):
        for c, level in (("a", 60), ("b", 190)):
            for i in range(count):
                put(root, f"{part}/{c}/{i:02}.png", level, seed=i)
    return root


@pytest.fixture(scope="module")
def run(split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dinoforge.train(split, out=tmp_path_factory.mktemp("runs") / "run", **TINY | {"train.steps": 2}).out


def plan_of(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["train", str(folder), "--dry-run", *options, *KEYS]) == 0
    return capsys.readouterr().out


# Said before work starts


def test_the_plan_says_what_was_left_out(tmp_path, capsys):
    for i in range(20):
        put(tmp_path, f"photo{i:02}.jpg", 90)
    for i in range(100):
        (tmp_path / f"slice{i:03}.dcm").touch()
        (tmp_path / f"volume{i:03}.nii.gz").touch()
    lines = plan_of(tmp_path, capsys).splitlines()
    assert lines[0].startswith("data     20 images in ")
    assert lines[1] == "left out 200 files: 100 .dcm (DICOM), 100 .nii.gz (NIfTI)"


def test_the_plan_says_nothing_where_nothing_was_left_out(split, capsys):
    assert "left out" not in plan_of(split, capsys)


def test_the_plan_says_what_the_labels_are(split, tmp_path, capsys):
    assert "labels   2 classes from sub-folders of train/ and val/\n" in plan_of(split, capsys)
    for i in range(24):
        put(tmp_path, f"{'ab'[i % 2]}/{i:02}.png", 90)
    assert "labels   2 classes from sub-folders\n" in plan_of(tmp_path, capsys)
    put(tmp_path, "stray.png", 90)
    said = "labels   2 classes from sub-folders; 1 image lies in none and takes no part: stray.png\n"
    assert said in plan_of(tmp_path, capsys)
    assert "labels" not in plan_of(tmp_path, capsys, "probe.every_minutes=null")


def test_the_plan_says_what_was_guessed_of_a_table(tmp_path, capsys):
    folder = tmp_path / "images"
    for i in range(24):
        put(folder, f"{i:02}.png", 90)
    table = tmp_path / "table.csv"
    rows = "".join(f"{i:02};{'train' if i % 3 else 'val'};{'Bär' if i % 2 else 'Katze'}\n" for i in range(24))
    table.write_text(f"image_id;split;label\n{rows}", encoding="cp1252")
    lines = [line for line in plan_of(folder, capsys, "--labels", str(table)).splitlines() if line.startswith("labels")]
    assert lines == [
        "labels   2 classes from table.csv",
        "labels   table.csv: read as Windows-1252, since it is no UTF-8; save it as UTF-8 if letters look wrong",
        "labels   table.csv: the label is column 'label'; not used: 'split'",
        "labels   table.csv: 24 names fit only without the ends of file names",
    ]


# Measured right


def test_evaluation_goes_by_the_classes_in_the_splits(run, split, capsys):
    assert main(["eval", "knn", str(run), "--data", str(split), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == "labels   2 classes from sub-folders of train/ and val/"
    result = json.loads(said.out)
    assert result["n"] == 72
    assert result["knn"]["pixels"]["mean"] == 1.0  # 'train' against 'val' would be two thirds


def test_probes_go_by_the_classes_in_the_splits(split, tmp_path):
    keys = TINY | {"train.steps": 2, "probe.every_steps": 1}
    result = dinoforge.train(split, out=tmp_path / "run", **keys)
    line = json.loads((result.out / "metrics.jsonl").read_text().splitlines()[0])
    assert line["probe.pixels.knn"] == 1.0


def test_the_report_goes_by_the_classes_in_the_splits(run, split):
    learned = open_run(run, data=split).learned
    assert set(learned.labels) == {"a", "b"}


def test_splits_without_classes_are_not_measured(run, tmp_path, capsys):
    for i in range(24):
        put(tmp_path, f"{'train' if i % 3 else 'val'}/{i:02}.png", 60 + 130 * (i % 2))
    assert main(["eval", "knn", str(run), "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: the images have no labels: train/ and val/ are parts of a split and hold no sub-folders. Expected"
    )


@pytest.fixture
def strays(tmp_path: Path) -> Path:
    """Bright and dark in classes of their own, and two images of another kind beside them."""
    for i in range(40):
        put(tmp_path, f"{'ab'[i % 2]}/{i:02}.png", 60 + 130 * (i % 2), seed=i)
    for name in ("0.png", "z.png"):
        put(tmp_path, name, 125)
    return tmp_path


def test_strays_take_no_part_in_an_evaluation(strays):
    source = open_source(strays)
    result, skipped = run_knn(Brightness(), Brightness(), source, source.labels(), **READING)
    assert (result["n"], skipped) == (40, [])
    assert result["knn"]["trained"]["mean"] == 1.0
    test = open_source([(np.full((9, 9), 60, np.uint8), "a"), (np.full((9, 9), 120, np.uint8), None)])
    result, _ = run_knn(Brightness(), None, source, source.labels(), test=(test, ["a", None]), **READING)
    assert (result["n"], result["knn"]["trained"]["mean"]) == (41, 1.0)


def test_strays_take_no_part_in_a_probe(strays):
    source = open_source(strays)
    probe = Probe(source, source.labels(), max_images=1000, **READING)
    assert [source.name(index).count("/") for index in probe.indices] == [1] * 40
    assert vars(probe.measure(Brightness())) == {"knn": 1.0, "linear": 1.0}


def test_a_probe_of_images_that_all_have_labels_is_what_it_was():
    """The same images are drawn, so that baselines of earlier runs stay."""
    items = [(np.full((9, 9), i, np.uint8), "ab"[i % 2]) for i in range(60)]
    probe = Probe(open_source(items), [label for _, label in items], max_images=20, seed=3, **READING)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert probe.indices == sorted(order[:20].tolist())


def test_strays_are_left_out_of_the_map(run, strays):
    learned = open_run(run, data=strays).learned
    assert len(learned.labels) == len(learned.names) == 40
    assert "Of the sampled images 2 without a label are left out." in learned.missing


# Names

AWKWARD = ["a\rb.png", "c\nd.png", "e\u2028f.png", "g\x85h.png", "i\x0cj.png", '"k.png', "l\\m.png", "n\to.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_features_have_one_name_for_each_row(run, tmp_path, suffix):
    folder = tmp_path / "images"
    names = [*AWKWARD, os.fsdecode(b"\xff.png")]
    for i, name in enumerate(names):
        put(folder, name, 90, seed=i)
    (folder / "broken\u2028\r.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / f"features{suffix}"
    assert write_features(run, folder, out).images == len(names)
    if suffix == ".npy":
        file = tmp_path / "features.names.txt"
        lines = file.read_text(encoding="utf-8").splitlines()
        with file.open(encoding="utf-8", newline="") as rows:
            assert len(list(csv.reader(rows))) == len(np.load(out))
    else:
        lines = pyarrow.parquet.read_table(out)["name"].to_pylist()
    assert [original_name(line) for line in lines] == sorted(names, key=os.fsencode)
    (skipped,) = (tmp_path / "features.skipped.txt").read_text(encoding="utf-8").splitlines()
    assert original_name(skipped.split("\t")[0]) == "broken\u2028\r.png"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_skipped_images_have_one_line_each(split, tmp_path):
    folder = tmp_path / "images"
    for i in range(24):
        put(folder, f"{i:02}.png", 90, seed=i)
    for name in AWKWARD:
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    keys = TINY | {"train.steps": 8, "data.max_bad_share": 0.9, "train.batch_size_per_gpu": 16}
    run = dinoforge.train(folder, out=tmp_path / "run", **keys).out
    lines = (run / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert {original_name(line.split("\t")[0]) for line in lines} == set(AWKWARD)
    assert len(lines) == len(AWKWARD)
    assert len(open_run(run).skipped) == len(AWKWARD)


def test_reasons_take_one_line_each(tmp_path):
    run = RunDirectory(tmp_path)
    run.list_skipped([("a.png", "an error\nof two\x85lines\u2028or more")])
    assert (tmp_path / "skipped.txt").read_text(encoding="utf-8").splitlines() == [
        "a.png\tan error\\nof two\\u0085lines\\u2028or more"
    ]


def test_a_list_of_an_earlier_version_is_read_by_its_lines(run):
    skipped = RunDirectory(run).skipped
    skipped.write_text("a\u2028b.png\tdamaged\nc.png\tempty file\n", encoding="utf-8")
    try:
        assert open_run(run).skipped == ("a\u2028b.png\tdamaged", "c.png\tempty file")
    finally:
        skipped.unlink()


# Python


@pytest.fixture
def arrays() -> list[np.ndarray]:
    """12-bit values, which minmax spreads over the whole range."""
    ramp = np.linspace(0, 4095, 48).astype(np.uint16)
    return [np.tile(ramp + i, (40, 1)) for i in range(24)]


def test_the_section_data_beside_images(arrays, tmp_path):
    sections = {key: value for key, value in TINY.items() if not key.startswith("data.")}
    data = {"sixteen_bit": "minmax", "mean": [0.5], "std": [0.25]}
    result = dinoforge.train(arrays, out=tmp_path / "run", data=data, **sections | {"train.steps": 1})
    recipe = RunDirectory(result.out).recipe()
    assert (recipe.data.sixteen_bit, recipe.data.std) == ("minmax", (0.25,))
    assert dinoforge.embed(result.out, arrays).shape == (24, 48)


def test_images_may_come_by_name(arrays, run, tmp_path):
    keys = TINY | {"train.steps": 1, "data.sixteen_bit": "minmax"}
    assert dinoforge.train(data=arrays, out=tmp_path / "run", **keys).finished
    assert np.array_equal(dinoforge.embed(tmp_path / "run", data=arrays), dinoforge.embed(tmp_path / "run", arrays))
    with pytest.raises(DataError, match="expected a folder"):
        dinoforge.train(out=tmp_path / "other", **keys)
    with pytest.raises(RecipeError, match="data"):
        dinoforge.train(arrays, data=arrays, out=tmp_path / "other", **keys)


@pytest.mark.parametrize(
    "function",
    [train, bench, auto_recipe, embed, write_features, evaluate_knn, evaluate_classifier],
)
def test_no_argument_takes_the_name_of_a_section(function):
    named = set(inspect.signature(function).parameters)
    assert not named & {"data", "student", "crops", "dino", "ibot", "train", "optim", "eval"}


def test_what_a_foreign_file_cannot_say_beside_images(run, split):
    backbone = dinoforge.load(run)
    with pytest.raises(RecipeError, match="give it to load"):
        dinoforge.embed(backbone, split, data={"mean": 0.5})
