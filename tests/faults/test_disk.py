"""Disks that are full or turn read-only during a run, on a real file system of a few megabytes."""

import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch

import dinoforge
from dinoforge.errors import RunError
from dinoforge.runs import checkpoint
from faults.test_images import SIZES  # type: ignore[import-not-found]

pytestmark = pytest.mark.processes

STEPS = 12


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a file system: {error}")
    yield folder
    subprocess.run(["umount", folder], check=True)


class Images:
    """Noise; does something when a step's images are read."""

    def __init__(self, actions=None):
        self.actions = actions or {}
        self.read = 0

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if action := self.actions.pop(self.read // 4 - 4, None):  # 16 are looked at before the first step
            action()
        self.read += 1
        return np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def settings(**more):
    return SIZES | {"train.num_workers": 0, "train.steps": STEPS, "checkpoint.every_steps": 2} | more


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return dinoforge.train(Images(), "small", tmp_path_factory.mktemp("runs") / "run", **settings()).out


def assert_same_end(run, undisturbed):
    lines = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, undisturbed)]
    assert [m["total"] for m in lines[0]] == [m["total"] for m in lines[1]]
    assert len(lines[0]) == STEPS
    ours, theirs = (dinoforge.load(r).network.state_dict() for r in (run, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    assert shutil.disk_usage(disk).free == 0


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_for_a_while_costs_nothing(small_disk, undisturbed, capsys, asynchronous):
    """Neither steps nor lines: what could not be written is written later."""
    images = Images({5: lambda: fill(small_disk), 9: lambda: (small_disk / "filler").unlink()})
    more = {"checkpoint.asynchronous": asynchronous}
    run = dinoforge.train(images, "small", small_disk / "run", **settings(**more)).out
    output = capsys.readouterr().out
    assert "not saved  no space left to write" in output
    assert "Training goes on" in output
    assert_same_end(run, undisturbed)
    assert checkpoint.steps(run) == [10, 12]
    assert not list((run / "checkpoints").glob(".*"))


def test_full_until_the_end_keeps_what_was_saved(small_disk, undisturbed):
    run = small_disk / "run"
    # Or else a busy machine may not have written one before the disk is full.
    keys = settings(**{"checkpoint.asynchronous": False})
    with pytest.raises(RunError, match=r"no space left to write .*: free some, then run the same command again"):
        dinoforge.train(Images({5: lambda: fill(small_disk)}), "small", run, **keys)
    saved = checkpoint.steps(run)
    assert saved
    assert saved[-1] < STEPS
    (small_disk / "filler").unlink()
    assert dinoforge.train(Images(), "small", run, **settings()).finished
    assert_same_end(run, undisturbed)


def test_read_only_for_a_while(small_disk, undisturbed, capsys):
    """As when the system finds an error on a disk."""

    def mount(mode):
        for _ in range(200):  # refused as long as a checkpoint is being written
            if (
                subprocess.run(["mount", "-o", f"remount,{mode}", small_disk], stderr=subprocess.DEVNULL).returncode
                == 0
            ):
                return
            time.sleep(0.02)
        os._exit(1)  # an exception would count as an unreadable image

    run = small_disk / "run"
    images = Images({5: lambda: mount("ro"), 9: lambda: mount("rw")})
    dinoforge.train(images, "small", run, **settings())
    assert "(Read-only file system)" in capsys.readouterr().out
    assert_same_end(run, undisturbed)


def test_read_only_from_the_start(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RunError, match=r"cannot write .*Read-only file system.*--out"):
        dinoforge.train(Images(), "small", small_disk / "run", **settings())
