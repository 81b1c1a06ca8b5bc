"""Whether training learns: features after a fixed time on two cores, beside raw pixels and an untrained network.

    python benchmarks/learning.py --minutes 15                        # every row on every data set, three seeds
    python benchmarks/learning.py --data scattered --rows small auto --minutes 60 --seeds 0
    python benchmarks/learning.py --ablation --minutes 4              # what separates dinov2 from bernoulli, one by one
    python benchmarks/learning.py --table --minutes 15                # only print what is stored

A cell is a row on a data set with a seed and a budget. Each is stored as a JSON file as soon as it is done, and never
measured again while its file is there; a cell that was stopped goes on where it was. So tables grow over days.

Minutes are those of an undisturbed machine: before a cell is trained, its step and the making of its batches are timed,
the quickest of several counts, and the budget becomes a number of steps, the same for every seed. What else runs
meanwhile costs time, but changes no result.

Data:
    fashion    Fashion-MNIST (Debian package dataset-fashion-mnist): 60,000 images of 28 pixels, tested on 10,000
    scattered  each of its images scaled by 0.7 to 1.3 and put somewhere on 48 pixels of smooth noise: 30,000, tested
               on 10,000. Pixels are a poor guide here.
    elpv       2,624 photographs of solar cells (Python package elpv-dataset), with a defect or not; five splits
"""

import argparse
import gzip
import importlib.util
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

import dinoforge
from dinoforge.builders.data import image_input
from dinoforge.builders.networks import vit_arguments
from dinoforge.commands.embed import embed
from dinoforge.commands.recipe import auto_recipe
from dinoforge.data.crops import resize
from dinoforge.data.sources import open_source
from dinoforge.errors import DinoforgeError
from dinoforge.evaluation import classifiers, knn
from dinoforge.evaluation.protocol import few_shot, stratified_splits
from dinoforge.models.vit import VisionTransformer
from dinoforge.planning.bench import seconds_per_step
from dinoforge.recipe.load import load_recipe, parse_override
from dinoforge.recipe.schema import Recipe, flatten
from dinoforge.runs.directory import RunDirectory
from dinoforge.system.files import write_text
from dinoforge.weights.backbone import Backbone

FASHION = Path("/usr/share/datasets/fashion-mnist")
RESULTS = Path(__file__).parent / "results" / "learning"
RUNS = Path("runs/learning")

GREY = {"student.in_chans": 1, "data.mean": 0.5, "data.std": 0.25}
# What all rows but `auto` are told about the images: crops that suit their size, and patches to match.
GEOMETRY: dict[str, dict[str, Any]] = {
    "fashion": GREY
    | {
        "crops.global_crops_size": 28,
        "crops.local_crops_size": 14,
        "student.patch_size": 7,
        "augment.blur_kernel": 5,
    },
    "scattered": GREY
    | {
        "crops.global_crops_size": 32,
        "crops.local_crops_size": 16,
        "student.patch_size": 8,
        "augment.blur_kernel": 5,
    },
    "elpv": GREY | {"crops.global_crops_size": 96, "crops.local_crops_size": 48, "student.patch_size": 12},
}
PIXELS = {"fashion": 28, "scattered": 48, "elpv": 96}  # side at which images are compared pixel by pixel
NO_COLOUR = {"augment.grayscale_probability": 0.0, "augment.solarize_probability": 0.0}
OFFICIAL_WEIGHTS = {"ibot.loss_weight": 1.0, "dino.koleo_loss_weight": 0.1}
NO_IBOT = {"ibot.loss_weight": 0.0, "ibot.mask_sample_probability": 0.0}
NO_KOLEO = {"dino.koleo_loss_weight": 0.0}
SIZES = ("student.arch", "student.embed_dim", "student.depth", "student.num_heads", "train.batch_size_per_gpu")

# What separates `dinov2` from `bernoulli`, one at a time on `small`: the reference's choice, and the variant's.
ABLATION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "masks": ({"ibot.mask_kind": "block"}, {"ibot.mask_kind": "bernoulli"}),
    "mask ratio": ({"ibot.mask_ratio_min_max": [0.1, 0.5]}, {"ibot.mask_ratio_min_max": [0.3, 0.3]}),
    "masking probability": ({"ibot.mask_sample_probability": 0.5}, {"ibot.mask_sample_probability": 1.0}),
    "layer-wise decay": ({"optim.layerwise_decay": 0.9}, {"optim.layerwise_decay": 1.0}),
    "patch embedding's rate": ({"optim.patch_embed_lr_mult": 0.2}, {"optim.patch_embed_lr_mult": 1.0}),
    "weight decay": ({"optim.weight_decay_scope": "all"}, {"optim.weight_decay_scope": "backbone"}),
    "patch targets": ({"ibot.targets": "centering"}, {"ibot.targets": "sinkhorn_knopp"}),
    "freeze of the last layer": ({"optim.freeze_last_layer": "lr"}, {"optim.freeze_last_layer": "gradient"}),
}
REFERENCE = OFFICIAL_WEIGHTS | {key: value for first, _ in ABLATION.values() for key, value in first.items()}

