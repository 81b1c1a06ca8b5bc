import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from dinoforge.data.sources import open_source
from dinoforge.errors import DataError
from dinoforge.evaluation import knn
from dinoforge.evaluation.knn import knn_predict, knn_table, run_knn, score_knn
from dinoforge.evaluation.protocol import balanced_accuracy, stratified_splits
from dinoforge.models.vit import Tokens


def clusters(n: int, classes: int, dim: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [n, dim] around one random centre per class, and labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + spread * torch.randn(n, dim, generator=generator), labels


def two_loops(features: Tensor, labels: Tensor, train: Tensor, k: int, temperature: float, centred: bool) -> list[int]:
    """One split, straight from the definition, in float64."""
    x = features.double()
    if centred:
        x = x - x[train].mean(0)
    predictions = []
    for i in range(len(x)):
        similarity = {j: float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for j in range(len(x)) if train[j] and j != i}
        votes = [0.0] * (int(labels.max()) + 1)
        for j in sorted(similarity, key=lambda j: -similarity[j])[:k]:
            votes[int(labels[j])] += math.exp(similarity[j] / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize("centred", [False, True])
def test_equals_two_loops(centred: bool) -> None:
    features, labels = clusters(90, classes=4, dim=12, spread=1.5)
    features += 3.0  # far from the origin, as pixels are
    train = stratified_splits(labels, 3)
    ks = [1, 5, 20]
    expected = [[two_loops(features, labels, part, k, 0.07, centred) for k in ks] for part in train]
    assert torch.equal(knn_predict(features, labels, train, ks, centred=centred), torch.tensor(expected))
    chunked = knn_predict(features, labels, train, ks, centred=centred, chunk_values=90 * 7)  # of 7, the last one of 6
    assert torch.equal(chunked, torch.tensor(expected))


def test_only_queries_are_classified() -> None:
    features, labels = clusters(90, classes=4, dim=12, spread=1.5)
    train = stratified_splits(labels, 3)
    queries = torch.arange(90) % 4 == 1
    expected = knn_predict(features, labels, train, [5])
    expected[..., ~queries] = -1
    assert torch.equal(knn_predict(features, labels, train, [5], queries=queries, chunk_values=90 * 7), expected)


def test_of_many_training_images_some_choose_k(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(200, classes=4, dim=6, spread=1.0)
    train = (torch.arange(200) < 150)[None]
    by_all = score_knn(features, labels, train)
    asked: list[Tensor] = []

    def predict(*arguments: object, queries: Tensor, **keys: object) -> Tensor:
        asked.append(queries)
        return knn_predict(*arguments, queries=queries, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(knn, "knn_predict", predict)
    by_some = score_knn(features, labels, train, most_choose=40)
    assert int(asked[0][:150].sum()) == 40
    assert bool(asked[0][150:].all())
    assert by_some["by_k"] == by_all["by_k"]  # all images are still neighbours


def test_centring_bytes_loses_no_digits() -> None:
    # Bright images that differ little: the mean is a hundred times the deviations.
    features, labels = clusters(60, classes=3, dim=500, spread=1.0)
    images = (240 + 1.5 * features).round().clamp(0, 255).to(torch.uint8)
    train = stratified_splits(labels, 2)
    expected = [[two_loops(images, labels, part, 5, 0.07, centred=True)] for part in train]
    assert torch.equal(knn_predict(images, labels, train, [5], centred=True), torch.tensor(expected))


def test_the_nearer_neighbours_outvote_the_many() -> None:
    # One neighbour of class 0 at cosine 1, two of class 1 at cosine 0: exp(1 / 0.07) against 2.
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels, train = torch.tensor([0, 0, 1, 1]), torch.tensor([[False, True, True, True]])
    assert knn_predict(features, labels, train, [3])[0, 0, 0] == 0
    # At a high temperature each vote counts alike.
    assert knn_predict(features, labels, train, [3], temperature=1e6)[0, 0, 0] == 1


def test_equal_votes_go_to_the_lowest_class() -> None:
    features, train = torch.ones(3, 2), torch.tensor([[False, True, True]])
    for labels in ([0, 2, 1], [0, 1, 2]):
        assert knn_predict(features, torch.tensor(labels), train, [2])[0, 0, 0] == 1


def test_features_of_zeros_are_no_trouble() -> None:
    labels, train = torch.tensor([0, 1, 0, 1]), torch.tensor([[True, True, False, False]])
    for centred in (False, True):
        predictions = knn_predict(torch.zeros(4, 3), labels, train, [2], centred=centred)
        assert predictions[0, 0, 2:].tolist() == [0, 0]  # one vote for each class


def test_k_is_capped_at_the_neighbours_there_are() -> None:
    features, labels = clusters(40, classes=2, dim=4, spread=0.1)
    assert list(score_knn(features, labels, stratified_splits(labels, 5))["by_k"]) == ["10", "20", "31"]
    first_half = torch.arange(40)[None] < 20
    assert list(score_knn(features, labels, first_half)["by_k"]) == ["10", "19"]


def test_chosen_k_sees_no_test_label() -> None:
    features, labels = clusters(300, classes=3, dim=8, spread=2.0)
    train = stratified_splits(labels, 5)[:1]
    row = score_knn(features, labels, train)
    shuffled = labels.clone()
    held_out = (~train[0]).nonzero().flatten()
    shuffled[held_out] = labels[held_out.roll(7)]
    other = score_knn(features, shuffled, train)
    assert other["by_k"] != row["by_k"]
    assert other["k_by_split"] == row["k_by_split"]


def test_chosen_k_is_the_best_of_the_training_part() -> None:
    features, labels = clusters(100, classes=4, dim=6, spread=1.5)
    train = stratified_splits(labels, 2)
    row = score_knn(features, labels, train, ks=[1, 3, 9, 27])
    for part, chosen in zip(train, row["k_by_split"], strict=True):
        predictions = {k: torch.tensor(two_loops(features, labels, part, k, 0.07, False)) for k in (1, 3, 9, 27)}
        right = {k: int((predicted == labels)[part].sum()) for k, predicted in predictions.items()}
        assert chosen == max(right, key=lambda k: right[k])


def test_mean_and_deviation_over_splits() -> None:
    features, labels = clusters(200, classes=4, dim=6, spread=1.5)
    train = stratified_splits(labels, 5)
    row = score_knn(features, labels, train, ks=[5])
    shares = [
        float((p[0, ~part] == labels[~part]).double().mean())
        for p, part in zip(knn_predict(features, labels, train, [5]), train, strict=True)
    ]
    assert row["mean"] == pytest.approx(statistics.fmean(shares)) == row["by_k"]["5"]
    assert row["sd"] == pytest.approx(statistics.stdev(shares))
    assert score_knn(features, labels, train[:1])["sd"] is None


def test_balanced_accuracy_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 2, 2])  # no image of class 1
    assert balanced_accuracy(torch.zeros(10, dtype=torch.int64), labels) == 0.5
    assert balanced_accuracy(torch.tensor([0, 0, 0, 0, 0, 0, 1, 3, 2, 1]), labels) == (6 / 8 + 1 / 2) / 2
    assert balanced_accuracy(labels, labels) == 1.0


def test_perfect_features_are_always_right_and_noise_is_at_chance() -> None:
    features, labels = clusters(600, classes=3, dim=32, spread=0.01)
    train = stratified_splits(labels, 5)
    assert score_knn(features, labels, train)["mean"] == 1.0
    assert score_knn(features, labels, train)["balanced_mean"] == 1.0
    noise = torch.randn(600, 32, generator=torch.Generator().manual_seed(1))
    assert abs(score_knn(noise, labels, train)["balanced_mean"] - 1 / 3) < 4 * math.sqrt(2 / 9 / 600)


@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=6).filter(lambda c: sum(x for x in c if x > 1) >= 5),
    n_splits=st.integers(2, 5),
    seed=st.integers(0, 2**31),
)
def test_splits_are_disjoint_cover_everything_and_are_stratified(counts: list[int], n_splits: int, seed: int) -> None:
    labels = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    test = ~stratified_splits(labels, n_splits, seed)  # [S, N]
    for i, count in enumerate(counts):
        # An only image is never held out; any other exactly once.
        assert (test[:, labels == i].sum(0) == (1 if count > 1 else 0)).all()
        held_out = test[:, labels == i].sum(1)
        assert held_out.max() - held_out.min() <= 1
    sizes = test.sum(1)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(test, ~stratified_splits(labels, n_splits, seed))


