"""What is looked up on a sample: how much of the data, in which time, with which neighbours."""

import time
from threading import Event

import numpy as np
import pytest
import torch

from dinoforge.commands.backbone import load
from dinoforge.data.sources import Item
from dinoforge.errors import DataError, ImageError
from dinoforge.report import learned
from dinoforge.report.analysis import pca_colours, project
from dinoforge.report.learned import study
from dinoforge.weights.backbone import Backbone


@pytest.fixture(scope="module")
def backbone(run) -> Backbone:
    return load(run)


class Million:
    """A million images, of which every tenth cannot be read."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.seconds = 0.0

    def __len__(self) -> int:
        return 1_000_000

    def item(self, index: int) -> Item:
        self.read.append(index)
        if index % 10 == 3:
            raise ImageError("damaged")
        pixels = np.random.default_rng(index).integers(0, 256, (40, 30 + index % 40, 3), dtype=np.uint8)
        return Item(pixels, self.name(index), label="odd" if index % 2 else "even")

    def name(self, index: int) -> str:
        return f"{index}.png"

    def labels(self) -> list[str] | None:
        raise AssertionError("a million labels for a sample of a few hundred")

    def fingerprint(self) -> str:
        return ""


def test_a_million_images_are_sampled(backbone) -> None:
    source = Million()
    found = study(backbone, source)
    assert len(source.read) == len(set(source.read)) == learned.SAMPLE
    assert found.images == 1_000_000
    assert [min(source.read), max(source.read)] == [0, 999_999]
    assert len(found.indices) == len(found.names) == len(found.cls) == len(found.shown) == len(found.positions)
    assert set(found.indices) == {index for index in source.read if index % 10 != 3}
    assert set(found.labels) == {"odd", "even"}
    assert "sampled images cannot be read" in found.missing[0]
    assert "t-SNE" in found.projection


def test_when_time_runs_out_what_was_read_is_spread_over_all(backbone, monkeypatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(time, "monotonic", clock)
    source = Million()
    found = study(backbone, source, seconds=50)
    assert 30 <= len(source.read) <= 51
    assert f"In 50 seconds only {len(source.read)} of the 300 sampled images were read." in found.missing
    gaps = np.diff(sorted([0, *source.read, 999_999]))
    assert gaps.max() < 4 * 1_000_000 / len(source.read)


def test_neighbours_are_the_nearest_and_good_ones_have_the_label(backbone) -> None:
    found = study(backbone, Million())
    unit = torch.nn.functional.normalize(found.cls, dim=-1)
    shares = []
    for i in range(len(unit)):
        others = sorted((j for j in range(len(unit)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:5]
        shares.append(sum(found.labels[j] == found.labels[i] for j in others) / 5)
        for n in found.neighbours:
            if n.query == i:
                expected = sorted((float(unit[i] @ unit[j]) for j in others), reverse=True)
                assert n.similarities == pytest.approx(expected, abs=1e-5)
    good = [shares[n.query] for n in found.neighbours if n.good]
    bad = [shares[n.query] for n in found.neighbours if not n.good]
    assert (len(good), len(bad)) == (3, 3)
    assert min(good) == max(shares)
    assert max(bad) == min(shares)
    assert found.same_label == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    same = [a == b for i, a in enumerate(found.labels) for j, b in enumerate(found.labels) if i != j]
    assert found.by_chance == pytest.approx(sum(same) / len(same))


def test_storage_that_hangs_is_given_up(backbone) -> None:
    class Hangs(Million):
        def item(self, index: int) -> Item:
            if len(self.read) == 3:
                Event().wait()
            return super().item(index)

    with pytest.raises(DataError, match=r"\d+\.png was not read within 0\.2 seconds"):
        study(backbone, Hangs(), seconds=0.2)


def test_no_readable_image_is_an_error(backbone) -> None:
    class Damaged(Million):
        def item(self, index: int) -> Item:
            raise ImageError("damaged")

    with pytest.raises(DataError, match=r"none of 300 sampled images can be read, such as 0\.png: damaged"):
        study(backbone, Damaged())


def test_the_background_is_parted_off_only_where_each_image_has_one() -> None:
    """Two kinds of patches: in each image, or each in an image of its own."""
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) / 10
    kinds = torch.zeros(200, 8)
    kinds[:, 0] = 5.0
    within = kinds * torch.tensor([1.0 if i % 4 == 0 else -1.0 for i in range(200)])[:, None] + noise
    _, foreground = pca_colours(within, [100, 100])
    assert foreground.tolist() == [i % 4 == 0 for i in range(200)]  # the smaller kind
    between = kinds * torch.tensor([1.0 if i < 80 else -1.0 for i in range(200)])[:, None] + noise
    colours, foreground = pca_colours(between, [80, 120])
    assert foreground.all()
    assert colours.min() >= 0
    assert colours.max() <= 1


def test_without_scikit_learn_the_map_is_of_principal_components(monkeypatch) -> None:
    import sys

    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    placed, how = project(features)
    again, _ = project(features)
    assert torch.equal(placed, again)  # and it draws nothing from global random states
    assert "t-SNE" in how
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    placed, how = project(features)
    assert "principal components; pip install" in how
    unit = torch.nn.functional.normalize(features, dim=-1)
    _, spread, _ = torch.linalg.svd(unit - unit.mean(0))
    torch.testing.assert_close(placed.norm(dim=0), spread[:2])
