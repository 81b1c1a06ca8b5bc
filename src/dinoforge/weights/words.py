"""Names, keys and values in the words of a refusal, cut to a length that people read."""

from collections.abc import Mapping
from typing import Any


def described(value: Any) -> str:
    """The type of something that is no state dict, and the first few of its keys, for a refusal."""
    kind = type(value).__name__
    if not isinstance(value, Mapping):
        return f"a {kind} of {len(value)}" if isinstance(value, list | tuple) else f"a {kind}"
    if not value:
        return f"an empty {kind}"
    return f"a {kind} with the keys {listed([f'{key!s:.60} ({type(each).__name__})' for key, each in value.items()])}"


def listed(names: list[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
