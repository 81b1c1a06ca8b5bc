"""Backbones as files: what comes back, and what is refused."""

import json
import pickle
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dinoforge.data.image_input import ImageInput
from dinoforge.errors import RunError, WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights.backbone import Backbone, load_backbone, save_backbone

ARCHITECTURE = {
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 16,
    "in_chans": 2,
    "num_register_tokens": 3,
    "ffn_layer": "swiglu",
    "interpolate_offset": 0.0,
    "qkv_bias": False,
}
IMAGE = ImageInput(size=16, in_chans=2, mean=(0.1, 0.2), std=(0.3, 1 / 3), sixteen_bit="minmax", max_pixels=10**9)


def make_backbone(**changes):
    torch.manual_seed(0)
    architecture = ARCHITECTURE | changes
    return Backbone(VisionTransformer(**architecture), architecture, IMAGE, step=1234)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_backbone(path, make_backbone())
    return path


def rewrite(path, *, tensors=None, header=None):
    """The file with its tensors or header changed by the given functions."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    contents = load_file(path)
    save_file(tensors(contents) if tensors else contents, path, metadata=header(metadata) if header else metadata)


@pytest.mark.parametrize("changes", [{}, {"ffn_layer": "mlp", "num_register_tokens": 0, "layerscale": 0.0}])
def test_a_backbone_comes_back_bit_by_bit(tmp_path, changes):
    backbone = make_backbone(**changes)
    path = tmp_path / "new" / "folder" / "teacher.safetensors"
    save_backbone(path, backbone)
    back = load_backbone(path)
    ours, theirs = backbone.network.state_dict(), back.network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype is theirs[name].dtype for name in ours)
    assert (back.architecture, back.image, back.step) == (backbone.architecture, IMAGE, 1234)
    assert not back.network.training
    assert not any(p.requires_grad or p.is_meta for p in back.network.parameters())
    for side in (16, 24):
        images = torch.randn(2, 2, side, side)
        assert torch.equal(back.network(images).cls, backbone.network.eval()(images).cls)


def test_the_file_is_plain_safetensors_with_official_names(saved):
    tensors = load_file(saved)
    assert set(tensors) == set(make_backbone().network.state_dict())
    assert {"cls_token", "pos_embed", "mask_token", "blocks.0.attn.qkv.weight", "blocks.1.mlp.w12.weight"} <= set(
        tensors
    )
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["architecture"]) == ARCHITECTURE
    assert json.loads(header["image"])["mean"] == [0.1, 0.2]
    assert header["step"] == "1234"


def test_saving_again_replaces_the_file_and_leaves_nothing_else(saved):
    other = make_backbone()
    with torch.no_grad():
        other.network.cls_token.fill_(7)
    save_backbone(saved, other)
    assert load_backbone(saved).network.cls_token.eq(7).all()
    assert list(saved.parent.iterdir()) == [saved]


def test_a_place_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        save_backbone(tmp_path / "file" / "teacher.safetensors", make_backbone())


def test_a_place_that_is_a_folder(tmp_path):
    path = tmp_path / "teacher.safetensors"
    path.mkdir()
    with pytest.raises(RunError, match="cannot write"):
        save_backbone(path, make_backbone())
    assert list(tmp_path.iterdir()) == [path]


# Refusals


def test_no_file(tmp_path):
    with pytest.raises(WeightsError, match="there is no file"):
        load_backbone(tmp_path / "teacher.safetensors")


def test_a_folder(tmp_path):
    with pytest.raises(WeightsError):
        load_backbone(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_without_our_header_gives_equal_tensors(saved, metadata):
    save_file(load_file(saved), saved, metadata=metadata)
    back = load_backbone(saved, {"num_heads": 2})
    assert all(torch.equal(t, make_backbone().network.state_dict()[n]) for n, t in back.network.state_dict().items())


def test_a_newer_format(saved):
    save_file(load_file(saved), saved, metadata={"format": "dinoforge-backbone-2"})
    with pytest.raises(WeightsError, match="newer dinoforge"):
        load_backbone(saved)


@pytest.mark.parametrize("length", [640, 1152, 1408, 19280])
def test_a_header_as_long_as_the_numbers_that_other_files_begin_with(tmp_path, length):
    """Safetensors begin with that length: 640 reads as the first bytes of a pickle, 19280 as those of an archive."""
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"padding": ""})
    plain = int.from_bytes(path.read_bytes()[:8], "little")
    save_file({"x": torch.zeros(1)}, path, metadata={"padding": " " * (length - plain)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    with pytest.raises(WeightsError, match=r"not a DINOv2 backbone.*it has x"):  # it was read
        load_backbone(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9, 0.999])
def test_a_truncated_file(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_backbone(saved)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [lambda o, p: torch.save(o, p), lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_pickle_file_is_refused_and_not_run(tmp_path, write):
    path, proof = tmp_path / "teacher.safetensors", tmp_path / "proof"
    write({"cls_token": Bomb(proof)}, path)
    with pytest.raises(WeightsError, match="could run code"):
        load_backbone(path)
    assert not proof.exists()


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("cls_token"), "cls_token"),
        (without("blocks.1.norm2.bias"), "blocks.1.norm2.bias"),
        (lambda tensors: tensors | {"head.weight": torch.zeros(2)}, "head.weight"),
        (lambda tensors: tensors | {"pos_embed": torch.zeros(1, 10, 16)}, "pos_embed"),
        (lambda tensors: tensors | {"mask_token": torch.zeros(16)}, "mask_token"),
        (lambda tensors: {}, "cls_token"),
    ],
)
def test_weights_that_do_not_fit_the_header(saved, change, named):
    rewrite(saved, tensors=change)
    with pytest.raises(WeightsError, match=named):
        load_backbone(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": json.dumps(ARCHITECTURE | {"depth": 3})},
        {"architecture": json.dumps(ARCHITECTURE | {"patch_size": 3})},
        {"architecture": json.dumps(ARCHITECTURE | {"num_heads": 3})},
        {"architecture": json.dumps(ARCHITECTURE | {"colour": 3})},
        {"architecture": json.dumps(ARCHITECTURE | {"embed_dim": "16"})},
        {"architecture": "{"},
        {"architecture": "5"},
        {"image": "[]"},
        {"image": json.dumps({"size": 16})},
        {"step": "many"},
        {"step": None},
        {"image": None},
        {"architecture": None},
        {"architecture": json.dumps(ARCHITECTURE | {"in_chans": 3})},
        {"image": json.dumps(asdict(IMAGE) | {"in_chans": 3})},
        {"image": json.dumps(asdict(IMAGE) | {"mean": []})},
        {"image": json.dumps(asdict(IMAGE) | {"std": [0.5, 0.5, 0.5]})},
        {"image": json.dumps(asdict(IMAGE) | {"std": [0.5, 0.0]})},
        {"image": json.dumps(asdict(IMAGE) | {"mean": [0.5, float("nan")]})},
        {"image": json.dumps(asdict(IMAGE) | {"size": 18})},
        {"image": json.dumps(asdict(IMAGE) | {"size": 0})},
        {"image": json.dumps(asdict(IMAGE) | {"sixteen_bit": "some"})},
    ],
)
def test_a_header_that_does_not_fit(saved, change):
    rewrite(saved, header=lambda h: {k: v for k, v in (h | change).items() if v is not None})
    with pytest.raises(WeightsError, match=r"teacher\.safetensors"):
        load_backbone(saved)


@pytest.mark.parametrize("key", ["num_heads", "patch_size"])
def test_a_header_with_a_zero(saved, key):
    rewrite(saved, header=lambda h: h | {"architecture": json.dumps(ARCHITECTURE | {key: 0})})
    with pytest.raises(WeightsError):
        load_backbone(saved)
