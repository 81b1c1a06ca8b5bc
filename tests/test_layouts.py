"""Backbones of other libraries, made by those libraries."""

import pytest
import torch
from safetensors.torch import save_file

from dinoforge.errors import WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights import load_backbone

HEADS = {"num_heads": 2}
SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14, "image_size": 56}
KINDS = [{}, {"num_register_tokens": 4}, {"ffn_layer": "swiglu"}]


def randomised(network):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network.eval()


def assert_equal(path, network):
    back = load_backbone(path, HEADS)
    ours = back.network.state_dict()
    assert set(ours) == set(network.state_dict())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in network.state_dict().items())
    return back


@pytest.mark.parametrize("kind", KINDS)
def test_official_backbone(tmp_path, kind):
    network = randomised(VisionTransformer(**SIZE, **kind))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    back = assert_equal(tmp_path / "w.pth", network)
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
    back = assert_equal(tmp_path / "w.pth", network)
    assert any("dino_head.mlp.0.weight" in note for note in back.notes)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_hugging_face_folder(tmp_path, registers, swiglu):
    transformers = pytest.importorskip("transformers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    extra = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{name}Config")(**sizes, **extra, use_swiglu_ffn=swiglu)
    model = randomised(getattr(transformers, f"{name}Model")(config))
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        theirs, ours = model(images).last_hidden_state, load_backbone(tmp_path).network(images)
    both = torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1)
    torch.testing.assert_close(both, theirs, rtol=0, atol=1e-4)
    with pytest.raises(WeightsError, match="says num_heads=2, not 4"):
        load_backbone(tmp_path, {"num_heads": 4})


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


def test_a_file_that_does_not_fit_is_refused_with_the_list(tmp_path):
    state = VisionTransformer(**SIZE).state_dict()
    del state["blocks.1.norm2.bias"]
    state |= {"colour": torch.zeros(1), "norm.weight": torch.zeros(5)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as error:
        load_backbone(tmp_path / "w.pth", HEADS)
    for text in ("missing blocks.1.norm2.bias", "unexpected colour", "norm.weight has shape [5], expected [32]"):
        assert text in str(error.value)
