from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinoforge.data.sources import Source, open_source
from dinoforge.errors import DataError, WeightsError
from dinoforge.features.extract import embed, extract
from dinoforge.models.vit import Tokens

READING = {"size": 8, "channels": 1, "mean": (0.0,), "std": (1.0,), "sixteen_bit": "full", "max_pixels": 10**4}


class Mean(nn.Module):
    """A backbone whose feature is the mean pixel; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tokens:
        assert not self.training
        assert images.dtype == torch.float32
        self.batches.append(len(images))
        cls = images.mean((2, 3)) * self.scale
        return Tokens(cls=cls, registers=cls[:, None, :0], patches=cls[:, None])


@pytest.fixture
def greys(tmp_path: Path) -> Source:
    """Ten images, the i-th of grey value 20·i; the fourth is damaged, the eighth is too large."""
    for i in range(10):
        side = 200 if i == 7 else 12
        Image.fromarray(np.full((side, side), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"\x89PNG no more")
    return open_source(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_row_per_readable_image_in_the_order_asked_for(greys: Source, num_workers: int) -> None:
    order = [9, 3, 0, 5, 7, 1, 2]
    got = extract(Mean(), greys, order, keep_images=True, batch_size=3, num_workers=num_workers, **READING)
    assert got.kept == [9, 0, 5, 1, 2]
    assert [s.name for s in got.skipped] == ["3.png", "7.png"]
    assert all(s.reason for s in got.skipped)
    torch.testing.assert_close(got.cls, torch.tensor([[180.0], [0], [100], [20], [40]]) / 255)
    assert got.images is not None
    assert got.images.dtype == torch.uint8
    assert got.images.shape == (5, 1, 8, 8)
    assert got.images[:, 0, 0, 0].tolist() == [180, 0, 100, 20, 40]


def test_images_are_kept_only_when_asked(greys: Source) -> None:
    assert extract(Mean(), greys, [0, 1], **READING).images is None


def test_memory_is_that_of_a_batch(greys: Source) -> None:
    backbone = Mean()
    extract(backbone, greys, [0, 1, 2, 4, 5], batch_size=2, **READING)
    assert backbone.batches == [2, 2, 1]
    backbone.batches.clear()
    embed(backbone, torch.zeros(5, 1, 8, 8, dtype=torch.uint8), batch_size=2, **READING)
    assert backbone.batches == [2, 2, 1]


@pytest.mark.parametrize("mode", [True, False])
def test_the_backbone_is_left_as_it_was(greys: Source, mode: bool) -> None:
    backbone = Mean().train(mode)
    assert not extract(backbone, greys, [0], **READING).cls.requires_grad
    assert backbone.training is mode


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_left_as_it_was(greys: Source, num_workers: int) -> None:
    before = torch.get_rng_state()
    extract(Mean(), greys, [0, 1], num_workers=num_workers, **READING)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_returns_float32(greys: Source) -> None:
    class Linear(Mean):
        def forward(self, images: Tensor) -> Tokens:
            tokens = super().forward(images)
            cls = nn.functional.linear(tokens.cls, self.scale.view(1, 1))
            assert cls.dtype == torch.bfloat16
            return Tokens(cls=cls, registers=tokens.registers, patches=tokens.patches)

    assert extract(Linear(), greys, [1, 2], autocast=torch.bfloat16, **READING).cls.dtype == torch.float32


def test_nothing_readable(greys: Source) -> None:
    with pytest.raises(DataError, match=r"none of the 2 images can be read: 3\.png: .*; 7\.png: "):
        extract(Mean(), greys, [3, 7], **READING)


def test_features_that_are_not_finite(greys: Source) -> None:
    backbone = Mean()
    with torch.no_grad():
        backbone.scale.fill_(torch.nan)
    with pytest.raises(WeightsError, match="not finite"):
        extract(backbone, greys, [0, 1], **READING)


def test_images_that_would_fill_the_memory_are_refused_before_work(greys: Source) -> None:
    backbone = Mean()
    with pytest.raises(DataError, match=r"eval\.size"):
        extract(backbone, greys, [0, 1], keep_images=True, max_kept_bytes=100, **READING)
    assert backbone.batches == []
