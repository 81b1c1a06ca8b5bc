"""Resolve the recipe of a call, completed from files, images and the run so far."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dinoforge.builders.data import image_input, least_reduction
from dinoforge.builders.start import ADOPTED, adopted
from dinoforge.commands.backbone import load
from dinoforge.commands.given import OF_VALUES, flat_keys, images_and_keys
from dinoforge.data.channels import Channels, channels_of, guess_channels
from dinoforge.data.planes import taken_apart
from dinoforge.data.sources import Source, open_source
from dinoforge.data.statistics import measure_pixels, read_sizes
from dinoforge.data.summary import summarize
from dinoforge.data.survey import MeasuredRange, measure_range
from dinoforge.data.values import plane_of
from dinoforge.errors import RecipeError
from dinoforge.planning import auto
from dinoforge.planning.bench import seconds_per_step
from dinoforge.planning.dry_run import Plan, make_plan
from dinoforge.planning.memory import ways_to_save
from dinoforge.recipe.load import converted, load_recipe
from dinoforge.recipe.schema import Recipe, flatten
from dinoforge.runs.directory import RunDirectory
from dinoforge.system import device as devices
from dinoforge.system import distributed
from dinoforge.system.out_of_memory import out_of_memory_in_words


def resolve(
    recipe: str | Path | Recipe, keys: Mapping[str, Any], run: RunDirectory | None = None
) -> tuple[Recipe, dict[str, str]]:
    """Load a recipe by ``load_recipe``, and complete it from the file in ``init.weights`` if the recipe asks for that.

    Args:
        recipe, keys: See ``train``.
        run: The run directory. If the run has begun, its recipe holds the values that were taken from the file.

    Returns:
        The recipe, and the reasons why keys were ignored.

    Raises:
        RecipeError: A key or value is invalid, or ``init.weights`` is missing where it is needed.
        WeightsError: There is no readable backbone in ``init.weights``.
    """
    flat = flat_keys(keys)
    resolved, ignored = load_recipe(recipe, flat)
    if resolved.init.architecture == "recipe":
        return resolved, ignored
    if resolved.init.weights is None:
        raise RecipeError("this recipe continues from given weights: say which by init.weights=RUN|FILE")
    if run and run.exists:  # the file that the run began from may be gone
        beneath = {key: value for key, value in flatten(run.recipe()).items() if key in ADOPTED}
    else:
        heads = resolved.student.num_heads
        given = load(resolved.init.weights, **({} if heads is None else {"num_heads": heads}))
        beneath = adopted(given, resolved)
    return load_recipe(recipe, flat, beneath=beneath)


def auto_recipe(images: Any = None, **keys: Any) -> tuple[Recipe, dict[str, auto.Choice]]:
    """Choose the recipe of ``auto`` for images, and return it with the choices and their reasons.

    Args:
        images: The images, as for ``train``.
        keys: The recipe keys, as for ``train``. They override the choices, and other choices take them into account.
            With ``train.max_minutes`` and no other length, a step is timed, and the run gets as many steps as fit.

    Raises:
        RecipeError: A key or value is invalid.
        DataError: There are no usable images.
    """
    images, keys = images_and_keys(images, keys)
    recipe, _, choices = choose_recipe(source_for_auto(images, keys), flat_keys(keys), None)
    return recipe, choices


def source_for_auto(images: Any, keys: Mapping[str, Any]) -> Source:
    """Open the images for recipe ``auto``; with ``data.plane=each``, every plane of a file is an image."""
    said, source = converted(flat_keys(keys)), open_source(images)
    if said.get("data.plane") != "each":
        return source
    return taken_apart(source, "each", said.get("student.in_chans") or guess_channels(source))


def choose_recipe(
    source: Source, given: dict[str, Any], run: RunDirectory | None
) -> tuple[Recipe, dict[str, str], dict[str, auto.Choice]]:
    """Choose the recipe of ``auto`` for images.

    Args:
        source: The images.
        given: The keys of the user, dotted.
        run: The run directory. A run that has begun keeps what it measured.

    Returns:
        The recipe, the reasons why keys were ignored, and the choices with their reasons.
    """
    said = converted(given)
    begun = distributed.from_first(lambda: flatten(run.recipe()) if run and run.exists else None)
    channels = _auto_channels(source, said, begun)
    values_said = {f"data.{key}": said[f"data.{key}"] for key in OF_VALUES if f"data.{key}" in said}
    one_for_all = {"data.mean": 0.5, "data.std": 0.5}
    base, _ = load_recipe(auto.BASE, values_said | one_for_all | {"student.in_chans": channels.count})
    base, measured = with_range(base, source, run)
    decoding = image_input(base).decoding
    # If no image can be read, summarize raises the error that says why.
    summary = read_sizes(source, channels.count, decoding) or summarize(
        source, channels=channels.count, decoding=decoding
    )
    found: dict[str, auto.Choice] = {}
    if base.data.range is not None and "data.range" not in said:
        found["data.range"] = auto.Choice(base.data.range, str(measured or "as the run began"))
    device = devices.resolve_device(said.get("device", "auto"))
    statistics = None
    if begun is None:
        statistics = distributed.from_first(lambda: measure_pixels(source, channels.count, decoding))
    else:  # another version may have measured other values, or none
        kept = {key: auto.Choice(begun[key], "as the run began") for key in auto.OF_PIXELS}
        found |= {key: choice for key, choice in kept.items() if key not in said}
    facts = auto.facts_of(summary, str(device), distributed.world_size(), channels=channels, statistics=statistics)
    timed: dict[str, Any] = {}
    if said.get("train.max_minutes") and not any(said.get(key) for key in auto.LENGTHS):
        if begun is not None and begun["train.steps"] is not None:
            timed = {"train.steps": begun["train.steps"]}  # a second measurement would give another number
        else:
            sample = auto.choose(facts, given | {"train.steps": auto.LONG}) | found
            values = {key: choice.value for key, choice in sample.items()}
            recipe, _ = load_recipe(auto.BASE, values | given | {"train.steps": auto.LONG})
            # All ranks time the step, since a step involves all ranks, and the slowest rank sets the pace.
            ways = partial(ways_to_save, recipe, ranks=distributed.world_size(), mode="none", device=device)
            with out_of_memory_in_words(device, ways):
                own = seconds_per_step(recipe, source)
            seconds = max(distributed.all_ranks(own))
            timed = {"train.steps": max(int(60 * said["train.max_minutes"] / seconds), 1)}
    choices = auto.choose(facts, given | timed) | found
    if timed:
        choices["train.steps"] = auto.Choice(timed["train.steps"], "as many as fit into train.max_minutes")
    recipe, ignored = load_recipe(auto.BASE, {key: choice.value for key, choice in choices.items()} | given)
    return recipe, ignored, choices


def _auto_channels(source: Source, said: Mapping[str, Any], begun: Mapping[str, Any] | None) -> Channels:
    """Choose the number of channels for ``auto``: the user's, that of the run so far, or that of most images."""
    if given := said.get("student.in_chans"):
        return Channels(given, "as given")
    if begun is not None:
        return Channels(begun["student.in_chans"], "as the run began")
    return distributed.from_first(lambda: channels_of(source))


def with_range(recipe: Recipe, source: Source, run: RunDirectory | None = None) -> tuple[Recipe, MeasuredRange | None]:
    """Complete the recipe with a ``data.range`` for images of more than 8 bits.

    A run that has begun keeps its range. It also keeps having no range, as runs of earlier versions do.

    Returns:
        The recipe, and the measured range; None if no range was measured by this call.
    """
    data = recipe.data
    if data.range is not None or data.sixteen_bit == "minmax":
        return recipe, None
    if run is not None and run.exists:
        return replace(recipe, data=replace(data, range=run.recipe().data.range)), None
    measured = measure_range(
        source,
        channels=recipe.student.in_chans,
        max_pixels=data.max_pixels,
        nodata=data.nodata,
        plane=plane_of(data.plane),
    )
    if measured is None:
        return recipe, None
    return replace(recipe, data=replace(data, range=measured.range)), measured


def plan_of(recipe: Recipe, source: Source) -> Plan:
    """Make the plan of a run on these images."""
    image = image_input(recipe)
    reduction = partial(least_reduction, recipe)
    summary = summarize(source, channels=image.in_chans, decoding=image.decoding, reduction=reduction)
    return make_plan(recipe, summary)
