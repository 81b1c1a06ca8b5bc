import pytest
import torch

from dinoforge.data.batch import Batch, normalize, prepare


def test_to_moves_tensors_only() -> None:
    batch = Batch(
        global_crops=torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        local_crops=torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
        masks=torch.zeros(2, 4, dtype=torch.bool),
        masked=torch.zeros(0, dtype=torch.int64),
        indices=torch.tensor([5]),
        skipped=((1, "a", "b"),),
    )
    moved = batch.to("meta")
    for name in ("global_crops", "local_crops", "masks", "masked", "indices"):
        # Where patches are masked is asked on the CPU.
        assert getattr(moved, name).device.type == ("cpu" if name == "masked" else "meta")
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert moved.skipped == batch.skipped


@pytest.mark.parametrize(("mean", "std"), [([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5], [0.25])])
def test_normalize(mean: list[float], std: list[float]) -> None:
    crops = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (crops.double() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    normalized = normalize(crops, mean, std)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized.double(), expected, rtol=1e-5, atol=1e-6)
    assert normalize(normalized, mean, std) is normalized


def test_prepare_normalizes_crops_and_keeps_the_rest() -> None:
    batch = Batch(
        global_crops=torch.full((2, 1, 8, 8), 255, dtype=torch.uint8),
        local_crops=torch.zeros(4, 1, 4, 4, dtype=torch.uint8),
        masks=torch.ones(2, 4, dtype=torch.bool),
        masked=torch.arange(8),
        indices=torch.tensor([5]),
        skipped=((1, "a", "b"),),
    )
    prepared = prepare(batch, device=torch.device("cpu"), mean=[0.5], std=[0.25])
    assert prepared.global_crops.unique().tolist() == [2.0]
    assert prepared.local_crops.unique().tolist() == [-2.0]
    assert prepared.masks is batch.masks
    assert prepared.skipped == batch.skipped
