import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from dinoforge.data.sources import open_source
from dinoforge.errors import DataError
from dinoforge.evaluation.classifiers import (
    Fit,
    LastBlocks,
    Method,
    classifier_table,
    fit_linear,
    fit_logreg,
    run_classifier,
    score_classifiers,
)
from dinoforge.evaluation.protocol import auroc, few_shot, stratified_splits
from dinoforge.models.vit import VisionTransformer

READING = {
    "size": 8,
    "channels": 3,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "sixteen_bit": "full",
    "max_pixels": 10**6,
}


def network(depth: int = 2) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(embed_dim=16, depth=depth, num_heads=2, patch_size=4, image_size=8, layerscale=1.0)


def clusters(n: int, classes: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, 8, generator=generator)
    return centres[labels] + spread * torch.randn(n, 8, generator=generator), labels


def test_each_learning_rate_of_the_grid_is_torch_sgd_by_itself() -> None:
    x, labels = clusters(60, 3, spread=1.0)
    rates, steps, batch_size = (0.01, 0.3), 20, 16
    together = fit_linear(x, labels[:40], 3, rates, steps=steps, batch_size=batch_size)
    for rate, scores in zip(rates, together, strict=True):
        generator = torch.Generator().manual_seed(0)
        weight = (0.01 * torch.randn(8, 3, generator=generator)).requires_grad_()
        bias = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr=rate * batch_size / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            batch = torch.randint(40, (batch_size,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(x[batch] @ weight + bias, labels[batch]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(scores, x[40:] @ weight.detach() + bias.detach(), rtol=1e-4, atol=1e-5)


def test_last_blocks_are_cls_tokens_last_first_and_the_mean_patch() -> None:
    net, images = network(depth=3).eval(), torch.randn(2, 3, 8, 8)
    features = LastBlocks(net, 2)(images).cls
    (_, before), (patches, last) = net.get_intermediate_layers(images, 2, return_class_token=True)
    assert torch.equal(features, torch.cat([last, before, patches.mean(1)], 1))
    torch.testing.assert_close(features[:, :16], net(images).cls)


@pytest.mark.parametrize("classes", [2, 4])
def test_auroc_is_scikit_learns(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(100) % classes
    scores = torch.randint(6, (100, classes), generator=generator).float()  # many ties
    scores[torch.arange(100), labels] += 1
    if classes == 2:
        expected = roc_auc_score(labels, scores[:, 1] - scores[:, 0])
    else:
        expected = np.mean([roc_auc_score(labels == c, scores[:, c]) for c in range(classes)])
    assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert auroc(scores[labels == 0], labels[labels == 0]) is None


def test_few_shots_are_few_of_each_class_within_the_training_part() -> None:
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 2)
    train = stratified_splits(labels, 4)
    few, more = few_shot(labels, train, 3), few_shot(labels, train, 6)
    assert not (more & ~train).any()
    assert not (few & ~more).any()
    for part, whole in zip(few, train, strict=True):
        assert labels[part].bincount(minlength=3).tolist() == labels[whole].bincount(minlength=3).clamp(max=3).tolist()


COLUMNS = {"all": [slice(None)]}


@pytest.mark.parametrize("fit", [("lr", [0.1, 1.0], fit_linear), ("C", [0.1, 1.0], fit_logreg)])
def test_separable_classes_are_told_apart_and_noise_is_at_chance(fit: tuple[str, list[float], Fit]) -> None:
    x, labels = clusters(200, 2, spread=0.1)
    train = stratified_splits(labels, 2)
    assert score_classifiers(x, labels, train, ~train, COLUMNS, *fit)["mean"] == 1.0
    noise = score_classifiers(
        torch.randn(200, 8, generator=torch.Generator().manual_seed(1)), labels, train, ~train, COLUMNS, *fit
    )
    assert 0.35 < noise["mean"] < 0.65
    assert noise["auroc_mean"] is not None
    assert 0.35 < noise["auroc_mean"] < 0.65


def test_chosen_setting_sees_no_test_label() -> None:
    x, labels = clusters(100, 2, spread=2.0)
    train = stratified_splits(labels, 2)[:1]
    other = torch.where(train[0], labels, 1 - labels)
    true, false = (
        score_classifiers(x, y, train, ~train, COLUMNS, "C", [0.01, 1.0, 100.0], fit_logreg) for y in (labels, other)
    )
    assert true["setting_by_split"] == false["setting_by_split"]
    assert true["mean"] == pytest.approx(1 - false["mean"])


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """20 noisy images each of red and blue, in a folder each."""
    generator = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (tmp_path / name).mkdir()
        for i in range(20):
            image = generator.integers(0, 120, (10, 14, 3), dtype=np.uint8)
            image[..., channel] += 100
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "logreg"])
def test_run_from_folders(method: Method, colours: Path) -> None:
    source = open_source(colours)
    net = network()
    choice = {"n_splits": 2, "shots": 8, "learning_rates": (0.01, 0.1)}
    result, skipped = run_classifier(method, net, net, source, source.labels(), **choice, **READING)
    assert skipped == []
    assert (result["n"], result["splits"], result["shots"]) == (40, 2, 8)
    assert result["rows"]["untrained"] == result["rows"]["trained"]
    assert result["rows"]["pixels"]["mean"] > 0.9
    assert json.loads(json.dumps(result)) == result
    assert "at most 8 labels of each class" in classifier_table(result)


def test_too_few_shots(colours: Path) -> None:
    source = open_source(colours)
    with pytest.raises(DataError, match="at least 5"):
        run_classifier("linear", network(), network(), source, source.labels(), shots=4, **READING)