ROWS = ("pixels", "untrained", "official", "dino", "dino+ibot", "all", "small", "auto")
TITLES = {
    "pixels": "raw pixels",
    "untrained": "untrained (LayerScale 1)",
    "official": "official defaults",
    "dino": "DINO only",
    "dino+ibot": "DINO + iBOT",
    "all": "all terms, official weights",
    "small": "`small`: all terms, lower weights",
    "auto": "`auto`",
}
SHOTS = (100, 10)
MIN_STEPS = 20


@dataclass(frozen=True)
class Data:
    """Images to train on, and labelled features' splits: the tested images come last, or in splits of all."""

    train: Any  # array [N, H, W] uint8, or a list of files
    images: Any  # to measure on
    labels: torch.Tensor  # int64, of ``images``
    train_parts: torch.Tensor  # bool [S, N]


def read_idx(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An array of Fashion-MNIST's format: a header of big-endian sizes, then bytes."""
    with gzip.open(FASHION / name) as file:
        content = file.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def scatter(image: np.ndarray[Any, Any], index: int, *, side: int = 48) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The image [28, 28], scaled by 0.7 to 1.3, on a canvas [side, side] of smooth noise; fixed by its index."""
    rng = np.random.default_rng([7, index])
    edge = round(28 * rng.uniform(0.7, 1.3))
    # The noise's strength and grain make neighbours by pixels right in about 57 % with 30,000 images.
    grains = rng.random((side // 2, side // 2), dtype=np.float32)
    canvas = cv2.resize(grains, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1) * 190
    top, left = rng.integers(0, side - edge + 1, 2)
    canvas[top : top + edge, left : left + edge] += resize(image[..., None], edge, edge)[..., 0]
    return canvas.clip(0, 255).astype(np.uint8)


@cache
def load_data(name: str, train_images: int | None = None, test_images: int | None = None) -> Data:
    """A data set; fewer images for a quick look."""
    if name == "elpv":
        spec = importlib.util.find_spec("elpv_dataset")
        if spec is None or spec.origin is None:
            sys.exit("the data set elpv needs: pip install 'dinoforge[demo]'")
        root = Path(spec.origin).parent / "data"
        rows = [line.split() for line in (root / "labels.csv").read_text(encoding="utf-8").splitlines()]
        files = [str(root / path) for path, *_ in rows][:train_images]
        labels = torch.tensor([float(probability) >= 0.5 for _, probability, _ in rows][:train_images]).long()
        return Data(files, files, labels, stratified_splits(labels))
    if not FASHION.is_dir():
        sys.exit(f"the data sets of clothes need {FASHION}: apt-get install dataset-fashion-mnist")
    train_images = train_images or (60_000 if name == "fashion" else 30_000)
    test_images = test_images or 10_000
    parts = [
        (read_idx(f"{part}-images-idx3-ubyte.gz")[:count], read_idx(f"{part}-labels-idx1-ubyte.gz")[:count])
        for part, count in (("train", train_images), ("t10k", test_images))
    ]
    (train, _), (test, _) = parts
    if name == "scattered":
        train = np.stack([scatter(image, index) for index, image in enumerate(train)])
        test = np.stack([scatter(image, 60_000 + index) for index, image in enumerate(test)])
    labels = torch.from_numpy(np.concatenate([labels for _, labels in parts]).astype(np.int64))
    known = torch.arange(len(labels)) < len(train)
    return Data(train, np.concatenate([train, test]), labels, known[None])


def recipe_of(row: str, data: str) -> tuple[str, dict[str, Any]]:
    """Recipe and keys of a row; rows of an ablation are named ``NAME=variant``, or ``reference``."""
    small, _ = load_recipe("small")
    if row == "auto":
        return "auto", {}
    if row == "official":
        # What a user gets who scales the reference's recipe to this machine: its sizes, batch and prototypes, no more.
        flat = flatten(small)
        shares = {
            "optim.warmup_length": "10%",  # the official lengths, of 100 nominal epochs, as shares
            "optim.freeze_last_layer_length": "1%",
            "teacher.warmup_teacher_temp_length": "30%",
            "dino.head_n_prototypes": 4096,
        }
        return "dinov2", GEOMETRY[data] | {key: flat[key] for key in SIZES} | shares
    changes = {
        "dino": NO_IBOT | NO_KOLEO,
        "dino+ibot": OFFICIAL_WEIGHTS | NO_KOLEO,
        "all": OFFICIAL_WEIGHTS,
        "small": {},
        "reference": REFERENCE,
    }
    images = GEOMETRY[data] | NO_COLOUR
    if row.endswith("=variant"):
        return "small", images | REFERENCE | ABLATION[row.removesuffix("=variant")][1]
    return "small", images | changes[row]


def scores(features: torch.Tensor, data: Data, *, centred: bool) -> dict[str, float]:
    """Accuracies, from 0 to 1: k-NN with all labels and with few, and a linear classifier; for elpv more scores."""
    labels, train = data.labels, data.train_parts
    test = ~train
    found: dict[str, float] = {}
    full = knn.score_knn(features, labels, train, test=test, centred=centred)
    found["knn"] = full["mean"]
    if len(train) == 1:
        for shots in SHOTS:
            few = few_shot(labels, train, shots)
            found[f"knn {shots}"] = knn.score_knn(features, labels, few, test=test, centred=centred)["mean"]
    else:
        found["knn balanced"] = full["balanced_mean"]
    row = classifiers.score_classifiers(
        features.float(),
        labels,
        train,
        test,
        {"cls": [slice(None)]},
        "lr",
        classifiers.LEARNING_RATES,
        classifiers.fit_linear,
    )
    found["linear"] = row["mean"]
    if len(train) > 1:
        found["linear balanced"] = row["balanced_mean"]
        found["linear AUROC"] = row["auroc_mean"] or math.nan
    return found


def pixels_of(data: Data, side: int) -> torch.Tensor:
    """Raw pixels [N, side · side] uint8."""
    images = (np.array(Image.open(i).convert("L")) if isinstance(i, str) else i for i in data.images)
    return torch.from_numpy(np.stack([resize(image[..., None], side, side) for image in images])).flatten(1)


def untrained(recipe: Recipe) -> Backbone:
    """The recipe's backbone as a run with its seed starts, but for LayerScale, which is 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        arguments = vit_arguments(recipe) | {"layerscale": 1.0}
        network = VisionTransformer(**arguments).eval()
    return Backbone(network, arguments, image_input(recipe), step=0)


@dataclass(frozen=True)
class Budget:
    """How long a cell trains: minutes of this machine undisturbed, or steps."""

    minutes: float | None
    steps: int | None

    def __str__(self) -> str:
        return f"{self.minutes:g}min" if self.steps is None else f"{self.steps}steps"


@dataclass(frozen=True)
class Settings:
    budget: Budget
    results: Path
    runs: Path
    keys: Mapping[str, Any]  # laid over every row's
    train_images: int | None
    test_images: int | None


def measure_cell(row: str, data_name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Trains if the row does, and measures."""
    data = load_data(data_name, settings.train_images, settings.test_images)
    result: dict[str, Any] = {"row": row, "data": data_name, "seed": seed, "images": len(data.train)}
    name, keys = recipe_of("small" if row in ("pixels", "untrained") else row, data_name)
    keys = keys | dict(settings.keys) | {"train.seed": seed}
    if row == "pixels":
        return result | {"scores": scores(pixels_of(data, PIXELS[data_name]), data, centred=True)}
    if row == "untrained":
        features = embed(untrained(load_recipe(name, keys)[0]), data.images)
        return result | {"scores": scores(torch.from_numpy(features), data, centred=False)}

    out = settings.runs / cell_name(row, data_name, seed, settings.budget)
    run = RunDirectory(out)
    if run.exists:
        steps = run.recipe().train.steps  # as it was planned; a second measurement would give another number
    elif settings.budget.steps is not None:
        steps = settings.budget.steps
    elif twins := sorted(settings.results.glob(f"{cell_name(row, data_name, '*', settings.budget)}.json")):
        steps = json.loads(twins[0].read_text())["steps"]  # seeds differ in nothing else
    else:
        assert settings.budget.minutes is not None
        # Long enough for every warm-up; only the cost of a step is asked for.
        recipe = prepare_recipe(name, data, keys, steps=1000)
        seconds = seconds_per_step(recipe, open_source(data.train))
        steps = max(round(60 * settings.budget.minutes / seconds), MIN_STEPS)
    started = time.perf_counter()
    trained = dinoforge.train(data.train, name, out, **keys, **{"train.steps": steps})
    if not trained.finished:
        raise KeyboardInterrupt
    features = embed(out, data.images)
    result |= {
        "recipe": name,
        "keys": keys,
        "steps": steps,
        "batch": run.recipe().train.batch_size_per_gpu,
        "seconds": time.perf_counter() - started,
        "losses": last_losses(run.metrics),
        "versions": run.info()["starts"][-1]["versions"],
        "scores": scores(torch.from_numpy(features), data, centred=False),
    }
    shutil.rmtree(out)
    return result


def prepare_recipe(name: str, data: Data, keys: Mapping[str, Any], *, steps: int) -> Recipe:
    """The recipe that a run of so many steps would take."""
    if name == "auto":
        return auto_recipe(data.train, **keys, **{"train.steps": steps})[0]
    return load_recipe(name, keys | {"train.steps": steps})[0]


def last_losses(metrics: Path) -> dict[str, float]:
    """The loss terms of the last logged step."""
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {name: last[name] for name in ("dino_local", "dino_global", "ibot", "koleo") if name in last}


def cell_name(row: str, data: str, seed: int | str, budget: Budget) -> str:
    trains = "" if row in ("pixels", "untrained") else f"-{budget}"
    return f"{data}-{row.replace(' ', '_')}{trains}-seed{seed}"


def stored(row: str, data: str, seed: int, settings: Settings) -> dict[str, Any] | None:
    """A cell's result, if it has been measured."""
    path = settings.results / f"{cell_name(row, data, seed, settings.budget)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(rows: Mapping[str, str], data: str, seeds: Sequence[int], settings: Settings) -> str:
    """What is stored, as Markdown: mean ± sample standard deviation over the seeds there are, in percent."""
    lines: list[str] = []
    for row, title in rows.items():
        cells = [c for seed in (seeds if row != "pixels" else seeds[:1]) if (c := stored(row, data, seed, settings))]
        if not cells:
            continue
        names = list(cells[0]["scores"])
        if not lines:
            lines += [f"| {data} | {' | '.join(names)} | steps | seeds |", "|---" * (len(names) + 3) + "|"]
        texts = []
        for name in names:
            values = [100 * cell["scores"][name] for cell in cells]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.1f}{spread}")
        steps = f"{cells[0]['steps']:,}" if "steps" in cells[0] else "–"
        lines.append(f"| {title} | {' | '.join(texts)} | {steps} | {len(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(GEOMETRY), default=list(GEOMETRY))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--ablation", action="store_true", help="the rows are dinov2's choices and bernoulli's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=15.0, help="of training; default: 15")
    length.add_argument("--steps", type=int, help="of training, instead")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where cells are stored")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are while they train")
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    parser.add_argument("--train-images", type=int, metavar="N", help="a quick look: only the first N")
    parser.add_argument("--test-images", type=int, metavar="N")
    parser.add_argument(
        "keys",
        nargs="*",
        metavar="key=value",
        help="recipe keys laid over every row's, before any option; give --out as well",
    )
    options = parser.parse_args()

    settings = Settings(
        Budget(options.minutes, options.steps),
        options.out,
        options.runs,
        dict(parse_override(text) for text in options.keys),
        options.train_images,
        options.test_images,
    )
    rows = {row: TITLES[row] for row in options.rows}
    if options.ablation:
        rows = {"reference": "the reference's choices"} | {f"{name}=variant": name for name in ABLATION}
    if not options.table:
        # Seeds are the outer loop, so that whole tables are there early, and become more certain.
        for seed in options.seeds:
            for data in options.data:
                for row in rows:
                    if (row == "pixels" and seed != options.seeds[0]) or stored(row, data, seed, settings):
                        continue
                    name = cell_name(row, data, seed, settings.budget)
                    print(f"\n== {name}", flush=True)
                    result = measure_cell(row, data, seed, settings)
                    settings.results.mkdir(parents=True, exist_ok=True)
                    write_text(settings.results / f"{name}.json", json.dumps(result, indent=2) + "\n")
    for data in options.data:
        print(f"\n{table(rows, data, options.seeds, settings)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DinoforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
