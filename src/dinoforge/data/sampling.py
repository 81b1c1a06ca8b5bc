"""Samples of a data set: places that are spread evenly over all of it."""

from collections.abc import Sequence

import numpy as np


def spaced(length: int, number: int) -> list[int]:
    """Choose up to `number` of `length` places, evenly spaced, with both ends."""
    places: list[int] = np.unique(np.linspace(0, length - 1, number).round().astype(int)).tolist()
    return places


def spread(places: Sequence[int]) -> list[int]:
    """Order places so that every beginning is spread over all of them: by the bits of their numbers, backwards."""
    bits = max(len(places) - 1, 1).bit_length()
    return [places[i] for i in sorted(range(len(places)), key=lambda i: f"{i:0{bits}b}"[::-1])]
