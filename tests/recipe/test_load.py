"""The recipe: official names and values, strict keys, layers, lengths."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoforge.errors import RecipeError
from dinoforge.recipe.load import dump, load_recipe, parse_override, recipe_names
from dinoforge.recipe.schema import FREE_KEYS, WITHOUT_MEANING, Length, Recipe, differences, flatten, parse_length

# The reference's default training file: ViT-L/16 on ImageNet.
OFFICIAL = {
    "dino.loss_weight": 1.0,
    "dino.head_n_prototypes": 65536,
    "dino.head_bottleneck_dim": 256,
    "dino.head_nlayers": 3,
    "dino.head_hidden_dim": 2048,
    "dino.koleo_loss_weight": 0.1,
    "ibot.loss_weight": 1.0,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": (0.1, 0.5),
    "ibot.separate_head": False,
    "ibot.head_n_prototypes": 65536,
    "ibot.head_bottleneck_dim": 256,
    "ibot.head_nlayers": 3,
    "ibot.head_hidden_dim": 2048,
    "train.batch_size_per_gpu": 64,
    "train.seed": 0,
    "train.num_workers": 10,
    "train.OFFICIAL_EPOCH_LENGTH": 1250,
    "train.centering": "centering",
    "student.arch": "vit_large",
    "student.patch_size": 16,
    "student.drop_path_rate": 0.3,
    "student.layerscale": 1e-5,
    "student.drop_path_uniform": True,
    "student.ffn_layer": "mlp",
    "student.qkv_bias": True,
    "student.proj_bias": True,
    "student.ffn_bias": True,
    "student.num_register_tokens": 0,
    "student.interpolate_antialias": False,
    "student.interpolate_offset": 0.1,
    "teacher.momentum_teacher": 0.992,
    "teacher.final_momentum_teacher": 1.0,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 30,
    "optim.epochs": 100,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.base_lr": 0.004,
    "optim.warmup_epochs": 10,
    "optim.min_lr": 1e-6,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.scaling_rule": "sqrt_wrt_1024",
    "optim.patch_embed_lr_mult": 0.2,
    "optim.layerwise_decay": 0.9,
    "optim.adamw_beta1": 0.9,
    "optim.adamw_beta2": 0.999,
    "crops.global_crops_scale": (0.32, 1.0),
    "crops.local_crops_number": 8,
    "crops.local_crops_scale": (0.05, 0.32),
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 96,
}
# What the reference has as constants in its code.
CONSTANTS = {
    "dino.student_temp": 0.1,
    "dino.center_momentum": 0.9,
    "ibot.student_temp": 0.1,
    "ibot.center_momentum": 0.9,
    "ibot.mask_kind": "block",
    "ibot.mask_min_patches": 4,
    "ibot.mask_min_aspect": 0.3,
    "train.sinkhorn_iterations": 3,
    "student.in_chans": 3,
    "student.mlp_ratio": 4.0,
    "crops.aspect_ratio": (3 / 4, 4 / 3),
    "augment.horizontal_flip": 0.5,
    "augment.jitter_probability": 0.8,
    "augment.brightness": 0.4,
    "augment.contrast": 0.4,
    "augment.saturation": 0.2,
    "augment.hue": 0.1,
    "augment.grayscale_probability": 0.2,
    "augment.blur_sigma": (0.1, 2.0),
    "augment.blur_kernel": 9,
    "augment.solarize_probability": 0.2,
    "augment.solarize_threshold": 128,
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
}
# Keys of the reference's file that have no counterpart here, with its values.
OFFICIAL_WITHOUT_MEANING = {
    "MODEL": {"WEIGHTS": ""},
    "compute_precision": {"grad_scaler": True},
    "train.dataset_path": "ImageNet:split=TRAIN",
    "train.output_dir": ".",
    "train.saveckp_freq": 20,
    "train.cache_dataset": True,
    "student.pretrained_weights": "",
    "student.block_chunks": 0,
    "optim.lr": 0.0,
    "evaluation": {"eval_period_iterations": 12500},
}


def nested(flat):
    sections = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        value = list(value) if isinstance(value, tuple) else value
        if dot:
            sections.setdefault(section, {})[name] = value
        else:
            sections[section] = value
    return sections


def recipe(**values):
    """The default recipe with overrides; two underscores stand for the point of a key."""
    return load_recipe("dinov2", {key.replace("__", "."): value for key, value in values.items()})[0]


@pytest.fixture
def file(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
        return path

    return write


# Values


@pytest.mark.parametrize("table", [OFFICIAL, CONSTANTS], ids=["file", "constants"])
def test_defaults_are_the_official_values(table):
    flat = flatten(Recipe())
    assert {key: flat[key] for key in table} == table


def test_the_default_recipe_is_the_schema():
    assert load_recipe() == (Recipe(), {})
    assert load_recipe("dinov2")[0] == Recipe()


def test_an_official_training_file_loads_unchanged(file):
    loaded, ignored = load_recipe(file(nested(OFFICIAL | OFFICIAL_WITHOUT_MEANING)))
    assert loaded == Recipe()
    assert set(ignored) == set(OFFICIAL_WITHOUT_MEANING)
    assert all(ignored.values())  # each with a reason


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_round_trip(name, file):
    loaded, ignored = load_recipe(name)
    assert not ignored
    assert load_recipe(file(dump(loaded))) == (loaded, {})
    assert load_recipe(loaded) == (loaded, {})


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.steps": 7},
        {"train.epochs": 0.5},
        {"optim.epochs": 3, "optim.warmup_epochs": 1.5},
        {"optim.warmup_length": "500 steps", "teacher.warmup_teacher_temp_length": "2 official epochs"},
        {"data.mean": 0.5, "data.std": [0.1], "train.num_workers": None, "eval.size": 48},
        {"augment.blur_probability": [0, 1, 0.5], "ibot.targets": "sinkhorn_knopp", "precision": "bf16"},
    ],
)
@pytest.mark.parametrize("name", ["dinov2", "small"])
def test_changed_recipes_round_trip(name, overrides, file):
    loaded, _ = load_recipe(name, overrides)
    assert differences(loaded, load_recipe(name)[0])
    assert load_recipe(file(dump(loaded)))[0] == loaded


# Keys


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optim.base_lrr", "optim.base_lr"),
        ("optim.baselr", "optim.base_lr"),
        ("train.batch_size_per_gp", "train.batch_size_per_gpu"),
        ("optim.batch_size_per_gpu", "train.batch_size_per_gpu"),  # the right key in another section
        ("patch_size", "student.patch_size"),  # no section
        ("dino.koleo_weight", "dino.koleo_loss_weight"),
        ("precison", "precision"),
    ],
)
def test_an_unknown_key_names_the_nearest(wrong, right, file):
    for given_recipe, overrides in (("dinov2", {wrong: 1}), ("dinov2", [f"{wrong}=1"]), (file(nested({wrong: 1})), ())):
        with pytest.raises(RecipeError, match="unknown key") as caught:
            load_recipe(given_recipe, overrides)
        assert wrong in str(caught.value)
        assert right in str(caught.value)


def test_a_key_like_no_other_names_none():
    with pytest.raises(RecipeError, match=r"unknown key 'zzzz\.qqqq'$"):
        load_recipe("dinov2", {"zzzz.qqqq": 1})


def test_a_mistyped_section_names_the_nearest(file):
    with pytest.raises(RecipeError, match=r"unknown key 'optm'.*optim"):
        load_recipe(file("optm:\n  base_lr: 1\n"))


def test_a_section_is_not_a_value(file):
    with pytest.raises(RecipeError, match="train is a section"):
        load_recipe("dinov2", {"train": {"seed": 1}})
    with pytest.raises(RecipeError, match="train is a section"):
        load_recipe(file("train: 5\n"))
    assert load_recipe(file("train:\n"))[0] == Recipe()  # an empty one says nothing


@pytest.mark.parametrize("name", ["dinov3", "smal", "no/such/file.yaml"])
def test_an_unknown_recipe_lists_those_there_are(name):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert all(known in str(caught.value) for known in recipe_names())


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text"])
def test_a_file_that_is_no_recipe(text, file):
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        load_recipe(file(text))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(path)


def test_keys_without_meaning_are_returned_with_their_reason():
    overrides = dict.fromkeys(WITHOUT_MEANING, 1) | {"MODEL.WEIGHTS": "x", "evaluation.eval_period_iterations": 1}
    loaded, ignored = load_recipe("dinov2", overrides)
    assert loaded == Recipe()
    assert set(ignored) == set(overrides)
    assert ignored["MODEL.WEIGHTS"] == WITHOUT_MEANING["MODEL"]


def test_weights_to_start_from_are_refused_rather_than_ignored():
    with pytest.raises(RecipeError, match="pretrained_weights"):
        load_recipe("dinov2", {"student.pretrained_weights": "model.pth"})


# Types


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 1.5),
        ("train.steps", "many"),
        ("train.steps", True),
        ("train.steps", [1]),
        ("train.batch_size_per_gpu", None),
        ("optim.base_lr", "fast"),
        ("optim.base_lr", True),
        ("optim.base_lr", float("nan")),
        ("optim.base_lr", float("inf")),
        ("optim.base_lr", None),
        ("student.qkv_bias", 1),
        ("student.qkv_bias", "true"),
        ("student.arch", 5),
        ("optim.warmup_length", 500),
        ("train.centering", "centring"),
        ("dino.targets", ["centering"]),
        ("precision", "fp8"),
        ("crops.global_crops_scale", 0.5),
        ("crops.global_crops_scale", [0.5]),
        ("crops.global_crops_scale", [0.1, 0.2, 0.3]),
        ("crops.global_crops_scale", ["a", "b"]),
        ("data.mean", []),
    ],
)
def test_wrong_types(key, value):
    with pytest.raises(RecipeError) as caught:
        load_recipe("dinov2", {key: value})
    assert str(caught.value).startswith(f"{key}: expected")


def test_a_number_that_no_float_holds():
    with pytest.raises(RecipeError):
        load_recipe("dinov2", {"optim.base_lr": 10**400})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim.base_lr=1e-3", "optim.base_lr", 1e-3),  # text to YAML 1.1
        ("optim.epochs=3", "optim.epochs", 3.0),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.steps=null", "train.steps", None),
        ("student.qkv_bias=false", "student.qkv_bias", False),
        ("crops.global_crops_scale=[0.4, 1]", "crops.global_crops_scale", (0.4, 1.0)),
        ("data.mean=0.5", "data.mean", (0.5,)),
        (" optim.warmup_length = 10%", "optim.warmup_length", "10%"),
    ],
)
def test_overrides_as_text(text, key, value):
    result = flatten(load_recipe("dinov2", [text])[0])[key]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("text", ["train.steps", "=5", " =5", ""])
def test_an_override_needs_key_and_value(text):
    with pytest.raises(RecipeError, match="key=value"):
        parse_override(text)


# Contradictions


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"dino.head_n_prototypes": 0}, "dino.head_n_prototypes"),
        ({"ibot.head_nlayers": 0}, "ibot.head_nlayers"),
        ({"dino.student_temp": 0}, "dino.student_temp"),
        ({"ibot.center_momentum": 1.1}, "ibot.center_momentum"),
        ({"dino.center_momentum": -0.1}, "dino.center_momentum"),
        *[
            ({key: 0}, key)
            for key in (
                "train.batch_size_per_gpu train.OFFICIAL_EPOCH_LENGTH train.steps train.sinkhorn_iterations "
                "train.threads student.patch_size student.in_chans student.embed_dim student.depth student.num_heads "
                "crops.global_crops_size crops.local_crops_size eval.size checkpoint.every_steps checkpoint.keep_last "
                "checkpoint.keep_every log.every_steps ibot.mask_min_patches data.max_pixels optim.layerwise_decay "
                "optim.base_lr teacher.teacher_temp teacher.warmup_teacher_temp train.epochs train.max_minutes "
                "checkpoint.every_minutes student.mlp_ratio optim.epochs probe.every_steps probe.every_minutes "
                "probe.max_images probe.patience"
            ).split()
        ],
        *[
            ({key: -1}, key)
            for key in (
                "dino.loss_weight dino.global_loss_weight dino.local_loss_weight dino.koleo_loss_weight "
                "ibot.loss_weight optim.warmup_epochs optim.freeze_last_layer_epochs optim.weight_decay "
                "optim.weight_decay_end optim.min_lr optim.clip_grad optim.patch_embed_lr_mult student.layerscale "
                "student.interpolate_offset student.num_register_tokens teacher.warmup_teacher_temp_epochs "
                "augment.brightness augment.contrast augment.saturation augment.hue crops.local_crops_number "
                "train.num_workers train.seed"
            ).split()
        ],
        *[
            ({key: 1.5}, key)
            for key in (
                "ibot.mask_sample_probability augment.horizontal_flip augment.vertical_flip augment.hue "
                "augment.jitter_probability augment.grayscale_probability augment.solarize_probability "
                "data.max_bad_share teacher.momentum_teacher teacher.final_momentum_teacher ibot.mask_min_aspect"
            ).split()
        ],
        ({"student.drop_path_rate": 1.0}, "student.drop_path_rate"),
        ({"crops.global_crops_scale": [0.5, 0.4]}, "crops.global_crops_scale"),
        ({"crops.local_crops_scale": [0.0, 0.4]}, "crops.local_crops_scale"),
        ({"crops.local_crops_scale": [0.1, 1.1]}, "crops.local_crops_scale"),
        ({"ibot.mask_ratio_min_max": [0.5, 0.1]}, "ibot.mask_ratio_min_max"),
        ({"ibot.mask_ratio_min_max": [0.5, 1.1]}, "ibot.mask_ratio_min_max"),
        ({"crops.aspect_ratio": [2, 1]}, "crops.aspect_ratio"),
        ({"augment.blur_sigma": [0, 1]}, "augment.blur_sigma"),
        ({"augment.blur_kernel": 8}, "augment.blur_kernel"),
        ({"augment.blur_kernel": 401}, "augment.blur_kernel=401"),
        ({"augment.blur_probability": [0, 0, 2]}, "augment.blur_probability"),
        ({"optim.warmup_length": "10"}, "not a length"),
        ({"optim.freeze_last_layer_length": "ten steps"}, "not a length"),
        ({"teacher.warmup_teacher_temp_length": "110%"}, "not a length"),
        ({"crops.global_crops_size": 225}, "the nearest that is, is 224"),
        ({"crops.local_crops_size": 100}, "crops.local_crops_size=100"),
        ({"eval.size": 30}, "the nearest that is, is 32"),
        ({"data.mean": [0.1, 0.2]}, "data.mean has 2 values"),
        ({"student.in_chans": 4}, "student.in_chans=4"),
        ({"data.std": [0.1, 0.0, 0.1]}, "data.std"),
        ({"dino.loss_weight": 0, "ibot.loss_weight": 0, "dino.koleo_loss_weight": 0}, "every loss is off"),
        ({"dino.loss_weight": 0, "dino.koleo_loss_weight": 0, "ibot.mask_sample_probability": 0}, "nothing"),
        ({"train.steps": 5, "train.epochs": 1}, "contradict"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused(overrides, named):
    with pytest.raises(RecipeError) as caught:
        load_recipe("dinov2", overrides)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"crops.local_crops_number": 0, "crops.local_crops_size": 100},  # not used
        {"student.in_chans": 4, "data.mean": [0.5], "data.std": [0.5]},
        {"student.in_chans": 2, "data.mean": [0.5, 0.4], "data.std": 0.5},
        {"dino.loss_weight": 0, "ibot.loss_weight": 0},
        {"ibot.mask_ratio_min_max": [0.3, 0.3]},
        {"student.drop_path_rate": 0, "student.layerscale": 0, "optim.clip_grad": 0, "train.num_workers": 0},
        {"teacher.momentum_teacher": 1.0, "optim.warmup_epochs": 0},
    ],
)
def test_edges_that_are_allowed(overrides):
    flat = flatten(load_recipe("dinov2", overrides)[0])
    for key, value in overrides.items():
        expected = tuple(value) if isinstance(value, list) else (value,) if key == "data.std" else value
        assert flat[key] == expected


def test_the_two_dino_terms_off_count_as_dino_off():
    off = {"dino.global_loss_weight": 0, "dino.local_loss_weight": 0, "ibot.loss_weight": 0}
    with pytest.raises(RecipeError, match="every loss is off"):
        load_recipe("dinov2", off | {"dino.koleo_loss_weight": 0})


@pytest.mark.parametrize("key", ["optim.adamw_beta1", "optim.adamw_beta2"])
def test_betas_outside_of_their_range(key):
    with pytest.raises(RecipeError, match=key):
        load_recipe("dinov2", {key: 1.5})


# Layers


def test_a_later_layer_wins(file):
    path = file({"base": "small", "student": {"depth": 3}, "train": {"seed": 5}})
    loaded, _ = load_recipe(path, {"train.seed": 6})
    changed = differences(load_recipe("small")[0], loaded)
    assert changed == {"student.depth": (4, 3), "train.seed": (0, 6)}


def test_without_a_base_a_file_lies_on_the_defaults(file):
    loaded, _ = load_recipe(file({"student": {"patch_size": 8}}))
    assert differences(Recipe(), loaded) == {"student.patch_size": (16, 8)}


def test_a_base_that_is_not_there(file):
    with pytest.raises(RecipeError, match="base must be one of"):
        load_recipe(file({"base": "other.yaml"}))


def length_keys(loaded):
    return loaded.train.steps, loaded.train.epochs, loaded.optim.epochs


def test_of_three_lengths_of_the_run_the_later_layer_wins(file):
    steps = file({"base": "small", "train": {"steps": 10}}, "steps.yaml")
    epochs = file({"base": "small", "train": {"epochs": 2}}, "epochs.yaml")
    nominal = file({"base": "small", "optim": {"epochs": 3}}, "nominal.yaml")
    assert length_keys(load_recipe(steps)[0]) == (10, None, 100)
    assert length_keys(load_recipe(epochs)[0]) == (None, 2, 100)
    assert length_keys(load_recipe(nominal)[0]) == (None, None, 3)
    assert length_keys(load_recipe(steps, {"train.epochs": 4})[0]) == (None, 4, 100)
    assert length_keys(load_recipe(epochs, {"train.steps": 4})[0]) == (4, None, 100)
    assert length_keys(load_recipe(steps, {"optim.epochs": 4})[0]) == (None, None, 4)
    assert length_keys(load_recipe(load_recipe(steps)[0], {"train.epochs": 4})[0]) == (None, 4, 100)
    assert length_keys(load_recipe(steps, {"train.steps": None})[0])[0] is None


@pytest.mark.parametrize("stem", ["optim.warmup", "optim.freeze_last_layer", "teacher.warmup_teacher_temp"])
def test_of_a_length_and_epochs_the_later_layer_wins(stem):
    length, epochs = f"{stem}_length", f"{stem}_epochs"
    default = flatten(Recipe())[epochs]
    by_length, _ = load_recipe("dinov2", {length: "5%"})
    assert flatten(by_length)[length] == "5%"
    by_epochs, _ = load_recipe(by_length, {epochs: 2})
    assert (flatten(by_epochs)[length], flatten(by_epochs)[epochs]) == (None, 2)
    back, _ = load_recipe(by_epochs, {length: "7 steps"})
    assert (flatten(back)[length], flatten(back)[epochs]) == ("7 steps", default)


def test_a_recipe_given_is_not_changed():
    before = recipe(train__steps=3)
    copy = flatten(before)
    after, _ = load_recipe(before, {"train.steps": 4, "data.mean": 0.5})
    assert flatten(before) == copy
    assert after.train.steps == 4


def test_differences():
    a = recipe(train__steps=3)
    b = recipe(train__steps=3, log__every_steps=1, train__num_workers=0, eval__size=32, optim__base_lr=0.1)
    assert differences(a, a) == {}
    assert differences(a, b, ignore=FREE_KEYS) == {"optim.base_lr": (0.004, 0.1)}
    assert set(differences(a, b)) == {"log.every_steps", "train.num_workers", "eval.size", "optim.base_lr"}
    assert differences(b, a) == {key: (y, x) for key, (x, y) in differences(a, b).items()}


def test_what_may_differ_in_a_continuation_does_not_change_what_is_learned():
    free = {key for key in flatten(Recipe()) if key.startswith(FREE_KEYS)}
    assert not {key for key in free if key.startswith(("dino.", "ibot.", "student.", "teacher.", "optim.", "crops."))}
    assert "train.seed" not in free
    # How the global batch is cut may differ; what it is in all is compared by itself.
    cut = {"train.batch_size", "train.batch_size_per_gpu", "train.accumulate"}
    assert {key for key in free if key.startswith("train.")} - cut == {
        f"train.{key}" for key in ("threads", "num_workers", "max_minutes", "max_skips", "max_rollbacks")
    }


# Lengths


@given(
    amount=st.one_of(st.integers(0, 10**9), st.floats(0, 1e9)),
    unit=st.sampled_from(["steps", "epochs", "official epochs", "step", "epoch", "official epoch"]),
    space=st.sampled_from(["", " ", "  "]),
)
@settings(max_examples=30, deadline=None)
def test_lengths_in_every_unit(amount, unit, space):
    length = parse_length(f"{space}{amount}{space}{unit}{space}")
    assert length == Length(float(amount), unit if unit.endswith("s") else unit + "s")
    steps_per_unit = {"steps": 1, "epochs": 2.5, "official epochs": 10}[length.unit]
    assert length.steps(1000, 2.5, 10) == round(float(amount) * steps_per_unit)


@pytest.mark.parametrize(("text", "steps"), [("0%", 0), ("10%", 20), ("2.5 %", 5), ("100%", 200), ("1e1%", 20)])
def test_lengths_as_a_share_of_the_run(text, steps):
    assert parse_length(text).steps(200, 3.0, 10) == steps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "steps",
        "%",
        "-1 steps",
        "101%",
        "1 2 steps",
        "1e999 steps",
        "nan steps",
        "inf epochs",
        "ten steps",
        "5 minutes",
        "5 stepss",
        "5 official steps",
        "1.2.3 epochs",
        "10% steps",
        "e steps",
        "0x10 steps",
    ],
)
def test_texts_that_are_no_length(text):
    with pytest.raises(RecipeError, match="is not a length: expected"):
        parse_length(text)


@pytest.mark.processes
def test_the_schema_is_read_without_torch():
    code = "import sys; from dinoforge.recipe.load import load_recipe; load_recipe('small', ['train.steps=5']); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# YAML 1.2, and what a shell leaves empty


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.steps=010", "train.steps", 10),
        ("train.seed=0x10", "train.seed", 16),
        ("train.steps=1_000", "train.steps", 1000),
        ("optim.base_lr=1e-3", "optim.base_lr", 0.001),
        ("init.weights=2026-11-29", "init.weights", "2026-11-29"),
        ("init.weights=010", "init.weights", "010"),
        ("init.weights=no", "init.weights", "no"),
        ("init.weights='null'", "init.weights", "null"),
        ("init.weights=null", "init.weights", None),
        ("data.plane=3", "data.plane", "3"),
        ("data.mean=0.5,0.4,0.3", "data.mean", (0.5, 0.4, 0.3)),
        ("data.range=-1,2.5e3", "data.range", (-1.0, 2500.0)),
        ("data.reduced_decode=yes", "data.reduced_decode", True),
        ("data.reduced_decode=off", "data.reduced_decode", False),
    ],
)
def test_values_are_what_they_look_like(text, key, value):
    assert flatten(load_recipe("small", [text])[0])[key] == value


@pytest.mark.parametrize("text", ["train.steps=1:30", "train.steps=2026-11-29", "train.seed=1:30:00"])
def test_what_looks_like_no_number_is_none(text):
    with pytest.raises(RecipeError, match="expected a whole number"):
        load_recipe("small", [text])


@pytest.mark.parametrize("text", ["init.weights=", "train.steps=", "train.steps= ", "data.mean=", "train.seed="])
def test_an_empty_value_is_refused_by_name(text):
    key = text.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"{key} has no value .*write {key}=null"):
        load_recipe("small", [text])
    with pytest.raises(RecipeError, match=f"{key} has no value"):
        load_recipe("small", {key: ""})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# nothing yet\n", "is empty"),
        ("train:\n  steps: 5\n  steps: 6\n", "steps stands there a second time"),
        (
            "train:\n  steps: 5\ncrops:\n  global_crops_size: 96\ntrain:\n  seed: 1\n",
            "train stands there a second time",
        ),
        ("train:\n  steps:\n", "train.steps has no value"),
        ("train:\n  steps: 1:30\n", "expected a whole number, got '1:30'"),
    ],
)
def test_files_that_say_less_than_it_seems(text, words, file):
    with pytest.raises(RecipeError, match=words):
        load_recipe(file(text))


def test_a_file_with_leading_zeros_and_an_empty_section(file):
    recipe, _ = load_recipe(file("train:\n  steps: 0100\n  seed: 08\noptim:\n"))
    assert (recipe.train.steps, recipe.train.seed) == (100, 8)
    assert load_recipe(file("{}"))[0] == load_recipe("dinov2")[0]


@pytest.mark.parametrize(
    "text", ["1e3", "010", "no", "2026-11-29", "1:30", "null", "~", "0x10", "true", "a: b", "#", "é"]
)
def test_text_that_looks_like_something_else_comes_back(text, file):
    recipe, _ = load_recipe("small", {"init.weights": text})
    assert load_recipe(file(dump(recipe)))[0] == recipe
