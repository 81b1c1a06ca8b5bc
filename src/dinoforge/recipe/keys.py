"""The list of all keys of a recipe, as a reference page needs it."""

import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from dinoforge.recipe.schema import BOUNDS, MEANINGS, TYPES, Recipe, flatten

_TYPE_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe, as a user needs to know it."""

    name: str  # the dotted name, as in "train.seed"
    type: str  # in words, as in "whole number or null"
    bounds: str | None  # in words, as in "at least 1"; None where the type says it all
    default: Any
    meaning: str  # one line


def list_keys() -> list[Key]:
    """List every key of a recipe, in the order of the schema."""
    return [
        Key(name, _in_words(TYPES[name]), BOUNDS[name].words if name in BOUNDS else None, default, MEANINGS[name])
        for name, default in flatten(Recipe()).items()
    ]


def _in_words(hint: Any) -> str:
    """The type of a key in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_in_words, arguments))
    if origin is Literal:
        return " | ".join(arguments)
    if origin is tuple:
        item = _in_words(arguments[0])
        return f"list of {item}s" if arguments[-1] is Ellipsis else f"list of {len(arguments)} {item}s"
    return _TYPE_NAMES[hint]
