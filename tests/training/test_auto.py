"""The rule of recipe `auto`: valid for anything, moved by what it says moves it, and overruled by the user."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoforge.api import auto_recipe, train
from dinoforge.config import flatten, load_recipe
from dinoforge.data.loader import DataSummary
from dinoforge.errors import RecipeError
from dinoforge.training import auto
from dinoforge.training.build import build_schedules, run_length, vit_size


def recipe_of(facts, **keys):
    keys = {name.replace("__", "."): value for name, value in keys.items()}
    choices = auto.choose(facts, keys)
    assert not set(choices) & set(keys)
    assert all(choice.reason for choice in choices.values())
    return load_recipe(auto.BASE, {key: choice.value for key, choice in choices.items()} | keys)[0]


@settings(max_examples=40)
@given(
    images=st.integers(2, 10_000_000),
    side=st.integers(1, 5000),
    channels=st.sampled_from((1, 3, 4, 13)),
    device=st.sampled_from(("cpu", "mps", "cuda", "cuda:1")),
    keys=st.sampled_from(
        (
            {},
            {"student__patch_size": 14},
            {"student__patch_size": 7, "crops__global_crops_size": 98},
            {"train__steps": 1},
            {"train__steps": 600_000},
            {"train__epochs": 3},
            {"optim__epochs": 1},
            {"student__arch": "vit_giant2"},
            {"crops__local_crops_number": 0},
            {"student__embed_dim": 200},
        )
    ),
)
def test_the_recipe_is_valid_for_all_images(images, side, channels, device, keys):
    recipe = recipe_of(auto.Facts(images, side, channels, device), **keys)
    length = run_length(recipe, images=images)
    build_schedules(recipe, length)
    width, _, heads = vit_size(recipe)
    assert width % heads == 0
    assert recipe.student.in_chans == channels
    assert recipe.teacher.momentum_teacher <= recipe.teacher.final_momentum_teacher <= 1
    assert recipe.teacher.warmup_teacher_temp <= recipe.teacher.teacher_temp


@pytest.mark.parametrize(
    ("keys", "share", "batch"),
    [
        ({}, 64, 128),
        ({"train__accumulate": 2}, 32, 128),
        ({"train__batch_size": 256}, 128, 256),
        ({"train__batch_size": 256, "train__accumulate": 4}, 32, 256),
    ],
)
def test_the_rule_knows_how_the_batch_is_cut(keys, share, batch):
    recipe = recipe_of(auto.Facts(512, 96, 3, "cpu", ranks=2), **keys)
    assert recipe.train.batch_size_per_gpu == share
    assert recipe.dino.head_n_prototypes == auto.prototypes(batch)


@given(st.integers(2, 10_000_000), st.integers(1, 5000), st.integers(1, 4096), st.integers(1, 1_000_000), st.booleans())
def test_what_grows_with_what(images, side, batch, steps, fast):
    assert auto.batch_size(images, fast=fast) <= auto.batch_size(2 * images, fast=fast)
    assert auto.run_steps(images, 64, fast=fast) <= auto.run_steps(2 * images, 64, fast=fast)
    assert auto.network(images, fast=fast) <= auto.network(2 * images, fast=fast)
    assert auto.patch_size(side, fast=fast) <= auto.patch_size(side + 1, fast=fast)
    assert auto.crop_size(side, fast=fast) <= auto.crop_size(side + 1, fast=fast)
    assert auto.blur_kernel(side) <= auto.blur_kernel(side + 1)
    assert auto.prototypes(batch) <= auto.prototypes(batch + 1)
    assert auto.teacher_temp(batch) <= auto.teacher_temp(batch + 1)
    assert auto.teacher_momentum(steps) <= auto.teacher_momentum(steps + 1) <= auto.final_momentum(steps + 1)


def test_it_meets_the_official_values_at_the_official_size():
    """A batch of 2,048 on a GPU for 125,000 steps of a million large photos: DINOv2's own setting."""
    facts = auto.Facts(1_281_167, 400, 3, "cuda")
    auto_flat = flatten(recipe_of(facts, train__batch_size_per_gpu=2048, train__steps=125_000, student__patch_size=16))
    official = flatten(load_recipe("dinov2")[0])
    for key in (
        "dino.head_n_prototypes teacher.teacher_temp teacher.warmup_teacher_temp student.layerscale optim.base_lr "
        "optim.layerwise_decay optim.patch_embed_lr_mult optim.weight_decay_end student.drop_path_rate train.centering "
        "crops.global_crops_size crops.local_crops_size crops.local_crops_number augment.blur_sigma "
        "augment.blur_kernel ibot.loss_weight dino.koleo_loss_weight"
    ).split():
        assert auto_flat[key] == official[key], key


