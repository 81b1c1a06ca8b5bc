"""Signals in the middle of a run, one after another."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dinoforge.commands.train import train
from dinoforge.optim.adamw import AdamW
from dinoforge.runs import checkpoint
from faults import soak  # type: ignore[import-not-found]

pytestmark = pytest.mark.processes

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


def test_a_closed_terminal_stops_a_run_as_any_signal_does(images, alone, tmp_path):
    run = tmp_path / "run"
    process = start(images, run, 1)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 129
    assert checkpoint.steps(run)[-1] == soak.step_of(run)
    subprocess.run(soak.command(images, run, 0, STEPS), check=True, stdout=subprocess.DEVNULL)
    assert [d for d in soak.differences(run, alone, STEPS) if not d.startswith("checkpoints")] == []


def test_a_signal_that_is_ignored_stays_ignored(images, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        soak.command(images, run, 1, STEPS),
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as nohup does
    )
    while soak.step_of(run) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=300) == 0
    assert soak.step_of(run) == STEPS


@pytest.mark.parametrize("closed", ["a pipe", "from the start"])
def test_nobody_reads_what_it_prints(images, alone, tmp_path, closed):
    run = tmp_path / "run"
    if closed == "a pipe":
        process = subprocess.Popen(
            soak.command(images, run, 0, STEPS), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()  # as head does
        errors = process.stderr.read()
        code = process.wait(timeout=300)
    else:
        done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *soak.command(images, run, 0, STEPS)], timeout=300)
        errors, code = "", done.returncode
    assert (code, "Traceback" in errors, "Exception" in errors) == (0, False, False), errors
    assert soak.differences(run, alone, STEPS) == []


@pytest.mark.parametrize("encoding", ["cp1252"])
def test_output_that_lacks_letters(images, tmp_path, encoding):
    command = soak.command(images, tmp_path / "run", 0, 2)
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"Done: 2 steps" in done.stdout
    done.stdout.decode(encoding)


HANGS = """
import os, pathlib, sys, time
import numpy as np
from dinoforge.commands.train import train_as_program
from dinoforge.recipe.load import parse_override

class Images:
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if pathlib.Path(sys.argv[2]).exists():
            pathlib.Path(sys.argv[3]).touch()
            time.sleep(3600)
        return np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)

if __name__ == "__main__":
    result = train_as_program(Images(), "small", sys.argv[1], **dict(map(parse_override, sys.argv[4:])))
    sys.exit({"SIGTERM": 143}[result.stopped_by])
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_waiting_for_a_batch(tmp_path, workers):
    """Storage that hangs: schedulers kill long before data.timeout."""
    run, hang, hangs = tmp_path / "run", tmp_path / "hang", tmp_path / "hangs"
    keys = soak.KEYS | {"train.steps": 100_000, "train.num_workers": workers, "checkpoint.every_steps": 1_000_000}
    (tmp_path / "script.py").write_text(HANGS)
    process = subprocess.Popen(
        [
            *(sys.executable, str(tmp_path / "script.py"), str(run), str(hang), str(hangs)),
            *(f"{key}={value}" for key, value in keys.items()),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while soak.step_of(run) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    hang.touch()
    while not hangs.exists():
        assert process.poll() is None
        time.sleep(0.005)
    before = None
    while (now := soak.step_of(run)) != before:  # the batches that were made before
        before = now
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)  # a twentieth of data.timeout
    assert (process.returncode, b"Traceback" in errors) == (143, False), errors
    assert checkpoint.steps(run) == [soak.step_of(run)]


SEVERAL = """
import sys
from dinoforge import train
from dinoforge.recipe.load import parse_override
import signal

keys = dict(map(parse_override, sys.argv[3:]))
before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
for name in ("first", "second"):
    try:
        train(sys.argv[1], "small", f"{sys.argv[2]}/{name}", **keys)
    finally:
        assert {number: signal.getsignal(number) for number in before} == before
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_script_of_several_trainings(images, tmp_path, number):
    (tmp_path / "script.py").write_text(SEVERAL)
    keys = soak.KEYS | {"train.steps": 100_000, "train.num_workers": 0}
    process = subprocess.Popen(
        [
            *(sys.executable, str(tmp_path / "script.py"), str(images), str(tmp_path)),
            *(f"{key}={value}" for key, value in keys.items()),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    run = tmp_path / "first"
    while soak.step_of(run) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (1, 130, -signal.SIGINT), errors
    assert f"KeyboardInterrupt: {signal.Signals(number).name} at step".encode() in errors
    assert checkpoint.steps(run)[-1] == soak.step_of(run)
    assert not (tmp_path / "second").exists()


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken("no"), OSError(5, "Input/output error")])
def test_any_error_between_two_steps_saves_what_was_done(images, tmp_path, monkeypatch, error, capsys):
    def fail(self, metrics):
        if metrics["step"] == 7:
            raise error

    monkeypatch.setattr("dinoforge.runs.display.Display.__call__", fail)
    keys = soak.KEYS | {"train.steps": 20, "train.num_workers": 0, "checkpoint.every_steps": 5}
    with pytest.raises(type(error)):
        train(images, "small", tmp_path / "run", **keys)
    assert checkpoint.steps(tmp_path / "run") == [5, 7]
    assert "saved      step 7" in capsys.readouterr().out
    monkeypatch.undo()
    train(images, "small", tmp_path / "run", **keys)
    train(images, "small", tmp_path / "alone", **keys)
    assert soak.differences(tmp_path / "run", tmp_path / "alone", 20) == []


def test_an_error_while_weights_change_saves_nothing(images, tmp_path, monkeypatch, capsys):
    step, calls = AdamW.step, []

    def fail(self, *arguments, **more):
        calls.append(step(self, *arguments, **more))
        if len(calls) == 7:
            raise Broken
        return calls[-1]

    monkeypatch.setattr(AdamW, "step", fail)
    keys = soak.KEYS | {"train.steps": 20, "train.num_workers": 0, "checkpoint.every_steps": 5}
    with pytest.raises(Broken):
        train(images, "small", tmp_path / "run", **keys)
    assert checkpoint.steps(tmp_path / "run") == [5]
    assert "not saved" in capsys.readouterr().out
