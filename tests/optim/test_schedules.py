"""Schedules at their edges, and the lengths that a recipe gives them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoforge.builders.lengths import RunLength, build_schedules, run_length
from dinoforge.errors import RecipeError
from dinoforge.optim.schedules import cosine, sqrt_scaled_lr
from dinoforge.recipe.load import load_recipe


def as_list(base, final, total, warmup=0, start=0.0):
    """The reference's way: the whole schedule as a list, a linear piece followed by half a cosine."""
    linear = [start + (base - start) * i / (warmup - 1) for i in range(warmup)] if warmup > 1 else [start] * warmup
    rest = total - warmup
    return linear + [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


# The curve


@given(data=st.data(), total=st.integers(1, 60), base=st.floats(0, 1), final=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_cosine_is_the_list_of_the_reference_and_constant_beyond(data, total, base, final):
    warmup = data.draw(st.integers(0, total))
    start = data.draw(st.floats(0, 1))
    ours = [cosine(i, base, final, total, warmup, start) for i in range(total)]
    assert ours == pytest.approx(as_list(base, final, total, warmup, start), rel=1e-9, abs=1e-12)
    assert cosine(total, base, final, total, warmup, start) == final
    assert cosine(total + 1000, base, final, total, warmup, start) == final
    low, high = min(base, final, start), max(base, final, start)
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in ours)


def test_cosine_by_hand():
    assert [cosine(i, 4.0, 0.0, 4) for i in range(5)] == pytest.approx([4, 2 + 2**0.5, 2, 2 - 2**0.5, 0])
    assert [cosine(i, 4.0, 0.0, 7, 3) for i in range(4)] == [0, 2, 4, 4]
    assert cosine(0, 0.5, 0.1, 1) == 0.5  # a run of one step
    assert [cosine(i, 0.5, 0.1, 4, 1) for i in range(2)] == [0.0, 0.5]  # the reference starts at the warm-up's start


@pytest.mark.parametrize(("batch", "factor"), [(1024, 1.0), (256, 0.5), (4096, 2.0), (64, 0.25), (1, 1 / 32)])
def test_the_learning_rate_follows_the_root_of_the_batch(batch, factor):
    assert sqrt_scaled_lr(0.004, batch) == pytest.approx(0.004 * factor)


# From a recipe


def make(**values):
    overrides = {key.replace("__", "."): value for key, value in values.items()}
    return load_recipe("dinov2", overrides)[0]


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_length_of_a_run_in_each_unit(world_size):
    batch = 10 * world_size

    def of(**values):
        return run_length(make(train__batch_size_per_gpu=10, **values), images=205, world_size=world_size)

    assert of(train__steps=7).steps == 7
    assert of(train__epochs=2).steps == math.ceil(410 / batch)
    assert of(train__epochs=0.1).steps == math.ceil(20.5 / batch)
    assert of(optim__epochs=3).steps == 3 * 1250
    assert of(optim__epochs=3, train__OFFICIAL_EPOCH_LENGTH=20).steps == 60
    assert of(optim__epochs=0.5, train__OFFICIAL_EPOCH_LENGTH=5).steps == 3
    assert of(train__steps=7).batch_size == batch
    assert of(train__steps=7).epochs == pytest.approx(7 * batch / 205)


def test_a_batch_may_be_all_images_but_not_more():
    recipe = make(train__batch_size_per_gpu=10, train__epochs=1)
    assert run_length(recipe, images=20, world_size=2).steps == 1
    with pytest.raises(RecipeError, match="batch_size_per_gpu to 9 or less"):
        run_length(recipe, images=19, world_size=2)


def of_run(steps, **values):
    return build_schedules(make(**values), RunLength(steps, batch_size=256, images=2560))


def test_schedules_take_the_values_of_the_recipe():
    s = of_run(125_000)
    assert (s.lr, s.min_lr) == (pytest.approx(0.002), 1e-6)  # √(256 / 1024) of 0.004
    assert (s.warmup_steps, s.teacher_temp_steps, s.freeze_last_layer_steps) == (12_500, 37_500, 1250)
    assert (s.weight_decay, s.weight_decay_end) == (0.04, 0.4)
    assert (s.momentum, s.final_momentum) == (0.992, 1.0)
    assert (s.warmup_teacher_temp, s.teacher_temp) == (0.04, 0.07)
    assert not s.freeze_by_gradient
    assert of_run(125_000, optim__scaling_rule="none").lr == 0.004
    assert of_run(125_000, optim__freeze_last_layer="gradient").freeze_by_gradient


SHORT = {
    "optim__warmup_length": "0%",
    "teacher__warmup_teacher_temp_length": "0%",
    "optim__freeze_last_layer_length": "0%",
}


@pytest.mark.parametrize(
    ("text", "steps"), [("15%", 30), ("7 steps", 7), ("2 epochs", 20), ("0.1 official epochs", 125), ("0 steps", 0)]
)
@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("optim__warmup_length", "warmup_steps"),
        ("teacher__warmup_teacher_temp_length", "teacher_temp_steps"),
        ("optim__freeze_last_layer_length", "freeze_last_layer_steps"),
    ],
)
def test_lengths_of_schedules(key, field, text, steps):
    schedules = of_run(200, **SHORT | {key: text})
    assert vars(schedules)[field] == steps
    others = {"warmup_steps", "teacher_temp_steps", "freeze_last_layer_steps"} - {field}
    assert {vars(schedules)[other] for other in others} == {0}


@pytest.mark.parametrize(
    ("key", "text", "named"),
    [
        ("optim__warmup_length", "200 steps", r"optim\.warmup_length=200 steps is 200 steps.*only 200"),
        ("optim__warmup_length", "100%", "optim.warmup_length=10%"),
        ("optim__freeze_last_layer_length", "20 epochs", "optim.freeze_last_layer_length=10%"),
        ("teacher__warmup_teacher_temp_length", "1 official epochs", "teacher.warmup_teacher_temp_length=10%"),
    ],
)
def test_a_length_as_long_as_the_run_is_refused(key, text, named):
    with pytest.raises(RecipeError, match=named):
        of_run(200, **SHORT | {key: text})


@pytest.mark.parametrize("key", ["optim.warmup", "optim.freeze_last_layer", "teacher.warmup_teacher_temp"])
def test_nominal_epochs_as_long_as_the_run_are_refused(key):
    lengths = {name: text for name, text in SHORT.items() if not name.replace("__", ".").startswith(key)}
    with pytest.raises(RecipeError, match=rf"{key}_epochs=.*give a share of it, such as {key}_length=10%"):
        of_run(200, **lengths)


def test_a_run_of_one_step():
    hyper = of_run(1, **SHORT)(0)
    assert (hyper.lr, hyper.last_layer_lr, hyper.teacher_temp) == (pytest.approx(0.002), pytest.approx(0.002), 0.07)
    assert (hyper.weight_decay, hyper.momentum) == (pytest.approx(0.04), pytest.approx(0.992))
