"""Which images of a data set are looked at, and in which order."""

import numpy as np

from dinoforge.data.sampling import spaced, spread

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
    found = dict.fromkeys(spaced(count, FIRST))
    pairs = -(-count // 2) if count <= limit else -(-limit // 2)
    starts = np.linspace(0, max(count - 2, 0), pairs).round().astype(int)
    if count <= limit:
        starts = np.arange(0, count, 2)
    for start in spread(starts.tolist()):
        found.update(dict.fromkeys(range(start, min(start + 2, count))))
        if len(found) >= limit:
            break
    return list(found)[:limit]
