"""The protocol that every evaluation shares: features of labelled images, splits, shots and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from dinoforge.data.duplicates import Fingerprint
from dinoforge.data.sources import Source, printable
from dinoforge.errors import DataError
from dinoforge.evaluation import overlap
from dinoforge.features.extract import Reading, Skipped, embed, extract


@dataclass(frozen=True)
class LabelledSets:
    """Features of the same images by each network, and the training and test parts of each split.

    Args:
        features: ``trained`` [N, D] and, if wanted, ``pixels`` [N, C·H·W] uint8 and ``untrained`` [N, D].
        labels: Classes from 0, [N] int64.
        train: The training part of each split, [S, N] bool.
        test: The test part of each split, [S, N] bool.
        skipped: The images that could not be read.
        duplicates: The test images that are also among the training images.
    """

    features: dict[str, Tensor]
    labels: Tensor
    train: Tensor
    test: Tensor
    skipped: list[Skipped]
    duplicates: overlap.Duplicates


def gather(
    backbone: nn.Module,
    untrained: nn.Module | None,
    source: Source,
    labels: Sequence[str | None] | None,
    *,
    test: tuple[Source, Sequence[str | None] | None] | None = None,
    pixels: bool = True,
    n_splits: int = 5,
    shots: int | None = None,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> LabelledSets:
    """Read each image once, and embed it with both networks; for arguments and errors, see ``run_knn``."""
    parts = [_labelled(source, labels), *([_labelled(*test)] if test else [])]
    # Raise errors about labels before the long computation.
    _plan([list(labels.values()) for _, labels in parts], n_splits, seed)

    rows: dict[str, list[Tensor]] = {"pixels": [], "untrained": [], "trained": []}
    kept_labels: list[list[str]] = []
    skipped: list[Skipped] = []
    fingerprints: list[Fingerprint] = []
    names: list[str] = []
    for images, image_labels in parts:
        keep = pixels or untrained is not None
        features = extract(backbone, images, list(image_labels), keep_images=keep, fingerprints=True, **reading)
        rows["trained"].append(features.cls)
        if features.images is not None and untrained is not None:
            rows["untrained"].append(embed(untrained, features.images, **reading))
        if features.images is not None and pixels:
            rows["pixels"].append(features.images.flatten(1))
        kept_labels.append([image_labels[i] for i in features.kept])
        skipped += features.skipped
        fingerprints += features.fingerprints or []
        names += [printable(images.name(i)) for i in features.kept]

    encoded, everyone = _plan(kept_labels, n_splits, seed)
    train = everyone if shots is None else few_shot(encoded, everyone, shots, seed)
    return LabelledSets(
        features={name: torch.cat(parts) for name, parts in rows.items() if parts},
        labels=encoded,
        train=train,
        test=~everyone,
        skipped=skipped,
        duplicates=overlap.count(fingerprints, names, train, ~everyone),
    )


def stratified_splits(labels: Tensor, n_splits: int = 5, seed: int = 0) -> Tensor:
    """Split images into training and test parts; test parts are disjoint, with equal class shares to within one image.

    The only image of a class is in every training part: if it were held out, no training image would have its class.

    Args:
        labels: Classes from 0, [N] int64.
        n_splits: The number of splits, at least 2.
        seed: The seed of the assignment of images to test parts.

    Returns:
        The training part of each split, [n_splits, N] bool.

    Raises:
        DataError: Fewer images can be held out than there are splits.
    """
    assert n_splits >= 2
    generator = torch.Generator().manual_seed(seed)
    held_out_by = torch.full_like(labels, -1)
    dealt = 0
    for label in labels.unique():
        images = (labels == label).nonzero().flatten()
        if len(images) > 1:
            images = images[torch.randperm(len(images), generator=generator)]
            # Dealing continues where the last class ended, so the sizes of the splits differ by at most one.
            held_out_by[images] = torch.arange(dealt, dealt + len(images)) % n_splits
            dealt += len(images)
    if dealt < n_splits:
        raise DataError(
            f"{len(labels)} labelled images are too few for {n_splits} splits: expected at least {n_splits} images of "
            "classes that have two or more"
        )
    return held_out_by != torch.arange(n_splits)[:, None]


def few_shot(labels: Tensor, train: Tensor, shots: int, seed: int = 0) -> Tensor:
    """Draw at most ``shots`` random images of each class from each training part.

    For the same seed, the images of fewer shots are a subset of the images of more shots.

    Args:
        labels: Classes from 0, [N] int64.
        train: The training part of each split, [S, N] bool.
        shots: The maximum number of images of each class.
        seed: The seed of the draw.

    Returns:
        The smaller training parts, [S, N] bool.
    """
    chosen = torch.zeros_like(train)
    generator = torch.Generator().manual_seed(seed)
    for part, kept in zip(train, chosen, strict=True):
        order = torch.randperm(len(labels), generator=generator)
        for label in labels.unique():
            kept[order[part[order] & (labels[order] == label)][:shots]] = True
    return chosen


def balanced_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Compute the share of correct ``predictions`` [N], averaged over the classes in ``labels`` [N]."""
    images = labels.bincount()
    right = labels[predictions == labels].bincount(minlength=len(images))
    return float((right[images > 0] / images[images > 0]).double().mean())


