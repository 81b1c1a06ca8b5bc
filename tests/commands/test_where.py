"""Where commands compute, and in which precision: as the user says, and on a device that is made current for it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import dinoforge
from dinoforge.cli.main import main
from dinoforge.commands import bench as bench_command
from dinoforge.commands.embed import write_features
from dinoforge.commands.evaluate import evaluate_classifier, evaluate_knn
from dinoforge.commands.recipe import auto_recipe
from dinoforge.commands.replay import replay
from dinoforge.commands.report import report
from dinoforge.commands.train import train
from dinoforge.data.batch import prepare
from dinoforge.errors import RecipeError
from dinoforge.features import extract
from dinoforge.planning import bench
from dinoforge.recipe.load import load_recipe
from dinoforge.runs import replay as replays
from dinoforge.system import device as devices
from dinoforge.system import distributed
from tiny import TINY

CPU = torch.device("cpu")
KEYS = TINY | {"train.steps": 4, "optim.warmup_length": "25%", "train.batch_size_per_gpu": 4}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    dinoforge.train(classes, out=out, console=QUIET, **KEYS | {"allow_tf32": True})
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Fitting a classifier and measuring a device take long, and are not what is looked at."""

    def fit(method: str, *, backbone: nn.Module, source: Any, labels: Any, shots: int, **how: Any) -> Any:
        reading = {key: how[key] for key in extract.Reading.__annotations__ if key in how}
        skipped = extract.extract(backbone, source, range(4), **reading).skipped
        return {"duplicates": {"exact": 0, "near": 0, "tested": 4, "examples": []}, "splits": 1}, skipped

    monkeypatch.setattr("dinoforge.commands.evaluate.run_classifier", fit)
    monkeypatch.setattr(bench, "gemm_peak", lambda device, precision: 1e9)


@dataclass
class Used:
    """What was in use while networks computed."""

    entered: list[tuple[torch.device, bool]] = field(default_factory=list)
    now: list[tuple[torch.device, bool]] = field(default_factory=list)
    calls: int = 0
    without: list[str] = field(default_factory=list)


@pytest.fixture
def used(monkeypatch) -> Iterator[Used]:
    used = Used()

    @contextlib.contextmanager
    def in_use(device: torch.device, *, allow_tf32: bool = False) -> Iterator[None]:
        used.entered.append((device, allow_tf32))
        used.now.append((device, allow_tf32))
        yield
        used.now.pop()

    def look(module: nn.Module, inputs: Any) -> None:
        used.calls += 1
        if not used.now:
            used.without.append(type(module).__name__)

    monkeypatch.setattr(devices, "in_use", in_use)
    monkeypatch.setattr(bench, "in_use", in_use)
    handle = nn.modules.module.register_module_forward_pre_hook(look)
    yield used
    handle.remove()


def saved_batch(run: Path, tmp_path: Path) -> Path:
    recipe = load_recipe(run / "recipe.yaml")[0]
    batch = prepare(bench.StepBench(recipe, CPU, torch.float32).batch(), device=CPU, mean=(0.5,), std=(0.25,))
    path = tmp_path / "batch.safetensors"
    replays.save_batch(path, replays.SavedBatch(batch, 2, 2, ("a", "b", "c", "d"), {"total": float("nan")}))
    return path


