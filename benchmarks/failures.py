"""Makes runs that fail on purpose, each beside its healthy twin, and measures whether they do.

    python benchmarks/failures.py make [--out FOLDER] [--only WORD] [--store]
    python benchmarks/failures.py table

``make`` trains each run (a few minutes for all of them on one core each; a run that is there is not made again),
measures k-NN accuracy at its end, and prints whether the failing ones end below their healthy twins and what
``dinoforge doctor`` says about each, at which share of the run. ``--store`` writes the metrics, compactly, to
tests/health/data, where the thresholds of ``dinoforge.health.rules`` are tested against them; ``table`` prints the same
from what is stored there.

Images: 6,000 of Fashion-MNIST's training images (Debian package dataset-fashion-mnist), k-NN of 2,000 test images among
them; and the 2,624 solar cells of the Python package elpv-dataset at 64 × 64 pixels, k-NN on five stratified splits
(balanced accuracy). Networks are small and short: what is wanted are signs that show early.
"""

import argparse
import gzip
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import dinoforge
from dinoforge.commands.evaluate import evaluate_knn
from dinoforge.health.rules import diagnose
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import flatten
from dinoforge.runs.metrics import read_metrics

STORED = Path(__file__).parents[1] / "tests" / "diagnosis" / "data"
FASHION = Path("/usr/share/datasets/fashion-mnist")
STEPS = 240

COMMON: dict[str, Any] = {
    "train.steps": STEPS,
    "train.batch_size_per_gpu": 64,
    "train.num_workers": 1,
    "train.threads": 1,
    "student.arch": "vit_custom",
    "student.embed_dim": 96,
    "student.depth": 4,
    "student.num_heads": 3,
    "student.in_chans": 1,
    "student.layerscale": 1.0,
    "dino.head_n_prototypes": 512,
    "dino.head_hidden_dim": 256,
    "dino.head_bottleneck_dim": 64,
    "crops.local_crops_number": 3,
    "teacher.momentum_teacher": 0.98,
    "teacher.final_momentum_teacher": 0.998,
    "teacher.teacher_temp": 0.04,
    "teacher.warmup_teacher_temp_length": "0%",
    "optim.base_lr": 0.004,
    "optim.warmup_length": "10%",
    "augment.solarize_probability": 0.0,
    "augment.blur_probability": [0.0, 0.1, 0.1],
    "checkpoint.every_minutes": None,
    "data.mean": [0.5],
    "data.std": [0.25],
    "log.every_steps": 4,
}
DATA: dict[str, dict[str, Any]] = {
    "fashion": {"student.patch_size": 7, "crops.global_crops_size": 28, "crops.local_crops_size": 14},
    "solar": {"student.patch_size": 12, "crops.global_crops_size": 48, "crops.local_crops_size": 24},
}
SINKHORN = {"dino.targets": "sinkhorn_knopp", "ibot.targets": "sinkhorn_knopp"}
RECIPES: dict[str, dict[str, Any]] = {
    "centering": {},
    "sinkhorn": SINKHORN,
    "dino": SINKHORN | {"ibot.loss_weight": 0.0},
    "patch8": {"student.patch_size": 8},  # of the solar cells: 36 patches instead of 16
}
TINY_CROPS = {"crops.global_crops_scale": [0.02, 0.02], "crops.local_crops_scale": [0.02, 0.02]}
FAILURES: dict[str, dict[str, Any]] = {
    "lr_x30": {"optim.base_lr": 30 * 0.004},
    "temperature_0.3": {"teacher.teacher_temp": 0.3},
    "no_centering": {"dino.center_momentum": 1.0, "ibot.center_momentum": 1.0},
    "layerscale_1e-6": {"student.layerscale": 1e-6},
    "crops_2_percent": TINY_CROPS,
    "lr_div1000": {"optim.base_lr": 4e-6},
}


def runs() -> dict[str, dict[str, Any]]:
    """Every run by name: data, recipe, what was changed, seed."""
    made: dict[str, dict[str, Any]] = {}
    for data, sizes in DATA.items():
        for recipe, keys in RECIPES.items():
            if data == "fashion" and recipe == "patch8":
                continue
            for seed in (0, 1):
                made[f"{data}-{recipe}-healthy-{seed}"] = COMMON | sizes | keys | {"train.seed": seed}
            if recipe == "dino":
                continue
            for failure, changed in FAILURES.items():
                if recipe != "sinkhorn" or failure != "no_centering":
                    made[f"{data}-{recipe}-{failure}-0"] = COMMON | sizes | keys | changed | {"train.seed": 0}
    return made