def auroc(scores: Tensor, labels: Tensor) -> float | None:
    """Compute the area under the ROC curve: how often a class's image outscores another image, ties counting half.

    For two classes, it is the area of class 1. For more, it is the mean over the classes, each against the rest.

    Args:
        scores: The scores of each image, [N, C]; a larger score makes class c likelier.
        labels: Classes from 0, [N] int64.

    Returns:
        The area, 0 to 1; ``None`` if ``labels`` hold a single class.
    """
    present = labels.unique()
    if len(present) < 2:
        return None
    if scores.shape[1] == 2:
        scores, present = scores.diff(dim=1).expand(-1, 2), present[1:]
    areas = []
    for label in present:
        of_class = labels == label
        _, place, count = scores[:, label].unique(return_inverse=True, return_counts=True)
        ranks = (count.cumsum(0) - (count - 1) / 2).double()[place]  # from 1; equal scores share their mean rank
        n = int(of_class.sum())
        areas.append((float(ranks[of_class].sum()) - n * (n + 1) / 2) / (n * (len(labels) - n)))
    return sum(areas) / len(areas)


def percent(mean: float, sd: float | None) -> str:
    """Write a share and its deviation as a percentage."""
    return f"{100 * mean:.1f} %" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f} %"


def how_measured(result: Mapping[str, Any]) -> str:
    """Say how a result was measured, for the sentence below its table."""
    how = "on the given test images"
    if result["splits"] > 1:
        how = f"mean ± standard deviation over {result['splits']} stratified splits into training and test images"
    few = "" if result["shots"] is None else f", at most {result['shots']} labels of each class"
    return f"{result['n']:,} images, labels from {result['labels_from']}{few}; {how}"


def _labelled(source: Source, labels: Sequence[str | None] | None) -> tuple[Source, dict[int, str]]:
    """Return the images, and the labels by index, without the images that have none."""
    if labels is None:
        raise DataError("the images have no labels: expected a sub-folder for each class, or a labels file (--labels)")
    if len(labels) != len(source):
        raise DataError(f"expected one label for each of the {len(source)} images, got {len(labels)}")
    return source, {i: label for i, label in enumerate(labels) if label is not None}


def _plan(parts: Sequence[Sequence[str]], n_splits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Number the labels [N], and return training parts [S, N]: the first of two given parts, or splits of a single."""
    classes = {label: i for i, label in enumerate(sorted(set(parts[0])))}
    if len(classes) < 2:
        have = f"all {len(parts[0])} are labelled {parts[0][0]!r}" if parts[0] else "there are none"
        raise DataError(f"an evaluation needs images of at least two classes, but {have}")
    encoded = torch.tensor([classes.get(label, -1) for part in parts for label in part])
    if (encoded < 0).any():
        unknown = sorted(set(parts[1]) - set(classes))
        raise DataError(f"the test images are labelled {unknown[0]!r}, but no training image is")
    if len(parts) == 1:
        return encoded, stratified_splits(encoded, n_splits, seed)
    if not parts[1]:
        raise DataError("there are no test images")
    return encoded, (torch.arange(len(encoded)) < len(parts[0]))[None]
