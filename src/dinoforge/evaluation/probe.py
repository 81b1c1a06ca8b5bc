"""A quick measurement of a backbone on a few labelled images, repeated during training.

It scores weighted k-NN as in ``dinoforge eval knn``, at one k, and a linear classifier by least squares. Both classify
each image by all other images, so every image counts, and no classifier is trained by steps. The scores compare moments
of one run. For numbers to report, use the evaluation commands.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoforge.data.sources import Source, printable
from dinoforge.errors import DataError
from dinoforge.evaluation import overlap
from dinoforge.evaluation.knn import knn_predict
from dinoforge.features.extract import Reading, Skipped, embed, extract

K = 20  # the best k in DINO for most networks
PENALTIES = tuple(10.0**power for power in range(-6, 1))  # candidates for the linear classifier
MIN_IMAGES = 10
MOST_BYTES = 2**28  # bytes of images kept in memory
COLUMNS = 4096  # number of features that are standardised at a time


@dataclass(frozen=True)
class Scores:
    """Top-1 accuracies of one kind of features, 0 to 1."""

    knn: float
    linear: float


class Probe:
    """Measures backbones on a random selection of the labelled images.

    The probe does not change the global random state, and its results must not be used for training.

    Args:
        source: The images.
        labels: The label of each image; None leaves an image out.
        max_images: The most images to select; fewer if they would take more than ``max_bytes``.
        seed: The seed of the selection.
        max_bytes: The most memory for the images, which are kept, in bytes.
        reading: Keywords of ``features.extract.Reading``: how images are shown to a backbone.

    Raises:
        DataError: The labels have too few classes, or too few images per class, to measure anything.
    """

    def __init__(
        self,
        source: Source,
        labels: Sequence[str | None],
        *,
        max_images: int,
        seed: int = 0,
        max_bytes: int = MOST_BYTES,
        **reading: Unpack[Reading],
    ) -> None:
        self.source, self.reading = source, reading
        most = min(max_images, max_bytes // (reading["channels"] * reading["size"] ** 2))
        labelled = [(i, label) for i, label in enumerate(labels) if label is not None]
        order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed))
        drawn = [labelled[place] for place in sorted(order[:most].tolist())]
        chosen = [i for i, _ in drawn]
        number = {label: i for i, label in enumerate(sorted({label for _, label in drawn}))}
        encoded = torch.tensor([number[label] for _, label in drawn], dtype=torch.int64)
        # The only image of a class cannot be classified by other images.
        has_others = encoded.bincount(minlength=len(number))[encoded] > 1
        self.indices = [i for i, kept in zip(chosen, has_others.tolist(), strict=True) if kept]
        _, self.labels = encoded[has_others].unique(return_inverse=True)
        self.classes = int(self.labels.max()) + 1 if len(self.labels) else 0
        if self.classes < 2 or len(self.indices) < MIN_IMAGES or len(self.indices) < len(chosen) / 2:
            raise DataError(
                f"{len(number):,} different labels of {len(chosen):,} images: expected two or more classes, most of "
                f"them with several images, and {MIN_IMAGES} images"
            )
        self._images: Tensor | None = None
        self.skipped: list[Skipped] = []
        """The images that turned out to be unreadable."""
        self.duplicates: overlap.Duplicates | None = None
        """The images that are equal or nearly equal to others, known once the images are read."""
        everything = repr((self.indices, self.labels.tolist(), sorted(reading.items(), key=str)))
        self.fingerprint = hashlib.sha256(everything.encode()).hexdigest()
        """A hash of everything that scores depend on, except the weights."""

    def __len__(self) -> int:
        return len(self.indices)

    def measure(self, backbone: nn.Module) -> Scores:
        """Compute the scores of a backbone's cls tokens.

        Raises:
            WeightsError: Features are not finite.
            DataError: No image can be read.
        """
        features, _ = self._features(backbone)
        return self._scores(features, pixels=False)

    def baselines(self, untrained: nn.Module) -> dict[str, Scores]:
        """Compute the scores of raw pixels and of an untrained network, as ``pixels`` and ``untrained``."""
        features, images = self._features(untrained)
        return {
            "pixels": self._scores(images.flatten(1), pixels=True),
            "untrained": self._scores(features, pixels=False),
        }

    def _features(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        """Compute the features [N, D] of the images, and return them with the images, uint8 [N, C, size, size].

        Images are read once. Unreadable images are left out from then on.
        """
        if self._images is not None:
            return embed(backbone, self._images, **self.reading), self._images
        found = extract(backbone, self.source, self.indices, keep_images=True, fingerprints=True, **self.reading)
        assert found.images is not None
        place = {index: i for i, index in enumerate(self.indices)}
        self.labels = self.labels[[place[index] for index in found.kept]]
        self.indices, self._images, self.skipped = found.kept, found.images, found.skipped
        everyone = torch.ones(1, len(self.indices), dtype=torch.bool)  # each image is classified by all others
        names = [printable(self.source.name(index)) for index in self.indices]
        self.duplicates = overlap.count(found.fingerprints or [], names, everyone, everyone)
        return found.cls, found.images

    def _scores(self, features: Tensor, *, pixels: bool) -> Scores:
        n = len(self.labels)
        everyone = torch.ones(1, n, dtype=torch.bool)
        predicted = knn_predict(features, self.labels, everyone, [min(K, n - 1)], centred=pixels)[0, 0]
        by_line = ridge_predict(features, self.labels)
        return Scores(*(float((p == self.labels).double().mean()) for p in (predicted, by_line)))


def ridge_predict(features: Tensor, labels: Tensor, *, columns: int = COLUMNS) -> Tensor:
    """Predict every image's class by the linear classifier that fits all other images.

    ::

        for i in images:
            W, b = argmin(sum(|W @ x[j] + b - one_hot(labels[j])|^2 for j in images if j != i) + penalty * |W|^2)
            prediction = argmax(W @ x[i] + b)

    Features are standardised to mean 0 and standard deviation 1. The penalty is the value in ``PENALTIES``, a share of
    the largest squared singular value, with the least sum of squares over left-out images. The result is exact, from
    one decomposition (Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", section 7.10).

    Args:
        features: Features of the images, [N, D], any real type.
        labels: Classes from 0, [N] int64.
        columns: The number of features that are standardised at a time.

    Returns:
        Classes, [N] int64.
    """
    n = len(labels)
    y = F.one_hot(labels).double()  # [N, C]
    # Raw pixels are far more than images. They are standardised in parts, and enter only products between images.
    parts = (_standardise(part) for part in features.split(columns, dim=1))
    if features.shape[1] < n:
        x = torch.cat(list(parts), 1)  # [N, D]
        squares, v = torch.linalg.eigh(x.T @ x)
        u = x @ v / squares.clamp_min(1e-12).sqrt()  # [N, D] left singular vectors
    else:
        squares, u = torch.linalg.eigh(sum((x @ x.T for x in parts), torch.zeros(n, n, dtype=torch.float64)))
    squares = squares.clamp_min(0)
    along = u.T @ (y - y.mean(0))
    best, chosen = float("inf"), y
    for share in PENALTIES:
        kept = squares / (squares + share * squares.max().clamp_min(1e-12))
        fitted = y.mean(0) + u @ (kept[:, None] * along)
        leverage = u.square() @ kept + 1 / n  # weight of an image's own label in its prediction
        left_out = y - (y - fitted) / (1 - leverage).clamp_min(1e-9)[:, None]
        error = float((left_out - y).square().sum())
        if error < best:
            best, chosen = error, left_out
    return chosen.argmax(1)


def _standardise(x: Tensor) -> Tensor:
    """Give features [N, D] mean 0 and deviation 1, in float64; constants become 0."""
    sd, mean = torch.std_mean(x.double(), 0, correction=0)
    return torch.where(sd > 1e-6, (x.double() - mean) / sd.clamp_min(1e-6), 0)