@cache
def fashion(part: str, count: int) -> list[tuple[np.ndarray, int]]:
    """The first images of Fashion-MNIST's ``train`` or ``t10k`` with their labels."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(FASHION / f"{part}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8)[header:]

    labels = read("labels-idx1", 8)
    return list(zip(read("images-idx3", 16).reshape(-1, 28, 28)[:count], labels[:count].tolist(), strict=True))


@cache
def solar() -> list[tuple[np.ndarray, str]]:
    """Every solar cell at 64 × 64 pixels; a defect where the experts' probability is at least 0.5."""
    spec = importlib.util.find_spec("elpv_dataset")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text(encoding="utf-8").splitlines()]
    return [
        (
            cv2.resize(cv2.imread(str(folder / name), cv2.IMREAD_GRAYSCALE), (64, 64), interpolation=cv2.INTER_AREA),
            "defect" if float(probability) >= 0.5 else "fine",
        )
        for name, probability, _ in rows
    ]


def accuracy(run: Path, data: str) -> dict[str, float]:
    """k-NN accuracy, balanced for the solar cells, of pixels, the untrained and the trained network."""
    if data == "fashion":
        result, _ = evaluate_knn(run, fashion("train", 6000), test=fashion("t10k", 2000))
        return {name: row["mean"] for name, row in result["knn"].items()}
    result, _ = evaluate_knn(run, solar())
    return {name: row["balanced_mean"] for name, row in result["knn"].items()}


def make(name: str, keys: dict[str, Any], folder: Path) -> None:
    """Trains and measures a run, unless that is done."""
    run = folder / name
    done = run / "accuracy.json"
    if done.exists():
        return
    data = name.partition("-")[0]
    try:
        dinoforge.train(fashion("train", 6000) if data == "fashion" else solar(), "small", run, **keys)
        done.write_text(json.dumps(accuracy(run, data)))
    except dinoforge.errors.DinoforgeError as error:  # a run that cannot go on has failed for certain
        done.write_text(json.dumps({"error": str(error)}))


def store(name: str, folder: Path) -> None:
    """Writes a run's metrics, three digits of each, and its accuracy to the tests' data."""
    metrics, _ = read_metrics(folder / name / "metrics.jsonl")
    others = ("step", "koleo", "lr", "teacher_temp", "data_wait_share", "skipped_steps", "diag.update_ratio.backbone")
    kept = ("diag.effective", "diag.patch", "diag.target", "diag.prototype", "diag.kl", *others)
    columns = {key: column for key, column in metrics.items() if key.startswith(kept)}
    recipe = flatten(load_recipe(folder / name / "recipe.yaml")[0])
    base = flatten(load_recipe("dinov2")[0])
    head = {
        "run": name,
        "accuracy": json.loads((folder / name / "accuracy.json").read_text()),
        "recipe_beside_dinov2": {key: value for key, value in recipe.items() if value != base[key]},
        "columns": list(columns),
    }
    rows = zip(*columns.values(), strict=True)
    lines = [[None if x is None else float(f"{x:.3g}") if x % 1 else int(x) for x in row] for row in rows]
    text = "\n".join(json.dumps(line, separators=(",", ":")) for line in [head, *lines])
    STORED.mkdir(parents=True, exist_ok=True)
    (STORED / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> tuple[dict[str, Any], dict[str, list[float | None]], dict[str, Any]]:
    """What ``store`` wrote: its head, the metrics, and the recipe."""
    head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    metrics = {name: list(column) for name, column in zip(head["columns"], zip(*rows, strict=True), strict=True)}
    return head, metrics, flatten(load_recipe("dinov2")[0]) | head["recipe_beside_dinov2"]


def table() -> str:
    """Every stored run: how it ends beside its healthy twin, and what the doctor says when."""
    stored = {path.stem: load(path) for path in sorted(STORED.glob("*.jsonl"))}
    lines = [f"{'run':<40}{'pixels':>8}{'untrained':>11}{'trained':>9}{'twin':>7}  named at"]
    for name, (head, metrics, recipe) in stored.items():
        data, kind, _ = name.split("-", 2)
        failure = name.removeprefix(f"{data}-{kind}-").rpartition("-")[0]
        result = head["accuracy"]
        twin = stored.get(f"{data}-{kind}-healthy-{name[-1]}")
        total = recipe["train.steps"]
        named = [f"{f.name} ({f.step / total:.0%})" for f in diagnose(metrics, recipe)]
        values = [f"{100 * result[k]:.1f}" if k in result else "–" for k in ("pixels", "untrained", "trained")]
        other = f"{100 * twin[0]['accuracy']['trained']:.1f}" if twin and failure != "healthy" else ""
        lines.append(f"{name:<40}{values[0]:>8}{values[1]:>11}{values[2]:>9}{other:>7}  {', '.join(named) or '–'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "table"))
    parser.add_argument("--out", type=Path, default=Path("runs/failures"), help="default: runs/failures")
    parser.add_argument("--only", default="", metavar="WORD", help="only runs with this in their name")
    parser.add_argument("--store", action="store_true", help="write the metrics to the tests' data")
    options = parser.parse_args()
    if options.what == "make":
        for name, keys in runs().items():
            if options.only in name:
                make(name, keys, options.out)
                if options.store:
                    store(name, options.out)
    print(table())


if __name__ == "__main__":
    main()
