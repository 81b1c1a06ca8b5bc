"""Images that are there more than once, and whether they lie across the parts of a split or across classes."""

import functools
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from dinoforge.data.classes import is_split
from dinoforge.data.names import printable
from dinoforge.data.sources import FolderSource
from dinoforge.inspection.result import Alike

_HEAD = 2**16  # bytes that are compared first
_EXAMPLES = 5
_OFTEN = 256  # files between two looks at the clock

Group = list[int]


def part_of(name: str) -> str | None:
    """The part of a split that an image lies in, in lower case; None: in none."""
    return _part_of_folder(name.rpartition("/")[0])


@functools.lru_cache(maxsize=4096)  # images of a folder come one after the other
def _part_of_folder(path: str) -> str | None:
    return next((folder.lower() for folder in path.split("/") if is_split(folder)), None)


def same_files(source: FolderSource, deadline: float) -> tuple[list[Group], int, int | None]:
    """Find files with the same content: first those of the same size, then those that begin alike.

    Args:
        source: The images.
        deadline: Time of ``time.monotonic`` by which to end; what was not compared by then is left out.

    Returns:
        Indices of files that are the same; how many files were compared; and the bytes of all of them, None where time
        was up before that was known.
    """
    by_size: defaultdict[int, Group] = defaultdict(list)
    total, root = 0, os.fsencode(source.root)
    for index in range(len(source)):
        if index % _OFTEN == 0 and time.monotonic() > deadline:
            return [], 0, None
        try:
            size = os.stat(os.path.join(root, os.fsencode(source.name(index)))).st_size
        except (OSError, ValueError):
            continue  # told when it is read
        total += size
        if size:
            by_size[size].append(index)
    alone = sum(len(group) == 1 for group in by_size.values())
    found: list[Group] = []
    compared = len(source) - sum(len(group) for group in by_size.values() if len(group) > 1)
    assert compared >= alone
    for size, group in sorted(by_size.items()):
        if len(group) < 2:
            continue
        heads, done = _by_content(source, group, min(size, _HEAD), deadline)
        if not done:
            return found, compared, total
        for alike in heads:
            whole, done = ([alike], True) if size <= _HEAD else _by_content(source, alike, None, deadline)
            if not done:
                return found, compared, total
            found += whole
        compared += len(group)
    return found, compared, total


def _by_content(
    source: FolderSource, group: Sequence[int], size: int | None, deadline: float
) -> tuple[list[Group], bool]:
    """Part files by their first bytes, or by all; and whether there was time for it."""
    alike: defaultdict[bytes, Group] = defaultdict(list)
    for number, index in enumerate(group):
        if number % (_OFTEN if size else 1) == 0 and time.monotonic() > deadline:
            return [], False
        try:
            with source.path(index).open("rb") as file:
                digest = hashlib.blake2b(file.read(size)).digest() if size else _digest_of_all(file.read)
        except OSError:
            continue
        alike[digest].append(index)
    return [found for found in alike.values() if len(found) > 1], True


def _digest_of_all(read: Callable[[int], bytes]) -> bytes:
    digest = hashlib.blake2b()
    while part := read(2**20):
        digest.update(part)
    return digest.digest()


def without(groups: Sequence[Group], known: Sequence[Group]) -> list[Group]:
    """The groups that are not within a known one."""
    home = {index: number for number, group in enumerate(known) for index in group}
    return [
        group
        for group in groups
        if any(index not in home for index in group) or len({home[index] for index in group}) > 1
    ]


def told(how: str, groups: Sequence[Group], name: Callable[[int], str], labels: Sequence[str | None] | None) -> Alike:
    """Count groups of images that are alike, and those that lie across parts of a split or across classes.

    Args:
        how: How they are alike; see `Alike`.
        groups: Indices of the images of each group.
        name: Returns the name of an image.
        labels: Labels of all images, where there are any.
    """
    parts, classes = [], []
    for group in groups:
        by_part = {part_of(name(index)): index for index in reversed(group)}
        if len(by_part) > 1:
            parts.append(list(by_part.values())[::-1])
        by_class = {labels[index]: index for index in reversed(group)} if labels else {}
        by_class.pop(None, None)
        if len(by_class) > 1:
            classes.append(list(by_class.values())[::-1])

    def examples(groups: Sequence[Group]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(printable(name(index)) for index in group[:4]) for group in groups[:_EXAMPLES])

    return Alike(
        how=how,
        groups=len(groups),
        images=sum(map(len, groups)),
        examples=examples(groups),
        across_parts=len(parts),
        part_examples=examples(parts),
        across_classes=len(classes),
        class_examples=examples(classes),
    )
