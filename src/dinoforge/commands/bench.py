"""Measure what limits a run on this machine."""

from functools import partial
from pathlib import Path
from typing import Any

from dinoforge.builders.lengths import with_batch_cut
from dinoforge.commands.given import images_and_keys
from dinoforge.commands.recipe import auto_recipe, plan_of, resolve, source_for_auto, with_range
from dinoforge.data.planes import taken_apart
from dinoforge.data.preflight import refuse_second_start
from dinoforge.data.sources import open_source
from dinoforge.planning.bench import BenchResult, measure
from dinoforge.planning.dry_run import ways_to_train
from dinoforge.recipe.schema import Recipe
from dinoforge.system import device as devices
from dinoforge.system.device import threads
from dinoforge.system.out_of_memory import out_of_memory_in_words


def bench(
    images: Any = None, recipe: str | Path | Recipe = "small", *, seconds: float = 10.0, **keys: Any
) -> BenchResult:
    """Measure whether data or steps limit a run on this machine; writes nothing.

    Args:
        images, recipe, keys: See ``train``.
        seconds: The approximate duration of each of the three measurements.

    Raises:
        RecipeError: A key or value is invalid.
        DataError: There are no usable images.
    """
    refuse_second_start()
    images, keys = images_and_keys(images, keys)
    source = source_for_auto(images, keys) if recipe == "auto" else open_source(images)
    resolved = auto_recipe(source, **keys)[0] if recipe == "auto" else resolve(recipe, keys)[0]
    source = taken_apart(source, resolved.data.plane, resolved.student.in_chans)
    resolved, _ = with_range(resolved, source)
    devices.use_expandable_segments(devices.rank_device(resolved.device))
    plan = plan_of(with_batch_cut(resolved, world_size=1), source)
    with (
        devices.in_use(plan.device, allow_tf32=plan.recipe.allow_tf32),
        threads(plan.threads),
        out_of_memory_in_words(plan.device, partial(ways_to_train, plan)),
    ):
        return measure(plan, source, seconds=seconds)
