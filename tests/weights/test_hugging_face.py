"""Hugging Face's folders, made by transformers: outputs, and what is held against weights and our network."""

import json

import pytest
import torch

from dinoforge.errors import WeightsError
from dinoforge.weights.backbone import load_backbone
from other_libraries import MEAN, STD, assert_outputs_equal, randomised, write_folder


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


def without_block(number):
    return lambda tensors: {name: t for name, t in tensors.items() if f"layer.{number}." not in name}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, but the weights have 2"),
        ({"hidden_size": 64}, "hidden_size=64, but the weights have 32"),
        ({"patch_size": 16}, "patch_size=16, but the weights have 14"),
        ({"patch_size": [14, 16]}, r"patch_size=\[14, 16\], but the weights have 14"),
        ({"image_size": 224}, "image_size=224, but the weights have position embeddings for 4 × 4 patches"),
        ({"image_size": [56, 70]}, r"image_size=\[56, 70\], but the weights"),
        ({"num_channels": 4}, "num_channels=4, but the weights have 3"),
        ({"mlp_ratio": 3}, "mlp_ratio=3, but the weights have hidden layers of 128 channels"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4'"),
        ({"qkv_bias": False}, "qkv_bias=False, but the weights have True"),
        ({"qkv_bias": 1}, "qkv_bias=1, but the weights have True"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn=True, but the weights have False"),
        ({"model_type": "dinov2_with_registers"}, "no register tokens"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new', but this network has the exact GELU"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05, but this network has 1e-06"),
        ({"layer_norm_eps": None}, "layer_norm_eps=None"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config="),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads="),
        ({"model_type": "vit"}, "model_type='vit': no configuration of a Dinov2 model"),
        ({"model_type": ..., "num_attention_heads": ...}, "no configuration of a Dinov2 model"),
        ({"num_attention_heads": ...}, "no num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: expected a whole number"),
        ({"num_attention_heads": "2"}, "num_attention_heads='2': expected a whole number"),
    ],
)
def test_a_configuration_that_the_weights_or_our_network_contradict(tmp_path, change, named):
    write_folder(tmp_path, change=change)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(WeightsError, match=named) as error:
            load_backbone(path)
        assert str(error.value).startswith(f"{tmp_path / 'config.json'}: it says ")


def test_weights_that_lack_the_last_block(tmp_path):
    write_folder(tmp_path, tensors=without_block(1))
    with pytest.raises(WeightsError, match="num_hidden_layers=2, but the weights have 1"):
        load_backbone(tmp_path)


def test_weights_that_lack_a_block_between(tmp_path):
    write_folder(tmp_path, num_hidden_layers=3, tensors=without_block(1))
    with pytest.raises(WeightsError, match=r"blocks 0 to 2, but only 2 of them; the first that is not there is 1"):
        load_backbone(tmp_path)


def test_weights_without_layerscale_have_one_of_1(tmp_path):
    def no_scale(tensors):
        return {name: t for name, t in tensors.items() if "layer_scale" not in name}

    write_folder(tmp_path, layerscale_value=1e-5, tensors=no_scale)
    with pytest.raises(WeightsError, match="layerscale_value=1e-05, but the weights have no LayerScale"):
        load_backbone(tmp_path)
    write_folder(tmp_path, layerscale_value=1.0, tensors=no_scale)
    assert any("no LayerScale" in note for note in load_backbone(tmp_path).notes)


def test_register_tokens_that_the_kind_of_model_has_not(tmp_path):
    write_folder(tmp_path, registers=4, change={"model_type": "dinov2"})
    with pytest.raises(WeightsError, match="which has no register tokens, but the weights have 4"):
        load_backbone(tmp_path)
    write_folder(tmp_path, registers=4, change={"num_register_tokens": 2})
    with pytest.raises(WeightsError, match="num_register_tokens=2, but the weights have 4"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"qkv_bias": False},
        {"mlp_ratio": 3},
        {"mlp_ratio": 3, "use_swiglu_ffn": True},
        {"use_swiglu_ffn": True, "hidden_act": "relu"},  # SwiGLU has SiLU, whatever it says
        {"layerscale_value": 1e-5},  # what LayerScale began with
        {"image_size": 60},  # of which 4 × 4 patches are seen
        {"image_size": [56, 56], "patch_size": [14, 14]},
        {"num_attention_heads": 4},
        {"use_mask_token": False},
        {"hidden_act": "gelu_python"},
        {"registers": 4, "mlp_ratio": 2},
    ],
)
def test_what_a_configuration_says_and_our_network_can_do(tmp_path, config):
    model = write_folder(tmp_path, **config)
    back = load_backbone(tmp_path)
    assert_outputs_equal(model, back)
    told = config == {"image_size": 60} or "use_mask_token" in config
    rule = [note for note in back.notes if "interpolate_" in note]
    assert len(back.notes) == 1 + len(rule) + told + 2  # the layout, resampling, and the mean and deviation of images
    assert back.architecture["num_heads"] == config.get("num_attention_heads", 2)


