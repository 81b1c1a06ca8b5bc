"""Which images of a data set are looked at, and in which order."""

import numpy as np

FIRST = 16
"""Evenly spaced images that come first: those that a run looks at before it starts, so that both say the same."""


def places(count: int, limit: int) -> list[int]:
    """Up to `limit` of `count` places, all of them where there are no more, in the order in which to look.

    Evenly spaced, and each with its neighbour: bursts, frames of a film and tiles of a scene lie side by side. Whenever
    the look is broken off, what was looked at until then is spread over all.

    Args:
        count: Number of images, at least 1.
        limit: Most places to return, at least 1.
    """
    found = dict.fromkeys(np.unique(np.linspace(0, count - 1, FIRST).round().astype(int)).tolist())
    pairs = -(-count // 2) if count <= limit else -(-limit // 2)
    starts = np.linspace(0, max(count - 2, 0), pairs).round().astype(int)
    if count <= limit:
        starts = np.arange(0, count, 2)
    for number in _spread(len(starts)):
        start = int(starts[number])
        found.update(dict.fromkeys(range(start, min(start + 2, count))))
        if len(found) >= limit:
            break
    return list(found)[:limit]


def _spread(count: int) -> list[int]:
    """The numbers 0…count - 1 by their bits read backwards: any first part of them is spread over all."""
    bits = max(count - 1, 1).bit_length()
    backwards = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [number for number in backwards if number < count]
