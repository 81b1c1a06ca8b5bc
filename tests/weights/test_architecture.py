"""What tensors say of the network that they belong to, and tensors that fit none."""

import pytest
import torch

from dinoforge.errors import WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights.backbone import load_backbone
from other_libraries import HEADS, SIZE


def test_a_file_that_does_not_fit_is_refused_with_the_list(tmp_path):
    state = VisionTransformer(**SIZE).state_dict()
    del state["blocks.1.norm2.bias"]
    state |= {"colour": torch.zeros(1), "norm.weight": torch.zeros(5)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as error:
        load_backbone(tmp_path / "w.pth", HEADS)
    for text in ("missing blocks.1.norm2.bias", "unexpected colour", "norm.weight has shape [5], expected [32]"):
        assert text in str(error.value)


def test_a_long_list_of_what_does_not_fit_is_cut(tmp_path):
    state = VisionTransformer(**SIZE).state_dict()
    state |= {f"extra{i}": torch.zeros(1) for i in range(100)}
    torch.save({name: t for name, t in state.items() if "norm" not in name}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"missing blocks.0.norm1.weight.*and 5 more.*extra4 and 95 more"):
        load_backbone(tmp_path / "w.pth", HEADS)


def test_a_number_of_blocks_that_no_file_could_hold(tmp_path):
    state = VisionTransformer(**SIZE).state_dict() | {"blocks.900000000.norm1.weight": torch.zeros(32)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="blocks 0 to 900000000, but only 3 of them"):
        load_backbone(tmp_path / "w.pth", HEADS)
