"""The examples of docs/using.md, as they stand, on a run of the recipe that they are written for."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinoforge
from dinoforge.cli.main import main

for library in ("timm", "transformers", "onnxruntime", "pyarrow"):
    pytest.importorskip(library)

PAGE = Path(__file__).parents[2] / "docs" / "using.md"
SHORT = {
    "train.steps": 2,
    "train.batch_size_per_gpu": 4,
    "train.num_workers": 0,
    "train.threads": 1,
    "crops.local_crops_number": 0,
    "dino.head_n_prototypes": 16,
    "dino.head_hidden_dim": 16,
    "device": "cpu",
}


def blocks():
    """Section, language and content of each block, in the order of the page."""
    found = []
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        title = section.splitlines()[0]
        found += [(title, *match) for match in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)]
    return found


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i, name in enumerate("abcdefgh"):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((160, 120)).save(f"photos/{name}.jpg")
    dinoforge.train("photos", "small", "runs/photos", **SHORT)

    names: dict[str, object] = {}
    sections = set()
    for section, language, content in blocks():
        sections.add(section)
        if language == "bash":
            for line in content.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "dinoforge"
                assert main(arguments) == 0, line
        else:
            assert language == "python"
            exec(compile(content, f"{PAGE.name}: {section}", "exec"), names)
    assert sections == {"Plain PyTorch", "timm", "Hugging Face", "ONNX Runtime", "A table of features"}

    out = capsys.readouterr().out
    for said in ("embed_dim=128", "patch_size=12", "img_size=96", "vit_small_patch14_dinov2"):
        assert said in out  # timm's call on the page is the one that the export says
    shapes = {name: tuple(names[name].shape) for name in ("images", "cls", "theirs", "hidden", "features", "patches")}
    assert shapes == {
        "images": (2, 3, 96, 96),
        "cls": (2, 128),
        "theirs": (2, 65, 128),
        "hidden": (1, 65, 128),
        "features": (8, 128),
        "patches": (8, 8, 8, 128),
    }
    assert [tuple(m.shape) for m in names["maps"]] == [(2, 128, 8, 8)] * 2