def test_only_small_networks_weigh_the_patch_loss_and_koleo_less():
    facts, small = auto.Facts(20_000, 300, 3, "cpu"), load_recipe("small")[0]
    shallow, deep = recipe_of(facts), recipe_of(facts, student__arch="vit_small")
    assert small.ibot.loss_weight == shallow.ibot.loss_weight < deep.ibot.loss_weight == 1
    assert small.dino.koleo_loss_weight == shallow.dino.koleo_loss_weight < deep.dino.koleo_loss_weight == 0.1


def test_ranks_share_a_batch():
    alone, together = (auto.Facts(1_000_000, 300, 3, "cuda", ranks) for ranks in (1, 8))
    assert recipe_of(together).train.batch_size_per_gpu == recipe_of(alone).train.batch_size_per_gpu == 256
    assert recipe_of(together).dino.head_n_prototypes == auto.prototypes(8 * 256)


def test_other_choices_follow_what_the_user_gives():
    facts = auto.Facts(20_000, 300, 3, "cpu")
    given = recipe_of(facts, train__batch_size_per_gpu=1024, student__patch_size=14)
    assert given.dino.head_n_prototypes == auto.prototypes(1024) != auto.prototypes(128)
    assert given.crops.global_crops_size % 14 == 0
    with pytest.raises(RecipeError, match="patch_size: expected at least 1"):
        recipe_of(facts, student__patch_size=0)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [
        ((("L", 3),), 1),
        ((("L", 3), ("RGB", 1)), 3),
        ((("I;16", 3),), 1),
        ((("uint8 x1", 3),), 1),
        ((("uint8 x5", 3),), 5),
        ((("P", 1),), 3),
    ],
)
def test_channels_are_the_images(modes, channels):
    summary = DataSummary(10, 4, (100, 400), (200, 300), modes, (0, 255), ())
    facts = auto.facts_of(summary, "cpu")
    assert facts == auto.Facts(10, 173, channels, "cpu")  # √(100 · 300)


def test_arrays_of_five_channels_are_read_as_such():
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 30, 5), dtype=np.uint8)
    recipe, choices = auto_recipe(images, train={"steps": 3})
    assert recipe.student.in_chans == 5
    assert recipe.train.steps == 3
    assert "train.steps" not in choices


def test_a_run_is_planned_with_reasons_and_continues(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    keys = {"train.steps": 2, "train.threads": 1, "train.num_workers": 0, "student.depth": 1}
    train(images, "auto", tmp_path / "run", dry_run=True, **keys)
    said = capsys.readouterr().out
    assert "teacher.teacher_temp" in said
    assert "student.depth  " not in said
    assert not (tmp_path / "run").exists()
    assert train(images, "auto", tmp_path / "run", **keys).finished
    assert train(images, "auto", tmp_path / "run", **keys).finished  # the same recipe again, else an error


def test_minutes_become_steps_once(tmp_path):
    """A second measurement of the step would give another number of steps, and with it another recipe."""
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    keys = {"train.max_minutes": 0.02, "train.threads": 1, "train.num_workers": 0, "student.depth": 1}
    first = train(images, "auto", tmp_path / "run", **keys)
    assert first.total_steps >= 1
    assert train(images, "auto", tmp_path / "run", **keys).total_steps == first.total_steps
