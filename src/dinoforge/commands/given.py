"""Images and recipe keys as a caller gives them."""

from collections.abc import Mapping
from typing import Any


def images_and_keys(images: Any, keys: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Images that came by name as ``data=``, and the other keys: ``data`` as a mapping is a section of these."""
    if images is None and "data" in keys and not isinstance(keys["data"], Mapping):
        keys = dict(keys)
        images = keys.pop("data")
    return images, keys


OF_VALUES = ("range", "sixteen_bit", "nodata", "fill", "plane", "max_pixels")
"""Keys of the section ``data`` that say how values become pixels."""


def flat_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in keys.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
