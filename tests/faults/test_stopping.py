"""Signals in the middle of a run, one after another."""

import json
import os
import signal
import subprocess
import time

import pytest

from dinoforge import checkpoint
from faults import soak  # type: ignore[import-not-found]

STEPS = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return soak.make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run(soak.command(images, run, 0, STEPS), check=True, stdout=subprocess.DEVNULL)
    return run


def start(images, run, workers):
    process = subprocess.Popen(
        soak.command(images, run, workers, STEPS),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while soak.step_of(run) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_second_ctrl_c_leaves_at_once_without_harm(images, alone, tmp_path, pause):
    run = tmp_path / "run"
    process = start(images, run, 1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        time.sleep(pause)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)  # the latter if it was already on its way out
    assert b"Traceback" not in errors
    subprocess.run(soak.command(images, run, 0, STEPS), check=True, stdout=subprocess.DEVNULL)
    assert soak.differences(run, alone, STEPS) == []


def test_a_stopped_run_has_the_step_it_was_stopped_at(images, alone, tmp_path):
    run = tmp_path / "run"
    process = start(images, run, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    summary = json.loads((run / "summary.json").read_text())
    assert checkpoint.steps(run)[-1] == summary["steps"] == soak.step_of(run)
    subprocess.run(soak.command(images, run, 1, STEPS), check=True, stdout=subprocess.DEVNULL)
    assert [d for d in soak.differences(run, alone, STEPS) if not d.startswith("checkpoints")] == []
