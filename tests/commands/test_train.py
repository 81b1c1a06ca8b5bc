"""Runs on real images, as users make them: combinations, continuing, stopping, what a run leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import dinoforge
from dinoforge.commands.train import train
from dinoforge.errors import DataError, RecipeError, RunError, WeightsError
from dinoforge.kernels import plain
from tiny import TINY

TERMS = ("total", "dino_local", "dino_global", "ibot", "koleo")


@pytest.fixture(scope="module")
def images(solar_cells, tmp_path_factory):
    """64 of the solar cells."""
    folder = tmp_path_factory.mktemp("cells")
    for path in sorted(solar_cells.iterdir())[:64]:
        shutil.copy(path, folder)
    return folder


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[dict[str, float]]:
    """What a continued run must have in common with an undisturbed one: all but times and memory."""
    timed = {"images_per_second", "data_wait_share", "memory_gib", "train_seconds"}
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics_of(run)]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dinoforge", *map(str, arguments)]


def keys(settings: dict[str, object]) -> list[str]:
    return [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in settings.items()]


COMBINATIONS = {
    "both by centering": {"dino.targets": "centering", "ibot.targets": "centering"},
    "both by Sinkhorn-Knopp": {"dino.targets": "sinkhorn_knopp", "ibot.targets": "sinkhorn_knopp"},
    "cls by centering, patches by Sinkhorn-Knopp": {"dino.targets": "centering", "ibot.targets": "sinkhorn_knopp"},
    "cls by Sinkhorn-Knopp, patches by centering": {"dino.targets": "sinkhorn_knopp", "ibot.targets": "centering"},
    "Bernoulli masks, one ratio, every crop": {
        "ibot.mask_kind": "bernoulli",
        "ibot.mask_ratio_min_max": [0.3, 0.3],
        "ibot.mask_sample_probability": 1.0,
    },
    "frozen by gradient": {"optim.freeze_last_layer": "gradient", "optim.freeze_last_layer_length": "5 steps"},
    "frozen by lr": {"optim.freeze_last_layer": "lr", "optim.freeze_last_layer_length": "5 steps"},
    "separate heads": {"ibot.separate_head": True},
    "no DINO": {"dino.loss_weight": 0},
    "no DINO, separate heads": {"dino.loss_weight": 0, "ibot.separate_head": True},
    "no global term": {"dino.global_loss_weight": 0},
    "no local term": {"dino.local_loss_weight": 0},
    "no iBOT": {"ibot.loss_weight": 0},
    "no KoLeo": {"dino.koleo_loss_weight": 0},
    "only KoLeo": {"dino.loss_weight": 0, "ibot.loss_weight": 0},
    "no local crops": {"crops.local_crops_number": 0},
    "no masked crops": {"ibot.mask_sample_probability": 0},
    "registers, SwiGLU, stochastic depth, no biases": {
        "student.num_register_tokens": 2,
        "student.ffn_layer": "swiglu",
        "student.drop_path_rate": 0.3,
        "student.drop_path_uniform": False,
        "student.qkv_bias": False,
        "student.proj_bias": False,
        "student.ffn_bias": False,
    },
    "bfloat16": {"precision": "bf16"},
    "three channels": {"student.in_chans": 3},
    "weight decay of the backbone only": {"optim.weight_decay_scope": "backbone"},
}
OFF = {
    "no DINO": ("dino_local", "dino_global"),
    "no DINO, separate heads": ("dino_local", "dino_global"),
    "no global term": ("dino_global",),
    "no local term": ("dino_local",),
    "no iBOT": ("ibot",),
    "no KoLeo": ("koleo",),
    "only KoLeo": ("dino_local", "dino_global", "ibot"),
    "no local crops": ("dino_local",),
    "no masked crops": ("ibot",),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combination(name, images, tmp_path):
    result = dinoforge.train(images, "small", tmp_path / "run", **TINY | COMBINATIONS[name])
    assert result.finished
    lines = metrics_of(result.out)
    assert [line["step"] for line in lines] == list(range(1, 21))
    off = OFF.get(name, ())
    for line in lines:
        assert np.isfinite(list(line.values())).all()
        for term in TERMS:
            assert (line[term] == 0) == (term in off), (term, line)
        assert line["total"] == pytest.approx(sum(line[t] for t in TERMS[1:]), rel=1e-5, abs=1e-5)
    backbone = dinoforge.load(result.out)
    assert backbone.step == 20
    tokens = backbone.network(torch.zeros(1, backbone.image.in_chans, 32, 32))
    assert torch.isfinite(tokens.cls).all()


def test_it_learns_what_it_optimises(images, tmp_path):
    """Without the spreading of KoLeo, on fixed targets' scale, the loss of a short run falls."""
    settings = TINY | {"train.steps": 60, "dino.targets": "sinkhorn_knopp", "ibot.targets": "sinkhorn_knopp"}
    run = dinoforge.train(images, "small", tmp_path / "run", **settings).out
    totals = [line["total"] for line in metrics_of(run)]
    assert np.mean(totals[-10:]) < np.mean(totals[:5]) - 0.1


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    dinoforge.train(images, "small", run, **TINY | {"student.drop_path_rate": 0.2, "train.steps": 40})
    return run


