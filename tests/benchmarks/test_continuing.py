"""The benchmark of continuing runs, goes on where it was, and its table says what was measured."""

import io

import pytest
import torch
from rich.console import Console


@pytest.fixture
def quiet():
    return Console(file=io.StringIO())


def test_all_of_it_in_small(benchmark, quiet, require_system, tmp_path, monkeypatch):
    require_system(benchmark.CLOTHES / "train-images-idx3-ubyte.gz", "dataset-fashion-mnist")
    for key, value in {"train.num_workers": 0, "train.threads": 1, "train.batch_size_per_gpu": 32}.items():
        monkeypatch.setitem(benchmark.EVERY_RUN, key, value)
    curves = benchmark.measure(tmp_path, benchmark.TINY, quiet)
    assert set(curves) == {
        "same domain, continue",
        "same domain, continue faster",
        "same domain, small",
        "new domain, continue",
        "new domain, continue faster",
        "new domain, small",
        "larger crops, highres",
        "larger crops, small",
    }
    for name, curve in curves.items():
        assert [step for step, _ in curve] == [0, 6, 12], name
        assert all(0 <= share <= 1 for _, share in curve)
    starts = {name: curve[0][1] for name, curve in curves.items()}
    assert starts["same domain, continue"] == starts["same domain, small"]
    assert starts["new domain, continue"] == starts["new domain, small"]

    def fail(*_, **__):
        pytest.fail("measured again")

    monkeypatch.setattr(benchmark, "accuracy", fail)
    assert benchmark.measure(tmp_path, benchmark.TINY, quiet) == curves


def test_the_table(benchmark):
    table = benchmark.render({"a": [(0, 0.5), (1, 0.48), (2, 0.6)], "b": [(0, 0.5), (4, 0.5), (8, 0.75)]})
    assert table.splitlines() == [
        "| % of the run | 0 | 50 | 100 | lowest − start |",
        "| --- | --- | --- | --- | --- |",
        "| a | 50.0 | 48.0 | 60.0 | -2.0 |",
        "| b | 50.0 | 50.0 | 75.0 | +0.0 |",
    ]


def test_knn_of_pixels_tells_clothes_apart(benchmark, require_system):
    """The same measurement with a network that hands on pixels, beside the definition in a loop."""
    require_system(benchmark.CLOTHES / "train-images-idx3-ubyte.gz", "dataset-fashion-mnist")
    sizes = benchmark.Sizes(train_images=300, gallery=300, test=40)
    domain = benchmark.clothes(sizes)

    class Pixels(torch.nn.Module):
        def forward(self, images):
            flat = images.flatten(1)
            return benchmark_tokens(flat)

    from dinoforge.models.vit import Tokens

    def benchmark_tokens(flat):
        return Tokens(cls=flat, registers=flat[:, None, :0], patches=flat[:, None])

    measured = benchmark.accuracy(Pixels(), domain, 28, sizes)
    mean, std = benchmark.NETWORK["data.mean"], benchmark.NETWORK["data.std"]

    def unit(image):
        x = (torch.from_numpy(image.copy()).double().flatten() / 255 - mean) / std
        return x / x.norm()

    gallery = torch.stack([unit(image) for image in domain.train])
    right = 0
    for image, label in zip(domain.test, domain.test_labels, strict=True):
        similarity = gallery @ unit(image)
        votes = torch.zeros(10, dtype=torch.float64)
        for i in similarity.topk(benchmark.K).indices:
            votes[domain.train_labels[i]] += (similarity[i] / 0.07).exp()
        right += int(votes.argmax() == label)
    assert measured == pytest.approx(right / len(domain.test))
    assert measured > 0.5
