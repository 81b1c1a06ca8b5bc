"""The reference's own YAML files, as they are, and the recipes that carry their values.

The files in ``official/`` hold the keys and values of its default file, its three training files and the
``config.yaml`` that a run of it leaves behind.
"""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from dinoforge.cli.main import main
from dinoforge.errors import RecipeError
from dinoforge.recipe.load import load_recipe, recipe_names
from dinoforge.recipe.schema import WITHOUT_MEANING, Recipe, differences, flatten

FILES = Path(__file__).parent / "official"
LONG = {
    "dino.head_n_prototypes": 131072,
    "dino.head_bottleneck_dim": 384,
    "ibot.separate_head": True,
    "ibot.head_n_prototypes": 131072,
    "train.batch_size_per_gpu": 32,
    "train.centering": "sinkhorn_knopp",
    "student.patch_size": 14,
    "student.drop_path_rate": 0.4,
    "student.ffn_layer": "swiglufused",
    "teacher.momentum_teacher": 0.994,
    "optim.epochs": 500.0,
    "optim.weight_decay_end": 0.2,
    "optim.base_lr": 0.0002,
    "optim.warmup_epochs": 80.0,
    "optim.layerwise_decay": 1.0,
    "crops.local_crops_size": 98,
}
GIANT = LONG | {"train.batch_size_per_gpu": 12, "student.arch": "vit_giant2"}
BERNOULLI = {
    "ibot.mask_kind": "bernoulli",
    "ibot.mask_ratio_min_max": (0.3, 0.3),
    "ibot.mask_sample_probability": 1.0,
    "train.centering": "sinkhorn_knopp",
    "optim.layerwise_decay": 1.0,
    "optim.patch_embed_lr_mult": 1.0,
    "optim.freeze_last_layer": "gradient",
}
EVERYTHING_ELSE = {
    "MODEL",
    "compute_precision",
    "train.dataset_path",
    "train.output_dir",
    "train.saveckp_freq",
    "train.cache_dataset",
    "student.pretrained_weights",
    "student.block_chunks",
    "optim.lr",
    "evaluation",
}
SHORT = {"train.dataset_path", "student.block_chunks"}
# File: what it says beyond the default, the keys without meaning here, the recipe of ours that is equal to it.
OFFICIAL = {
    "default": ({}, EVERYTHING_ELSE, "dinov2"),
    "vitl16_short": ({}, SHORT, "dinov2"),
    "vitl14": (LONG, SHORT, "dinov2_long"),
    "vitg14": (GIANT, SHORT, "dinov2_giant"),
    "config": (LONG, EVERYTHING_ELSE, "dinov2_long"),
}


def changed(recipe):
    """The values that are not the schema's defaults, which tests/recipe/test_load.py holds against the reference's."""
    return {key: value for key, (value, _) in differences(recipe, Recipe()).items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_file_resolves_to_its_values(name):
    recipe, ignored = load_recipe(FILES / f"{name}.yaml")
    values, without_meaning, ours = OFFICIAL[name]
    assert changed(recipe) == values
    assert set(ignored) == without_meaning
    assert all(ignored.values())  # each with its reason
    assert load_recipe(ours) == (recipe, {})


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_key_of_an_official_file_is_used_or_listed(name):
    flat = flatten(load_recipe(FILES / f"{name}.yaml")[0])
    _, without_meaning, _ = OFFICIAL[name]
    used = 0
    for section, keys in yaml.safe_load((FILES / f"{name}.yaml").read_text()).items():
        if section in without_meaning:
            continue
        for key, value in keys.items():
            if f"{section}.{key}" not in without_meaning:
                resolved = flat[f"{section}.{key}"]
                assert (list(resolved) if isinstance(resolved, tuple) else resolved) == value
                used += 1
    assert used


@pytest.mark.parametrize(
    ("name", "values"), [("dinov2", {}), ("dinov2_long", LONG), ("dinov2_giant", GIANT), ("bernoulli", BERNOULLI)]
)
def test_our_recipes_of_the_method(name, values):
    assert name in recipe_names()
    assert changed(load_recipe(name)[0]) == values


def test_an_official_file_under_changes():
    recipe, _ = load_recipe(FILES / "vitl14.yaml", ["train.steps=200", "optim.warmup_length=10%"])
    assert (recipe.train.steps, recipe.optim.warmup_length) == (200, "10%")
    assert recipe.student.drop_path_rate == 0.4


@pytest.mark.parametrize(("old", "new"), [("  saveckp_freq:", "  saveckp_frequency:"), ("evaluation:", "evaluations:")])
def test_an_unknown_key_in_an_official_file_is_an_error(old, new, tmp_path):
    file = tmp_path / "config.yaml"
    text = (FILES / "config.yaml").read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe(file)


def test_training_says_once_which_keys_it_does_not_use(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for shade in range(4):
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(images / f"{shade}.png")
    run = tmp_path / "run"
    keys = ["train.batch_size_per_gpu=2", "train.num_workers=0"]
    recipe = str(FILES / "config.yaml")
    assert main(["train", str(images), "--recipe", recipe, "--out", str(run), "--dry-run", *keys]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("ignored"))
    for key in EVERYTHING_ELSE:
        assert out.count(f"{key}: {WITHOUT_MEANING.get(key, 'empty')}") == 1
        assert f"{key}: " in line
