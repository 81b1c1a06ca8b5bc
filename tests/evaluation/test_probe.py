"""Measuring quickly while training: against plain loops, and on real images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinoforge.data.sources import SequenceSource, open_source
from dinoforge.errors import DataError
from dinoforge.evaluation.knn import knn_predict
from dinoforge.evaluation.probe import PENALTIES, Probe, ridge_predict
from dinoforge.models.vit import Tokens

READING = {"size": 8, "channels": 1, "mean": [0.5], "std": [0.5], "sixteen_bit": "full", "max_pixels": 10**6}


def clusters(n, classes, dim, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + spread * torch.randn(n, dim, generator=generator) + 3, labels


def refit_for_each(features, labels):
    """Least squares with all images but one, again and again: predictions at the best penalty, in plain float64."""
    x = features.double()
    x = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    y = np.eye(int(labels.max()) + 1)[labels.numpy()]
    largest = np.linalg.svd(x, compute_uv=False)[0] ** 2
    best = None
    for share in PENALTIES:
        predicted = np.empty_like(y)
        for i in range(len(x)):
            others = np.arange(len(x)) != i
            a = np.hstack([x[others], np.ones((len(x) - 1, 1))])
            penalty = share * largest * np.diag([*[1.0] * x.shape[1], 0.0])  # the constant costs nothing
            w = np.linalg.solve(a.T @ a + penalty, a.T @ y[others])
            predicted[i] = np.append(x[i], 1) @ w
        error = ((predicted - y) ** 2).sum()
        if best is None or error < best[0]:
            best = (error, predicted.argmax(1))
    return torch.from_numpy(best[1])


@pytest.mark.parametrize("dim", [6, 50])
def test_the_linear_classifier_is_fitted_without_the_image_it_tells(dim):
    features, labels = clusters(40, 3, dim, spread=1.5 if dim == 6 else 4.0)
    expected = refit_for_each(features, labels)
    assert torch.equal(ridge_predict(features, labels), expected)
    assert torch.equal(ridge_predict(features, labels, columns=7), expected)
    assert 0.4 < float((expected == labels).float().mean()) < 1


def test_random_labels_are_not_told():
    features, _ = clusters(400, 4, 100, spread=1.0)
    labels = torch.randint(4, (400,), generator=torch.Generator().manual_seed(5))
    assert float((ridge_predict(features, labels) == labels).float().mean()) < 0.35


class Flat(nn.Module):
    """The first pixels as cls token."""

    def forward(self, images):
        cls = images.flatten(1)[:, :10]
        return Tokens(cls=cls, registers=cls[:, None, :0], patches=cls[:, None, :0])


def labelled(n=40, classes=2):
    rng = np.random.default_rng(0)
    made = [(rng.integers(50 * (i % classes), 50 * (i % classes) + 100, (8, 8), dtype=np.uint8)) for i in range(n)]
    return SequenceSource(made), [str(i % classes) for i in range(n)]


def test_scores_are_those_of_the_definitions():
    source, labels = labelled()
    probe = Probe(source, labels, max_images=1000, **READING)
    images = torch.stack([torch.from_numpy(source.item(i).image) for i in range(40)])
    truth = torch.arange(40) % 2
    everyone = torch.ones(1, 40, dtype=torch.bool)

    def share(predicted):
        return float((predicted == truth).double().mean())

    baselines = probe.baselines(Flat())
    pixels = images.flatten(1)
    assert baselines["pixels"].knn == share(knn_predict(pixels, truth, everyone, [20], centred=True)[0, 0])
    assert baselines["pixels"].linear == share(ridge_predict(pixels, truth))
    cls = (pixels[:, :10] / 255 - 0.5) / 0.5
    assert probe.measure(Flat()).knn == share(knn_predict(cls, truth, everyone, [20])[0, 0])
    assert vars(baselines["untrained"]) == vars(probe.measure(Flat()))


def test_a_choice_of_the_images_that_depends_on_the_seed_alone():
    source, labels = labelled(200, classes=4)
    first = Probe(source, labels, max_images=50, seed=1, **READING)
    assert len(first) == 50
    assert first.indices == Probe(source, labels, max_images=50, seed=1, **READING).indices
    other = Probe(source, labels, max_images=50, seed=2, **READING)
    assert first.indices != other.indices
    assert len({first.fingerprint, other.fingerprint, Probe(source, labels, max_images=60, **READING).fingerprint}) == 3


def test_memory_bounds_the_number_of_images():
    assert len(Probe(*labelled(), max_images=1000, max_bytes=30 * 64 + 1, **READING)) == 30


@pytest.mark.parametrize(
    "labels",
    [["a"] * 40, [str(i) for i in range(40)], [*(["a"] * 10), *(str(i) for i in range(30))], [*["a"] * 39, "b"]],
)
def test_labels_by_which_nothing_can_be_measured(labels):
    with pytest.raises(DataError, match="classes"):
        Probe(labelled()[0], labels, max_images=1000, **READING)


def test_damaged_images_take_no_part(tmp_path):
    source, labels = labelled(30)
    for i in range(30):
        (tmp_path / labels[i]).mkdir(exist_ok=True)
        path = tmp_path / labels[i] / f"{i:02}.png"
        Image.fromarray(source.item(i).image).save(path)
        if i == 7:
            path.write_bytes(b"no image")
    folder = open_source(tmp_path)
    probe = Probe(folder, folder.labels(), max_images=1000, **READING)
    assert len(probe) == 30
    before = probe.fingerprint
    probe.baselines(Flat())
    assert len(probe) == 29
    assert probe.fingerprint == before
    assert vars(probe.measure(Flat())) == vars(probe.measure(Flat()))
