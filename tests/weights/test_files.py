"""Weights in several files, and files that could run code."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from dinoforge.errors import WeightsError
from dinoforge.weights.backbone import load_backbone
from other_libraries import assert_outputs_equal, write_folder


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
