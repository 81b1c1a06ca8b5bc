"""The content of a folder: the images, and the files beside them that are left out."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dinoforge.data.kinds import EXTENSIONS, IMAGE_EXTENSIONS, OTHER_EXTENSIONS, Kind, extension, kind_of
from dinoforge.data.names import printable
from dinoforge.errors import DataError
from dinoforge.system.files import is_stranger

_THUMBNAILS = frozenset({"thumbnails", "thumbnail"})
"""Folders, in lower case, of small copies of the images outside."""

_ARRAY_FOLDERS = frozenset({"zarr", "n5"})
"""Ends of the names of folders that are one array each."""

MOST_COUNTED = 10_000  # files of a folder that is left out: snapshots and .git have many
_NO_EXTENSION = "without extension"
_SAMPLES = 8  # files of a kind that are looked at
_MOST_KINDS = 12  # kinds of files that are looked at, or named
_LOOK = 4096  # bytes


@dataclass(frozen=True)
class Contents:
    """The images in a folder, and the files that are left out.

    Args:
        names: Relative paths of the images with forward slashes, sorted.
        left_out: The number of other files by kind, in words such as ``.dcm (DICOM)``, most frequent first.
        hint: Advice on the most frequent kind; '' where there is none.
    """

    names: list[bytes]
    left_out: dict[str, int]
    hint: str = ""


def walk(root: Path, *, most_counted: int = MOST_COUNTED) -> Contents:
    """List the images below a folder, and count the other files by kind.

    Images are told by the ends of their names. A few of the files whose names tell nothing are opened.

    Args:
        root: The folder.
        most_counted: The most files that are counted in a folder that is left out.

    Raises:
        DataError: The folder does not exist, is not a folder, or cannot be read.
    """
    names: list[bytes] = []
    others = _Others(most_counted)
    # Each pending folder knows the real folders above it: a link to one of them would never end.
    pending: list[tuple[bytes, bytes, frozenset[tuple[int, int]]]] = [(os.fsencode(root), b"", frozenset())]
    while pending:
        folder, prefix, above = pending.pop()
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = os.fsdecode(entry.name)
                    if _leads_to(entry.is_dir):
                        if name.startswith(".") or is_stranger(name):
                            others.add_folder(name, entry.path)
                        elif _is_run(entry.path):
                            others.add_folder(name, entry.path, "a run of dinoforge")
                        elif extension(name) in _ARRAY_FOLDERS:
                            others.add(_in_words(extension(name)))
                        else:
                            pending.append((entry.path, prefix + entry.name + b"/", above | {identity}))
                    elif name.startswith("."):
                        others.add("hidden")
                    elif _leads_to(entry.is_file) or entry.is_symlink():  # a dangling link cannot be read, and is told
                        if extension(name) in IMAGE_EXTENSIONS:
                            names.append(prefix + entry.name)
                        else:
                            others.add_file(name, entry.path)
        except NotADirectoryError as error:
            raise DataError(f"{printable(root)} is a file; expected a folder of images") from error
        except FileNotFoundError as error:
            raise DataError(f"{printable(os.fsdecode(folder))} does not exist") from error
        except OSError as error:
            raise DataError(f"cannot read the folder {printable(os.fsdecode(folder))}: {error.strerror}") from error
    names.sort()
    return Contents(_without_thumbnails(names, others), *others.summary())


def no_images(root: Path, contents: Contents) -> str:
    """Say why a folder without images cannot be used, and what it holds."""
    expected = f"no images in {printable(root)}: expected files of {', '.join(EXTENSIONS)}"
    if not contents.left_out:
        return f"{expected}; found no files at all"
    hint = f". The way out: {contents.hint}" if contents.hint else ""
    return f"{expected}; found only others, {left_out_in_words(contents.left_out)}{hint}"


def left_out_in_words(left_out: Mapping[str, int]) -> str:
    """Say what was left out, in words such as ``52 files: 50 .dcm (DICOM), 2 hidden``."""
    total = sum(left_out.values())
    kinds = sorted(left_out.items(), key=lambda kind: -kind[1])
    said = [f"{count:,} {words}" for words, count in kinds[:_MOST_KINDS]]
    if rest := kinds[_MOST_KINDS:]:
        said.append(f"{sum(count for _, count in rest):,} of other kinds")
    return f"{total:,} file{'' if total == 1 else 's'}: {', '.join(said)}"


@dataclass
class _Others:
    """The files that are left out, by kind."""

    most_counted: int
    counts: Counter[str] = field(default_factory=Counter)
    samples: defaultdict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))

    def add(self, words: str, count: int = 1) -> None:
        if count:
            self.counts[words] += count

    def add_folder(self, name: str, path: bytes, what: str = "") -> None:
        """Count the files below a folder that is left out; parts of it that may not be opened do not matter."""
        words = f"in {printable(name)}" + (f" ({what})" if what else "")
        count = 0
        for _, _, files in os.walk(path):
            count += len(files)
            if count >= self.most_counted:
                self.add(f"or more {words}", count)
                return
        self.add(words, count)

    def add_file(self, name: str, path: bytes) -> None:
        if name.lower() == "thumbs.db":
            self.add("Thumbs.db")
            return
        end = extension(name)
        # 'IM.0001' and '1.2.840.113619' (DICOM) have no end that says anything, nor have hashes.
        is_end = end in OTHER_EXTENSIONS or re.fullmatch(r"(?!\d+$)[\w~-]{1,16}|\w+\.gz", end)
        words = _in_words(end) if is_end else _NO_EXTENSION
        self.add(words)
        if len(self.samples[words]) < _SAMPLES:
            self.samples[words].append(path)

    def summary(self) -> tuple[dict[str, int], str]:
        """The counts, most frequent first, and advice on the most frequent kind that the content of files tells."""
        named: dict[str, int] = {}
        hint = ""
        for number, (words, count) in enumerate(sorted(self.counts.items(), key=lambda kind: (-kind[1], kind[0]))):
            kinds = _look_at(self.samples[words]) if words in self.samples and number < _MOST_KINDS else []
            if kinds:
                if not hint and not (kinds[0].is_image and "(" in words):
                    hint = _way_out(kinds[0])
                if "(" not in words and (kinds[0].is_image or words == _NO_EXTENSION):
                    some = "" if len(kinds) == 1 else "some "
                    words = f"{words} ({some}{kinds[0].name} by content)"
            named[words] = named.get(words, 0) + count
        return named, hint


def _in_words(end: str) -> str:
    known = OTHER_EXTENSIONS.get(end)
    return f".{printable(end)} ({known})" if known else f".{printable(end)}"


def _way_out(kind: Kind) -> str:
    if kind.is_image:
        return f"give {kind.name} files the end .{EXTENSIONS[kind.name][0]}"
    return f"{kind.name}: {kind.hint}"


def _look_at(paths: Iterable[bytes]) -> list[Kind]:
    """Read the kinds of a few files, images first; none where there is no advice on the first."""
    found: set[Kind] = set()
    for path in paths:
        with suppress(OSError):  # a file that cannot be read is left out all the same, under its name
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    found.add(kind_of(file.read(_LOOK)))
    kinds = sorted(found, key=lambda kind: (not kind.is_image, not kind.hint, kind.name))
    return kinds if kinds and (kinds[0].is_image or kinds[0].hint) else []


def _without_thumbnails(names: list[bytes], others: _Others) -> list[bytes]:
    """Leave out folders of thumbnails, unless they are all there is."""

    def folder_of(name: bytes) -> str | None:
        found = (os.fsdecode(part) for part in name.split(b"/")[:-1])
        return next((part for part in found if part.lower() in _THUMBNAILS), None)

    if not any(b"humbnail" in name for name in names) and not any(b"THUMBNAIL" in name for name in names):
        return names  # the common case
    small = {name: folder for name in names if (folder := folder_of(name))}
    if len(small) == len(names):
        return names
    for folder in small.values():
        others.add(f"in {printable(folder)}")
    return [name for name in names if name not in small]


def _is_run(folder: bytes) -> bool:
    """Whether a folder is a run directory: its pictures are no data."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in (b"run.json", b"recipe.yaml"))


def _leads_to(test: Callable[[], bool]) -> bool:
    """Ask an entry of a folder what it is; a link that leads to itself is nothing."""
    try:
        return test()
    except OSError:
        return False
