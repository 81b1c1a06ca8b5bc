"""Out of memory: told in words, with what helps; the last step is saved; a code of its own."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dinoforge.cli.main import main
from dinoforge.commands import train as train_command
from dinoforge.commands.backbone import ways_to_embed
from dinoforge.commands.bench import bench
from dinoforge.commands.embed import embed, write_features
from dinoforge.commands.evaluate import evaluate_classifier, evaluate_knn
from dinoforge.commands.recipe import auto_recipe
from dinoforge.commands.report import report
from dinoforge.errors import OutOfMemoryError, RunError
from dinoforge.planning import dry_run
from dinoforge.runs import checkpoint
from dinoforge.system import out_of_memory as memory
from dinoforge.training.step import Stepper
from tiny import TINY

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 77.80 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and 3.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
MPS = (
    "MPS backend out of memory (MPS allocated: 17.50 GB, other allocations: 384.00 KB, max allowed: 18.13 GB). Tried "
    "to allocate 1.00 GB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
    "allocations (may cause system failure)."
)
KEYS = TINY | {
    "train.steps": 8,
    "train.centering": "centering",  # whose centre a forward pass moves
    "checkpoint.every_minutes": None,
    "report.every_minutes": None,
    "log.every_steps": 1,
}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError(CUDA),
            "cuda:0 is out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
            "1.25 GiB is free. In this order, try: a smaller one; another",
        ),
        (
            RuntimeError(MPS),
            "cuda:0 is out of memory. MPS backend out of memory (MPS allocated: 17.50 GB, other allocations: 384.00 "
            "KB, max allowed: 18.13 GB). Tried to allocate 1.00 GB on private pool. In this order, try: a smaller "
            "one; another",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "cuda:0 is out of memory. CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`. In "
            "this order, try: a smaller one; another",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side asserts"),
            "cuda:0 is out of memory. CUDA error: out of memory. In this order, try: a smaller one; another",
        ),
        (MemoryError(), "cuda:0 is out of memory. MemoryError. In this order, try: a smaller one; another"),
    ],
)
def test_what_libraries_say_is_told_in_words(error, told):
    ways = ["a smaller one", "another"]
    with (
        pytest.raises(OutOfMemoryError) as raised,
        memory.out_of_memory_in_words(torch.device("cuda", 0), lambda: ways),
    ):
        raise error
    assert str(raised.value) == told
    assert raised.value.__cause__ is error


def test_main_memory_that_pytorch_does_not_get():
    with (
        pytest.raises(OutOfMemoryError, match=r"cpu is out of memory\. 931322\.6 GiB of main memory were asked for"),
        memory.out_of_memory_in_words(torch.device("cpu"), list),
    ):
        torch.empty(10**15, dtype=torch.uint8)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes differ"), ValueError("no"), RunError("No space left on device")):
        with pytest.raises(type(error)) as raised, memory.out_of_memory_in_words(torch.device("cpu"), list):
            raise error
        assert raised.value is error


def train(folder, out, **keys):
    return train_command.train(folder, out=out, console=Console(quiet=True), **(KEYS | keys))


@pytest.fixture(scope="module")
def run(classes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(classes, out, **{"train.steps": 2})
    return out


def fails_in(part, monkeypatch, *, step=5):
    """Has memory run out in a part of a step."""
    original, number = Stepper.__call__, 0

    def raising(*given):
        raise torch.OutOfMemoryError(CUDA)

    def make_step(stepper, state, *given, **named):
        nonlocal number
        number += 1
        if number != step:
            return original(stepper, state, *given, **named)
        with monkeypatch.context() as patch:
            if part == "backward":
                forward = stepper.parallel.forward

                def with_hook(*given, **named):
                    losses = forward(*given, **named)
                    losses.total.register_hook(raising)
                    return losses

                parallel = dataclasses.replace(stepper.parallel, forward=with_hook)
                stepper = dataclasses.replace(stepper, parallel=parallel)
            elif part == "optimizer":  # when moments have moved
                after = state.optimizer.step
                patch.setattr(state.optimizer, "step", lambda: (after(), raising()))
            else:
                patch.setattr(state.student_teacher, "update_teacher", raising)
            return original(stepper, state, *given, **named)

    monkeypatch.setattr(Stepper, "__call__", make_step)


def test_the_last_step_is_saved_and_the_run_goes_on_from_it(classes, tmp_path, monkeypatch):
    train(classes, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fails_in("backward", patch)
        with pytest.raises(OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB"):
            train(classes, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [4]
    assert train(classes, tmp_path / "run").finished
    ours, theirs = (load_file(tmp_path / run / "teacher.safetensors") for run in ("run", "whole"))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    lines = [
        [json.loads(line)["total"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "whole")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 8


@pytest.mark.parametrize("part", ["optimizer", "moving average"])
def test_weights_that_are_half_updated_are_not_saved(classes, tmp_path, monkeypatch, capsys, part):
    fails_in(part, monkeypatch)
    with pytest.raises(OutOfMemoryError):
        train_command.train(classes, out=tmp_path / "run", **(KEYS | {"checkpoint.every_steps": 3}))
    assert checkpoint.steps(tmp_path / "run") == [3]
    assert "not saved  memory ran out while weights were updated" in capsys.readouterr().out


def test_a_checkpoint_that_finds_no_memory_either_is_told(classes, tmp_path, monkeypatch, capsys):
    fails_in("backward", monkeypatch)

    def whole(tensors, *, copy):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes.")

    monkeypatch.setattr(checkpoint, "whole", whole)
    with pytest.raises(OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB"):
        train_command.train(classes, out=tmp_path / "run", **KEYS)
    assert checkpoint.steps(tmp_path / "run") == []
    assert "not saved  DefaultCPUAllocator" in capsys.readouterr().out


def test_the_command_says_which_keys_help_and_has_a_code_of_its_own(classes, tmp_path, monkeypatch, capsys):
    fails_in("backward", monkeypatch)
    asked = []
    monkeypatch.setattr(dry_run, "ways_to_save", lambda recipe, **named: asked.append(named) or ["one key", "another"])
    keys = [f"{key}={'null' if value is None else value}" for key, value in KEYS.items()]
    assert main(["train", str(classes), "--out", str(tmp_path / "run"), *keys]) == 3
    assert (asked[0]["ranks"], asked[0]["mode"], asked[0]["device"].type) == (1, "none", "cpu")
    captured = capsys.readouterr()
    assert "saved      step 4, the last one before memory ran out." in captured.out
    assert captured.err == (
        "error: cpu is out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
        "1.25 GiB is free. In this order, try: one key; another\n"
    )


@pytest.mark.parametrize(
    ("inner", "call", "helps"),
    [
        ("features.extract.extract", lambda run, data: embed(run, data, **{"eval.size": 32}), "eval.size below 32"),
        (
            "features.table.write_features",
            lambda run, data: write_features(run, data, run.with_name("x.npy"), **{"eval.size": 64}),
            "eval.size below 64",
        ),
        ("commands.evaluate.run_knn", lambda run, data: evaluate_knn(run, data), "eval.size below 32"),
        (
            "commands.evaluate.run_classifier",
            lambda run, data: evaluate_classifier("logreg", run, data),
            "eval.size below 32",
        ),
        ("report.page.page", lambda run, data: report(run), "a smaller network"),
        ("commands.bench.measure", lambda run, data: bench(data, **KEYS), "a smaller network"),
        (
            "commands.recipe.seconds_per_step",
            lambda run, data: auto_recipe(data, **{"train.max_minutes": 1}),
            "a smaller network",
        ),
    ],
)
def test_other_commands_say_it_in_words_too(run, classes, monkeypatch, inner, call, helps):
    def raising(*given, **named):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(f"dinoforge.{inner}", raising)
    with pytest.raises(OutOfMemoryError, match=rf"cpu is out of memory\. Tried to allocate 2\.00 GiB.* {helps}"):
        call(run, classes)


def test_a_gpu_has_a_cpu_beside_it():
    assert ways_to_embed(torch.device("cuda", 1), 224) == ["eval.size below 224", "device=cpu"]
