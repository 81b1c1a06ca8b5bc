"""``dinoforge submit``: submitit's own executor for one machine takes the place of Slurm."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dinoforge.cli import slurm
from dinoforge.cli.main import main
from dinoforge.errors import RunError
from distributed import continuing

pytestmark = pytest.mark.processes


@pytest.mark.timeout(600)
def test_a_job_that_is_taken_away_is_queued_again_and_goes_on(tmp_path):
    images, run = continuing.make_images(tmp_path / "images"), tmp_path / "run"
    keys = continuing.KEYS | {"train.steps": 60}
    arguments = ["train", str(images), "--recipe", "small", "--out", str(run), *(f"{k}={v}" for k, v in keys.items())]
    job = slurm.submit(arguments, slurm.Resources(ranks_per_node=2), folder=tmp_path / "jobs", cluster="local")
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline, job.stderr()
        assert not job.done(), job.stderr()
        time.sleep(0.05)
    controller = job._process.pid
    for task in Path(f"/proc/{controller}/task/{controller}/children").read_text().split():
        os.kill(int(task), signal.SIGUSR2)  # as Slurm does before it takes a job away
    assert job.results() == [0, 0]
    info, summary = (json.loads((run / name).read_text()) for name in ("run.json", "summary.json"))
    assert summary["finished"]
    assert [start["ranks"] for start in info["starts"]] == [2, 2]
    assert 5 <= info["starts"][1]["step"] < 60
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 61))


def test_no_slurm_here(tmp_path):
    with pytest.raises(RunError, match="the job was not taken"):
        slurm.submit(["train"], slurm.Resources(), folder=tmp_path, cluster="slurm")


def test_mistakes_are_told_before_anything_is_queued(tmp_path, capsys):
    assert main(["submit", "x", "--slurm", "--out", str(tmp_path / "run"), "train.stepps=1"]) == 2
    assert "did you mean train.steps" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
