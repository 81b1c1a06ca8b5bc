"""Every key says what it means, and keeps to its bounds."""

import math
import typing

import pytest

from dinoforge.errors import RecipeError
from dinoforge.recipe.bounds import Bounds
from dinoforge.recipe.keys import list_keys
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import BOUNDS, MEANINGS, TYPES, Recipe, flatten


def number_types(hint):
    """The numbers that a key may hold: of ``tuple[float, ...] | None``, float."""
    arguments = [a for a in typing.get_args(hint) if a is not Ellipsis]
    return {hint} & {int, float} if not arguments else set().union(*map(number_types, arguments))


NUMBERS = [key for key, hint in TYPES.items() if number_types(hint)]


def count_of(key):
    """How many numbers a key holds; 0: a single one, without a list."""
    value = flatten(Recipe())[key]
    if isinstance(value, tuple):
        return len(value)
    return {"augment.blur_probability": 3, "data.range": 2, "report.channels": 3}.get(key, 0)


def outside(bounds, kind):
    """Numbers of a type just outside of the bounds, and far outside."""
    step = 1 if kind is int else 1e-6
    found = [math.inf, -math.inf]
    found += [bounds.at_least - step] if bounds.at_least > -math.inf else []
    found += [bounds.above] if bounds.above > -math.inf else []
    found += [bounds.at_most + step] if bounds.at_most < math.inf else []
    found += [bounds.below] if bounds.below < math.inf else []
    return found + ([4] if bounds.odd else [])


def test_every_key_has_one_line_of_meaning():
    assert list(MEANINGS) == list(flatten(Recipe()))
    for key, meaning in MEANINGS.items():
        assert meaning.endswith("."), key
        assert 10 < len(meaning) < 120, key
        assert "\n" not in meaning, key


def test_every_number_has_bounds_and_nothing_else_has():
    assert sorted(BOUNDS) == sorted(NUMBERS)


def test_defaults_lie_within_their_bounds():
    flat = flatten(Recipe())
    assert [key for key, bounds in BOUNDS.items() if flat[key] is not None and not bounds.accept(flat[key])] == []


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_outside_of_its_bounds_is_refused_by_name(key):
    (kind,) = number_types(TYPES[key])
    for number in outside(BOUNDS[key], kind):
        count = count_of(key)
        for value in [number] if not count else [[number] * count]:
            with pytest.raises(RecipeError) as caught:
                load_recipe("dinov2", {key: value})
            assert str(caught.value).startswith(f"{key}: expected "), value


@pytest.mark.parametrize("key", [key for key in NUMBERS if count_of(key) > 1])
def test_one_number_of_several_outside_of_the_bounds_is_enough(key):
    (kind,) = number_types(TYPES[key])
    inside = [float(BOUNDS[key].at_most) if BOUNDS[key].at_most < math.inf else 1.0] * (count_of(key) - 1)
    for number in outside(BOUNDS[key], kind):
        with pytest.raises(RecipeError, match=f"{key}: expected "):
            load_recipe("dinov2", {key: [number, *inside]})


def test_bounds_that_are_kept_and_broken():
    share = Bounds("0 up to below 1", at_least=0, below=1)
    assert [share.accept(n) for n in (-0.1, 0, 0.999, 1, math.nan)] == [False, True, True, False, False]
    scale = Bounds("0 < low ≤ high ≤ 1", above=0, at_most=1, ascending=True)
    pairs = [(0.2, 0.5), (0.5, 0.5), (0.5, 0.2), (0.0, 0.5), (0.5, 1.1)]
    assert [scale.accept(pair) for pair in pairs] == [True, True, False, False, False]
    odd = Bounds("odd", at_least=1, odd=True)
    assert [odd.accept(n) for n in (-1, 0, 1, 2, 9)] == [False, False, True, False, True]


def test_the_list_of_keys_says_all_of_each():
    keys = {key.name: key for key in list_keys()}
    flat = flatten(Recipe())
    assert list(keys) == list(flat)
    assert {name: key.default for name, key in keys.items()} == flat
    assert {name: key.meaning for name, key in keys.items()} == MEANINGS
    assert {name: key.bounds for name, key in keys.items() if key.bounds} == {k: b.words for k, b in BOUNDS.items()}
    words = {
        "train.seed": "whole number",
        "train.epochs": "number or null",
        "train.centering": "centering | sinkhorn_knopp",
        "dino.targets": "centering | sinkhorn_knopp or null",
        "crops.global_crops_scale": "list of 2 numbers",
        "report.channels": "list of whole numbers or null",
        "optim.warmup_length": "text or null",
        "student.qkv_bias": "true or false",
    }
    assert {name: keys[name].type for name in words} == words