def test_dropout_and_unknown_keys_are_told_and_harmless_ones_are_not(tmp_path):
    model = write_folder(tmp_path, attention_probs_dropout_prob=0.1, drop_path_rate=0.2, hidden_dropout_prob=0.3)
    usual = load_backbone(tmp_path)
    assert_outputs_equal(model, usual)
    told = " ".join(usual.notes)
    assert all(f"{key}=" in told for key in ("attention_probs_dropout_prob", "drop_path_rate", "hidden_dropout_prob"))
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"torch_dtype": "float32", "id2label": {"0": "cat"}, "use_rope": None}))
    assert load_backbone(tmp_path).notes == usual.notes
    path.write_text(json.dumps(said | {"use_rope": True, "auto_map": {"AutoModel": "code.Model"}}))
    new = [note for note in load_backbone(tmp_path).notes if note not in usual.notes]
    assert len(new) == 2
    assert "code of its own" in new[0]
    assert "use_rope" in new[1]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, []),
        ({"do_rescale": False, "image_mean": [25.5, 51, 76.5], "image_std": [102, 127.5, 153]}, ["do_rescale=false"]),
        ({"rescale_factor": 1 / 127.5, "image_mean": [0.2, 0.4, 0.6], "image_std": [0.8, 1, 1.2]}, ["rescale_factor"]),
        ({"do_normalize": False}, ["do_normalize=false"]),
        ({"resample": 2}, ["resample=2 (bilinear)"]),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 56}}, ["a centre crop"]),
        ({"do_resize": False, "resample": 2}, ["do_resize=false"]),
        ({"do_sharpen": True}, ["do_sharpen"]),
        ({"processor_class": "X", "do_convert_rgb": True}, []),
    ],
)
def test_how_the_preprocessor_makes_images(tmp_path, said, told):
    """Pixels are (pixel · factor - mean) / std there; here the factor is 1/255, so the others change with it."""
    write_folder(tmp_path)
    before = set(load_backbone(tmp_path).notes)
    plain = {"image_mean": MEAN, "image_std": STD, "size": {"height": 56, "width": 56}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(plain | said))
    back = load_backbone(tmp_path)
    mean, std = ([0], [1]) if "do_normalize" in said else (MEAN, STD)
    assert back.image.mean == pytest.approx(mean)
    assert back.image.std == pytest.approx(std)
    new = [note for note in back.notes if note not in before]
    assert len(new) == len(told)
    assert all(word in note for word, note in zip(told, new, strict=True))
    assert load_backbone(tmp_path, {"mean": (0.5,) * 3}).image.mean == (0.5,) * 3


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"image_mean": ...}, "does not say image_mean"),
        ({"image_std": [0.1, "0.2", 0.3]}, "does not say image_std"),
        ({"image_std": [0.1, 0, 0.3]}, "expected std above 0"),
        ({"rescale_factor": 0}, "rescale_factor=0"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order=True"),
        ({"image_mean": [0.1, 0.2]}, "expected one value, or one for each of 3 channels"),
    ],
)
def test_a_preprocessor_that_says_what_cannot_be_done(tmp_path, said, named):
    write_folder(tmp_path)
    plain = {"image_mean": MEAN, "image_std": STD} | said
    config = {key: value for key, value in plain.items() if value is not ...}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=named):
        load_backbone(tmp_path)
