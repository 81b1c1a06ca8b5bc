"""timm's files and folders, made by timm."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dinoforge.errors import WeightsError
from dinoforge.weights.backbone import load_backbone
from other_libraries import HEADS, MEAN, STD, randomised


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "swiglu"])
def test_timm(tmp_path, name):
    timm = pytest.importorskip("timm")
    arguments = {"img_size": 56, "depth": 2, "embed_dim": 32, "num_heads": 2}
    if name == "swiglu":
        name, arguments["mlp_ratio"] = "vit_giant_patch14_dinov2", 5.5
    model = randomised(timm.create_model(name, **arguments))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        theirs, ours = model.forward_features(images), load_backbone(tmp_path / "w.pth", HEADS).network(images)
    both = torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1)
    torch.testing.assert_close(both, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", [(56, 56), (84, 84), (28, 70)])
def test_a_timm_model_at_any_size_by_its_own_rule(tmp_path, registers, size):
    """What the file cannot say is told, and once it is said outputs are the same; with registers nothing is missing."""
    timm = pytest.importorskip("timm")
    name = f"vit_small_patch14{'_reg4' if registers else ''}_dinov2"
    arguments = {"img_size": 56, "depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    model = randomised(timm.create_model(name, **arguments))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assumed = load_backbone(tmp_path / "w.safetensors", HEADS)
    told = [note for note in assumed.notes if "interpolate_antialias=true interpolate_offset=0.0" in note]
    assert len(told) == (0 if registers else 1)
    rule = {"interpolate_antialias": True, "interpolate_offset": 0.0}
    said = assumed if registers else load_backbone(tmp_path / "w.safetensors", HEADS | rule)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        theirs, ours = model.forward_features(images), said.forward_features(images)
    both = torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1)
    torch.testing.assert_close(both, theirs, rtol=0, atol=1e-4)


TIMM = {"img_size": 56, "depth": 2, "embed_dim": 32, "num_heads": 2}


def write_timm(folder, change=None, **pretrained):
    timm = pytest.importorskip("timm")
    model = randomised(timm.create_model("vit_small_patch14_dinov2", **TIMM))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "vit_small_patch14_dinov2",
        "num_classes": 0,
        "model_args": TIMM,
        "pretrained_cfg": {"mean": MEAN, "std": STD} | pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config | (change or {})))
    return model


def test_a_timm_folder(tmp_path):
    model = write_timm(tmp_path)
    back = load_backbone(tmp_path)
    assert (back.architecture["num_heads"], back.image.mean, back.image.std) == (2, tuple(MEAN), tuple(STD))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        theirs, ours = model.forward_features(images), back.network(images)
    torch.testing.assert_close(torch.cat([ours.cls[:, None], ours.patches], dim=1), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "quickgelu"),
        ({"architecture": "resnet50"}, "resnet50"),
        ({"architecture": "vit_small_patch16_224"}, "patches of 16 pixels, but the weights have 14"),
        ({"model_args": TIMM | {"depth": 3}}, "depth=3, but the weights have 2"),
        ({"model_args": TIMM | {"img_size": [70, 70]}}, "img_size="),
        ({"model_args": TIMM | {"num_heads": "two"}}, "num_heads='two'"),
        ({"model_args": TIMM | {"act_layer": "quick_gelu"}}, "act_layer='quick_gelu'"),
        ({"model_args": [1]}, "model_args"),
        ({"pretrained_cfg": {"mean": MEAN, "std": [0, 1, 1]}}, "std above 0|numbers above 0"),
    ],
)
def test_a_timm_folder_with_another_model(tmp_path, change, named):
    write_timm(tmp_path, change)
    with pytest.raises(WeightsError, match=named):
        load_backbone(tmp_path)
