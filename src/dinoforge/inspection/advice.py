"""Keys that follow from what was found, with reasons, as they are pasted on the command line."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dinoforge.inspection.gather import Seen
from dinoforge.inspection.result import Advice, Values
from dinoforge.inspection.troubles import NARROW, suspected_nodata
from dinoforge.planning.auto import Choice
from dinoforge.recipe.schema import Recipe

_OF_IMAGES = (
    "student.in_chans",
    "student.patch_size",
    "crops.global_crops_size",
    "crops.local_crops_size",
    "data.",
    "augment.horizontal_flip",
    "augment.vertical_flip",
    "augment.quarter_turns",
    "augment.grayscale_probability",
    "augment.solarize_probability",
)
"""Choices of the recipe auto that the images decide; its others are about the run."""

_MANY = 4  # times the side of a crop, from which on a JPEG is large


def from_auto(choices: Mapping[str, Choice]) -> list[Advice]:
    """The choices of the recipe auto that the images decide."""
    return [
        Advice(key, in_words(choice.value), choice.reason, "auto")
        for key, choice in choices.items()
        if key.startswith(_OF_IMAGES)
    ]


def further(
    seen: Sequence[Seen],
    unread: int,
    values: Sequence[Values],
    recipe: Recipe,
    given: Mapping[str, Any],
    chosen: Mapping[str, Choice],
) -> list[Advice]:
    """Keys that auto does not choose by itself.

    Args:
        seen: Images that could be read.
        unread: Number of images that could not be read.
        values: Values of the images.
        recipe: The recipe that the user's keys and auto's choices make.
        given: The user's keys.
        chosen: Auto's choices.
    """
    found: list[Advice] = []

    def say(key: str, value: Any, reason: str) -> None:
        if key not in given and not (key in chosen and chosen[key].value == value):
            found.append(Advice(key, in_words(value), reason, "inspect"))

    counts = Counter(one.channels for one in seen)
    usual, number = counts.most_common(1)[0] if counts else (3, 0)
    if usual != recipe.student.in_chans and not (usual in (1, 3) and recipe.student.in_chans in (1, 3)):
        say("student.in_chans", usual, f"so many channels have {number:,} of {len(seen):,} images")
    for of_type in values:
        if (suspect := suspected_nodata(of_type)) is not None:
            say("data.nodata", suspect, "a value far from all others, which most likely means no data")
            break
    usual_values = [v for v in values if v.type in ("uint8", "int8") and 2 * v.images > len(seen)]
    if usual_values and recipe.data.range is None and recipe.data.sixteen_bit != "minmax":
        eight = usual_values[0]
        low = math.floor(min(channel.percentiles[0] for channel in eight.channels))
        high = math.ceil(max(channel.percentiles[-1] for channel in eight.channels))
        if not eight.is_within:
            lowest = math.floor(min(channel.min for channel in eight.channels))
            highest = math.ceil(max(channel.max for channel in eight.channels))
            say("data.range", (lowest, highest), f"{eight.type} values below 0 are refused without a range")
        elif eight.fills < NARROW and low < high:
            say("data.range", (low, high), f"the values fill {eight.fills:.0%} of 0 to 255")
    several = [one for one in seen if one.planes > 1]
    if 2 * len(several) > len(seen) and recipe.data.plane is None:
        planes = sorted(one.planes for one in several)[len(several) // 2]
        if several[0].along in ("z", "q"):
            say("data.plane", "max", f"the brightest of {planes} planes; each or a number takes others")
        else:
            say("data.plane", "each", f"{planes} planes ({several[0].along}) a file, of which only the first is taken")
    jpegs = [one for one in seen if one.kind == "JPEG"]
    sides = sorted(min(one.width, one.height) for one in jpegs)
    crop = recipe.crops.global_crops_size
    if 2 * len(jpegs) > len(seen) and sides[len(sides) // 2] >= _MANY * crop and "data.reduced_decode" not in given:
        reason = f"JPEG files of {sides[len(sides) // 2]:,} pixels for crops of {crop}: decodes only what these need"
        by = "auto" if recipe.data.reduced_decode else "inspect"
        found.append(Advice("data.reduced_decode", "true", reason, by))
    bad = unread / max(len(seen) + unread, 1)
    if seen and bad > recipe.data.max_bad_share:
        say("data.max_bad_share", min(math.ceil(bad * 20 + 1) / 20, 1.0), f"{bad:.0%} cannot be read; better mend them")
    return found


def with_notes(advice: Sequence[Advice]) -> tuple[Advice, ...]:
    """The advice, with a note on a measured range that other advised keys change."""
    changing = [one.key for one in advice if one.by == "inspect" and one.key in ("data.nodata", "data.plane")]
    if not changing:
        return tuple(advice)
    again = f"; measured anew with {' and '.join(changing)}"
    return tuple(
        replace(one, reason=one.reason + again) if (one.key, one.by) == ("data.range", "auto") else one
        for one in advice
    )


def command(data: str, given: Mapping[str, Any], advice: Sequence[Advice]) -> str:
    """The command that trains with what is advised; what auto chooses by itself is not repeated."""
    keys = [f"{key}={in_words(value)}" for key, value in given.items()]
    keys += [f"{one.key}={one.value}" for one in advice if one.by == "inspect"]
    return shlex.join(["dinoforge", "train", data, "--recipe", "auto", *keys])


def in_words(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return f"[{','.join(map(in_words, value))}]"
    return f"{value:.7g}" if isinstance(value, float) else str(value)
