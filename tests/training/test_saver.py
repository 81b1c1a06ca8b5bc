"""Saving while training goes on."""

import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dinoforge
from dinoforge import checkpoint
from dinoforge.config import load_recipe
from dinoforge.training import build
from faults.test_images import SIZES  # type: ignore[import-not-found]


class Images:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def train(run, **more):
    settings = SIZES | {"train.num_workers": 0, "train.steps": 6, "checkpoint.every_steps": 2} | more
    return dinoforge.train(Images(), "small", run, **settings)


@pytest.fixture
def slow(monkeypatch):
    """Writing a checkpoint takes 0.6 s. Gives who wrote which, and how many steps were done by then."""
    written = []
    save = checkpoint.save

    def save_slowly(run, step, tensors, values):
        time.sleep(0.6)
        written.append((step, threading.current_thread() is threading.main_thread()))
        return save(run, step, tensors, values)

    monkeypatch.setattr(checkpoint, "save", save_slowly)
    return written


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow):
    run = train(tmp_path / "run", **{"checkpoint.every_steps": 4})
    assert slow == [(4, False), (6, False)]
    # At step 4 only the copying was waited for; at the end both were.
    assert 0.6 < run.summary["checkpoint_wait_seconds"] < 1.3


def test_one_checkpoint_is_written_at_a_time(tmp_path, slow):
    run = train(tmp_path / "run")
    assert [step for step, _ in slow] == [2, 4, 6]
    assert run.summary["checkpoint_wait_seconds"] > 1.0


def test_what_is_written_is_the_state_at_that_step(tmp_path, slow):
    """Not what the steps after made of it."""
    quick = train(tmp_path / "quick", **{"checkpoint.asynchronous": False, "checkpoint.keep_last": 9}).out
    run = train(tmp_path / "run", **{"checkpoint.keep_last": 9}).out
    for step in (2, 4, 6):
        files = [checkpoint.path_of(r, step).glob("*.safetensors") for r in (quick, run)]
        ours, theirs = ({k: t for file in some for k, t in load_file(file).items()} for some in files)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_waiting_on_purpose(tmp_path, slow):
    run = train(tmp_path / "run", **{"checkpoint.asynchronous": False})
    assert run.summary["checkpoint_wait_seconds"] > 1.7


def test_the_backbone_is_that_of_the_checkpoint(tmp_path):
    run = train(tmp_path / "run").out
    recipe, _ = load_recipe(run / "recipe.yaml")
    state = build.build_state(recipe, torch.device("cpu"), images=64)
    checkpoint.load(run, 6, state.tensors())
    saved = dinoforge.load(run).network.state_dict()
    teacher = state.student_teacher.teacher["backbone"].state_dict()
    assert all(torch.equal(saved[name], teacher[name]) for name in saved)
