"""Names, keys and values in the words of a refusal, cut to a length that people read."""

from collections.abc import Mapping
from typing import Any


def described(value: Any) -> str:
    """Name the type of an object that is no state dict, and the first few of its keys."""
    kind = type(value).__name__
    if not isinstance(value, Mapping):
        return f"a {kind} of {len(value)}" if isinstance(value, list | tuple) else f"a {kind}"
    if not value:
        return f"an empty {kind}"
    return f"a {kind} with the keys {listed([f'{key!s:.60} ({type(each).__name__})' for key, each in value.items()])}"


def listed(names: list[str]) -> str:
    """List the first few names, and say how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def short(value: Any) -> str:
    """Write a value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
