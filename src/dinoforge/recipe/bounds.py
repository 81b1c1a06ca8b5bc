"""Bounds of a recipe's keys, and how a field of the schema states its bounds and meaning."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")
Number = int | float


@dataclass(frozen=True)
class Bounds:
    """The numbers that a key accepts: one number, or each of several."""

    words: str  # the text after "expected" in an error
    at_least: Number = float("-inf")
    above: Number = float("-inf")
    at_most: Number = float("inf")
    below: Number = float("inf")
    ascending: bool = False  # no number may be smaller than the one before it
    odd: bool = False

    def accept(self, value: Number | tuple[Number, ...]) -> bool:
        """Whether a value of a key lies within its bounds."""
        numbers = value if isinstance(value, tuple) else (value,)
        inside = all(self.at_least <= n <= self.at_most and self.above < n < self.below for n in numbers)
        in_order = not self.ascending or all(a <= b for a, b in pairwise(numbers))
        return inside and in_order and (not self.odd or all(n % 2 == 1 for n in numbers))


FINITE = Bounds("a finite number")
FROM_0 = Bounds("0 or more", at_least=0)
FROM_1 = Bounds("at least 1", at_least=1)
FROM_2 = Bounds("at least 2", at_least=2)
ABOVE_0 = Bounds("more than 0", above=0)
EACH_FROM_0 = Bounds("values of 0 or more", at_least=0)
EACH_ABOVE_0 = Bounds("values above 0", above=0)
SHARE = Bounds("0 to 1", at_least=0, at_most=1)
SHARE_ABOVE_0 = Bounds("above 0 up to 1", above=0, at_most=1)
SHARE_BELOW_1 = Bounds("0 up to below 1", at_least=0, below=1)
EACH_SHARE = Bounds("values from 0 to 1", at_least=0, at_most=1)
SHARES_IN_ORDER = Bounds("0 ≤ low ≤ high ≤ 1", at_least=0, at_most=1, ascending=True)
CROP_SCALES = Bounds("0 < low ≤ high ≤ 1 (shares of the image)", above=0, at_most=1, ascending=True)
ABOVE_0_IN_ORDER = Bounds("0 < low ≤ high", above=0, ascending=True)
HUE = Bounds("0 to 0.5", at_least=0, at_most=0.5)
LEVEL = Bounds("a level from 0 to 255", at_least=0, at_most=255)
ODD = Bounds("an odd number of pixels", at_least=1, odd=True)
SEED = Bounds("0 or more, and less than 2^63", at_least=0, below=2**63)


def key(default: T, meaning: str, bounds: Bounds | None = None) -> T:
    """Make a field of a section, with its meaning and bounds beside its default; typed as ``dataclasses.field`` is.

    Args:
        default: The value of a recipe that does not give one.
        meaning: One line for the reference page.
        bounds: The numbers that it accepts; None for keys that are no numbers.
    """
    field: T = dataclasses.field(default=default, metadata={"meaning": meaning, "bounds": bounds})
    return field
