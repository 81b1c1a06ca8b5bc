"""Saving while training goes on."""

import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dinoforge
from dinoforge.builders.networks import build_state
from dinoforge.recipe.load import load_recipe
from dinoforge.runs import checkpoint
from faults.test_images import SIZES  # type: ignore[import-not-found]

pytestmark = pytest.mark.slow


class Images:
    """Noise; tells when the images of a step from 1 are read."""

    def __init__(self, step=None):
        # Before the first step, 8 are looked at for the range of their values, and 16 for the plan.
        self.told, self.left = threading.Event(), 8 + 16 + 4 * ((step or 99) - 1)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if self.left == 0:
            self.told.set()
        self.left -= 1
        return np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def train(run, images=None, **more):
    settings = SIZES | {"train.num_workers": 0, "train.steps": 6, "checkpoint.every_steps": 2} | more
    return dinoforge.train(images or Images(), "small", run, **settings)


@pytest.fixture
def slow(monkeypatch):
    """Writing waits until ``slow.until`` happens, for a second at most. Notes each step, and whether it happened."""

    class Slow:
        until = threading.Event()
        written: ClassVar = []
        at_once = 0

    save = checkpoint.save

    def save_slowly(run, step, tensors, values):
        Slow.at_once += 1
        assert Slow.at_once == 1
        Slow.written.append((step, Slow.until.wait(timeout=1.0)))
        path = save(run, step, tensors, values)
        Slow.at_once -= 1
        return path

    monkeypatch.setattr(checkpoint, "save", save_slowly)
    return Slow


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow):
    images = Images(step=4)
    slow.until = images.told
    run = train(tmp_path / "run", images)
    assert slow.written == [(2, True), (4, True), (6, True)]
    assert run.summary["checkpoint_wait_seconds"] >= 0


def test_waiting_on_purpose(tmp_path, slow):
    images = Images(step=4)
    slow.until = images.told
    run = train(tmp_path / "run", images, **{"checkpoint.asynchronous": False})
    assert slow.written == [(2, False), (4, True), (6, True)]
    assert run.summary["checkpoint_wait_seconds"] >= 1.0  # what the first took


def test_one_checkpoint_is_written_at_a_time(tmp_path, slow):
    """The next waits for it, and what it waits is counted."""
    run = train(tmp_path / "run")
    assert [step for step, _ in slow.written] == [2, 4, 6]
    assert run.summary["checkpoint_wait_seconds"] >= 1.0


def test_what_is_written_is_the_state_at_that_step(tmp_path, slow):
    """Not what the steps after made of it."""
    quick = train(tmp_path / "quick", **{"checkpoint.asynchronous": False, "checkpoint.keep_last": 9}).out
    run = train(tmp_path / "run", **{"checkpoint.keep_last": 9}).out
    for step in (2, 4, 6):
        files = [checkpoint.path_of(r, step).glob("*.safetensors") for r in (quick, run)]
        ours, theirs = ({k: t for file in some for k, t in load_file(file).items()} for some in files)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_backbone_is_that_of_the_checkpoint(tmp_path):
    run = train(tmp_path / "run").out
    recipe, _ = load_recipe(run / "recipe.yaml")
    state = build_state(recipe, torch.device("cpu"), images=64)
    checkpoint.load(run, 6, state.tensors())
    saved = dinoforge.load(run).network.state_dict()
    teacher = state.student_teacher.teacher.backbone.state_dict()
    assert all(torch.equal(saved[name], teacher[name]) for name in saved)