COMMANDS: dict[str, tuple[bool, Callable[[Path, Path, Path], object]]] = {
    "train": (True, lambda run, data, tmp: dinoforge.train(
        data, out=tmp / "run", console=QUIET, allow_tf32=True, **KEYS | {"probe.every_steps": 2}
    )),
    "bench": (True, lambda run, data, tmp: bench_command.bench(data, seconds=0.01, allow_tf32=True, **KEYS)),
    "auto": (True, lambda run, data, tmp: auto_recipe(
        data, allow_tf32=True, **{k: v for k, v in KEYS.items() if k != "train.steps"} | {"train.max_minutes": 0.01}
    )),
    "replay": (True, lambda run, data, tmp: replay(run, saved_batch(run, tmp))),
    "embed": (False, lambda run, data, tmp: dinoforge.embed(run, data)),
    "embed --out": (False, lambda run, data, tmp: write_features(run, data, tmp / "features.npy")),
    "eval knn": (False, lambda run, data, tmp: evaluate_knn(run, data, shots=2)),
    "eval linear": (False, lambda run, data, tmp: evaluate_classifier("linear", run, data, shots=5)),
    "report": (False, lambda run, data, tmp: report(run, device="cpu")),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_networks_compute_on_a_device_that_is_in_use(run, classes, tmp_path, used, command):
    """Or else TF32 would be allowed, and a first GPU would be used beside the one that was chosen."""
    allow_tf32, call = COMMANDS[command]
    call(run, classes, tmp_path)
    assert used.calls > 0
    assert used.without == []
    assert set(used.entered) == {(CPU, allow_tf32)}


# Keys


@pytest.fixture
def reading(monkeypatch) -> list[dict[str, Any]]:
    """What features are made with."""
    seen: list[dict[str, Any]] = []
    forward = extract._forward

    def look(backbone: nn.Module, images: torch.Tensor, precision: torch.dtype | None) -> Any:
        seen.append({"device": images.device, "precision": precision})
        return forward(backbone, images, precision)

    monkeypatch.setattr(extract, "_forward", look)
    return seen


@pytest.mark.parametrize(
    ("keys", "precision"), [({"precision": "fp32"}, None), ({"precision": "bf16"}, torch.bfloat16)]
)
@pytest.mark.parametrize(
    "call",
    [
        dinoforge.embed,
        lambda run, data, **keys: evaluate_knn(run, data, shots=2, **keys),
        lambda run, data, **keys: evaluate_classifier("linear", run, data, shots=5, **keys),
    ],
    ids=["embed", "eval knn", "eval linear"],
)
def test_evaluations_take_a_device_and_a_precision(run, classes, monkeypatch, reading, call, keys, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # which is not asked for then
    call(run, classes, device="cpu", **keys)
    assert reading
    assert all(seen == {"device": CPU, "precision": precision} for seen in reading)


def test_embed_on_the_command_line_takes_them(run, classes, tmp_path, reading):
    out = tmp_path / "features.npy"
    assert main(["embed", str(run), str(classes), "--out", str(out), "device=cpu", "precision=bf16"]) == 0
    assert {seen["precision"] for seen in reading} == {torch.bfloat16}
    ours = dinoforge.embed(run, classes, device="cpu", precision="bf16")
    np.testing.assert_array_equal(np.load(out), ours)


def test_report_takes_a_device(run, capsys):
    assert main(["report", str(run), "--device", "cpu"]) == 0
    if not torch.cuda.is_available():
        assert main(["report", str(run), "--device", "cuda"]) == 2
        assert "device=cuda is not available here" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused_with_the_reason(run, classes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(RecipeError, match=r"device=cuda is not available here: .* is built without CUDA"):
        dinoforge.embed(run, classes, device="cuda")


def test_features_from_the_cpu_in_place_of_a_gpu_are_told(run, classes, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for there, keys, told in ((True, {}, True), (False, {}, False), (True, {"device": "cpu"}, False)):
        monkeypatch.setattr(devices, "has_gpu", lambda there=there: there)
        dinoforge.embed(run, classes, **keys)
        assert ("device   computes on the CPU, although there is a GPU: " in capsys.readouterr().err) is told


def test_other_keys_are_refused(run, classes):
    with pytest.raises(RecipeError, match=r"train\.steps: expected eval\.size, eval\.crop, device, precision, or"):
        dinoforge.embed(run, classes, **{"train.steps": 3})
    with pytest.raises(RecipeError, match="precision: expected auto"):
        dinoforge.embed(run, classes, precision="fp8")


def test_training_asks_for_blocks_that_grow_before_it_uses_the_device(classes, tmp_path, monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(devices, "use_expandable_segments", lambda device: order.append(f"blocks on {device}"))
    monkeypatch.setattr(distributed, "process_group", lambda *_: contextlib.nullcontext(order.append("group")))
    train(classes, out=tmp_path / "run", dry_run=True, console=QUIET, device="cpu", **KEYS)
    assert order == ["blocks on cpu", "group"]
