"""Configurations that other libraries write beside weights: the checks that all libraries share.

Tensors say nothing about activations, epsilons, heads, or how images were made. Our network has one of each, so weights
that were trained with another would load and give other outputs. Therefore ``weights.hugging_face`` and
``weights.timm`` hold a configuration against the weights and against our network: they refuse keys that change outputs,
pass over keys that cannot, and note the others.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoforge.errors import WeightsError
from dinoforge.weights.words import described, listed, short

TAKE_BOTH = (
    "Configuration and weights are not of one model, or part of the weights is missing: take both from one source "
    "again, or correct the configuration if you are sure of the weights"
)
OTHER_OUTPUTS = (
    "Outputs would not be those of that model, so its weights are not loaded: take a model without this, or correct "
    "the configuration if it is wrong"
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        WeightsError: The file cannot be read as JSON, or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: expected an object with keys, got {described(config)}")
    return config


def contradictions(config: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name the keys of a configuration that contradict the weights.

    Args:
        config: The configuration.
        expected: The values that the weights imply.
    """
    wrong = []
    for key, value in expected.items():
        if key not in config:
            continue
        said = side_of(config[key])
        if isinstance(said, bool) != isinstance(value, bool) or said != value:
            wrong.append(f"{key}={short(config[key])}, but the weights have {value}")
    return wrong


def wrong_grid(config: Mapping[str, Any], key: str, architecture: Mapping[str, Any]) -> list[str]:
    """Say it where images of the size under a key have another grid of patches than the position embeddings."""
    if key not in config:
        return []
    side, patch = side_of(config[key]), architecture["patch_size"]
    grid = architecture["image_size"] // patch
    if isinstance(side, int) and not isinstance(side, bool) and side // patch == grid:
        return []
    return [f"{key}={short(config[key])}, but the weights have position embeddings for {grid} × {grid} patches"]


def side_of(value: Any) -> Any:
    """Take the side of a square that is given as one number or as two equal ones."""
    if isinstance(value, Sequence) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value


def whole_number(key: str, value: Any) -> int:
    """Check that the value of a key is a whole number of at least 1.

    Raises:
        WeightsError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WeightsError(f"it says {key}={short(value)}: expected a whole number of at least 1")
    return value


def numbers(config: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """Read one number, or one for each channel.

    Raises:
        WeightsError: The key is missing, or holds something else.
    """
    value = config.get(key)
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise WeightsError(
            f"it does not say {key}: expected numbers, got {short(value)}; it has {keys_in_words(config)}"
        )
    return tuple(map(float, values))


def keys_in_words(config: Mapping[str, Any]) -> str:
    """Name the first few keys of a configuration."""
    return f"the keys {listed(list(map(str, config)))}" if config else "no keys"
