"""Weighted k-nearest-neighbour classification on frozen features, beside raw pixels and the untrained network.

The protocol of DINO and DINOv2 (arXiv 2104.14294, section 4.1; arXiv 2304.07193, section 7.1): cosine similarity of
cls tokens; each of the k nearest images votes for its class with weight exp(similarity / 0.07).
"""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoforge.data.sources import Source
from dinoforge.errors import DataError
from dinoforge.features import Reading, Skipped, embed, extract

KS = (10, 20, 100, 200)  # DINO's
TEMPERATURE = 0.07  # DINO's

# Values in the largest matrices that knn_predict makes: 128 MiB each in float32.
_CHUNK_VALUES = 2**25


class Row(TypedDict):
    """Accuracies, from 0 to 1, over the test parts of the splits; no deviation where there is one split."""

    mean: float  # at the k that each split's training part chose
    sd: float | None  # sample standard deviation
    balanced_mean: float  # mean of the classes' recalls, at the same k
    balanced_sd: float | None
    by_k: dict[str, float]  # mean accuracy at each k
    k_by_split: list[int]  # the chosen ones


class KnnResult(TypedDict):
    """The measurement, as ``dinoforge eval knn --json`` prints it."""

    knn: dict[str, Row]  # "pixels", "untrained", "trained"
    k: int  # of the trained network: the one that most splits chose, the smallest of equals
    splits: int
    n: int  # images in training and test parts together
    labels_from: str  # "folders", or the name of the labels file


