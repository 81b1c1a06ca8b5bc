"""Backbones of other libraries, made by those libraries."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoforge.errors import WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights.backbone import load_backbone

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


# A Hugging Face folder, whose configuration is held against its weights and against our network


def write_folder(folder, *, change=None, tensors=None, registers=0, **config):
    """A folder that transformers wrote, its config.json and tensors changed; returns the model."""
    transformers = pytest.importorskip("transformers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    extra = {"num_register_tokens": registers} if registers else {}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes | config, **extra))
    randomised(model).save_pretrained(folder)
    if change is not None:
        path = folder / "config.json"
        said = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
    if tensors is not None:
        path = folder / "model.safetensors"
        save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
    return model


def assert_outputs_equal(model, back, size=(56, 56)):
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        theirs, ours = model(images).last_hidden_state, back.network(images)
    both = torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1)
    torch.testing.assert_close(both, theirs, rtol=0, atol=1e-4)


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


def test_a_folder_without_configuration_says_what_is_assumed(tmp_path):
    model = write_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    back = load_backbone(tmp_path, HEADS)
    assert_outputs_equal(model, back)
    assert any("no config.json" in note and "GELU" in note for note in back.notes)


@pytest.mark.parametrize("text", ["[1]", "{", "5", "null", ""])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_configuration_that_is_no_object(tmp_path, name, text):
    write_folder(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(WeightsError, match=name):
        load_backbone(tmp_path)


def test_a_file_beside_a_configuration_of_something_else(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"port": 80}')
    back = load_backbone(tmp_path / "model.safetensors", HEADS)
    assert any("describes no model" in note for note in back.notes)
    with pytest.raises(WeightsError, match="no configuration of a Dinov2 model"):
        load_backbone(tmp_path, HEADS)


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


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


# Weights in several files


def write_shards(folder, kind):
    """Three files and their index, as transformers writes them, or as PyTorch pickles."""
    model = write_folder(folder)
    if kind == "safetensors":
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="40KB")
        (index,) = folder.glob("*.index.json")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        return model, index
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    index, places = folder / "pytorch_model.bin.index.json", {}
    for i in range(3):
        name = f"pytorch_model-0000{i + 1}-of-00003.bin"
        torch.save(dict(tensors[i::3]), folder / name)
        places |= dict.fromkeys(dict(tensors[i::3]), name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return model, index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files(tmp_path, kind):
    model, index = write_shards(tmp_path, kind)
    for path in (tmp_path, index):
        back = load_backbone(path)
        assert_outputs_equal(model, back)
        assert back.architecture["num_heads"] == 2


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_of_several_that_is_not_there_or_lacks_a_tensor(tmp_path, kind):
    _, index = write_shards(tmp_path, kind)
    said = json.loads(index.read_text())
    name, shard = next(iter(said["weight_map"].items()))
    moved = said | {"weight_map": said["weight_map"] | {name: sorted(set(said["weight_map"].values()) - {shard})[0]}}
    index.write_text(json.dumps(moved))
    with pytest.raises(WeightsError, match=f"names tensors that are not there: {name} in ") as error:
        load_backbone(tmp_path)
    index.write_text(json.dumps(said))
    (tmp_path / shard).rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=f"are not there: {shard}") as error:
        load_backbone(tmp_path)
    assert index.name in str(error.value)


@pytest.mark.parametrize(
    "place", ["../w.safetensors", "/w.safetensors", "..\\w.safetensors", "C:\\w.safetensors", "a/../../w"]
)
def test_an_index_that_leads_out_of_its_folder(tmp_path, place):
    folder = tmp_path / "model"
    folder.mkdir()
    _, index = write_shards(folder, "safetensors")
    said = json.loads(index.read_text())
    name, shard = next(iter(said["weight_map"].items()))
    (tmp_path / "w.safetensors").write_bytes((folder / shard).read_bytes())
    index.write_text(json.dumps({"weight_map": said["weight_map"] | {name: place}}))
    with pytest.raises(WeightsError, match="names files outside its folder"):
        load_backbone(folder)


def test_files_that_are_links_as_in_a_cache(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    model, _ = write_shards(folder, "safetensors")
    for i, path in enumerate(folder.glob("model-*.safetensors")):
        path.rename(tmp_path / f"blob{i}")
        path.symlink_to(tmp_path / f"blob{i}")
    assert_outputs_equal(model, load_backbone(folder))


@pytest.mark.parametrize("said", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"cls_token": 1}}])
def test_an_index_that_names_nothing(tmp_path, said):
    _, index = write_shards(tmp_path, "bin")
    index.write_text(json.dumps(said))
    with pytest.raises(WeightsError, match="expected weight_map"):
        load_backbone(tmp_path)


# A timm folder


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


# Checkpoints with the weights and their moving average


def with_prefix(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


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
    back = assert_equal(tmp_path / "w.pth", network)
    assert any("the moving average" in note and "left out" in note for note in back.notes)


def test_raw_weights_are_told_where_there_is_no_average_that_can_be_read(tmp_path):
    network = randomised(VisionTransformer(**SIZE))
    path = tmp_path / "w.pth"
    torch.save({"model": network.state_dict(), "ema": list(network.state_dict().values())}, path)
    assert any("'ema' (list) holds no tensors by name" in note for note in assert_equal(path, network).notes)
    torch.save({"student": network.state_dict(), "epoch": 1}, path)
    assert any("raw weights" in note for note in assert_equal(path, network).notes)
    torch.save(with_prefix("student.", network.state_dict()), path)
    assert any("raw weights" in note for note in assert_equal(path, network).notes)


def test_an_average_that_pytorch_keeps(tmp_path):
    network = randomised(VisionTransformer(**SIZE))
    averaged = torch.optim.swa_utils.AveragedModel(network)
    assert "n_averaged" in averaged.state_dict()
    torch.save({"model": with_prefix("", network.state_dict()), "ema": averaged.state_dict()}, tmp_path / "w.pth")
    assert any("AveragedModel" in note for note in assert_equal(tmp_path / "w.pth", network).notes)


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
        assert_equal(tmp_path / "w.pth", network)
        assert set(torch.serialization.get_safe_globals()) == set(before)
        assert argparse.Namespace not in torch.serialization.get_safe_globals()


# What is no backbone


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "hide", [lambda bomb: bomb, lambda bomb: argparse.Namespace(lr=bomb), lambda bomb: [{1: bomb}]]
)
def test_a_namespace_hides_no_code(tmp_path, hide, new_format):
    path, proof = tmp_path / "w.pth", tmp_path / "proof"
    torch.save({"args": hide(Bomb(proof))}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match=r"io\.open, and could run code.*nothing of it was run"):
        load_backbone(path)
    assert not proof.exists()


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
