"""A run that an earlier version began, and stopped at step 3 of 6, goes on as it would have gone on there.

``data/version_0_1_0`` holds 12 images, one of them unreadable, the run, and what that version was given and computed in
its six steps. Sums of many products differ in their last bits between processors, so losses and weights are compared to
four digits; what the steps are given is compared exactly.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dinoforge import load, train
from dinoforge.commands.report import doctor, open_run
from dinoforge.data.batch import Batch, prepare

FOLDERS = sorted((Path(__file__).parent / "data").glob("version_*"))


@pytest.fixture(params=FOLDERS, ids=[folder.name for folder in FOLDERS])
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(request.param, tmp_path / "earlier")
    return tmp_path / "earlier"


def given(batch: Batch) -> dict[str, Any]:
    return {
        "images": batch.indices.tolist(),
        "masked": batch.masks.sum(dim=1).tolist(),
        "masks": hashlib.sha256(batch.masks.numpy().tobytes()).hexdigest(),
        "global": pytest.approx(batch.global_crops.float().mean(dim=(1, 2, 3)).tolist(), abs=0.5),
        "local": pytest.approx(batch.local_crops.float().mean(dim=(1, 2, 3)).tolist(), abs=0.5),
    }


def test_it_goes_on_as_there(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json.loads((earlier / "expected.json").read_text())
    batches: list[dict[str, Any]] = []

    def record(batch: Batch, **named: Any) -> Batch:
        batches.append(given(batch))
        return prepare(batch, **named)

    monkeypatch.setattr("dinoforge.commands.run.prepare", record)
    result = train(earlier / "images", "small", earlier / "run", console=Console(quiet=True), **expected["keys"])
    assert result.finished
    assert batches == expected["batches"][3:]

    lines = [json.loads(line) for line in (earlier / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in expected["losses"]]
    for line, losses in zip(lines, expected["losses"], strict=True):
        assert {key: line[key] for key in losses} == pytest.approx(losses, rel=1e-4)
    teacher = load_file(earlier / "run" / "teacher.safetensors")
    assert {name: [float(t.double().mean()), float(t.double().abs().mean())] for name, t in teacher.items()} == {
        name: pytest.approx(moments, rel=1e-3, abs=1e-6) for name, moments in expected["teacher"].items()
    }


def test_it_is_opened(earlier: Path) -> None:
    backbone = load(earlier / "run")
    assert backbone(torch.zeros(1, 1, 32, 32)).shape == (1, 16)
    assert doctor(earlier / "run") == []
    opened = open_run(earlier / "run", data=earlier / "images")
    assert opened.checkpoints == (3,)
    assert opened.missing == ()
