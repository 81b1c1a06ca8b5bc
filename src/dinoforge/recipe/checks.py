"""Checks of a recipe: the bounds of its keys, and contradictions between them."""

from collections.abc import Sequence
from typing import Any

from dinoforge.errors import RecipeError
from dinoforge.recipe.schema import BOUNDS, Data, Recipe, flatten, parse_length


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _number(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def validate(recipe: Recipe) -> None:
    """Check the bounds of every key, and the keys that must fit each other whatever the architecture is.

    Raises:
        RecipeError: A value outside of its key's bounds, or a contradiction.
    """
    flat = flatten(recipe)
    for key, bounds in BOUNDS.items():
        value = flat[key]
        _require(value is None or bounds.accept(value), f"{key}: expected {bounds.words}, got {_number(value)}")
    _validate_values(recipe.data)
    for key in flat:
        if key.endswith("_length") and flat[key] is not None:
            parse_length(flat[key])
    dino = recipe.dino.loss_weight * (recipe.dino.global_loss_weight + recipe.dino.local_loss_weight)
    _require(
        dino + recipe.ibot.loss_weight + recipe.dino.koleo_loss_weight > 0,
        "every loss is off: dino.loss_weight (times its two parts), ibot.loss_weight and dino.koleo_loss_weight are 0",
    )
    _require(
        dino + recipe.dino.koleo_loss_weight > 0
        or recipe.ibot.mask_sample_probability * recipe.ibot.mask_ratio_min_max[1] > 0,
        "only the iBOT loss is on, but ibot.mask_sample_probability or ibot.mask_ratio_min_max masks nothing",
    )
    frozen = recipe.optim.freeze_backbone_length
    _require(
        dino + recipe.ibot.loss_weight > 0 or frozen is None or parse_length(frozen).amount == 0,
        f"optim.freeze_backbone_length={frozen}: there is no head that could learn meanwhile, because dino.loss_weight "
        "and ibot.loss_weight are 0",
    )
    _require(
        recipe.train.steps is None or recipe.train.epochs is None,
        "train.steps and train.epochs contradict each other: give one of them",
    )
    group, scope = recipe.dino.koleo_group_size, recipe.dino.koleo_scope
    _require(
        (scope == "groups") == (group is not None),
        f"dino.koleo_scope=groups goes with dino.koleo_group_size of at least 2, got {scope} and {group}",
    )
    _require(
        recipe.parallel.shard_ranks is None or recipe.parallel.mode == "hsdp",
        "parallel.shard_ranks is for parallel.mode=hsdp",
    )
    sharded = recipe.parallel.mode in ("fsdp", "hsdp")
    _require(not (sharded and recipe.precision == "fp16"), "precision=fp16 cannot be sharded: set precision=bf16")


def _validate_values(data: Data) -> None:
    """Check the keys that say how values become pixels."""
    if data.range is not None:
        pairs = list(zip(data.range[::2], data.range[1::2], strict=False))
        fits = len(data.range) % 2 == 0 and all(low < high for low, high in pairs)
        _require(
            fits and bool(pairs),
            f"data.range: expected low, high with low < high, or such a pair for each channel, got {list(data.range)}",
        )
    plane = data.plane
    _require(
        plane is None or plane in ("max", "each") or plane.isdecimal(),
        f"data.plane: expected a number from 0, max or each, got {plane!r}",
    )


def validate_sizes(recipe: Recipe) -> None:
    """Check crops and pixel values against the network, whose sizes may come from a file of weights.

    Raises:
        RecipeError: A contradiction.
    """
    flat = flatten(recipe)
    patch = recipe.student.patch_size
    sizes = {"crops.global_crops_size": recipe.crops.global_crops_size}
    if recipe.crops.local_crops_number:
        sizes["crops.local_crops_size"] = recipe.crops.local_crops_size
    if recipe.eval.size is not None:
        sizes["eval.size"] = recipe.eval.size
    for key, side in sizes.items():
        _require(
            key == "eval.size" or recipe.augment.blur_kernel // 2 < side,
            f"augment.blur_kernel={recipe.augment.blur_kernel} is too large for {key}={side}",
        )
        near = max(patch, round(side / patch) * patch)
        _require(
            side % patch == 0,
            f"{key}={side} is not a multiple of student.patch_size={patch}: the nearest that is, is {near}",
        )
    for key in ("data.mean", "data.std"):
        count, channels = len(flat[key]), recipe.student.in_chans
        _require(
            count in (1, channels),
            f"{key} has {count} values for student.in_chans={channels}: give one, or one for each channel",
        )
    pairs = len(recipe.data.range or ()) // 2
    _require(
        pairs in (0, 1, recipe.student.in_chans),
        f"data.range has {pairs} pairs for student.in_chans={recipe.student.in_chans}: give one, or one for each "
        "channel",
    )
    if recipe.report.channels is not None:
        require_shown_channels(recipe.report.channels, recipe.student.in_chans, "report.channels")


def require_shown_channels(shown: Sequence[int], count: int, name: str) -> None:
    """Check which channels pictures show.

    Args:
        shown: One as grey, or three as red, green and blue.
        count: Channels that images have.
        name: What to call them in the error.

    Raises:
        RecipeError: Another number of channels, or one that images do not have.
    """
    _require(
        len(shown) in (1, 3) and all(0 <= channel < count for channel in shown),
        f"{name}: expected one channel, or three for red, green and blue, each from 0 to {count - 1}, "
        f"got {list(shown)}",
    )
