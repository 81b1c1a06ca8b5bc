"""Classifiers trained on frozen features: a grid of linear classifiers by SGD, and logistic regression.

The linear classifiers follow DINOv2 (arXiv 2304.07193, section 7.1, and its released evaluation): SGD with momentum 0.9
and a cosine schedule, for 13 learning rates, on the cls tokens of the last 1 or 4 blocks, with or without the mean
patch token. Unlike in DINOv2, features are computed once, so images are not augmented, and the best setting of the grid
is chosen within the training part.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Literal, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoforge.data.sources import Source
from dinoforge.errors import DataError
from dinoforge.evaluation.overlap import Duplicates
from dinoforge.evaluation.protocol import auroc, balanced_accuracy, gather, how_measured, percent, stratified_splits
from dinoforge.features.extract import Reading, Skipped
from dinoforge.models.vit import Tokens, VisionTransformer

Method = Literal["linear", "logreg"]

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # for a batch of 256
LAST_BLOCKS = (1, 4)  # as in the reference
BATCH_SIZE = 128  # as in the reference, per GPU
STEPS = 1250  # a tenth of the reference's 12,500 steps, which are for a million images
STRENGTHS = tuple(10.0**power for power in range(-5, 3))  # C of logistic regression
MIN_SHOTS = 5  # with fewer shots, most classes have no image left to choose a setting by

Fit = Callable[[Tensor, Tensor, int, Sequence[float]], Tensor]
"""A fit: features [N, D] of all images, labels [T] of the first T, C classes, V settings -> scores [V, N - T, C]."""


class Row(TypedDict):
    """Scores of one kind of features, 0 to 1, over the test parts of the splits; no deviation for one split."""

    mean: float
    sd: float | None
    balanced_mean: float
    balanced_sd: float | None
    auroc_mean: float | None  # two classes: of the second class; more: mean of each class against the rest
    auroc_sd: float | None
    setting_by_split: list[str]  # the setting that each training part chose


class ClassifierResult(TypedDict):
    """The result of ``dinoforge eval linear`` or ``eval logreg``, as ``--json`` prints it."""

    method: Method
    rows: dict[str, Row]  # "pixels", "untrained", "trained"
    setting: str  # the setting that most splits chose for the trained network
    splits: int
    n: int  # images in training and test parts together
    shots: int | None  # the most labelled images of each class; None: the whole training part
    labels_from: str  # "folders", or the name of the labels file
    duplicates: Duplicates  # test images that are also among the training images


class LastBlocks(nn.Module):
    """A backbone whose ``cls`` [B, (n + 1)·D] is the last n blocks' cls tokens, last first, and the mean patch token.

    Args:
        network: The backbone.
        n: The number of blocks.
    """

    def __init__(self, network: VisionTransformer, n: int) -> None:
        super().__init__()
        self.network, self.n = network, n

    def forward(self, images: Tensor) -> Tokens:
        """Compute the tokens of normalised images [B, C, H, W]."""
        layers = self.network.get_intermediate_layers(images, self.n, return_class_token=True)
        pairs = cast(tuple[tuple[Tensor, Tensor], ...], layers)
        patches = pairs[-1][0]
        cls = torch.cat([*(cls for _, cls in reversed(pairs)), patches.mean(1)], 1)
        return Tokens(cls=cls, registers=patches[:, :0], patches=patches)


def run_classifier(
    method: Method,
    backbone: VisionTransformer,
    untrained: VisionTransformer,
    source: Source,
    labels: Sequence[str | None] | None,
    *,
    labels_from: str = "folders",
    test: tuple[Source, Sequence[str | None] | None] | None = None,
    n_splits: int = 5,
    shots: int | None = None,
    seed: int = 0,
    learning_rates: Sequence[float] = LEARNING_RATES,
    **reading: Unpack[Reading],
) -> tuple[ClassifierResult, list[Skipped]]:
    """Measure how well a classifier predicts an image's label from pixels, untrained and trained frozen features.

    Args:
        method: The classifier: ``linear``, or ``logreg`` for logistic regression on the normalised cls token.
        backbone: The trained network.
        untrained: A network of the same architecture before training.
        source: The labelled images.
        labels: The label of each image of ``source``; None leaves an image out.
        labels_from: The origin of the labels, as the result names it.
        test: Images and labels of a test part; ``None`` makes ``n_splits`` stratified splits of ``source``.
        n_splits: The number of splits, at least 2; each holds out ``1 / n_splits`` of the images.
        shots: The most labelled images of each class; ``None`` for the whole training part.
        seed: The seed of the splits and of the choice of shots.
        learning_rates: The learning rates in the grid of linear classifiers, for a batch of 256.
        reading: Keywords of ``features.extract.Reading``.

    Returns:
        The result, and the images that could not be read and took no part.

    Raises:
        DataError: The labels or images cannot be used, as for ``run_knn``; there are too few shots; or scikit-learn is
            missing.
        WeightsError: Features are not finite.
    """
    if shots is not None and shots < MIN_SHOTS:
        raise DataError(
            f"--shots {shots}: eval {method} needs at least {MIN_SHOTS} to choose its setting; see eval knn"
        )
    blocks = min(max(LAST_BLOCKS), len(backbone.blocks)) if method == "linear" else 1
    if method == "logreg":
        _require_sklearn()
    sets = gather(
        LastBlocks(backbone, blocks),
        LastBlocks(untrained, blocks),
        source,
        labels,
        test=test,
        n_splits=n_splits,
        shots=shots,
        seed=seed,
        **reading,
    )
    width = backbone.embed_dim
    fit: tuple[str, Sequence[float], Fit] = ("lr", learning_rates, fit_linear)
    if method == "logreg":
        fit = ("C", STRENGTHS, fit_logreg)
    rows: dict[str, Row] = {}
    for name, features in sets.features.items():
        inputs = {name: [slice(None)]}
        if name != "pixels":
            inputs = {"cls": [slice(0, width)]}
            if method == "linear":
                numbers = sorted({min(n, blocks) for n in LAST_BLOCKS})
                inputs = {f"{n} cls": [slice(0, n * width)] for n in numbers}
                mean_patch = slice(blocks * width, None)
                inputs |= {f"{cls} + mean patch": [*columns, mean_patch] for cls, columns in inputs.items()}
        rows[name] = score_classifiers(features, sets.labels, sets.train, sets.test, inputs, *fit, seed=seed)
    chosen = Counter(rows["trained"]["setting_by_split"]).most_common(1)[0][0]
    result: ClassifierResult = {
        "method": method,
        "rows": rows,
        "setting": chosen,
        "splits": len(sets.train),
        "n": len(sets.labels),
        "shots": shots,
        "labels_from": labels_from,
        "duplicates": sets.duplicates,
    }
    return result, sets.skipped


def score_classifiers(
    features: Tensor,
    labels: Tensor,
    train: Tensor,
    test: Tensor,
    inputs: Mapping[str, Sequence[slice]],
    key: str,
    values: Sequence[float],
    fit: Fit,
    *,
    seed: int = 0,
) -> Row:
    """Compute scores on the test part of each split, with the setting that is best on a fifth of its training part.

    A classifier with this setting is then fitted on the whole training part. No label of a test part is used.

    Args:
        features: Features of all images, [N, D], any real type.
        labels: Classes from 0, [N] int64.
        train: The training part of each split, [S, N] bool.
        test: The test part of each split, [S, N] bool.
        inputs: Columns of the features to choose from, by name.
        key: The name of the setting to choose.
        values: Values of the setting to choose from.
        fit: A function that fits a classifier for each value.
        seed: The seed of the draw of a fifth of the training part.
    """
    classes = int(labels.max()) + 1
    accuracy: list[float] = []
    balanced: list[float] = []
    areas: list[float | None] = []
    settings: list[str] = []
    for in_train, in_test in zip(train, test, strict=True):
        x, y = _standardise(features, in_train), labels
        known = in_train.nonzero().flatten()
        inner = stratified_splits(y[known], 5, seed)[0]
        learn, choose = known[inner], known[~inner]
        right: dict[tuple[str, float], int] = {}
        for name, columns in inputs.items():
            trials = fit(_columns(x[torch.cat([learn, choose])], columns), y[learn], classes, values)
            right |= {
                (name, value): int((scores.argmax(1) == y[choose]).sum())
                for value, scores in zip(values, trials, strict=True)
            }
        name, value = max(right, key=lambda setting: right[setting])  # the first in a tie
        rows = torch.cat([known, in_test.nonzero().flatten()])
        scores = fit(_columns(x[rows], inputs[name]), y[known], classes, [value])[0]  # [T, C]
        predicted, truth = scores.argmax(1), y[in_test]
        settings.append(f"{name}, {key} {value:g}")
        accuracy.append(float((predicted == truth).double().mean()))
        balanced.append(balanced_accuracy(predicted, truth))
        areas.append(auroc(scores, truth))
    known_areas = [area for area in areas if area is not None]
    many = len(train) > 1
    return {
        "mean": fmean(accuracy),
        "sd": stdev(accuracy) if many else None,
        "balanced_mean": fmean(balanced),
        "balanced_sd": stdev(balanced) if many else None,
        "auroc_mean": fmean(known_areas) if known_areas else None,
        "auroc_sd": stdev(known_areas) if len(known_areas) > 1 else None,
        "setting_by_split": settings,
    }


def fit_linear(
    x: Tensor,
    labels: Tensor,
    classes: int,
    rates: Sequence[float],
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Fit one linear classifier for each learning rate, all on the same batches, with independent losses.

    SGD has momentum 0.9 and a cosine schedule to 0.

    Args:
        x: Features of all images, [N, D] float32.
        labels: Classes of the first T rows, [T] int64.
        classes: The number of classes, C.
        rates: Learning rates for a batch of 256, scaled linearly.
        steps: The number of steps.
        batch_size: The number of images in a batch.

    Returns:
        Scores of the other rows, [R, N - T, C].
    """
    generator = torch.Generator().manual_seed(0)
    known, unknown = x[: len(labels)], x[len(labels) :]
    weight = 0.01 * torch.randn(x.shape[1], classes, generator=generator)  # [D, C]
    weight = weight[:, None].repeat(1, len(rates), 1).requires_grad_()  # [D, R, C]: one product serves all rates
    bias = torch.zeros(len(rates), classes, requires_grad=True)
    lr = torch.tensor(rates)[:, None] * batch_size / 256
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(steps):
        batch = torch.randint(len(labels), (batch_size,), generator=generator)
        logits = torch.tensordot(known[batch], weight, 1) + bias  # [B, R, C]
        target = labels[batch].repeat_interleave(len(rates))
        loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="sum") / batch_size
        gradients = torch.autograd.grad(loss, [weight, bias])
        with torch.no_grad():
            for parameter, momentum, gradient in zip([weight, bias], momenta, gradients, strict=True):
                momentum.mul_(0.9).add_(gradient)
                parameter -= lr * 0.5 * (1 + math.cos(math.pi * step / steps)) * momentum
    with torch.no_grad():
        scores: Tensor = torch.tensordot(unknown, weight, 1) + bias  # [N - T, R, C]
    return scores.transpose(0, 1)


