"""Exports beside the libraries they are for: timm, transformers and ONNX Runtime, opened as a user opens them."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dinoforge import load, train
from dinoforge.cli.main import main
from dinoforge.commands.export import export
from dinoforge.data.image_input import ImageInput
from dinoforge.errors import ExportError, RecipeError, RunError
from dinoforge.export import make
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights.backbone import Backbone

pytestmark = pytest.mark.slow

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 14, "image_size": 98}
TINY = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 14, "image_size": 56}
REGISTERS = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
KINDS = {"small": SMALL, "registers": SMALL | REGISTERS, "swiglu": TINY | {"ffn_layer": "swiglu"}}
SUFFIX = {name: (f.suffixes or ("",))[0] for name, f in make.FORMATS.items()}
LIBRARIES = ("timm", "hf", "onnx")


def random_network(**arguments):
    torch.manual_seed(0)
    network = VisionTransformer(**arguments).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name or "gamma" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=0.1)
    return network


def random_backbone(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), **arguments):
    channels = arguments.get("in_chans", 3)
    image = ImageInput(arguments["image_size"], channels, mean[:channels], std[:channels], "full", 10**8)
    return Backbone(random_network(**arguments), arguments, image, 7)


def opened(report, backbone):
    """What a user gets who follows the first line that the export says, and the model."""
    registers, name = backbone.network.num_register_tokens, report.path.name
    if report.library == "onnxruntime":
        session = onnxruntime.InferenceSession(report.path)
        return lambda images: [torch.from_numpy(x) for x in session.run(["cls", "patches"], {"images": images.numpy()})]
    if report.library == "timm":
        said = report.notes[0].replace(repr(name), repr(str(report.path)))
        model = eval(said, {"timm": timm}).eval()
        tokens = model.forward_features
    else:
        model = transformers.AutoModel.from_pretrained(report.path).eval()
        tokens = lambda images: model(images).last_hidden_state  # noqa: E731
    return lambda images: [tokens(images)[:, 0], tokens(images)[:, 1 + registers :]]


def assert_agrees(report, backbone, size, tolerance=1e-4):
    images = torch.randn(3, backbone.image.in_chans, *size)
    with torch.no_grad():
        ours = backbone.forward_features(images)
        cls, patches = opened(report, backbone)(images)
    torch.testing.assert_close(cls, ours.cls, rtol=0, atol=tolerance)
    torch.testing.assert_close(patches, ours.patches, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=KINDS)
def official(request, tmp_path_factory):
    """A file in the official layout with random weights."""
    path = tmp_path_factory.mktemp("official") / f"{request.param}.pth"
    torch.save(random_network(**KINDS[request.param]).state_dict(), path)
    return path


@pytest.mark.parametrize("to", LIBRARIES)
def test_from_the_official_layout_to_other_libraries(official, to, tmp_path):
    backbone = load(official)
    report = export(official, to, tmp_path / f"it{SUFFIX[to]}")
    side = backbone.architecture["image_size"]
    assert_agrees(report, backbone, (side, side))
    coincide = official.stem == "registers"  # timm, transformers and ONNX Runtime then resample as we do
    for height, width in ((side + 28, side + 28), (side - 28, side + 14)) if coincide else ():
        assert_agrees(report, backbone, (height, width))
    assert [check.same_rule for check in report.checks] == (
        [True] if to == "onnx" and not coincide else [True, coincide, coincide]
    )


@pytest.mark.parametrize("to", ["safetensors", "official", "hf", "timm"])
def test_and_back(official, to, tmp_path):
    backbone = load(official)
    report = export(official, to, tmp_path / f"it{SUFFIX[to]}")
    back = load(report.path)
    ours, theirs = backbone.network.state_dict(), back.network.state_dict()
    if to != "timm":
        assert list(ours) == list(theirs)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert back.architecture == backbone.architecture
    images = torch.randn(2, 3, 70, 84)
    with torch.no_grad():
        before, after = backbone.forward_features(images), back.forward_features(images)
    torch.testing.assert_close(after.cls, before.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.patches, before.patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_onnx_takes_any_size_where_that_is_exact(antialias, tmp_path):
    backbone = random_backbone(**TINY, interpolate_offset=0.0, interpolate_antialias=antialias)
    report = export(backbone, "onnx", tmp_path / "it.onnx")
    for size in ((56, 56), (28, 98), (140, 42)):
        assert_agrees(report, backbone, size)
    session = onnxruntime.InferenceSession(report.path)
    said = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(said["mean"])) == backbone.image.mean
    assert tuple(json.loads(said["std"])) == backbone.image.std


def test_onnx_without_that_is_for_one_size(tmp_path):
    backbone = random_backbone(**TINY)
    report = export(backbone, "onnx", tmp_path / "it.onnx", size=(28, 70))
    assert [check.size for check in report.checks] == [(28, 70)]
    assert_agrees(report, backbone, (28, 70))


@pytest.mark.parametrize(("to", "size"), [("timm", (84, 84)), ("timm", (28, 84)), ("hf", (84, 84)), ("onnx", (28, 84))])
def test_baked_for_a_size(to, size, tmp_path):
    backbone = random_backbone(**TINY)
    report = export(backbone, to, tmp_path / f"it{SUFFIX[to]}", size=size, bake=True)
    assert_agrees(report, backbone, size)


def test_without_baking_another_rule_is_told(tmp_path, capsys):
    torch.save(random_network(**TINY).state_dict(), tmp_path / "w.pth")
    assert main(["export", str(tmp_path / "w.pth"), "--to", "hf", "--out", str(tmp_path / "hf"), "--size", "84"]) == 0
    out = capsys.readouterr().out
    assert "another rule" in out
    assert "--bake" in out
    report = export(tmp_path / "w.pth", "hf", tmp_path / "again", size=84)
    (other,) = [check for check in report.checks if check.size == (84, 84)]
    assert not other.same_rule
    assert other.difference > 1e-3


def test_our_own_file_baked(tmp_path):
    backbone = random_backbone(**TINY)
    back = load(export(backbone, "safetensors", tmp_path / "it.safetensors", size=84, bake=True).path)
    assert (back.image.size, back.architecture["image_size"], back.step) == (84, 84, 7)
    images = torch.randn(1, 3, 84, 84)
    assert torch.equal(back(images), backbone(images))


@pytest.mark.parametrize("to", ["timm", "hf"])
@pytest.mark.parametrize(
    "kind",
    [
        {"layerscale": 0.0, "qkv_bias": False, "proj_bias": False, "ffn_bias": False},
        {"in_chans": 1},
        {"ffn_layer": "swiglu", "num_register_tokens": 2, "mlp_ratio": 3.0},
        {"patch_size": 8, "depth": 1, "mlp_ratio": 2.0},
    ],
)
def test_networks_that_the_libraries_have_no_name_for(to, kind, tmp_path):
    backbone = random_backbone(**TINY | kind)
    assert_agrees(export(backbone, to, tmp_path / f"it{SUFFIX[to]}"), backbone, (56, 56))


def test_hugging_face_folder_is_complete(tmp_path):
    backbone = random_backbone(**TINY)
    report = export(backbone, "hf", tmp_path / "hf")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} == {
        path.name for path in report.path.iterdir()
    }
    _, info = transformers.AutoModel.from_pretrained(report.path, output_loading_info=True)
    assert not any(info.values()), info
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(report.path)(Image.fromarray(pixels), return_tensors="pt")
    one_level = 1 / 255 / min(backbone.image.std)
    torch.testing.assert_close(theirs["pixel_values"][0], backbone.preprocess(pixels), rtol=0, atol=one_level + 1e-5)
    assert load(report.path).image.mean == backbone.image.mean


# Refusals


@pytest.mark.parametrize("to", list(make.FORMATS))
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_outputs_that_differ_leave_nothing(to, factor, tmp_path, monkeypatch):
    target = make.FORMATS[to]

    def wrong(content, path):
        run = target.open(content, path)
        return lambda images: tuple(x * factor for x in run(images))

    monkeypatch.setitem(make.FORMATS, to, dataclasses.replace(target, open=wrong))
    with pytest.raises(ExportError, match="other outputs at 56 × 56"):
        export(random_backbone(**TINY), to, tmp_path / "new" / f"it{SUFFIX[to]}")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_a_changed_weight_is_noticed(to, tmp_path, monkeypatch):
    target = make.FORMATS[to]

    def spoil(content, path):
        notes = target.write(content, path)
        file = path / "model.safetensors" if to == "hf" else path
        tensors = load_file(file)
        name = next(name for name in tensors if "norm2.bias" in name)
        tensors[name] = tensors[name] + 0.1
        save_file(tensors, file, metadata={"format": "pt"})
        return notes

    monkeypatch.setitem(make.FORMATS, to, dataclasses.replace(target, write=spoil))
    with pytest.raises(ExportError, match="other outputs"):
        export(random_backbone(**TINY), to, tmp_path / f"it{SUFFIX[to]}")


@pytest.mark.parametrize(
    ("to", "name", "more", "message"),
    [
        ("tflite", "it.tflite", {}, "expected safetensors, official"),
        ("onnx", "it.pth", {}, r"ends in \.onnx"),
        ("timm", "it.safetensors", {"size": 50}, "multiple of the patch size 14"),
        ("hf", "it", {"size": (28, 56), "bake": True}, "square images only"),
        ("safetensors", "it.safetensors", {"size": (28, 56), "bake": True}, "square images only"),
    ],
)
def test_what_cannot_be_is_said(to, name, more, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(random_backbone(**TINY), to, tmp_path / name, **more)
    assert not list(tmp_path.iterdir())


def test_hidden_layers_that_hugging_face_cannot_have(tmp_path):
    with pytest.raises(ExportError, match="whole multiple"):
        export(random_backbone(**TINY | {"mlp_ratio": 2.5}), "hf", tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "it.pth").write_text("precious")
    with pytest.raises(RunError, match="exists"):
        export(random_backbone(**TINY), "official", tmp_path / "it.pth")
    assert (tmp_path / "it.pth").read_text() == "precious"


@pytest.mark.parametrize(
    ("to", "package"), [("timm", "timm"), ("hf", "transformers"), ("onnx", "onnx"), ("onnx", "onnxruntime")]
)
def test_a_missing_package_is_named_with_the_extra(to, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"{package}: pip install 'dinoforge\[export\]'"):
        export(random_backbone(**TINY), to, tmp_path / f"it{SUFFIX[to]}")
    assert not list(tmp_path.iterdir())


# Runs and files


def test_a_run_is_compared_on_its_images(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    keys = (
        "student.embed_dim=32 student.depth=1 student.num_heads=1 student.patch_size=8 student.in_chans=1 "
        "data.mean=0.5 data.std=0.25 crops.global_crops_size=32 crops.local_crops_number=0 dino.head_n_prototypes=16 "
        "dino.head_hidden_dim=16 train.batch_size_per_gpu=4 train.steps=2 train.num_workers=0 device=cpu"
    )
    train(folder, "small", tmp_path / "run", **dict(key.split("=") for key in keys.split()))
    backbone = load(tmp_path / "run")
    assert (backbone.step, backbone.metadata["images"], backbone.metadata["total_steps"]) == (2, 8, 2)
    assert backbone.metadata["recipe"]["student"]["embed_dim"] == 32

    report = export(tmp_path / "run", "hf", tmp_path / "hf")
    assert report.shown == "images of the run"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Training images: 8" in card
    assert "Training steps: 2" in card
    folder.rename(tmp_path / "elsewhere")
    assert "not found" in export(tmp_path / "run", "timm", tmp_path / "it.safetensors").shown


def test_heads_and_normalisation_can_be_given(tmp_path, capsys):
    network = random_network(**TINY | {"num_heads": 4})
    torch.save(network.state_dict(), tmp_path / "w.pth")
    arguments = ["export", str(tmp_path / "w.pth"), "--to", "safetensors", "--out", str(tmp_path / "w.safetensors")]
    assert main([*arguments, "student.num_heads=4", "data.mean=0.5", "data.std=[0.1,0.2,0.3]"]) == 0
    assert "assumed num_heads" not in capsys.readouterr().err
    back = load(tmp_path / "w.safetensors")
    assert back.architecture["num_heads"] == 4
    assert (back.image.mean, back.image.std) == ((0.5,), (0.1, 0.2, 0.3))
    images = torch.randn(1, 3, 56, 56)
    assert torch.equal(back(images), network(images).cls)
    with pytest.raises(RecipeError, match=r"eval\.size"):
        export(tmp_path / "w.pth", "official", tmp_path / "x.pth", **{"eval.size": 56})


def test_a_size_has_one_or_two_sides(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", "x", "--to", "timm", "--out", str(Path(tmp_path, "y")), "--size", "1", "2", "3"])
    assert "--size" in capsys.readouterr().err
