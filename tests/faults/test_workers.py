"""Data-loading workers that die or stall: never a hang, and the image is named."""

import faulthandler
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

import dinoforge
from dinoforge.data.batches import make_loader
from dinoforge.errors import DataError
from faults.test_images import SIZES, training_data  # type: ignore[import-not-found]

pytestmark = pytest.mark.processes

BAD = 13


class Images:
    """Images of which one does something to the process that reads it."""

    def __init__(self, action=lambda: None, length=40):
        self.action, self.length = action, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == BAD and multiprocessing.parent_process() is not None:
            self.action()
        return np.full((20, 20, 3), index % 256, dtype=np.uint8)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def crash():
    faulthandler.disable()  # of pytest, which would print where
    os.abort()  # as a decoder that runs into its own assertion


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def stall():
    time.sleep(3600)


def stream(action, num_workers=2, timeout=600.0):
    data = training_data(Images(action), batch_size=4)
    return make_loader(data, start_step=0, end_step=100, num_workers=num_workers, timeout=timeout)


def assert_no_worker_is_left():
    """Or else Python would wait for it when it ends."""
    for _ in range(6000):  # a killed process takes a moment to be gone
        if not multiprocessing.active_children():
            return
        time.sleep(0.01)
    raise AssertionError("workers are left")


@pytest.mark.parametrize("action", [kill, crash])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_that_dies(action, num_workers):
    with pytest.raises(DataError, match=rf"worker was killed while it read item {BAD}\b.*train\.num_workers"):
        for _ in stream(action, num_workers):
            pass
    assert_no_worker_is_left()


@pytest.mark.parametrize("action", [stop, stall])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_that_stalls(action, num_workers):
    with pytest.raises(DataError, match=rf"within 1 s \(data\.timeout\).*hangs while it read item {BAD}\b"):
        for _ in stream(action, num_workers, timeout=1.0):
            pass
    assert_no_worker_is_left()


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_worker_that_is_stopped_between_two_images(seconds):
    """Also when batches of it wait to be fetched, for which a stopped process gives no answer."""
    batches = stream(lambda: None, num_workers=1, timeout=1.0)
    next(batches)
    time.sleep(seconds)  # makes batches ahead
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="a data-loading worker hangs"):
        for _ in batches:
            pass


def test_slow_storage_is_no_stall():
    """Longer than one look, shorter than the limit."""
    batches = stream(lambda: time.sleep(2.5), num_workers=1, timeout=60.0)
    assert sum(1 for _, _ in zip(range(12), batches, strict=False)) == 12


def test_a_run_whose_worker_stalls_ends_with_a_checkpoint(tmp_path):
    settings = SIZES | {"train.num_workers": 1, "data.timeout": 1.0, "train.steps": 100}
    with pytest.raises(DataError, match=rf"item {BAD}\b"):
        dinoforge.train(Images(stall, length=400), "small", tmp_path / "run", **settings)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step_"))
    assert steps == len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # The same command continues where it stopped, once the image is well again.
    assert dinoforge.train(Images(length=400), "small", tmp_path / "run", **settings).finished
