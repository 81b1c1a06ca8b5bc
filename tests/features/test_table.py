"""Features as files: what is in them, and that being killed changes nothing of it."""

import hashlib
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import dinoforge
from dinoforge.cli.main import main
from dinoforge.commands.embed import write_features
from dinoforge.data.image_input import ImageInput
from dinoforge.errors import DataError, ExportError, RunError
from dinoforge.features import table as table_module
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights.backbone import Backbone, save_backbone

ARCHITECTURE = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "in_chans": 1,
    "layerscale": 1.0,
    "num_register_tokens": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    image = ImageInput(32, 1, (0.4,), (0.2,), "full", 10**6)
    path = tmp_path_factory.mktemp("model") / "teacher.safetensors"
    save_backbone(path, Backbone(VisionTransformer(**ARCHITECTURE), ARCHITECTURE, image, 5))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine images in two folders; the fourth and the last are damaged."""
    root = tmp_path_factory.mktemp("images")
    for i in range(9):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (root / "a/6.png").write_bytes(b"\x89PNG no more")
    (root / "b/7.png").write_bytes(b"")
    return root


READABLE = ["a/0.png", "a/2.png", "a/4.png", "a/8.png", "b/1.png", "b/3.png", "b/5.png"]


def expected(model, images):
    """Cls [N, D] and patch tokens [N, P, D] by the loaded module, image by image."""
    backbone = dinoforge.load(model)
    with torch.no_grad():
        tokens = [backbone.forward_features(backbone.preprocess(images / name)[None]) for name in READABLE]
    return torch.cat([t.cls for t in tokens]).numpy(), torch.cat([t.patches for t in tokens]).numpy()


def contents(out):
    """Names, cls and patch tokens of what was written."""
    if out.suffix == ".npy":
        names = out.with_name(f"{out.stem}.names.txt").read_text(encoding="utf-8").splitlines()
        return names, np.load(out), np.load(out.with_name(f"{out.stem}.patches.npy"))
    table = pyarrow.parquet.read_table(out)
    rows, columns = json.loads(table.schema.metadata[b"dinoforge"])["grid"]
    cls, patches = (np.stack(table[key].to_numpy()) for key in ("cls", "patches"))
    return table["name"].to_pylist(), cls, patches.reshape(len(cls), rows * columns, -1)


def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("suffix", table_module.SUFFIXES)
def test_names_and_tokens_in_order(suffix, model, images, tmp_path, capsys):
    out = tmp_path / f"features{suffix}"
    assert main(["embed", str(model), str(images), "--out", str(out), "--patches"]) == 0
    names, cls, patches = contents(out)
    assert names == READABLE
    ours = expected(model, images)
    # Where the machine multiplies faster in bfloat16, features are computed in it.
    np.testing.assert_allclose(cls, ours[0], atol=0.05)
    np.testing.assert_allclose(patches, ours[1], atol=0.05)
    assert cls.dtype == np.float32
    skipped = (tmp_path / "features.skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["a/6.png", "b/7.png"]
    assert all(line.split("\t")[1] for line in skipped)
    said = capsys.readouterr()
    assert "7 images" in said.out
    assert "2 could not be read and have no row, first a/6.png" in said.out
    assert "9/9 images" in said.err
    files = {"features.skipped.txt", out.name} | (
        {"features.names.txt", "features.patches.npy"} if suffix == ".npy" else set()
    )
    assert {path.name for path in tmp_path.iterdir()} == files


def test_the_same_rows_as_in_python(model, images, tmp_path):
    good = [images / name for name in READABLE]
    out = tmp_path / "features.npy"
    write_features(dinoforge.load(model), good, out, eval={"size": 64})
    assert np.array_equal(np.load(out), dinoforge.embed(model, good, eval={"size": 64}))
    assert not (tmp_path / "features.skipped.txt").exists()


@pytest.mark.parametrize("suffix", table_module.SUFFIXES)
def test_many_parts_are_as_one(suffix, model, images, tmp_path, monkeypatch):
    one, many = tmp_path / "one", tmp_path / "many"
    seen = []
    monkeypatch.setattr(table_module, "_BATCH", 2)
    monkeypatch.setattr(table_module, "_PART_IMAGES", 4)
    write_features(model, images, many / f"it{suffix}", patches=True, on_progress=lambda *n: seen.append(n))
    assert seen == [(0, 9), (4, 9), (8, 9), (9, 9)]
    monkeypatch.setattr(table_module, "_PART_IMAGES", 100)
    write_features(model, images, one / f"it{suffix}", patches=True)
    assert sums(one) == sums(many)


def test_memory_is_that_of_a_part(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "_PART_BYTES", 4 * 32 * 16 * 3)  # of three images' patch tokens
    sizes = []
    save = table_module.save_tensors
    monkeypatch.setattr(
        table_module,
        "save_tensors",
        lambda t, *rest, **more: (sizes.append(t["patches"].nbytes), save(t, *rest, **more)),
    )
    write_features(model, images, tmp_path / "it.parquet", patches=True)
    assert len(sizes) == 3
    assert max(sizes) <= table_module._PART_BYTES
    assert pyarrow.parquet.ParquetFile(tmp_path / "it.parquet").num_row_groups == 3


def killed_at(moment, work):
    """Runs ``work`` in a process of its own that gets SIGKILL at a moment; whether it came to its end.

    Moments are counted: in front of each part, each file that gets its name, each clearing away.
    """
    child = os.fork()
    if child == 0:
        passed = 0

        def counted(function):
            def call(*arguments, **keywords):
                nonlocal passed
                passed += 1
                if passed == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        try:
            table_module.save_tensors = counted(table_module.save_tensors)
            Path.rename, Path.replace = counted(Path.rename), counted(Path.replace)
            shutil.rmtree = counted(shutil.rmtree)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("suffix", table_module.SUFFIXES)
def test_killed_anywhere_the_same_command_goes_on(suffix, model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "_BATCH", 2)
    monkeypatch.setattr(table_module, "_PART_IMAGES", 4)
    write_features(model, images, tmp_path / "whole" / f"it{suffix}", patches=True)
    whole = sums(tmp_path / "whole")
    moments = 0
    for moment in range(1, 100):  # killed once at each moment
        out = tmp_path / f"killed{moment}" / f"it{suffix}"
        write = partial(write_features, model, images, out, patches=True)
        if killed_at(moment, write):
            break
        moments += 1
        assert not out.exists() or sums(out.parent) == whole
        if out.exists() and not (out.parent / f".it{suffix}.parts").exists():
            with pytest.raises(RunError, match="exists"):  # all was done
                write()
        else:
            write()
        assert sums(out.parent) == whole
        assert [path.name for path in out.parent.iterdir() if path.is_dir()] == []
    assert moments > 9

    out = tmp_path / "again" / f"it{suffix}"  # and at one after the other
    for moment in (3, 1, 2, 4):
        assert not killed_at(moment, partial(write_features, model, images, out, patches=True))
    write_features(model, images, out, patches=True)
    assert sums(out.parent) == whole


def test_what_is_done_is_not_done_again(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "_BATCH", 2)
    monkeypatch.setattr(table_module, "_PART_IMAGES", 2)

    def stop(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(model, images, tmp_path / "it.npy", on_progress=stop)
    parts = tmp_path / ".it.npy.parts"
    assert len(list(parts.glob("*.safetensors"))) == 3
    seen = []
    write_features(model, images, tmp_path / "it.npy", on_progress=lambda done, total: seen.append(done))
    assert seen == [6, 8, 9]


def test_ctrl_c_says_how_to_go_on(model, images, tmp_path, capsys, monkeypatch):
    def save(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(table_module, "save_tensors", save)
    assert main(["embed", str(model), str(images), "--out", str(tmp_path / "it.npy")]) == 130
    assert "same command again" in capsys.readouterr().err


# Refusals


def test_parts_of_something_else(model, images, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(model, images, tmp_path / "it.npy", on_progress=stop)
    with pytest.raises(RunError, match="different: patches"):
        write_features(model, images, tmp_path / "it.npy", patches=True)
    with pytest.raises(RunError, match="different: reading"):
        write_features(model, images, tmp_path / "it.npy", eval={"size": 64})
    with pytest.raises(RunError, match="different: images"):
        write_features(model, images / "a", tmp_path / "it.npy")
    other = dinoforge.load(model)
    other.network.norm.bias.data += 1
    with pytest.raises(RunError, match="different: weights"):
        write_features(other, images, tmp_path / "it.npy")


def test_what_is_there_stays(model, images, tmp_path):
    (tmp_path / "it.npy").write_text("precious")
    with pytest.raises(RunError, match="exists"):
        write_features(model, images, tmp_path / "it.npy")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"it.npy": "precious"}


@pytest.mark.parametrize("name", ["it.csv", "it"])
def test_another_kind_of_file(name, model, images, tmp_path):
    with pytest.raises(ExportError, match=r"ends in \.parquet or \.npy"):
        write_features(model, images, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_pyarrow(model, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ExportError, match=r"pip install 'dinoforge\[parquet\]'"):
        write_features(model, images, tmp_path / "it.parquet")
    assert not list(tmp_path.iterdir())
    write_features(model, images, tmp_path / "it.npy")


def test_nothing_readable(model, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the 1 images can be read: 0\.png"):
        write_features(model, tmp_path / "images", tmp_path / "out" / "it.npy")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_no_text(model, images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"a\nb.png", b"\xff.png"):
        (folder / os.fsdecode(name)).write_bytes((images / READABLE[0]).read_bytes())
    for suffix in table_module.SUFFIXES:
        out = tmp_path / f"it{suffix}"
        write_features(model, folder, out, patches=True)
        assert contents(out)[0] == ["a\\nb.png", "\\xff.png"]
