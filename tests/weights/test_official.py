"""The official layout: backbones, training checkpoints, and checkpoints with weights and their moving average."""

import argparse

import pytest
import torch

from dinoforge.errors import WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights.backbone import load_backbone
from other_libraries import SIZE, assert_same_tensors, randomised, with_prefix

KINDS = [{}, {"num_register_tokens": 4}, {"ffn_layer": "swiglu"}]


@pytest.mark.parametrize("kind", KINDS)
def test_official_backbone(tmp_path, kind):
    network = randomised(VisionTransformer(**SIZE, **kind))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    back = assert_same_tensors(tmp_path / "w.pth", network)
    registers = "num_register_tokens" in kind
    assert (back.architecture["interpolate_antialias"], back.architecture["interpolate_offset"]) == (
        (True, 0.0) if registers else (False, 0.1)
    )
    assert any("interpolate_offset" in note for note in back.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_official_training_checkpoint(tmp_path, kind):
    network = randomised(VisionTransformer(**SIZE, **kind))
    chunked = {
        f"backbone._fsdp_wrapped_module.{name.replace('blocks.', f'blocks.{i}._fsdp_wrapped_module.')}": tensor
        for name, tensor in network.state_dict().items()
        for i in [0 if name.startswith("blocks.0.") else 1]
    }
    torch.save({"teacher": chunked | {"dino_head.mlp.0.weight": torch.zeros(2, 2)}}, tmp_path / "w.pth")
    back = assert_same_tensors(tmp_path / "w.pth", network)
    assert any("dino_head.mlp.0.weight" in note for note in back.notes)


AVERAGED_AND_RAW = {
    "DINO": lambda ema, raw: {
        "student": with_prefix("module.backbone.", raw),
        "teacher": with_prefix("backbone.", ema),
    },
    "timm": lambda ema, raw: {"epoch": 3, "arch": "vit", "state_dict": raw, "state_dict_ema": ema},
    "DeiT": lambda ema, raw: {"model": raw, "optimizer": {"state": {}}, "model_ema": ema, "epoch": 1},
    "nested": lambda ema, raw: {"model": raw, "ema": {"decay": 0.99, "module": ema}},
    "shadow": lambda ema, raw: {"state_dict": raw, "ema": {"decay": 0.99, "shadow": ema}},
    "I-JEPA": lambda ema, raw: {"encoder": raw, "target_encoder": with_prefix("module.", ema)},
    "one state dict": lambda ema, raw: {
        "state_dict": with_prefix("model.", raw) | with_prefix("ema_model.module.", ema)
    },
    "inside": lambda ema, raw: with_prefix("model.student.", raw) | with_prefix("model.teacher.backbone.", ema),
    "lightly": lambda ema, raw: with_prefix("student_backbone.", raw) | with_prefix("teacher_backbone.", ema),
    "ours": lambda ema, raw: {
        "student_teacher": with_prefix("student.backbone.", raw) | with_prefix("teacher.backbone.", ema)
    },
}


@pytest.mark.parametrize("kind", AVERAGED_AND_RAW)
def test_of_weights_and_their_moving_average_the_average_is_taken_and_told(tmp_path, kind):
    network = randomised(VisionTransformer(**SIZE))
    raw = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    torch.save(AVERAGED_AND_RAW[kind](network.state_dict(), raw), tmp_path / "w.pth")
    back = assert_same_tensors(tmp_path / "w.pth", network)
    assert any("the moving average" in note and "left out" in note for note in back.notes)


def test_raw_weights_are_told_where_there_is_no_average_that_can_be_read(tmp_path):
    network = randomised(VisionTransformer(**SIZE))
    path = tmp_path / "w.pth"
    torch.save({"model": network.state_dict(), "ema": list(network.state_dict().values())}, path)
    assert any("'ema' (list) holds no tensors by name" in note for note in assert_same_tensors(path, network).notes)
    torch.save({"student": network.state_dict(), "epoch": 1}, path)
    assert any("raw weights" in note for note in assert_same_tensors(path, network).notes)
    torch.save(with_prefix("student.", network.state_dict()), path)
    assert any("raw weights" in note for note in assert_same_tensors(path, network).notes)


def test_an_average_that_pytorch_keeps(tmp_path):
    network = randomised(VisionTransformer(**SIZE))
    averaged = torch.optim.swa_utils.AveragedModel(network)
    assert "n_averaged" in averaged.state_dict()
    torch.save({"model": with_prefix("", network.state_dict()), "ema": averaged.state_dict()}, tmp_path / "w.pth")
    assert any("AveragedModel" in note for note in assert_same_tensors(tmp_path / "w.pth", network).notes)


def test_a_dino_checkpoint_with_its_arguments(tmp_path):
    """As DINO's main_dino.py writes it: no LayerScale, no mask token, an argparse Namespace."""
    network = randomised(VisionTransformer(**SIZE, layerscale=0.0))
    with torch.no_grad():
        network.mask_token.zero_()
    state = {name: tensor for name, tensor in network.state_dict().items() if name != "mask_token"}
    checkpoint = {
        "student": with_prefix("module.backbone.", {name: t + 1 for name, t in state.items()}),
        "teacher": with_prefix("backbone.", state) | {"head.mlp.0.weight": torch.zeros(2, 2)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, global_crops_scale=(0.4, 1.0)),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    for new_format in (True, False):
        torch.save(checkpoint, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
        before = torch.serialization.get_safe_globals()
        assert_same_tensors(tmp_path / "w.pth", network)
        assert set(torch.serialization.get_safe_globals()) == set(before)
        assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"epoch": 3, "args": argparse.Namespace(lr=0.1)}, r"a dict with the keys epoch \(int\), args \(Namespace\)"),
        ({"vit": {"cls_token": torch.zeros(1)}}, r"a dict with the keys vit \(dict\)"),
        ({str(i): i for i in range(40)}, r"4 \(int\) and 35 more"),
        ({0: torch.zeros(2)}, r"a dict with the keys 0 \(Tensor\)"),
        ({}, "an empty dict"),
        ([torch.zeros(2)], "expected a dictionary of tensors, got a list of 1"),
        (torch.zeros(2), "expected a dictionary of tensors, got a Tensor"),
        ("weights", "expected a dictionary of tensors, got a str"),
        ({"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, "it has conv1.weight, fc.bias"),
        ({"cls_token": torch.zeros(1, 1, 2, dtype=torch.int8)}, "tensors of int8: cls_token"),
    ],
)
def test_what_is_no_backbone_is_refused_with_what_it_is(tmp_path, content, named):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=named) as error:
        load_backbone(tmp_path / "w.pth")
    assert len(str(error.value)) < 600


def test_a_checkpoint_that_holds_itself(tmp_path):
    content = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no tensors in it"):
        load_backbone(tmp_path / "w.pth")
