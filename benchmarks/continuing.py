"""Does further training keep what a backbone knows? Recipes continue and highres beside naive continuation.

    python benchmarks/continuing.py [--out FOLDER] [--times N] [--tiny] [--threads N] [--json]

A small network is pretrained on images of clothes (Fashion-MNIST, Debian's dataset-fashion-mnist) by recipe small, and
then trained on from its file: on the same images; on a new domain, the same clothes in negative before a cloudy
background, which it has never seen; and at larger crops. Each by our recipe, the first two also at small's learning
rates ("faster"), and naively: recipe small with init.weights, its heads cold and its schedules from the start. At every
eighth of a run, weighted k-NN (cosine, k = 20, temperature 0.07) on the teacher's cls tokens classifies test images
that no training has seen, of the domain that is trained on.

It goes on where it was stopped, and the same command on a finished folder only prints. --tiny is a few steps of
everything, to see that it runs: its figures mean nothing.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console

import dinoforge
from dinoforge.builders.networks import build_student_teacher
from dinoforge.data.sources import SequenceSource
from dinoforge.evaluation.knn import knn_predict
from dinoforge.features.extract import extract
from dinoforge.models.vit import VisionTransformer
from dinoforge.recipe.load import load_recipe
from dinoforge.runs import checkpoint

CLOTHES = Path("/usr/share/datasets/fashion-mnist")
K = 20
NETWORK = {
    "student.embed_dim": 64,
    "student.depth": 4,
    "student.num_heads": 2,
    "student.patch_size": 4,
    "student.in_chans": 1,
    "data.mean": 0.3,
    "data.std": 0.3,
    "crops.global_crops_size": 20,
    "crops.local_crops_size": 12,
    "dino.head_n_prototypes": 256,
    "dino.head_hidden_dim": 256,
    "dino.head_bottleneck_dim": 64,
}
EVERY_RUN = {
    "crops.global_crops_scale": [0.4, 1.0],
    "augment.solarize_probability": 0.0,
    "augment.blur_probability": [0.0, 0.2, 0.1],
    "augment.blur_kernel": 3,
    "train.num_workers": 1,
    "device": "cpu",
    "checkpoint.every_minutes": 1.0,
}
FASTER = {"optim.base_lr": 0.005, "optim.layerwise_decay": 1.0, "optim.patch_embed_lr_mult": 1.0}  # as small has them
HIGHRES = 28  # pixels; the network was pretrained on crops of 20


@dataclass(frozen=True)
class Sizes:
    """How long everything is."""

    pretraining: int = 1000  # steps
    further: int = 240
    highres: int = 120
    train_images: int = 20_000
    gallery: int = 5_000  # labelled images, of those
    test: int = 3_000
    points: int = 8  # of a curve, after its start


TINY = Sizes(pretraining=4, further=12, highres=12, train_images=64, gallery=32, test=16, points=2)


@dataclass(frozen=True)
class Domain:
    """Images [N, 28, 28] uint8 and labels [N]."""

    train: np.ndarray
    test: np.ndarray
    train_labels: torch.Tensor
    test_labels: torch.Tensor


def clothes(sizes: Sizes, folder: Path = CLOTHES) -> Domain:
    """The first images of Fashion-MNIST's two parts."""

    def read(name: str, header: int) -> np.ndarray:
        path = folder / f"{name}-ubyte.gz"
        if not path.exists():
            sys.exit(f"needs {path} of the Debian package dataset-fashion-mnist")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)

    images = [read(f"{part}-images-idx3", 16).reshape(-1, 28, 28) for part in ("train", "t10k")]
    labels = [torch.from_numpy(read(f"{part}-labels-idx1", 8).astype(np.int64)) for part in ("train", "t10k")]
    counts = (sizes.train_images, sizes.test)
    return Domain(*(x[:n] for x, n in zip((*images, *labels), (*counts, *counts), strict=True)))


def elsewhere(domain: Domain) -> Domain:
    """The new domain: each image in negative, before clouds of its own."""

    def changed(images: np.ndarray, seed: int) -> np.ndarray:
        result = np.empty_like(images)
        for i, image in enumerate(images):
            rng = np.random.default_rng((seed, i))
            clouds = cv2.resize(
                rng.uniform(20, 235, (5, 5)).astype(np.float32), (28, 28), interpolation=cv2.INTER_CUBIC
            )
            opaque = np.minimum(image.astype(np.float32) / 64, 1)
            result[i] = np.clip(opaque * (255.0 - image) + (1 - opaque) * clouds, 0, 255)
        return result

    return Domain(changed(domain.train, 0), changed(domain.test, 1), domain.train_labels, domain.test_labels)


