"""Images and recipe keys as a caller gives them."""

from collections.abc import Mapping
from typing import Any


def images_and_keys(images: Any, keys: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Separate images that were passed as ``data=`` from the recipe keys; a mapping ``data`` is a section of keys."""
    if images is None and "data" in keys and not isinstance(keys["data"], Mapping):
        keys = dict(keys)
        images = keys.pop("data")
    return images, keys


OF_VALUES = ("range", "sixteen_bit", "nodata", "fill", "plane", "max_pixels")
"""The keys of the section ``data`` that say how values become pixels."""


def flat_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten sections given as mappings into dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in keys.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
