"""Images that cannot be read: their names, the reasons, and the limit that stops a run."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from dinoforge.errors import DataError

Skipped = tuple[int, str, str]
"""Index, printable name and reason of an image that could not be read."""

_KINDS = 6  # reasons that are told one by one


class BadImagesError(DataError):
    """Too many images cannot be read.

    Args:
        message: The number of images, and the reasons.
        skipped: The images that turned out to be unreadable now.
        of_one_rank: Whether this rank alone met them; otherwise all ranks have the same error.
    """

    def __init__(self, message: str, skipped: Iterable[Skipped], *, of_one_rank: bool = False) -> None:
        super().__init__(message)
        self.skipped = tuple(skipped)
        self.of_one_rank = of_one_rank


def by_reason(bad: Iterable[Skipped]) -> str:
    """Name every kind of reason with the number of images and one of them, most frequent first.

    Reasons that differ in numbers alone are of one kind: ``12 such as a.tif: truncated: 80 bytes; b.tif: empty file``.
    """
    groups: defaultdict[str, list[Skipped]] = defaultdict(list)
    for image in bad:
        groups[re.sub(r"\d[\d,.]*", "0", image[2])].append(image)
    ordered = sorted(groups.values(), key=len, reverse=True)
    told = [
        f"{f'{len(group):,} such as ' if len(group) > 1 else ''}{group[0][1]}: {group[0][2]}"
        for group in ordered[:_KINDS]
    ]
    if rest := ordered[_KINDS:]:
        told.append(f"{sum(map(len, rest)):,} for {len(rest)} other reasons")
    return "; ".join(told)


class BadImages:
    """The images that could not be read so far, and the rule that stops a run when they are too many.

    The share is taken of the distinct images drawn so far, but of no fewer than 64 (or all), so that one bad image at
    the start stops nothing.

    Args:
        max_share: The largest share of unreadable images, 0…1 (`data.max_bad_share`).
        length: The number of images in the source.
    """

    def __init__(self, max_share: float, length: int) -> None:
        self.max_share = max_share
        self.length = length
        self.skipped: dict[int, tuple[str, str]] = {}
        """Printable name and reason of each image, by index."""

    def update(self, skipped: Iterable[Skipped], draws: int) -> list[Skipped]:
        """Note images that were skipped, and return those that are new.

        Args:
            skipped: Unreadable images as in `Batch.skipped`, of one rank or of all.
            draws: The number of samples drawn since the start of training, over all ranks.

        Raises:
            BadImagesError: The share of unreadable images is above the limit.
        """
        known = dict(self.skipped)
        new = []
        for index, name, reason in skipped:
            if index not in known:
                known[index] = (name, reason)
                new.append((index, name, reason))
        seen = max(min(draws, self.length), min(self.length, 64))
        if len(known) > self.max_share * seen:
            raise BadImagesError(
                f"{len(known)} of about {seen} images could not be read ({len(known) / seen:.1%}; "
                f"data.max_bad_share allows {self.max_share:.1%}): "
                + by_reason((index, *told) for index, told in known.items()),
                new,
            )
        self.skipped = known  # after an error they are forgotten: a run may continue with mended images
        return new

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": [[index, name, reason] for index, (name, reason) in self.skipped.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = {int(index): (name, reason) for index, name, reason in state["skipped"]}