def test_splits_depend_on_the_seed() -> None:
    labels = torch.arange(100) % 4
    assert not torch.equal(stratified_splits(labels, seed=0), stratified_splits(labels, seed=1))


def test_too_few_images_to_split() -> None:
    with pytest.raises(DataError, match="4 labelled images are too few for 5 splits"):
        stratified_splits(torch.tensor([0, 0, 1, 1]), 5)
    with pytest.raises(DataError, match="too few"):  # plenty of images, but each the only one of its class
        stratified_splits(torch.arange(50), 5)


class Brightness(nn.Module):
    """A backbone whose feature is the mean of each channel."""

    def forward(self, images: Tensor) -> Tokens:
        cls = images.mean((2, 3))
        return Tokens(cls=cls, registers=cls[:, None, :0], patches=cls[:, None])


class Constant(nn.Module):
    """A backbone that sees nothing."""

    def forward(self, images: Tensor) -> Tokens:
        cls = torch.ones(len(images), 2)
        return Tokens(cls=cls, registers=cls[:, None, :0], patches=cls[:, None])


READING = {
    "size": 8,
    "channels": 3,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "sixteen_bit": "full",
    "max_pixels": 10**6,
}


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """30 noisy images each of red and blue, in a folder each."""
    generator = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (tmp_path / name).mkdir()
        for i in range(30):
            image = generator.integers(0, 120, (10, 14, 3), dtype=np.uint8)
            image[..., channel] += 100
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_run_from_folders(colours: Path) -> None:
    source = open_source(colours)
    (colours / "red" / "5.png").write_bytes(b"no image")
    result, skipped = run_knn(Brightness(), Constant(), source, source.labels(), **READING)
    assert [s.name for s in skipped] == ["red/5.png"]
    assert json.loads(json.dumps(result)) == result
    assert list(result) == ["knn", "k", "splits", "n", "shots", "labels_from", "duplicates"]
    assert (result["splits"], result["n"], result["labels_from"]) == (5, 59, "folders")
    assert list(result["knn"]) == ["pixels", "untrained", "trained"]
    for row in result["knn"].values():
        assert {"mean", "sd", "balanced_mean", "balanced_sd", "by_k"} <= set(row)
        assert list(row["by_k"]) == ["10", "20", "46"]
    assert result["knn"]["trained"]["mean"] == 1.0
    assert result["knn"]["untrained"]["balanced_mean"] == pytest.approx(0.5, abs=0.01)
    assert str(result["k"]) in result["knn"]["trained"]["by_k"]


