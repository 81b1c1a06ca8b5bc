"""Files of several planes (z, time, pages, frames), each plane of which is an image of its own."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinoforge.data import tiff
from dinoforge.data.headers import count_planes, may_move
from dinoforge.data.sources import FolderSource, Item, OnePlane, SequenceSource, Source
from dinoforge.errors import ImageError

_THREADS = 8  # threads that wait for storage
_AT_ONCE = 4096  # files that the threads are given
_HEAD = 4096  # bytes


def taken_apart(source: Source, plane: str | None, channels: int) -> Source:
    """Take the files of a source apart into planes with ``data.plane=each``; else return the source itself.

    Args:
        source: The images.
        plane: The recipe's ``data.plane``.
        channels: The number of channels wanted, which decides which pages of a file are channels and not planes.
    """
    if plane != "each":
        return source
    if isinstance(source, PlanesOf):
        return source if source.channels == channels else PlanesOf(source.files, channels)
    return PlanesOf(source, channels)


class PlanesOf:
    """Every plane of every file of a source, in the order of the files.

    Planes are counted in the headers of the files. A file that cannot be read counts as one image, which is refused at
    its turn. The index takes 8 bytes per file. The planes of ``stack.tif`` are ``stack.tif#0``, ``stack.tif#1`` and so
    on, as ``data.plane`` counts them; a file with one plane keeps its name.

    Items that are not files by name, such as those of a data set in Python, are fetched to be counted.

    Args:
        source: The files.
        channels: The number of channels wanted.
    """

    def __init__(self, source: Source, channels: int) -> None:
        self.files = source
        self.channels = channels
        counts: list[int] = []
        self.along: Counter[str] = Counter()
        """The number of files with several planes, by what the planes are, such as ``z``."""
        for count, along in _counted(source, channels):
            counts.append(count)
            if count > 1:
                self.along[along] += 1
        self._offsets = np.cumsum([0, *counts], dtype=np.int64)  # [files + 1]

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def left_out(self) -> Mapping[str, int]:
        """The kinds of files that are left out beside these."""
        found: Mapping[str, int] = getattr(self.files, "left_out", {})
        return found

    @property
    def counts(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The number of planes of each file."""
        return np.diff(self._offsets)

    def place(self, index: int) -> tuple[int, int | None]:
        """Find the index of the file, and the number of the plane in it; None where the file has only one."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        file = int(np.searchsorted(self._offsets, index, side="right")) - 1
        first, after = self._offsets[file : file + 2].tolist()
        return file, index - first if after - first > 1 else None

    def name(self, index: int) -> str:
        """Name the file and, after ``#``, the number of the plane."""
        file, plane = self.place(index)
        name = self.files.name(file)
        return name if plane is None else f"{name}#{plane}"

    def item(self, index: int) -> Item:
        """Fetch the file of one plane.

        Raises:
            ImageError: The file cannot be read.
        """
        file, plane = self.place(index)
        item = self.files.item(file)
        if plane is None or isinstance(item.image, OnePlane):
            return item
        return replace(item, image=OnePlane(item.image, plane), name=self.name(index))

    def labels(self) -> list[str | None] | None:
        """The label of each plane's file."""
        labels = self.files.labels()
        if labels is None:
            return None
        return [label for label, count in zip(labels, self.counts.tolist(), strict=True) for _ in range(count)]

    def fingerprint(self) -> str:
        """Hash the files' fingerprint and the number of planes of each."""
        digest = hashlib.sha256(f"planes {len(self)}\n{self.files.fingerprint()}\n".encode())
        digest.update(self._offsets.astype("<i8").tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        several = int((self.counts > 1).sum())
        if not several:
            return f"none of {len(self.files):,} files has several"
        kinds = ", ".join(f"{kind} in {count:,}" for kind, count in self.along.most_common())
        return (
            f"each is an image: {len(self):,} in {len(self.files):,} files, up to {int(self.counts.max()):,} in one; "
            f"{several:,} file{'' if several == 1 else 's'} with several ({kinds})"
        )


def _counted(source: Source, channels: int) -> Iterator[tuple[int, str]]:
    """Count the planes of each image of a source, and say what they are."""

    def path_of(index: int) -> Path | None:
        return source.path(index) if isinstance(source, FolderSource | SequenceSource) else None

    def quickly(index: int) -> tuple[int, str] | None:
        path = path_of(index)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD)
                if tiff.is_tiff(head):
                    return tiff.count_quickly(file, channels)
                return None if may_move(head) else (1, "")
        except (OSError, ValueError):  # a zero byte in the path
            return 1, ""

    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(source), _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, len(source)))
            for index, found in zip(indices, threads.map(quickly, indices), strict=True):
                yield found or _slowly(source, index, path_of(index), channels)


def _slowly(source: Source, index: int, path: Path | None, channels: int) -> tuple[int, str]:
    """Count planes with libraries whose settings belong to the process, and so in one thread."""
    try:
        if path is None:
            image = source.item(index).image
            return (1, "") if isinstance(image, OnePlane) else count_planes(image, channels)
        with path.open("rb") as file:
            return count_planes(file, channels)
    except (ImageError, OSError):
        return 1, ""