@pytest.mark.processes
def test_killed_and_continued_equals_undisturbed(images, undisturbed, tmp_path):
    run = tmp_path / "run"
    settings = TINY | {"student.drop_path_rate": 0.2, "train.steps": 40, "checkpoint.every_steps": 7}
    process = subprocess.Popen(
        command("train", images, "--recipe", "small", "--out", run, *keys(settings | {"train.num_workers": 1})),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not any((run / "checkpoints").glob("step_*")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists() or not json.loads((run / "summary.json").read_text())["finished"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "tot')  # a line that a kill tore apart

    result = dinoforge.train(images, "small", run, **settings)  # with other workers than before
    assert result.finished
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert starts[0]["step"] == 0
    assert starts[1]["step"] >= 7
    assert losses_of(run) == losses_of(undisturbed)
    ours, theirs = load_file(run / "teacher.safetensors"), load_file(undisturbed / "teacher.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(images, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    settings = TINY | {"student.drop_path_rate": 0.2, "train.steps": 40}
    more = {"checkpoint.every_steps": 10, "checkpoint.keep_last": 4}
    dinoforge.train(images, "small", run, **settings | more)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"finished": False}))  # as if killed before its last line
    (newest,) = (run / "checkpoints" / "step_00000040").glob("*.safetensors")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    capsys.readouterr()
    assert dinoforge.train(images, "small", run, **settings | more).finished
    output = capsys.readouterr().out
    assert "step_00000040 is damaged" in output
    assert "Continuing at step 30" in output
    assert losses_of(run) == losses_of(undisturbed)
    ours, theirs = load_file(run / "teacher.safetensors"), load_file(undisturbed / "teacher.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_saves_and_says_how_to_continue(number, images, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command("train", images, "--out", run, *keys(TINY | {"train.steps": 100_000, "train.num_workers": 1})),
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Run the same command again to continue" in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] > 0
    assert not summary["finished"]
    assert dinoforge.load(run).step == summary["steps"]


def test_time_limit_stops_with_a_checkpoint_and_is_no_other_run(images, tmp_path):
    settings = TINY | {"train.steps": 100_000}
    first = dinoforge.train(images, "small", tmp_path / "run", **settings | {"train.max_minutes": 0.01})
    assert first.stopped_by == "max_minutes"
    assert not first.finished
    second = dinoforge.train(images, "small", tmp_path / "run", **settings | {"train.max_minutes": 0.02})
    assert second.steps > first.steps


@pytest.mark.processes
def test_finished_run_says_so_and_does_nothing(images, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    settings = TINY | {"student.drop_path_rate": 0.2, "train.steps": 40}
    done = subprocess.run(
        command("train", images, "--out", undisturbed, *keys(settings)), capture_output=True, text=True, check=True
    )
    assert "finished" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before


def test_free_keys_do_not_make_another_run_and_others_do(images, undisturbed, tmp_path):
    settings = TINY | {"student.drop_path_rate": 0.2, "train.steps": 40}
    free = {"train.num_workers": 1, "checkpoint.keep_last": 5, "log.every_steps": 7}
    assert dinoforge.train(images, "small", undisturbed, **settings | free).finished
    with pytest.raises(RunError, match=r"(?s)optim\.base_lr: 0\.\d+ there, 0\.5 now.*--out"):
        dinoforge.train(images, "small", undisturbed, **settings | {"optim.base_lr": 0.5})
    fewer = tmp_path / "fewer"
    shutil.copytree(images, fewer)
    next(fewer.iterdir()).unlink()
    with pytest.raises(RunError, match=r"other images: 64 in .* there, 63 in"):
        dinoforge.train(fewer, "small", undisturbed, **settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    with pytest.raises(RunError, match="something else than a run"):
        dinoforge.train(images, "small", tmp_path / "other", **TINY)


def test_run_directory_explains_itself(images, undisturbed):
    info = json.loads((undisturbed / "run.json").read_text())
    assert info["data"]["images"] == 64
    assert info["seed"] == 0
    start = info["starts"][0]
    assert start["versions"]["torch"] == torch.__version__
    assert start["threads"] >= 1
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 40
    assert summary["train_seconds"] > 0
    assert summary["images_per_second"] > 0
    backbone = dinoforge.load(undisturbed)
    assert backbone.image.mean == (0.5,)
    assert backbone.architecture["interpolate_offset"] == 0.1
    names = set(load_file(undisturbed / "teacher.safetensors"))
    assert {"cls_token", "pos_embed", "mask_token", "blocks.1.mlp.fc2.weight", "blocks.0.ls1.gamma"} <= names
    assert all("head" not in name for name in names)
    assert len(list((undisturbed / "checkpoints").iterdir())) == 1


def test_checkpoints_are_kept_as_asked(images, tmp_path):
    settings = TINY | {"checkpoint.every_steps": 2, "checkpoint.keep_last": 2, "checkpoint.keep_every": 8}
    run = dinoforge.train(images, "small", tmp_path / "run", **settings).out
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step_{i:08d}" for i in (8, 16, 18, 20)]


@pytest.mark.processes
def test_dry_run_writes_nothing_and_tells_everything(images, tmp_path):
    done = subprocess.run(
        command("train", images, "--recipe", "small", "--dry-run", *keys(TINY)),
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    for word in ("64 images", "20 steps", "backbone", "memory", "momentum", "weight_decay: 0.04"):
        assert word in done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_estimate_is_near_the_measurement(images, tmp_path, precision):
    settings = TINY | {
        "student.embed_dim": 192,
        "student.depth": 6,
        "student.num_heads": 3,
        "crops.global_crops_size": 64,
        "crops.local_crops_size": 32,
        "dino.head_n_prototypes": 8192,
        "dino.head_hidden_dim": 512,
        "dino.head_bottleneck_dim": 128,
        "train.batch_size_per_gpu": 32,
        "train.steps": 3,
        "log.every_steps": 1,
        "precision": precision,
    }
    # In a process of its own: memory is the peak of the process.
    run = tmp_path / "run"
    done = subprocess.run(
        command("train", images, "--out", run, *keys(settings)), capture_output=True, text=True, check=True
    )
    estimated = float(done.stdout.split("memory   about ")[1].split(" GiB")[0])
    measured = metrics_of(run)[-1]["memory_gib"]
    assert estimated == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("asked", ["auto", "plain"])
def test_a_run_computes_by_the_kernels_that_it_asks_for(images, tmp_path, monkeypatch, asked):
    calls = []
    attention = plain.attention
    monkeypatch.setattr(plain, "attention", lambda *arguments: calls.append(1) or attention(*arguments))
    keys = TINY | {"train.steps": 1, "parallel.kernels": asked, "optim.warmup_length": "0%"}
    assert train(images, out=tmp_path / "run", console=Console(quiet=True), **keys).finished
    assert bool(calls) == (asked == "plain")


def test_python_data_and_nested_keys(tmp_path):
    class Noise:
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return np.random.default_rng(index).integers(0, 256, (40, 50), dtype=np.uint8)

    nested = {"train": {"steps": 2, "num_workers": 0, "batch_size_per_gpu": 4}, "log": {"every_steps": 1}}
    flat = {k: v for k, v in TINY.items() if not k.startswith(("train.", "log."))}
    result = dinoforge.train(Noise(), "small", tmp_path / "run", **nested, **flat)
    assert result.steps == 2
    features = dinoforge.embed(result.out, Noise())
    assert features.shape == (16, 48)
    assert np.isfinite(features).all()


def test_tensorboard(images, tmp_path):
    run = dinoforge.train(images, "small", tmp_path / "run", **TINY | {"log.tensorboard": True, "train.steps": 3}).out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [(e.step, e.value) for e in events.Scalars("total")]
    assert [step for step, _ in logged] == [1, 2, 3]
    assert [value for _, value in logged] == pytest.approx([line["total"] for line in metrics_of(run)], rel=1e-6)


def test_unreadable_images_are_skipped_listed_and_counted(images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    run = dinoforge.train(folder, "small", tmp_path / "run", **TINY).out
    lines = (run / "skipped.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == ["empty.png", "text.jpg"]
    assert metrics_of(run)[-1]["skipped_images"] == 2
    assert json.loads((run / "summary.json").read_text())["skipped_images"] == 2


def test_too_many_unreadable_images_stop_the_run(images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for i in range(30):
        (folder / f"bad{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"data\.max_bad_share"):
        dinoforge.train(folder, "small", tmp_path / "run", **TINY)


def test_tiny_and_large_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(1, 1), (3, 2), (1, 500), (2000, 1500), (40, 40), (7, 900), (33, 32), (32, 32)]):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
    result = dinoforge.train(folder, "small", tmp_path / "run", **TINY | {"train.steps": 3})
    assert result.finished
    assert metrics_of(result.out)[-1]["skipped_images"] == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train.batch_size_per_gpu": 65}, RecipeError, "larger than the data"),
        ({"student.num_heads": 5}, RecipeError, "multiple of student.num_heads"),
        ({"student.depth": None}, RecipeError, "needs student.depth"),
        ({"student.arch": "vit_small"}, RecipeError, "contradicts"),
        ({"student.arch": "vit_smal"}, RecipeError, "vit_small"),
        ({"crops.local_crops_size": 20}, RecipeError, "multiple of student.patch_size"),
        ({"optim.warmup_length": "20 steps"}, RecipeError, "run has only 20"),
        ({"train.step": 4}, RecipeError, "did you mean train.steps"),
        ({"device": "cuda:7"}, RecipeError, "not available here"),
        ({"device": "gpu"}, RecipeError, "device=gpu"),
        ({"student.in_chans": 5}, RecipeError, "data.mean"),
        ({"student.in_chans": 4, "data.mean": [0.5], "data.std": [0.5]}, DataError, "expected 4"),
    ],
)
def test_bad_recipe_is_told_before_anything_is_written(settings, error, message, images, tmp_path):
    wanted = TINY | settings
    if settings.get("student.in_chans") == 5:
        wanted["data.mean"] = [0.5, 0.5]
    with pytest.raises(error, match=message):
        dinoforge.train(images, "small", tmp_path / "run", **wanted)
    assert not (tmp_path / "run").exists()


def test_no_space_and_not_writable_are_told_before_work(images, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="--out"):
            dinoforge.train(images, "small", out, **TINY)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match="MiB free"):
        dinoforge.train(images, "small", tmp_path / "run", **TINY)


def test_model_that_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"no teacher\.safetensors, which a run writes with its first checkpoint"):
        dinoforge.load(tmp_path)
    with pytest.raises(WeightsError, match="there is no file"):
        dinoforge.load(tmp_path / "x.safetensors")


def test_weights_do_not_depend_on_the_random_state_of_the_caller(images, tmp_path):
    settings = TINY | {"train.steps": 2}
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        state = torch.get_rng_state()
        runs.append(dinoforge.train(images, "small", tmp_path / str(seed), **settings).out)
        assert torch.equal(torch.get_rng_state(), state)
    assert losses_of(runs[0]) == losses_of(runs[1])
    other = dinoforge.train(images, "small", tmp_path / "other", **settings | {"train.seed": 1}).out
    assert losses_of(other) != losses_of(runs[0])


def test_api_is_what_the_command_line_calls():
    assert dinoforge.train is train