def fit_logreg(x: Tensor, labels: Tensor, classes: int, strengths: Sequence[float]) -> Tensor:
    """Fit logistic regression with an L2 penalty by scikit-learn, for each C in ``strengths``; see ``fit_linear``."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    known, unknown = x[: len(labels)].double().numpy(), x[len(labels) :].double().numpy()
    # A class without a training image is never predicted.
    scores = torch.full((len(strengths), len(unknown), classes), -torch.inf, dtype=torch.float64)
    for by_class, strength in zip(scores, strengths, strict=True):
        model = LogisticRegression(C=strength, max_iter=1000).fit(known, labels.numpy())
        by_class[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_log_proba(unknown))
    return scores


def classifier_table(result: ClassifierResult) -> str:
    """Format a result as a table and a sentence for a terminal."""
    lines = [f"{'':<12}{'accuracy':>16}{'balanced accuracy':>22}{'AUROC':>16}"]
    for name, row in result["rows"].items():
        area = "–" if row["auroc_mean"] is None else percent(row["auroc_mean"], row["auroc_sd"])
        balanced = percent(row["balanced_mean"], row["balanced_sd"])
        lines.append(f"{name:<12}{percent(row['mean'], row['sd']):>16}{balanced:>22}{area:>16}")
    title = {"linear": "Linear classifiers", "logreg": "Logistic regression"}[result["method"]]
    lines += ["", f"{title} ({result['setting']}) on {how_measured(result)}."]
    return "\n".join(lines)


def _columns(x: Tensor, slices: Sequence[slice]) -> Tensor:
    return torch.cat([x[:, columns] for columns in slices], 1)


def _standardise(features: Tensor, train: Tensor) -> Tensor:
    """Give features [N, D] float32 mean 0 and deviation 1 in the training part, [N] bool; constants become 0."""
    x = features.float()
    sd, mean = torch.std_mean(x[train], 0, correction=0)
    return torch.where(sd > 1e-6, (x - mean) / sd.clamp_min(1e-6), 0)


def _require_sklearn() -> None:
    try:
        import sklearn.linear_model  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise DataError("eval logreg needs: pip install 'dinoforge[eval]'") from error
