"""Weighted k-nearest-neighbour classification on frozen features, beside raw pixels and the untrained network.

The protocol is that of DINO and DINOv2 (arXiv 2104.14294, section 4.1; arXiv 2304.07193, section 7.1). Cls tokens are
compared by cosine similarity, and each of the k nearest images votes for its class with weight exp(similarity / 0.07).
"""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoforge.data.sources import Source
from dinoforge.evaluation.overlap import Duplicates
from dinoforge.evaluation.protocol import balanced_accuracy, few_shot, gather, how_measured, percent
from dinoforge.features.extract import Reading, Skipped

KS = (10, 20, 100, 200)  # DINO's values of k
TEMPERATURE = 0.07  # DINO's temperature
MOST_CHOOSE = 10_000  # the most training images of a split that choose its k, since the time grows with their square
CHUNK_VALUES = 2**25  # values in the largest matrices that knn_predict makes: 128 MiB each in float32


class Row(TypedDict):
    """Accuracies of one kind of features, 0 to 1, over the test parts of the splits; no deviation for one split."""

    mean: float  # at the k that each split's training part chose
    sd: float | None  # sample standard deviation
    balanced_mean: float  # mean of the classes' recalls, at the same k
    balanced_sd: float | None
    by_k: dict[str, float]  # mean accuracy at each k
    k_by_split: list[int]  # the k that each split chose


class KnnResult(TypedDict):
    """The result of ``dinoforge eval knn``, as ``--json`` prints it."""

    knn: dict[str, Row]  # "pixels", "untrained", "trained"
    k: int  # the k that most splits chose for the trained network; the smallest in a tie
    splits: int
    n: int  # images in training and test parts together
    shots: int | None  # the most labelled images of each class; None: the whole training part
    labels_from: str  # "folders", or the name of the labels file
    duplicates: Duplicates  # test images that are also among the training images


