"""``dinoforge compare``: every difference of two recipes stands in a row, in words."""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoforge.cli.main import main
from dinoforge.data.crops import BLUR_PROBABILITY
from dinoforge.recipe.compare import compare, differences_text
from dinoforge.recipe.load import load_recipe, recipe_names
from dinoforge.recipe.schema import Recipe, differences, flatten

FILES = Path(__file__).parent / "official"


def with_values(recipe, values):
    for key, value in values.items():
        section, dot, name = key.partition(".")
        part = dataclasses.replace(getattr(recipe, section), **{name: value}) if dot else value
        recipe = dataclasses.replace(recipe, **{section: part})
    return recipe


def another(key, value, hint):
    """A value of the key's type that is not this one."""
    options = typing.get_args(hint)
    literal = next((o for o in (hint, *options) if typing.get_origin(o) is typing.Literal), None)
    if literal is not None:
        return next(o for o in typing.get_args(literal) if o != value)
    if key.endswith("_length"):
        return "7%"
    if key == "augment.blur_probability":
        return (0.1, 0.2, 0.3)
    if key == "data.range":
        return (0.0, 4095.0)
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(v / 2 + 0.01 for v in value)
    if isinstance(value, str):
        return {"student.arch": "vit_small", "device": "cpu"}[key]
    return 3 if value is None else value / 2 + 0.01 if isinstance(value, float) else value + 1


HINTS = {f.name: f.type for f in dataclasses.fields(Recipe)} | {
    f"{f.name}.{key}": hint
    for f in dataclasses.fields(Recipe)
    if dataclasses.is_dataclass(f.type)
    for key, hint in typing.get_type_hints(f.type).items()
}
OTHER = {key: another(key, value, HINTS[key]) for key, value in flatten(Recipe()).items()}


def words(a, b, what):
    (row,) = (row for row in compare(a, b) if row.what == what)
    return row.first, row.second


@pytest.mark.parametrize("key", OTHER)
def test_a_change_of_one_key_is_one_row_or_one_for_each_loss(key):
    rows = compare(Recipe(), with_values(Recipe(), {key: OTHER[key]}))
    assert rows
    for row in rows:
        assert key in row.keys
        assert row.first != row.second


@settings(max_examples=150, deadline=None)
@given(keys=st.sets(st.sampled_from(sorted(OTHER)), max_size=12), base=st.sampled_from(recipe_names()))
def test_every_key_that_differs_is_in_a_row(keys, base):
    first = load_recipe(base)[0]
    second = with_values(first, {key: OTHER[key] for key in keys})
    rows = compare(first, second)
    assert {key for row in rows for key in row.keys} == set(differences(first, second))
    assert all(row.first != row.second for row in rows)
    mirrored = [(row.what, row.second, row.first) for row in compare(second, first)]
    assert mirrored == [(row.what, row.first, row.second) for row in rows]


def test_a_value_that_the_words_round_away_is_still_shown():
    second = with_values(Recipe(), {"optim.base_lr": 0.004 * (1 + 1e-12)})
    (row,) = compare(Recipe(), second)
    assert (row.what, row.first) == ("optim.base_lr", "0.004")
    assert row.second != row.first


def test_a_key_without_effect_is_shown_by_its_name():
    (row,) = compare(Recipe(), with_values(Recipe(), {"ibot.head_n_prototypes": 5}))
    assert (row.what, row.part, row.first, row.second) == ("ibot.head_n_prototypes", "method", "65536", "5")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_does_the_same_as_itself(name, capsys):
    assert main(["compare", name, name]) == 0
    assert "do the same" in capsys.readouterr().out


def test_the_default_and_the_bernoulli_variant():
    rows = compare(*(load_recipe(name)[0] for name in ("dinov2", "bernoulli")))
    assert [(row.what, row.first, row.second) for row in rows] == [
        ("targets of cls tokens", "centering, with a running mean of momentum 0.9", "Sinkhorn-Knopp, 3 iterations"),
        ("targets of patches", "centering, with a running mean of momentum 0.9", "Sinkhorn-Knopp, 3 iterations"),
        (
            "masks",
            "block-wise, ratio 0.1–0.5 in bins, on half of the crops",
            "per token, fixed ratio 0.3, on every crop",
        ),
        (
            "freeze of the last layer",
            "by a learning rate of 0, AdamW's moments go on; 1,250 steps (1 nominal epoch)",
            "by dropping its gradient, AdamW's moments stand still; 1,250 steps (1 nominal epoch)",
        ),
        ("layer-wise decay", "× 0.9 for each block below the top", "none, one learning rate for all layers"),
        ("patch embedding", "learning rate × 0.2", "learning rate × 1"),
    ]
    assert {row.part for row in rows} == {"method"}


