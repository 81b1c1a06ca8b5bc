"""Test images that are equal or nearly equal to training images, which inflate every score."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from dinoforge.data import duplicates
from dinoforge.data.duplicates import Fingerprint

MOST_EXAMPLES = 5


class Duplicates(TypedDict):
    """Test images that are also in the training parts, summed over the splits; see ``dinoforge.data.duplicates``."""

    exact: int  # test images with the same pixels as a training image
    near: int  # other test images that are nearly equal to a training image
    tested: int  # all test images
    examples: list[list[str]]  # a few pairs: names of a test image and of a similar training image


def count(fingerprints: Sequence[Fingerprint], names: Sequence[str], train: Tensor, test: Tensor) -> Duplicates:
    """Count the test images that are equal or nearly equal to a training image other than themselves.

    Args:
        fingerprints: The fingerprints of N images.
        names: The names of these images.
        train: The training part of each split, [S, N] bool.
        test: The test part of each split, [S, N] bool.
    """
    n = len(fingerprints)
    equal, like = _numbered(duplicates.same(fingerprints), n), _numbered(duplicates.groups(fingerprints), n)
    counted = [0, 0]
    examples: dict[int, list[str]] = {}
    for learns, asks in zip(train, test, strict=True):
        is_equal = asks & _has_other(equal, learns)
        is_like = asks & _has_other(like, learns) & ~is_equal
        counted[0] += int(is_equal.sum())
        counted[1] += int(is_like.sum())
        for found, group in ((is_equal, equal), (is_like, like)):
            for image in found.nonzero().flatten().tolist():
                if len(examples) == MOST_EXAMPLES:
                    break
                others = ((group == group[image]) & learns).nonzero().flatten().tolist()
                examples.setdefault(image, [names[image], names[next(i for i in others if i != image)]])
    return {"exact": counted[0], "near": counted[1], "tested": int(test.sum()), "examples": list(examples.values())}


def duplicates_in_words(found: Duplicates, *, splits: int = 1) -> str | None:
    """Describe the duplicates in a sentence; None if there are none."""
    number = found["exact"] + found["near"]
    if not number:
        return None
    is_one = number == 1
    some, other = found["examples"][0]
    return (
        f"{number:,} of {found['tested']:,} test images {'is' if is_one else 'are'} also among the training images"
        f"{' of their split' if splits > 1 else ''} ({found['exact']:,} equal, {found['near']:,} nearly), such as "
        f"{some} and {other}: {'it makes' if is_one else 'they make'} the score look better than it is"
    )


def _numbered(groups: Sequence[Sequence[int]], n: int) -> Tensor:
    """Number the group of each image, [N] int64; 0 for images that are in no group."""
    numbers = torch.zeros(n, dtype=torch.int64)
    for number, group in enumerate(groups, 1):
        numbers[list(group)] = number
    return numbers


def _has_other(groups: Tensor, learns: Tensor) -> Tensor:
    """Return for each image whether another image of its group is in the training part, [N] bool."""
    learning = torch.bincount(groups[learns], minlength=int(groups.max()) + 1)
    return (groups > 0) & (learning[groups] > learns)
