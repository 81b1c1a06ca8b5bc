"""float16: gradients that overflow lower the loss scale, and are told; those that stay NaN end like any others."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import dinoforge
from dinoforge.builders import networks as networks_module
from dinoforge.errors import TrainingError
from dinoforge.planning.bench import StepBench
from dinoforge.recipe.load import load_recipe
from tiny import TINY

FP16 = TINY | {"precision": "fp16", "train.steps": 40, "report.every_minutes": None}
CPU = torch.device("cpu")


class Images:
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return np.random.default_rng(index).integers(0, 256, (40, 40), dtype=np.uint8)


@pytest.fixture
def poison(monkeypatch):
    """A gradient becomes NaN, with a finite loss, in backward passes for whose number ``poison.when`` is true."""

    class Poison:
        def __init__(self):
            self.passes = 0
            self.when = lambda number: False

        def __call__(self, gradient):
            self.passes += 1
            return torch.full_like(gradient, torch.nan) if self.when(self.passes) else gradient

    make, spoil = networks_module.build_optimizer, Poison()

    def build_optimizer(recipe, networks):
        networks.student.backbone.norm.weight.register_hook(spoil)
        return make(recipe, networks)

    monkeypatch.setattr(networks_module, "build_optimizer", build_optimizer)
    return spoil


def bench(**keys):
    recipe, _ = load_recipe("small", FP16 | {"train.steps": 1000} | keys)
    ours = StepBench(recipe, CPU, torch.float16)
    ours.warm_up()  # until the loss scale is no longer too high
    return ours


def weights(bench):
    return {name: tensor.clone() for name, tensor in bench._state.student_teacher.state_dict().items()}


def test_an_overflow_halves_the_scale_and_updates_nothing(poison):
    ours = bench()
    before, scale = weights(ours), ours._state.scaler.get_scale()
    poison.when = lambda number: True
    assert not ours.step(ours.batch())
    assert ours._state.scaler.get_scale() == scale / 2
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(ours).items())
    poison.when = lambda number: False
    assert ours.step(ours.batch())
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(ours).items())


def test_gradients_that_stay_nan_are_not_blamed_on_the_scale_for_ever(poison):
    ours = bench()
    poison.when = lambda number: True
    for _ in range(int(np.log2(ours._state.scaler.get_scale()))):
        assert not ours.step(ours.batch())
    assert ours._state.scaler.get_scale() == 1
    for _ in range(3):  # and the scaler is ready for the next step each time
        assert not ours.step(ours.batch())
    assert ours._state.scaler.get_scale() == 1


def test_a_loss_that_is_not_finite_leaves_the_scaler_as_it_was():
    ours = bench()
    scale, batch = ours._state.scaler.get_scale(), ours.batch()
    spoiled = batch.global_crops.float()
    spoiled[0] = torch.nan
    for _ in range(2):
        assert not ours.step(replace(batch, global_crops=spoiled))
    assert ours._state.scaler.get_scale() == scale
    assert ours.step(ours.batch())


def test_a_small_layerscale_needs_no_smaller_loss_scale():
    """The gradients of weights before LayerScale are 1e5 times as large as after it, and beyond float16."""
    plain, small = (bench(**{"student.layerscale": value})._state.scaler.get_scale() for value in (1.0, 1e-5))
    assert small >= plain >= 256


def run(tmp_path, **keys):
    console = Console(record=True, width=400, force_terminal=False, file=open(tmp_path / "told", "w"))  # noqa: SIM115
    try:
        dinoforge.train(Images(), out=tmp_path / "run", console=console, **(FP16 | keys))
    finally:
        told = console.export_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return told, lines


def test_a_run_counts_and_tells_overflows(poison, tmp_path):
    poison.when = lambda number: 17 <= number < 25
    told, lines = run(tmp_path, **{"train.steps": 30})
    counts = [line["overflows"] for line in lines]
    at_the_start = counts[15]  # that many halvings, and the loss scale was low enough
    assert at_the_start < 8
    assert counts[16:] == [at_the_start + more for more in (*range(1, 9), *[8] * 6)]
    assert lines[-1]["loss_scale"] == lines[15]["loss_scale"] / 2**8
    assert lines[-1]["skipped_steps"] == 0
    assert told.count("gradients of 8 steps in a row") == 1
    assert "gradients of 8 steps in a row, up to step 24, are not finite in float16" in told
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["overflows"] == counts[-1]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line
        assert "Infinity" not in line


def test_a_run_whose_gradients_stay_nan_goes_back_and_ends(poison, tmp_path):
    poison.when = lambda number: number > 12
    with pytest.raises(TrainingError, match="1 rollbacks did not help"):
        run(tmp_path, **{"train.steps": 200, "train.max_rollbacks": 1, "checkpoint.every_steps": 4})
    assert poison.passes < 60


def test_checkpoints_without_the_counts_still_load():
    state = bench()._state
    values = state.values()
    for name in ("overflows", "overflows_in_a_row"):
        del values[name]
    state.load_values(values)
    assert state.overflows == 0