def test_method_comes_before_sizes():
    rows = compare(*(load_recipe(name)[0] for name in ("dinov2", "small")))
    parts = [row.part for row in rows]
    assert list(dict.fromkeys(parts)) == ["method", "augmentation", "sizes and lengths", "running"]
    order = {part: i for i, part in enumerate(dict.fromkeys(parts))}
    assert parts == sorted(parts, key=order.__getitem__)


@pytest.mark.parametrize(
    ("values", "what", "said"),
    [
        ({"optim.weight_decay_scope": "backbone"}, "weight decay", "heads 0.01, AdamW's default"),
        ({"ibot.separate_head": True}, "heads", "one for each loss"),
        ({"dino.koleo_loss_weight": 0.0}, "losses", "DINO × 1, iBOT × 1, no KoLeo"),
        ({"dino.local_loss_weight": 0.5}, "losses", "DINO × 1 (global × 1, local × 0.5)"),
        ({"ibot.loss_weight": 0.0}, "targets of patches", "none, the loss is off"),
        ({"augment.blur": "stated"}, "blur", "on 100 %, 10 %, half of first global"),
        ({"crops.local_crops_number": 0}, "crops", "2 global of 0.32–1 of the image; aspect"),
        ({"train.steps": 700}, "run", "700 steps"),
        ({"train.epochs": 2.5}, "run", "2.5 epochs of your images"),
        ({"optim.warmup_length": "10%"}, "warm-up", "10% of the run"),
        ({"student.arch": "vit_custom", "student.embed_dim": 64}, "network", "vit_custom, width 64"),
        ({"student.qkv_bias": False, "student.ffn_bias": False}, "network", "no biases in qkv, feed-forward"),
        ({"teacher.warmup_teacher_temp": 0.07}, "temperature of the teacher", "0.07, constant"),
        ({"ibot.mask_min_patches": 1}, "masks", "blocks from 1 patch, aspect 0.3 to 1/0.3"),
        ({"ibot.mask_sample_probability": 0.0}, "masks", "none"),
        ({"student.drop_path_uniform": False}, "stochastic depth", "0.3 in the last, rising from 0"),
    ],
)
def test_words(values, what, said):
    assert said in words(Recipe(), with_values(Recipe(), values), what)[1]


@pytest.mark.parametrize("blur", BLUR_PROBABILITY)
def test_blur_is_what_the_augmentation_does(blur):
    named = with_values(Recipe(), {"augment.blur": blur})
    listed = with_values(named, {"augment.blur_probability": BLUR_PROBABILITY[blur]})
    assert [row.what for row in compare(named, listed)] == ["augment.blur_probability"]  # equal in words


def test_json_is_one_line(capsys):
    assert main(["compare", "dinov2", "bernoulli", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer["recipes"] == ["dinov2", "bernoulli"]
    assert len(answer["differences"]) == 6
    assert all(set(row) == {"part", "what", "keys", "first", "second"} for row in answer["differences"])


def test_files_keys_and_errors(capsys):
    file = str(FILES / "config.yaml")
    assert main(["compare", file, "dinov2_long"]) == 0
    captured = capsys.readouterr()
    assert "do the same" in captured.out
    assert captured.err.count("compute_precision") == 1
    assert main(["compare", "dinov2", "bernoulli", "ibot.mask_kind=block", "--json"]) == 0
    masks = json.loads(capsys.readouterr().out)["differences"][2]
    assert masks["second"] == "block-wise, fixed ratio 0.3, on every crop"
    for arguments, message in ((["dinov2", "dinov3"], "no recipe"), (["dinov2", "small", "a.b=1"], "unknown key")):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_table_fits_a_terminal():
    names = ("dinov2", "small")
    text = differences_text(compare(*(load_recipe(name)[0] for name in names)), names)
    assert max(map(len, text.splitlines())) <= 120
    assert "METHOD" in text


@pytest.mark.processes
def test_it_answers_without_torch():
    code = (
        "import sys; from dinoforge.cli.main import main; main(['compare', 'dinov2', 'small']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