def accuracy(network: VisionTransformer, domain: Domain, size: int, sizes: Sizes) -> float:
    """Share of the test images that k-NN among the gallery classifies rightly."""
    images = np.concatenate([domain.train[: sizes.gallery], domain.test])
    labels = torch.cat([domain.train_labels[: sizes.gallery], domain.test_labels])
    mean, std = (NETWORK["data.mean"],), (NETWORK["data.std"],)
    reading = {"channels": 1, "mean": mean, "std": std, "sixteen_bit": "full", "max_pixels": 10**6, "batch_size": 256}
    features = extract(network, SequenceSource(images), range(len(images)), size=size, **reading).cls
    in_gallery = (torch.arange(len(images)) < sizes.gallery)[None]
    predicted = knn_predict(features, labels, in_gallery, [K])[0, 0]
    return float((predicted == labels)[sizes.gallery :].double().mean())


def trained(data: np.ndarray, recipe: str, out: Path, steps: int, sizes: Sizes, console: Console, **keys: Any) -> None:
    """A run, gone on with if it was begun; the checkpoints that its curve is measured at stay."""
    every = max(steps // sizes.points, 1)
    keys = EVERY_RUN | {"train.steps": steps, "checkpoint.every_steps": every, "checkpoint.keep_every": every} | keys
    dinoforge.train(data, recipe, out, console=console, **keys)


def teachers(run: Path) -> Iterator[tuple[int, VisionTransformer]]:
    """The teacher's backbone at each checkpoint."""
    recipe, _ = load_recipe(run / "recipe.yaml")
    for step in checkpoint.steps(run):
        networks = build_student_teacher(recipe)
        checkpoint.load(run, step, networks.state_dict())
        yield step, networks.teacher.backbone.eval()


def curve(run: Path, start: VisionTransformer, domain: Domain, size: int, sizes: Sizes) -> list[tuple[int, float]]:
    """Steps and accuracies, from the start on; what was measured before is taken from a file in the run."""
    file = run / f"knn-{size}.json"
    known = {int(step): value for step, value in json.loads(file.read_text()).items()} if file.exists() else {}
    for step, network in ((0, start), *teachers(run)):
        if step not in known:
            known[step] = accuracy(network, domain, size, sizes)
            file.write_text(json.dumps(known))
    return sorted(known.items())


def measure(out: Path, sizes: Sizes, console: Console) -> dict[str, list[tuple[int, float]]]:
    """Every curve by name, after whatever training is still to be done."""
    here = clothes(sizes)
    there = elsewhere(here)
    first = out / "pretraining"
    trained(here.train, "small", first, sizes.pretraining, sizes, console, **NETWORK)
    start = dinoforge.load(first).network
    from_first = {"init.weights": str(first)}
    curves = {}
    for name, domain in (("same domain", here), ("new domain", there)):
        for kind, keys in (("continue", {}), ("continue faster", FASTER), ("small", NETWORK)):
            run = out / f"{name.split()[0]}-{kind.replace(' ', '-')}"
            trained(domain.train, kind.split()[0], run, sizes.further, sizes, console, **from_first | keys)
            curves[f"{name}, {kind}"] = curve(run, start, domain, NETWORK["crops.global_crops_size"], sizes)
    larger = {"crops.global_crops_size": HIGHRES, "crops.local_crops_size": 16}
    for recipe in ("highres", "small"):
        run = out / f"larger-{recipe}"
        keys = from_first | ({} if recipe == "highres" else NETWORK) | larger
        trained(here.train, recipe, run, sizes.highres, sizes, console, **keys)
        curves[f"larger crops, {recipe}"] = curve(run, start, here, HIGHRES, sizes)
    return curves


def render(curves: dict[str, list[tuple[int, float]]]) -> str:
    """A table: a row for each curve, in percent, at shares of its run."""
    points = max(len(curve) for curve in curves.values())
    head = ["% of the run", *(f"{round(100 * i / (points - 1))}" for i in range(points)), "lowest − start"]
    rows = [head, ["---"] * len(head)]
    for name, values in curves.items():
        shares = [value for _, value in values]
        lowest = 100 * (min(shares) - shares[0])
        rows.append([name, *(f"{100 * value:.1f}" for value in shares), f"{lowest:+.1f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/continuing"), help="default: runs/continuing")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything")
    parser.add_argument("--times", type=int, default=1, help="so many times as many steps of everything; default: 1")
    parser.add_argument("--threads", type=int, help="for computing; default: all processors")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    if options.threads:
        EVERY_RUN["train.threads"] = options.threads
        torch.set_num_threads(options.threads)
    sizes = TINY if options.tiny else Sizes()
    longer = {key: getattr(sizes, key) * options.times for key in ("pretraining", "further", "highres")}
    curves = measure(options.out, replace(sizes, **longer), Console(stderr=True))
    print(json.dumps(curves) if options.json else render(curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