def run_knn(
    backbone: nn.Module,
    untrained: nn.Module | None,
    source: Source,
    labels: Sequence[str] | None,
    *,
    labels_from: str = "folders",
    test: tuple[Source, Sequence[str] | None] | None = None,
    pixels: bool = True,
    n_splits: int = 5,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> tuple[KnnResult, list[Skipped]]:
    """How well an image's nearest neighbours tell its label: by pixels, by untrained and by trained features.

    Args:
        backbone: the trained network, from float32 images [B, C, H, W] to ``Tokens``.
        untrained: the same architecture as it starts; ``None`` leaves its row out.
        source: the labelled images.
        labels: one for each image of ``source``.
        labels_from: where the labels come from; it stands in the result.
        test: images and labels of a test part; ``None`` makes ``n_splits`` stratified splits of ``source``.
        pixels: whether raw pixels are measured, too.
        n_splits: at least 2; each holds out ``1 / n_splits`` of the images.
        seed: of the splits.
        reading: see ``dinoforge.features.Reading``.

    Returns:
        The result, and the images that could not be read and took no part.

    Raises:
        DataError: no labels, fewer than two classes, too few images, a test label without training images, or no
            readable image.
        WeightsError: features that are not finite.
    """
    parts = [_labelled(source, labels), *([_labelled(*test)] if test else [])]
    _plan([labels for _, labels in parts], n_splits, seed)  # a mistake shows now, not after the long part

    rows: dict[str, list[Tensor]] = {"pixels": [], "untrained": [], "trained": []}
    kept_labels: list[list[str]] = []
    skipped: list[Skipped] = []
    for images, image_labels in parts:
        keep = pixels or untrained is not None
        features = extract(backbone, images, range(len(images)), keep_images=keep, **reading)
        rows["trained"].append(features.cls)
        if features.images is not None and untrained is not None:
            rows["untrained"].append(embed(untrained, features.images, **reading))
        if features.images is not None and pixels:
            rows["pixels"].append(features.images.flatten(1))
        kept_labels.append([image_labels[i] for i in features.kept])
        skipped += features.skipped

    encoded, train = _plan(kept_labels, n_splits, seed)
    device = reading.get("device")
    if device is not None and device.type != "cuda":
        device = None  # MPS sorts out 16 neighbours at most in some versions; the CPU is quick enough
    knn = {
        name: measure(torch.cat(parts), encoded, train, centred=name == "pixels", device=device)
        for name, parts in rows.items()
        if parts
    }
    chosen = Counter(sorted(knn["trained"]["k_by_split"])).most_common(1)[0][0]
    return {"knn": knn, "k": chosen, "splits": len(train), "n": len(encoded), "labels_from": labels_from}, skipped


def measure(
    features: Tensor,
    labels: Tensor,
    train: Tensor,
    *,
    centred: bool = False,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
) -> Row:
    """Accuracy on the test part of each split, at the k that classifies its training part best.

    That choice leaves each training image out of its own neighbours and sees no label of the test part; of equally
    good k the smallest is taken. A k is capped at the neighbours that every training image has.

    Args:
        features: [N, D], any real type.
        labels: [N] int64, classes from 0.
        train: [S, N] bool, the training part of each split; the rest is its test part.
        centred, temperature, device: see ``knn_predict``.
        ks: numbers of neighbours to choose from.
    """
    most = int(train.sum(1).min()) - 1
    assert most >= 1
    ks = sorted({min(k, most) for k in ks})
    predictions = knn_predict(features, labels, train, ks, centred=centred, temperature=temperature, device=device)
    chosen: list[int] = []
    accuracy: list[list[float]] = []  # by split and k
    balanced: list[float] = []  # by split, at the chosen k
    for predicted, in_train in zip(predictions, train, strict=True):  # [K, N], [N]
        correct = predicted == labels
        best = int(correct[:, in_train].sum(1).argmax())  # the first of equals
        chosen.append(best)
        accuracy.append(correct[:, ~in_train].double().mean(1).tolist())
        balanced.append(balanced_accuracy(predicted[best, ~in_train], labels[~in_train]))
    at_chosen = [by_k[best] for by_k, best in zip(accuracy, chosen, strict=True)]
    return {
        "mean": fmean(at_chosen),
        "sd": stdev(at_chosen) if len(train) > 1 else None,
        "balanced_mean": fmean(balanced),
        "balanced_sd": stdev(balanced) if len(train) > 1 else None,
        "by_k": {str(k): fmean(by_k[i] for by_k in accuracy) for i, k in enumerate(ks)},
        "k_by_split": [ks[best] for best in chosen],
    }


def knn_predict(
    features: Tensor,
    labels: Tensor,
    train: Tensor,
    ks: Sequence[int],
    *,
    centred: bool = False,
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
) -> Tensor:
    """Every image's class by its nearest neighbours in the training part of each split, itself left out.

    ::

        for i in images:
            nearest = sorted(train - {i}, key=lambda j: -cos(features[i], features[j]))[:k]
            votes[c] = sum(exp(cos(features[i], features[j]) / temperature) for j in nearest if labels[j] == c)
            prediction = argmax(votes)  # the lowest class of equals

    All splits share one pass over the similarities, in chunks of images: memory grows with N, not with N².

    Args:
        features: [N, D], any real type; converted to float32 chunk by chunk.
        labels: [N] int64, classes from 0.
        train: [S, N] bool.
        ks: K numbers of neighbours.
        centred: whether each split's mean training feature is subtracted first.
        temperature: of the votes.
        device: where to compute; ``None``: the CPU.

    Returns:
        [S, K, N] int64 on the CPU.
    """
    n, classes = len(features), int(labels.max()) + 1
    size = max(1, min(1024, _CHUNK_VALUES // max(features.shape)))
    chunks = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    labels, train = labels.to(device), train.to(device)

    # Subtracting a split's mean from every feature needs no second product of features: with x measured from a
    # common origin and m the mean, (x - m)·(y - m) = x·y - x·m - y·m + m·m.
    def load(chunk: slice) -> Tensor:  # [Q, D] float32
        x = features[chunk].to(device, torch.float32)
        return x - origin if centred else F.normalize(x, dim=1)

    origin = torch.zeros(features.shape[1], device=device)
    means = torch.zeros(len(train), features.shape[1], device=device)  # [S, D]
    if centred:
        for chunk in chunks:
            means += train[:, chunk].float() @ load(chunk)
        means /= train.sum(1, keepdim=True)
        origin = means.mean(0)  # near all of them, so that the differences above lose no digits
        means -= origin
    along = torch.cat([means @ load(chunk).T for chunk in chunks], 1)  # [S, N] x·m
    squares = torch.cat([load(chunk).square().sum(1) for chunk in chunks])  # [N] x·x
    mean_squares = means.square().sum(1, keepdim=True)  # [S, 1] m·m
    scale = (squares - 2 * along + mean_squares).clamp_min(1e-12).rsqrt()  # [S, N] 1 / |x - m|

    predictions = torch.empty(len(train), len(ks), n, dtype=torch.int64)
    for chunk in chunks:
        queries = load(chunk)
        products = torch.cat([queries @ load(other).T for other in chunks], 1)  # [Q, N]
        own = torch.arange(chunk.start, chunk.stop, device=device)
        for split, in_train in enumerate(train):
            similarity = products - along[split, chunk, None] - along[split] + mean_squares[split]  # [Q, N]
            similarity *= scale[split, chunk, None] * scale[split]
            similarity[:, ~in_train] = -torch.inf
            similarity[own - chunk.start, own] = -torch.inf
            nearest, which = similarity.topk(max(ks))  # [Q, max k]
            weights = (nearest / temperature).exp()
            for i, k in enumerate(ks):
                votes = weights.new_zeros(len(own), classes).scatter_add_(1, labels[which[:, :k]], weights[:, :k])
                predictions[split, i, chunk] = votes.argmax(1).cpu()
    return predictions


def balanced_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Mean over the classes in ``labels`` [N] of the share of their images that ``predictions`` [N] gets right."""
    images = labels.bincount()
    right = labels[predictions == labels].bincount(minlength=len(images))
    return float((right[images > 0] / images[images > 0]).double().mean())


def stratified_splits(labels: Tensor, n_splits: int = 5, seed: int = 0) -> Tensor:
    """Training parts whose test parts are disjoint and hold an equal share of each class, to within one image.

    The only image of a class is in every training part: nothing could tell its class if it were held out.

    Args:
        labels: [N] int64, classes from 0.
        n_splits: at least 2.
        seed: decides which image is held out where.

    Returns:
        [n_splits, N] bool, true in the training part.

    Raises:
        DataError: fewer images to hold out than splits.
    """
    assert n_splits >= 2
    generator = torch.Generator().manual_seed(seed)
    held_out_by = torch.full_like(labels, -1)
    dealt = 0
    for label in labels.unique():
        images = (labels == label).nonzero().flatten()
        if len(images) > 1:
            images = images[torch.randperm(len(images), generator=generator)]
            # Dealt like cards, on from where the last class ended: the splits' sizes differ by one at most.
            held_out_by[images] = torch.arange(dealt, dealt + len(images)) % n_splits
            dealt += len(images)
    if dealt < n_splits:
        raise DataError(
            f"{len(labels)} labelled images are too few for {n_splits} splits: expected at least {n_splits} images of "
            "classes that have two or more"
        )
    return held_out_by != torch.arange(n_splits)[:, None]


def render(result: KnnResult) -> str:
    """The result as a table and a sentence for a terminal."""
    lines = [f"{'':<12}{'accuracy':>16}{'balanced accuracy':>22}"]
    for name, row in result["knn"].items():
        accuracy = _percent(row["mean"], row["sd"])
        lines.append(f"{name:<12}{accuracy:>16}{_percent(row['balanced_mean'], row['balanced_sd']):>22}")
    how = "on the given test images"
    if result["splits"] > 1:
        how = f"mean ± standard deviation over {result['splits']} stratified splits into training and test images"
    lines += [
        "",
        f"Weighted k-NN (k = {result['k']}) on {result['n']:,} images, labels from {result['labels_from']}; {how}.",
    ]
    return "\n".join(lines)


def _percent(mean: float, sd: float | None) -> str:
    return f"{100 * mean:.1f} %" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f} %"


def _labelled(source: Source, labels: Sequence[str] | None) -> tuple[Source, list[str]]:
    if labels is None:
        raise DataError("the images have no labels: expected a sub-folder for each class, or a labels file (--labels)")
    if len(labels) != len(source):
        raise DataError(f"expected one label for each of the {len(source)} images, got {len(labels)}")
    return source, list(labels)


def _plan(parts: Sequence[Sequence[str]], n_splits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels [N] as numbers and training parts [S, N] of one part to split, or of a training and a test part."""
    classes = {label: i for i, label in enumerate(sorted(set(parts[0])))}
    if len(classes) < 2:
        have = f"all {len(parts[0])} are labelled {parts[0][0]!r}" if parts[0] else "there are none"
        raise DataError(f"k-NN needs images of at least two classes, but {have}")
    encoded = torch.tensor([classes.get(label, -1) for part in parts for label in part])
    if (encoded < 0).any():
        unknown = sorted(set(parts[1]) - set(classes))
        raise DataError(f"the test images are labelled {unknown[0]!r}, but no training image is")
    if len(parts) == 1:
        return encoded, stratified_splits(encoded, n_splits, seed)
    if not parts[1]:
        raise DataError("there are no test images")
    return encoded, (torch.arange(len(encoded)) < len(parts[0]))[None]