def run_knn(
    backbone: nn.Module,
    untrained: nn.Module | None,
    source: Source,
    labels: Sequence[str | None] | None,
    *,
    labels_from: str = "folders",
    test: tuple[Source, Sequence[str | None] | None] | None = None,
    pixels: bool = True,
    n_splits: int = 5,
    shots: int | None = None,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> tuple[KnnResult, list[Skipped]]:
    """Measure how well an image's nearest neighbours predict its label, for pixels, untrained and trained features.

    Args:
        backbone: The trained network, from float32 images [B, C, H, W] to ``Tokens``.
        untrained: A network of the same architecture before training; ``None`` leaves its row out.
        source: The labelled images.
        labels: The label of each image of ``source``; None leaves an image out.
        labels_from: The origin of the labels, as the result names it.
        test: Images and labels of a test part; ``None`` makes ``n_splits`` stratified splits of ``source``.
        pixels: Whether raw pixels are measured, too.
        n_splits: The number of splits, at least 2; each holds out ``1 / n_splits`` of the images.
        shots: The most labelled images of each class; ``None`` for the whole training part.
        seed: The seed of the splits and of the choice of shots.
        reading: Keywords of ``features.extract.Reading``.

    Returns:
        The result, and the images that could not be read and took no part.

    Raises:
        DataError: There are no labels, fewer than two classes, or too few images; a test label has no training
            images; or no image can be read.
        WeightsError: Features are not finite.
    """
    sets = gather(
        backbone,
        untrained,
        source,
        labels,
        test=test,
        pixels=pixels,
        n_splits=n_splits,
        shots=shots,
        seed=seed,
        **reading,
    )
    device = reading.get("device")
    if device is not None and device.type != "cuda":
        device = None  # in some versions, topk on MPS returns at most 16 neighbours; the CPU is fast enough
    knn = {
        name: score_knn(x, sets.labels, sets.train, test=sets.test, centred=name == "pixels", device=device)
        for name, x in sets.features.items()
    }
    chosen = Counter(sorted(knn["trained"]["k_by_split"])).most_common(1)[0][0]
    result: KnnResult = {
        "knn": knn,
        "k": chosen,
        "splits": len(sets.train),
        "n": len(sets.labels),
        "shots": shots,
        "labels_from": labels_from,
        "duplicates": sets.duplicates,
    }
    return result, sets.skipped


def score_knn(
    features: Tensor,
    labels: Tensor,
    train: Tensor,
    *,
    test: Tensor | None = None,
    centred: bool = False,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
    most_choose: int = MOST_CHOOSE,
) -> Row:
    """Compute the accuracy on the test part of each split, at the k that classifies its training part best.

    The choice of k leaves each training image out of its own neighbours, and uses no label of the test part. Of equally
    good values, the smallest k is chosen. Values of k are capped at the number of neighbours of a training image.

    Args:
        features: Features of all images, [N, D], any real type.
        labels: Classes from 0, [N] int64.
        train: The training part of each split, [S, N] bool.
        test: The test part of each split, [S, N] bool; ``None`` for all other images.
        centred: Whether each split's mean training feature is subtracted first.
        ks: Numbers of neighbours to choose from.
        temperature: The temperature of the votes.
        device: The device of the computation; ``None`` for the CPU.
        most_choose: The most training images of a split that choose its k; of more images, so many are drawn at random.
    """
    most = int(train.sum(1).min()) - 1
    assert most >= 1
    ks = sorted({min(k, most) for k in ks})
    test = ~train if test is None else test
    choose = few_shot(torch.zeros_like(labels), train, most_choose)  # a random draw regardless of class
    predictions = knn_predict(
        features,
        labels,
        train,
        ks,
        queries=(choose | test).any(0),
        centred=centred,
        temperature=temperature,
        device=device,
    )
    chosen: list[int] = []
    accuracy: list[list[float]] = []  # by split and k
    balanced: list[float] = []  # by split, at the chosen k
    for predicted, chooses, in_test in zip(predictions, choose, test, strict=True):  # [K, N], [N]
        correct = predicted == labels
        best = int(correct[:, chooses].sum(1).argmax())  # the first in a tie
        chosen.append(best)
        accuracy.append(correct[:, in_test].double().mean(1).tolist())
        balanced.append(balanced_accuracy(predicted[best, in_test], labels[in_test]))
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
    queries: Tensor | None = None,
    centred: bool = False,
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
    chunk_values: int = CHUNK_VALUES,
) -> Tensor:
    """Predict every image's class by its nearest neighbours in the training part of each split, without itself.

    ::

        for i in images:
            nearest = sorted(train - {i}, key=lambda j: -cos(features[i], features[j]))[:k]
            votes[c] = sum(exp(cos(features[i], features[j]) / temperature) for j in nearest if labels[j] == c)
            prediction = argmax(votes)  # the lowest class in a tie

    All splits share one pass over the similarities, in chunks of images, so memory grows with N, not with N².

    Args:
        features: Features of all images, [N, D], any real type; converted to float32 chunk by chunk.
        labels: Classes from 0, [N] int64.
        train: The training part of each split, [S, N] bool.
        ks: The numbers of neighbours, K of them.
        queries: The images to classify, [N] bool; ``None`` for all.
        centred: Whether each split's mean training feature is subtracted first.
        temperature: The temperature of the votes.
        device: The device of the computation; ``None`` for the CPU.
        chunk_values: The most values in the largest temporary matrices.

    Returns:
        Classes, [S, K, N] int64 on the CPU; -1 for images that are not queries.
    """
    n, classes = len(features), int(labels.max()) + 1
    size = max(1, min(1024, chunk_values // max(features.shape)))
    chunks = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    labels, train = labels.to(device), train.to(device)

    # Subtracting a split's mean from every feature needs no second product of features: with x measured from a
    # common origin and m the mean, (x - m)·(y - m) = x·y - x·m - y·m + m·m.
    def load(chunk: slice | Tensor) -> Tensor:  # [Q, D] float32
        x = features[chunk].to(device, torch.float32)
        return x - origin if centred else F.normalize(x, dim=1)

    origin = torch.zeros(features.shape[1], device=device)
    means = torch.zeros(len(train), features.shape[1], device=device)  # [S, D]
    if centred:
        for chunk in chunks:
            means += train[:, chunk].float() @ load(chunk)
        means /= train.sum(1, keepdim=True)
        origin = means.mean(0)  # near all means, so that the differences above lose no digits
        means -= origin
    along = torch.cat([means @ load(chunk).T for chunk in chunks], 1)  # [S, N] x·m
    squares = torch.cat([load(chunk).square().sum(1) for chunk in chunks])  # [N] x·x
    mean_squares = means.square().sum(1, keepdim=True)  # [S, 1] m·m
    scale = (squares - 2 * along + mean_squares).clamp_min(1e-12).rsqrt()  # [S, N] 1 / |x - m|

    predictions = torch.full((len(train), len(ks), n), -1)
    asked = torch.arange(n) if queries is None else queries.nonzero().flatten()
    for own in asked.split(size):
        x = load(own)
        products = torch.cat([x @ load(chunk).T for chunk in chunks], 1)  # [Q, N]
        there = own.to(device)
        for split, in_train in enumerate(train):
            similarity = products - along[split, there, None] - along[split] + mean_squares[split]  # [Q, N]
            similarity *= scale[split, there, None] * scale[split]
            similarity[:, ~in_train] = -torch.inf
            similarity[torch.arange(len(own), device=device), there] = -torch.inf
            nearest, which = similarity.topk(max(ks))  # [Q, max k]
            weights = (nearest / temperature).exp()
            for i, k in enumerate(ks):
                votes = weights.new_zeros(len(own), classes).scatter_add_(1, labels[which[:, :k]], weights[:, :k])
                predictions[split, i, own] = votes.argmax(1).cpu()
    return predictions


def knn_table(result: KnnResult) -> str:
    """Format a result as a table and a sentence for a terminal."""
    lines = [f"{'':<12}{'accuracy':>16}{'balanced accuracy':>22}"]
    for name, row in result["knn"].items():
        accuracy = percent(row["mean"], row["sd"])
        lines.append(f"{name:<12}{accuracy:>16}{percent(row['balanced_mean'], row['balanced_sd']):>22}")
    lines += [
        "",
        f"Weighted k-NN (k = {result['k']}) on {how_measured(result)}.",
    ]
    return "\n".join(lines)
