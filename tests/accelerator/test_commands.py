"""What users call, on an accelerator that is not there: everything that ``auto`` would find there."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import dinoforge
from dinoforge.commands import replay as replay_command
from dinoforge.commands.embed import write_features
from dinoforge.commands.evaluate import evaluate_classifier, evaluate_knn
from dinoforge.commands.export import export
from dinoforge.commands.report import report
from dinoforge.data.batch import prepare
from dinoforge.evaluation import classifiers
from dinoforge.evaluation.knn import knn_predict
from dinoforge.features import extract
from dinoforge.planning.bench import StepBench
from dinoforge.runs import replay
from dinoforge.runs.directory import RunDirectory
from dinoforge.selfcheck.fake import DEVICE, Counts, fake_accelerator
from dinoforge.system import device as devices
from tiny import TINY

KEYS = TINY | {"train.steps": 6, "optim.warmup_length": "20%", "report.every_minutes": None}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the CPU."""
    out = tmp_path_factory.mktemp("runs") / "cpu"
    dinoforge.train(classes, out=out, console=QUIET, **KEYS)
    return out


@pytest.fixture
def accelerator() -> Iterator[Counts]:
    with fake_accelerator(float64=False, found=True) as counts:
        yield counts


def test_auto_finds_it(accelerator):
    assert devices.resolve_device("auto") == DEVICE


def test_features_are_those_of_the_cpu(run, classes, accelerator, tmp_path):
    """The backbone goes where the images go."""
    ours = dinoforge.embed(run, classes)
    assert accelerator.kernels > 0
    expected = dinoforge.embed(run, classes, device="cpu", precision="fp32")
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    result = write_features(run, classes, tmp_path / "features.npy", patches=True)
    assert result.images == len(expected)
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), expected, atol=1e-5)


def test_a_backbone_that_was_given_is_put_back(run, classes, accelerator):
    backbone = dinoforge.load(run)
    first = dinoforge.embed(backbone, classes)
    assert accelerator.kernels > 0
    assert {p.device.type for p in backbone.parameters()} == {"cpu"}
    backbone.to(DEVICE)
    np.testing.assert_allclose(dinoforge.embed(backbone, classes), first, atol=1e-6)
    assert {p.device for p in backbone.parameters()} == {DEVICE}


def test_a_backbone_on_the_device_is_exported(run, accelerator, tmp_path):
    backbone = dinoforge.load(run).to(DEVICE)
    export(backbone, "safetensors", tmp_path / "exported.safetensors")
    again = dinoforge.load(tmp_path / "exported.safetensors").state_dict()
    for name, tensor in dinoforge.load(run).state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("method", ["knn", "linear", "logreg"])
def test_evaluations_are_those_of_the_cpu(method, run, classes, accelerator, monkeypatch):
    monkeypatch.setattr(classifiers, "fit_linear", partial(classifiers.fit_linear, steps=20))
    monkeypatch.setattr(classifiers, "STRENGTHS", (1.0,))

    def measure(**keys: object) -> dict[str, float]:
        if method == "knn":
            result, _ = evaluate_knn(run, classes, **keys)
            rows = result["knn"]
        else:
            classified, _ = evaluate_classifier(method, run, classes, **keys)
            rows = classified["rows"]
        return {name: row["mean"] for name, row in rows.items()}

    accelerator.clear()
    ours = measure()
    assert accelerator.kernels > 0
    expected = measure(device="cpu", precision="fp32")
    assert ours.keys() == expected.keys() == {"pixels", "untrained", "trained"}
    for name, accuracy in expected.items():  # of 40 images, one may change sides by rounding
        assert abs(ours[name] - accuracy) <= 1 / 40 + 1e-9, name


def test_neighbours_are_found_on_it(accelerator):
    """As on CUDA, where k-NN itself runs on the device."""
    features = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    train = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    for centred in (False, True):
        ours = knn_predict(features, labels, train, [3, 5], centred=centred, device=DEVICE)
        assert ours.device.type == "cpu"
        assert torch.equal(ours, knn_predict(features, labels, train, [3, 5], centred=centred))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"augment.device": "train", "checkpoint.asynchronous": False},
        {"train.accumulate": 2, "parallel.activation_checkpointing": True},
    ],
    ids=["plain", "colours there", "accumulated"],
)
def test_a_run_is_that_of_the_cpu(keys, classes, accelerator, tmp_path):
    """Training with probes, checkpoints and metrics; stopped in the middle and continued."""
    settings = KEYS | {"probe.every_steps": 2} | keys
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    dinoforge.train(classes, out=theirs, console=QUIET, device="cpu", **settings)
    accelerator.clear()
    dinoforge.train(classes, out=ours, console=QUIET, **settings)
    assert accelerator.kernels > 0
    lines, expected = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (ours, theirs)
    )
    assert len(lines) == len(expected) == 6
    for line, other in zip(lines, expected, strict=True):
        for name in ("total", "dino_local", "dino_global", "ibot", "koleo", "diag.effective_rank"):
            assert line[name] == pytest.approx(other[name], rel=2e-3), name
    assert any("probe.knn" in line for line in lines)
    embedded = (dinoforge.embed(run, classes, device="cpu", precision="fp32") for run in (ours, theirs))
    np.testing.assert_allclose(*embedded, atol=0.02)
    assert RunDirectory(ours).info()["starts"][0]["device"] == str(DEVICE)


def test_a_report_is_made_there(run, classes, accelerator):
    accelerator.clear()
    written = report(run, data=classes)
    assert accelerator.kernels > 0
    assert written.page.stat().st_size > 100_000


def test_a_batch_is_replayed_there(run, accelerator, tmp_path):
    recipe = RunDirectory(run).recipe()
    batch = StepBench(recipe, torch.device("cpu"), torch.float32).batch()
    batch = prepare(batch, device=torch.device("cpu"), mean=recipe.data.mean, std=recipe.data.std)
    batch.global_crops[3] = torch.nan
    file = tmp_path / "batch.safetensors"
    replay.save_batch(file, replay.SavedBatch(batch, 6, 6, tuple("abcdefgh"), {"total": float("nan")}))
    accelerator.clear()
    findings, _, _ = replay_command.replay(run, file)
    assert accelerator.kernels > 0
    assert findings.inputs == findings.images == (3,)


@pytest.mark.parametrize("call", [dinoforge.embed, lambda run, data, **keys: evaluate_knn(run, data, **keys)])
def test_a_backbone_that_is_left_behind_is_found(call: Callable[..., object], run, classes, accelerator, monkeypatch):
    """What these tests are for: without the placement, they fail."""
    monkeypatch.setattr(extract, "placed", lambda network, device: nullcontext())
    with pytest.raises(RuntimeError, match="one device"):
        call(run, classes)