def test_run_with_a_test_part(colours: Path) -> None:
    source, test = open_source(colours), open_source(colours / "red")
    test_labels = ["red"] * len(test)
    result, _ = run_knn(
        Brightness(),
        None,
        source,
        source.labels(),
        test=(test, test_labels),
        pixels=False,
        labels_from="a.csv",
        **READING,
    )
    assert list(result["knn"]) == ["trained"]
    row = result["knn"]["trained"]
    assert (row["mean"], row["sd"], row["balanced_sd"]) == (1.0, None, None)
    assert (result["splits"], result["n"], result["labels_from"]) == (1, 90, "a.csv")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "no labels"),
        (["red"] * 60, "at least two classes, but all 60 are labelled 'red'"),
        (["red", "blue"], "one label for each of the 60 images, got 2"),
        ([str(i) for i in range(60)], "too few"),
    ],
)
def test_labels_that_cannot_be_used(colours: Path, labels: Sequence[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run_knn(Brightness(), None, open_source(colours), labels, **READING)


def test_a_test_label_that_no_training_image_has(colours: Path) -> None:
    source = open_source(colours)
    with pytest.raises(DataError, match="labelled 'green', but no training image"):
        run_knn(Brightness(), None, source, source.labels(), test=(source, ["green"] * 60), **READING)


def test_rendered_numbers_are_the_measured_ones() -> None:
    row: knn.Row = {
        "mean": 0.8123,
        "sd": 0.0149,
        "balanced_mean": 0.7,
        "balanced_sd": 0.02,
        "by_k": {"10": 0.8, "20": 0.81},
        "k_by_split": [20, 20, 10, 20, 20],
    }
    result: knn.KnnResult = {
        "knn": {"trained": row},
        "k": 20,
        "splits": 5,
        "n": 2624,
        "shots": None,
        "labels_from": "labels.csv",
        "duplicates": {"exact": 0, "near": 0, "tested": 100, "examples": []},
    }
    table = knn_table(result)
    for part in ("81.2 ± 1.5 %", "70.0 ± 2.0 %", "k = 20", "2,624 images", "labels.csv", "5 stratified splits"):
        assert part in table
    row["sd"] = row["balanced_sd"] = None
    result["splits"] = 1
    assert "±" not in knn_table(result)
