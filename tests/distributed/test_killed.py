"""``dinoforge train --nproc 2``: a rank that dies, again and again; and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed import continuing

pytestmark = pytest.mark.processes

STEPS = 40


def command(folder: Path, run: str, **keys: object) -> list[str]:
    settings = continuing.KEYS | {"train.steps": STEPS, "checkpoint.every_steps": 2} | keys
    texts = [f"{key}={value}" for key, value in settings.items()]
    program = [sys.executable, "-m", "dinoforge", "train", str(folder / "images"), "--out", str(folder / run)]
    return [*program, "--nproc", "2", "--recipe", "small", *texts]


def ranks_of(agent: int) -> list[int]:
    """Processes that the launcher started, the last one last."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return sorted(int(pid) for pid in children if b"dinoforge" in Path(f"/proc/{pid}/cmdline").read_bytes())


def lines_of(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int, *, saved: bool = False) -> None:
    deadline = time.monotonic() + 200
    while (lines_of(run) or [{"step": 0}])[-1]["step"] < step or (saved and not list(run.glob("checkpoints/step_*"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)


@pytest.mark.timeout(900)
def test_a_rank_is_killed_three_times(tmp_path):
    continuing.make_images(tmp_path / "images")
    subprocess.run(command(tmp_path, "alone"), check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path, "killed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for step, which in ((4, 0), (12, 1), (22, 0)):
            wait_for_step(process, tmp_path / "killed", step, saved=True)
            os.kill(ranks_of(process.pid)[which], signal.SIGKILL)
            seen = len(lines_of(tmp_path / "killed"))
            while len(lines_of(tmp_path / "killed")) == seen and process.poll() is None:
                time.sleep(0.02)  # until the next start has gone on
        output, _ = process.communicate(timeout=250)
        assert process.returncode == 0, output
    finally:
        process.kill()
    assert output.count("Continuing at step") == 3, output
    info = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert [start["ranks"] for start in info["starts"]] == [2] * 4
    alone, killed = (lines_of(tmp_path / run) for run in ("alone", "killed"))
    assert [line["step"] for line in killed] == list(range(1, STEPS + 1))
    for a, b in zip(alone, killed, strict=True):
        assert abs(a["total"] - b["total"]) < 1e-4 * a["total"], a["step"]
    ours, theirs = (load_file(tmp_path / run / "teacher.safetensors") for run in ("killed", "alone"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_signal_stops_all_ranks_with_a_checkpoint(tmp_path):
    continuing.make_images(tmp_path / "images")
    process = subprocess.Popen(
        command(tmp_path, "run", **{"train.steps": 5000, "checkpoint.every_steps": 100_000}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_step(process, tmp_path / "run", 3)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, output
    assert output.count("Stopped by SIGINT at step") == 1, output
    step = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{step:08d}"]


def test_a_mistake_is_told_once(tmp_path):
    continuing.make_images(tmp_path / "images")
    result = subprocess.run(command(tmp_path, "run", **{"train.stepps": 3}), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("did you mean train.steps") == 1
