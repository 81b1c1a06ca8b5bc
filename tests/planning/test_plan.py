"""``dinoforge plan``: sums worked out by hand, and what has to follow from what."""

import json

import pytest
import torch

from dinoforge.builders.networks import build_student_teacher
from dinoforge.cli.main import main
from dinoforge.errors import RecipeError
from dinoforge.planning import plan
from dinoforge.recipe.load import load_recipe


@pytest.fixture(scope="module")
def large():
    recipe, _ = load_recipe("dinov2")
    return plan.requirements(recipe, images=1_281_167, gpus="16xA100")


def test_weights_and_communication(large):
    with torch.device("meta"):
        networks = build_student_teacher(large.recipe)
    parameters = sum(p.numel() for p in networks.student.parameters())
    layouts = {layout.name: layout for layout in large.layouts}
    ddp, fsdp = layouts["DDP"], layouts["FSDP2"]
    # Weights of both networks, gradients, two moments: 4 bytes each.
    assert sum(ddp.memory[k] for k in ("student and teacher", "gradients", "optimizer")) == 5 * 4 * parameters
    for part in ("student and teacher", "optimizer"):
        assert fsdp.memory[part] == pytest.approx(ddp.memory[part] / 16)
    # All-reduce in a ring: 2 (W - 1) / W; three gathers and a scatter: 4 (W - 1) / W.
    assert ddp.sent == pytest.approx(2 * 15 / 16 * 4 * parameters)
    assert fsdp.sent == pytest.approx(2 * ddp.sent)
    assert large.length.batch_size == 16 * 64


def test_recomputing_trades_memory_for_work(large):
    layouts = {layout.name: layout for layout in large.layouts}
    for name in ("DDP", "FSDP2"):
        less = layouts[f"{name}, activations recomputed"]
        assert less.memory["activations"] < layouts[name].memory["activations"] / 2
        assert large.seconds(less)[0] > 1.1 * large.seconds(layouts[name])[0]


def test_the_cheapest_that_fits_is_chosen(large):
    assert large.chosen is not None
    assert large.chosen.total <= 0.9 * 80e9
    small = load_recipe("dinov2_giant")[0]
    assert plan.requirements(small, images=10**6, gpus="1xL4").chosen is None  # its weights alone are 24 GB
    assert plan.requirements(small, images=10**6, gpus="16xL4").chosen.name.startswith("FSDP2")


def test_time_follows_from_work(large):
    compute, _ = large.seconds(large.layouts[0])
    assert compute == pytest.approx(large.flops / (312e12 * 0.35))
    twice = plan.requirements(large.recipe, images=1_281_167, gpus="16xA100", utilisation=0.7)
    assert twice.seconds(twice.layouts[0])[0] == pytest.approx(compute / 2)


@pytest.mark.parametrize("text", ["8", "H100", "0xH100", "8xH101", "8 H100"])
def test_unknown_machines(text):
    with pytest.raises(RecipeError, match="--gpus: expected"):
        plan.requirements(load_recipe("small")[0], images=1000, gpus=text)


def test_the_command(capsys):
    arguments = ["plan", "--recipe", "dinov2", "--images", "1281167", "--gpus", "8xh100", "train.accumulate=2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "published peak" in text
    assert "images per second have to be read" in text
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["gpus"] == "8xH100"
    assert answer["batch_size"] == 8 * 64 * 2
    assert answer["hours"] > 0
    assert main([*arguments[:5], "--gpus", "8xH100", "--utilisation", "2"]) == 2
