"""Going on from a backbone that is good already: what is taken from its file, and what moves when."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dinoforge
from dinoforge.builders.lengths import RunLength, build_schedules
from dinoforge.builders.networks import build_state, build_student_teacher
from dinoforge.cli.main import main
from dinoforge.commands.recipe import resolve
from dinoforge.commands.start import heads_of_run
from dinoforge.errors import RecipeError, RunError, WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import flatten
from dinoforge.runs import checkpoint
from dinoforge.runs.directory import RunDirectory

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 1, "patch_size": 8}
PRETRAINING = {f"student.{key}": value for key, value in SIZE.items()} | {
    "student.num_register_tokens": 2,
    "student.interpolate_offset": 0.0,
    "student.in_chans": 1,
    "data.mean": 0.4,
    "data.std": 0.2,
    "data.sixteen_bit": "minmax",
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "dino.head_n_prototypes": 24,
    "dino.head_hidden_dim": 16,
    "dino.head_bottleneck_dim": 8,
    "train.centering": "centering",  # which has centres to take over
    "teacher.teacher_temp": 0.05,
}
SHORT = {
    "train.steps": 20,
    "train.batch_size_per_gpu": 4,
    "train.num_workers": 0,
    "train.threads": 1,
    "crops.local_crops_number": 2,
    "device": "cpu",
    "precision": "fp32",
    "checkpoint.every_steps": 2,
    "checkpoint.keep_every": 2,
}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (24, 40, 40), dtype=np.uint8)


@pytest.fixture(scope="module")
def first(images, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "first"
    dinoforge.train(images, "small", out, **PRETRAINING | SHORT | {"train.steps": 4})
    return out


@pytest.fixture(scope="module")
def second(images, first, tmp_path_factory):
    """A run that continues it, with a checkpoint at every second step."""
    out = tmp_path_factory.mktemp("runs") / "second"
    keys = SHORT | {"init.weights": str(first), "optim.freeze_backbone_length": "10%"}
    dinoforge.train(images, "continue", out, **keys)
    return out


def state_at(run, step):
    recipe, _ = load_recipe(run / "recipe.yaml")
    state = build_state(recipe, torch.device("cpu"), images=24)
    checkpoint.load(run, step, state.tensors())
    return state.student_teacher


# What is taken from the file


def test_network_and_pixel_values_are_the_runs_own(first):
    recipe, _ = resolve("continue", {"init.weights": str(first)})
    same = {key: value for key, value in PRETRAINING.items() if key not in ("data.mean", "data.std")}
    flat = flatten(recipe)
    assert {key: flat[key] for key in same} == same
    assert (recipe.data.mean, recipe.data.std) == ((0.4,), (0.2,))
    assert recipe.student.drop_path_rate == load_recipe("continue")[0].student.drop_path_rate


def test_larger_crops_are_multiples_of_what_they_were(first):
    recipe, _ = resolve("highres", {"init.weights": str(first)})
    assert (recipe.crops.global_crops_size, recipe.crops.local_crops_size) == (64, 32)
    recipe, _ = resolve("highres", {"init.weights": str(first), "init.enlarge": 1.3})
    assert (recipe.crops.global_crops_size, recipe.crops.local_crops_size) == (40, 24)  # multiples of the patch


def test_what_is_given_wins(first):
    keys = {"init.weights": str(first), "crops.global_crops_size": 48, "data.mean": 0.1, "dino.head_n_prototypes": 7}
    recipe, _ = resolve("continue", keys)
    assert (recipe.crops.global_crops_size, recipe.data.mean, recipe.dino.head_n_prototypes) == (48, (0.1,), 7)
    with pytest.raises(RecipeError, match=r"multiple of student\.patch_size=8"):
        resolve("continue", keys | {"crops.global_crops_size": 50})


@pytest.mark.parametrize(("side", "crops"), [(37, (224, 98)), (4, (56, 28))])
def test_of_an_official_file(side, crops, tmp_path):
    """At 37 × 37 patches of 14 pixels it was made for images of 518, but pretrained on crops of 224."""
    network = VisionTransformer(**SIZE | {"patch_size": 14}, image_size=14 * side, num_register_tokens=4)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    recipe, _ = resolve("continue", {"init.weights": str(tmp_path / "w.pth")})
    assert (recipe.crops.global_crops_size, recipe.crops.local_crops_size) == crops
    s = recipe.student
    assert (s.embed_dim, s.depth, s.num_heads, s.patch_size, s.num_register_tokens) == (32, 2, 1, 14, 4)
    assert (s.interpolate_antialias, s.interpolate_offset) == (True, 0.0)
    small = load_recipe("small")[0].dino
    assert dataclasses.replace(recipe.dino, targets=small.targets) == dataclasses.replace(
        load_recipe("continue")[0].dino,
        **{
            key: getattr(small, key)
            for key in ("head_n_prototypes", "head_hidden_dim", "head_bottleneck_dim", "targets")
        },
    )
    recipe, _ = resolve("continue", {"init.weights": str(tmp_path / "w.pth"), "student.num_heads": 4})
    assert recipe.student.num_heads == 4


def test_a_head_number_that_the_rule_does_not_fit(tmp_path, images):
    """Of width 224 at 64 channels for each head there would be 3, which does not divide it."""
    network = VisionTransformer(embed_dim=224, depth=1, num_heads=7, patch_size=8, image_size=32, in_chans=1)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    keys = SHORT | {"init.weights": str(tmp_path / "w.safetensors"), "student.num_heads": 7, "train.steps": 10}
    dinoforge.train(images, "continue", tmp_path / "run", dry_run=True, **keys)
    with pytest.raises(WeightsError, match="num_heads"):
        dinoforge.train(images, "continue", tmp_path / "run", dry_run=True, **keys | {"student.num_heads": None})


def test_without_weights_it_says_what_is_missing(images, tmp_path, capsys):
    with pytest.raises(RecipeError, match=r"init\.weights=RUN\|FILE"):
        dinoforge.train(images, "continue", tmp_path / "run")
    assert main(["explain", "--recipe", "continue"]) == 0
    assert "without init.weights" in capsys.readouterr().err


def test_explain_takes_the_network_from_the_file(first, capsys):
    assert main(["explain", "--recipe", "continue", f"init.weights={first}", "--images", "200", "train.steps=100"]) == 0
    out = capsys.readouterr().out
    assert "Only the heads learn in the first 5 steps (this is one of them)" in out
    assert "4 × 4 patches" in out


# The heads


def test_heads_and_centres_are_the_runs_own(first, second):
    theirs = state_at(first, 4)
    networks = build_student_teacher(load_recipe(second / "recipe.yaml")[0])
    assert "step 4" in heads_of_run(networks, first)
    ours, before = networks.state_dict(), theirs.state_dict()
    heads = [name for name in ours if ".backbone." not in name]
    assert {name.split(".")[0] for name in heads} == {"student", "teacher", "dino_center", "ibot_center"}
    assert all(torch.equal(ours[name], before[name]) for name in heads)


def test_without_a_checkpoint_heads_start_fresh(first, tmp_path):
    shutil.copytree(first, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    recipe, _ = resolve("continue", {"init.weights": str(first)})
    networks = build_student_teacher(recipe)
    before = networks.student.dino_head.last_layer.weight_v.clone()
    assert "fresh" in heads_of_run(networks, tmp_path / "run")
    assert torch.equal(networks.student.dino_head.last_layer.weight_v, before)


def test_heads_of_another_size_are_refused(first, images, tmp_path):
    keys = SHORT | {"init.weights": str(first), "dino.head_n_prototypes": 7}
    with pytest.raises(WeightsError, match="does not fit"):
        dinoforge.train(images, "continue", tmp_path / "run", **keys)


# What moves when


def test_the_backbone_stands_still_until_the_heads_have_learned(first, second):
    """20 steps: 2 of them frozen."""
    start = dinoforge.load(first).network.state_dict()
    frozen, after = state_at(second, 2), state_at(second, 4)
    for network in (frozen.student.backbone, frozen.teacher.backbone):
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-6)  # the moving average rounds
    assert not torch.equal(after.student.backbone.norm.weight, start["norm.weight"])
    warm = state_at(first, 4)
    for side in ("student", "teacher"):
        before, now = (getattr(s, side).dino_head.mlp[0].weight for s in (warm, frozen))
        assert not torch.equal(before, now)


def test_while_it_is_frozen_it_takes_no_gradient_and_the_optimizer_does_not_see_it(second):
    recipe, _ = load_recipe(second / "recipe.yaml")
    state = build_state(recipe, torch.device("cpu"), images=24)
    checkpoint.load(second, 2, state.tensors())
    tensors = state.tensors()
    for name, tensor in tensors.items():
        if name.startswith("optimizer.backbone."):
            assert tensor.eq(0).all(), name
    assert tensors["optimizer.dino_head.mlp.0.weight.step"] == 2
    checkpoint.load(second, 6, tensors)
    assert tensors["optimizer.backbone.norm.weight.step"] == 4  # since the thaw


def test_learning_rates_rise_after_the_thaw(first):
    recipe, _ = resolve("continue", {"init.weights": str(first), "train.steps": 200})
    schedules = build_schedules(recipe, RunLength(200, 64, 1000))
    hyper = [schedules(step) for step in range(200)]
    assert [h.backbone_frozen for h in hyper] == [True] * 10 + [False] * 190
    backbone = [h.lr * h.backbone_lr_mult for h in hyper]
    assert backbone[:10] == [0.0] * 10
    assert backbone[10] < 0.1 * schedules.lr  # no jump
    rising = backbone[10:30]
    assert rising == sorted(rising)
    assert all(h.backbone_lr_mult == 1 for h in hyper[30:])
    momentum = [h.momentum for h in hyper]
    assert set(momentum[:10]) == {recipe.teacher.frozen_momentum_teacher}
    assert momentum[10:] == sorted(momentum[10:])
    assert momentum[10] >= recipe.teacher.momentum_teacher


@pytest.mark.parametrize(
    "keys",
    [
        {"optim.freeze_backbone_length": "100%"},
        {"optim.freeze_backbone_length": "soon"},
        {"dino.loss_weight": 0, "ibot.loss_weight": 0},
        {"teacher.frozen_momentum_teacher": 1.5},
        {"init.enlarge": 0},
    ],
)
def test_what_cannot_be_is_refused(keys, first, images, tmp_path):
    with pytest.raises(RecipeError, match=r"freeze_backbone|frozen_momentum|enlarge|not a length"):
        dinoforge.train(images, "continue", tmp_path / "run", **SHORT | {"init.weights": str(first)} | keys)
    assert not (tmp_path / "run").exists()


# Continuing the continuation


@pytest.mark.slow
def test_it_goes_on_without_the_file(first, images, tmp_path):
    """What was taken from the file is in the run; the file may be gone once there is a checkpoint."""
    there = tmp_path / "there"
    shutil.copytree(first, there)
    keys = SHORT | {"init.weights": str(there)}
    whole = dinoforge.train(images, "continue", tmp_path / "whole", **keys)
    stopped = dinoforge.train(images, "continue", tmp_path / "run", **keys, **{"train.max_minutes": 1e-9})
    assert not stopped.finished
    shutil.rmtree(there)
    result = dinoforge.train(images, "continue", tmp_path / "run", **keys)
    assert result.finished
    ours, theirs = (dinoforge.load(run.out).network.state_dict() for run in (result, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    with pytest.raises(RunError, match=r"augment\.hue"):
        dinoforge.train(images, "continue", tmp_path / "run", **keys | {"augment.hue": 0.0})
    resolved, _ = resolve(tmp_path / "run" / "recipe.yaml", {}, RunDirectory(tmp_path / "run"))
    assert resolved == RunDirectory(tmp_path / "run").recipe()
