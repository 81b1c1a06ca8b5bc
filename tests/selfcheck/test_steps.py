"""Faults that are put in on purpose make the lines of steps fail."""

from contextlib import nullcontext

import pytest
import torch

from dinoforge.method import koleo
from dinoforge.recipe.load import load_recipe
from dinoforge.selfcheck import fidelity, steps

CPU = torch.device("cpu")


@pytest.fixture
def cases():
    name = "centering_shared_head"
    return [steps._Case(name, fidelity.CASES / name, 1)]


def test_steps_pass(cases):
    line = steps._steps("steps", cases, torch.float32, CPU)
    assert line.status == "ok"
    assert all(0 <= error["share_of_bound"] < 0.5 for error in line.values["errors"].values())
    assert line.values["errors"].keys() == fidelity.BOUNDS.keys()


def test_a_wrong_sign_in_the_gradient_of_koleo(cases, monkeypatch):
    """Its value is right, so no loss of the first step shows it."""

    right = koleo.koleo_loss

    def wrong(x):
        loss = right(x)
        return 2 * loss.detach() - loss

    monkeypatch.setattr("dinoforge.method.koleo.koleo_loss", wrong)
    line = steps._steps("steps", cases, torch.float32, CPU)
    assert line.status == "FAIL"
    assert line.values["errors"]["gradient"]["share_of_bound"] > 10
    assert any(row.startswith("gradient:") for row in line.details)


def test_half_precision_that_is_not_in_effect(cases, monkeypatch):
    monkeypatch.setattr(fidelity, "autocast", lambda device, dtype: nullcontext())
    line = steps._steps("steps", cases, torch.bfloat16, CPU)
    assert line.status == "FAIL"
    assert "this was not bfloat16" in line.text


def test_a_case_that_cannot_be_run_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(fidelity, "CASES", tmp_path)
    with pytest.raises(FileNotFoundError, match="install it again"):
        steps._descriptions()


SMALL = {"student.embed_dim": 32, "student.depth": 2, "crops.global_crops_size": 48, "crops.local_crops_size": 24}


@pytest.fixture
def gradients():
    recipe, _ = load_recipe("small", SMALL | {"train.batch_size_per_gpu": 2})
    return steps.gradients_of(recipe, CPU, torch.float32)


def test_gradients_beside_others(gradients):
    assert steps.beside("gradients", gradients, gradients, torch.float32).status == "ok"
    worst = "backbone.blocks.1.mlp.fc1.weight"
    other = gradients | {worst: gradients[worst] * (1 + 2e-4)}
    line = steps.beside("gradients", other, gradients, torch.float32)
    assert line.status == "FAIL"
    assert line.values["where"] == worst
    assert line.values["largest"] == pytest.approx(2e-4, rel=0.01)


def test_gradients_that_are_not_numbers_or_not_there(gradients):
    name = "backbone.cls_token"
    for wrong in (gradients | {name: gradients[name] * torch.nan}, {k: v for k, v in gradients.items() if k != name}):
        line = steps.beside("gradients", wrong, gradients, torch.float32)
        assert line.status == "FAIL"
        assert name in line.text


def test_gradients_too_near_to_be_of_half_precision(gradients):
    assert steps.beside("gradients", gradients, gradients, torch.bfloat16).status == "FAIL"


def test_gradients_are_those_of_training(gradients):
    """Of every parameter, and the key third of the attention bias, which is noise, is left out."""
    assert len(gradients["backbone.blocks.0.attn.qkv.bias"]) == 2 * SMALL["student.embed_dim"]
    assert all(torch.isfinite(gradient).all() and gradient.norm() > 0 for gradient in gradients.values())
