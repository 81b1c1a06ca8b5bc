"""Where images come from: an index in, one undecoded image with its name and label out.

A source never holds pixels and never decodes; it is cheap to pickle and cheap to share with worker processes.
"""

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from dinoforge.errors import DataError, ImageError

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif"})

RawImage = bytes | Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Item:
    """One image as it lies in its source, not decoded.

    Args:
        image: Encoded bytes, a PIL image, an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W].
        name: What to call it in messages.
        label: Its class, where the source knows one. Never seen by training.
    """

    image: RawImage
    name: str
    label: str | None = None


@runtime_checkable
class Source(Protocol):
    """A finite, ordered collection of images."""

    def __len__(self) -> int: ...

    def item(self, index: int) -> Item:
        """Fetch one image. Raises: ImageError: it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Name one image without reading it."""
        ...

    def labels(self) -> list[str] | None:
        """One label per image, or None if the source knows none without reading the images."""
        ...

    def fingerprint(self) -> str:
        """Hash of the number and names of the images: two sources that agree order their images alike."""
        ...


def open_source(data: object) -> Source:
    """Make a source of what the user calls their data.

    Args:
        data: A folder's path, a Source, or any object with ``__len__`` and ``__getitem__`` (see SequenceSource).

    Raises:
        DataError: `data` is none of these, or holds no images.
    """
    if isinstance(data, str | os.PathLike):
        return FolderSource(data)
    if isinstance(data, Source):
        return data
    return SequenceSource(data)


class FolderSource:
    """All images below a folder, sorted by relative path.

    Found by extension (`EXTENSIONS`, any case), through symbolic links as ``find -L`` does; hidden files and folders
    and macOS archive residue (``__MACOSX``) are left out. Names that are not valid UTF-8 work: as Python strings they
    carry surrogate escapes, in messages the offending bytes read ``\\xNN``.

    The index is one bytes object and one array of offsets: the length of a path plus 8 bytes per image.

    Raises:
        DataError: The folder does not exist, is not a folder, cannot be read, or holds no images.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        names, others = _walk(self.root)
        if not names:
            seen = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5))
            raise DataError(
                f"no images in {printable(self.root)}: expected files named {', '.join(sorted(EXTENSIONS))}; "
                + (f"found {others.total()} other files ({seen})" if others else "found no files at all")
            )
        names.sort()
        self._names = b"".join(names)
        self._offsets = np.cumsum([0, *map(len, names)], dtype=np.int64)  # [count + 1]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def name(self, index: int) -> str:
        """Relative path with forward slashes, e.g. ``cats/tom.jpg``."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return os.fsdecode(self._names[self._offsets[index] : self._offsets[index + 1]])

    def item(self, index: int) -> Item:
        """Read one file.

        Raises:
            ImageError: It vanished, may not be read, or is empty.
        """
        name = self.name(index)
        return Item(image=_read_file(self.root / name), name=name, label=_top_folder(name))

    def labels(self) -> list[str] | None:
        """The top-level sub-folder of each image; None if an image lies in none."""
        labels = []
        for index in range(len(self)):
            label = _top_folder(self.name(index))
            if label is None:
                return None
            labels.append(label)
        return labels

    def fingerprint(self) -> str:
        """Hash of the sorted relative paths."""
        digest = hashlib.sha256(f"folder {len(self)}\n".encode())
        digest.update(self._offsets.astype("<i8").tobytes())
        digest.update(self._names)
        return digest.hexdigest()


class SequenceSource:
    """Any Python object with ``__len__`` and ``__getitem__``: a list of paths, an array of images, a data set.

    An item is encoded bytes, a path, a PIL image, an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W];
    or a tuple or list of such an image and its label; or a mapping with an ``image`` and perhaps a ``label``.
    With worker processes that are spawned rather than forked, the object must be picklable.

    Raises:
        DataError: The object has no length or items, is a mapping, or is empty.
    """

    def __init__(self, items: Any) -> None:
        if isinstance(items, Mapping) or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(
                f"data: expected a folder, or an object with __len__ and items by position, got {type(items).__name__}"
            )
        if len(items) == 0:
            raise DataError(f"data: the {type(items).__name__} is empty")
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        """The path where a list of paths says so, else ``item 17``."""
        if isinstance(self._items, list | tuple):
            image, _ = _image_and_label(self._items[index])
            if isinstance(image, str | os.PathLike):
                return os.fsdecode(image)
        return f"item {index}"

    def item(self, index: int) -> Item:
        """Fetch one item.

        Raises:
            ImageError: The object raises an exception, a path cannot be read, or the item is no image.
        """
        try:
            value = self._items[index]
        except Exception as error:  # the user's code: whatever it raises costs this image, not the run
            raise ImageError(f"{type(error).__name__}: {error}") from error
        image, label = _image_and_label(value)
        if isinstance(image, str | os.PathLike):
            image = _read_file(Path(os.fsdecode(image)))
        if not isinstance(image, RawImage):
            raise ImageError(
                "expected bytes, a path, a PIL image, an array or a tensor, alone or before a label; "
                f"got {type(image).__name__}"
            )
        return Item(image=image, name=self.name(index), label=label)

    def labels(self) -> list[str] | None:
        """The labels of a list or tuple in which every item has one; None for other objects: items would be read."""
        if not isinstance(self._items, list | tuple):
            return None
        labels = [label for _, label in map(_image_and_label, self._items) if label is not None]
        return labels if len(labels) == len(self) else None

    def fingerprint(self) -> str:
        """Hash of the number of items and of the paths, where a list of paths names them."""
        digest = hashlib.sha256(f"sequence {len(self)}\n".encode())
        if isinstance(self._items, list | tuple):
            for index in range(len(self)):
                digest.update(os.fsencode(self.name(index)) + b"\0")
        return digest.hexdigest()


def read_labels(csv_path: str | os.PathLike[str], source: Source) -> list[str]:
    """Read one label per image of a source from a table.

    The first column names the image, by its relative path or, where only one image has it, by its base name; the
    second is the label; more columns are ignored. Columns are separated by commas, semicolons or tabs. A first row
    whose name belongs to no image is taken for a header. Rows about images that the source lacks are ignored.

    Raises:
        DataError: The table cannot be read, has fewer than two columns, names an image ambiguously or labels it twice
            differently, or leaves images without a label.
    """
    path = Path(csv_path)
    indices = {source.name(index): index for index in range(len(source))}
    by_base_name: dict[str, list[int]] = defaultdict(list)
    for name, index in indices.items():
        by_base_name[PurePosixPath(name).name].append(index)

    labels: list[str | None] = [None] * len(source)
    strangers = []
    for line, name, label in _rows(path):
        if name in indices:
            found = [indices[name]]
        else:  # a path that is not there is not the same as a base name
            found = [] if "/" in name else by_base_name.get(name, [])
        if len(found) > 1:
            examples = ", ".join(printable(source.name(index)) for index in found[:3])
            raise DataError(
                f"{path}, line {line}: '{printable(name)}' could be any of {examples}: give the relative path"
            )
        if not found:
            strangers.append(printable(name))
            continue
        if not label:
            continue
        if labels[found[0]] not in (None, label):
            both = f"'{printable(labels[found[0]] or '')}' and '{printable(label)}'"
            raise DataError(f"{path}, line {line}: '{printable(name)}' is labelled both {both}")
        labels[found[0]] = label

    missing = [index for index, label in enumerate(labels) if label is None]
    if missing:
        examples = ", ".join(printable(source.name(index)) for index in missing[:3])
        hint = f"; names in the table look like: {', '.join(strangers[-3:])}" if strangers else ""
        raise DataError(f"{path}: no label for {len(missing)} of {len(source)} images, such as {examples}{hint}")
    return [label for label in labels if label is not None]


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, name, label of each row that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read labels from {path}: {error.strerror}") from error
    lines = text.splitlines()
    delimiter = next((mark for mark in ",;\t" if lines and mark in lines[0]), ",")
    reader = csv.reader(lines, delimiter=delimiter)
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) < 2:
            raise DataError(
                f"{path}, line {reader.line_num}: expected a file name and a label, got '{printable(row[0])}'"
            )
        yield reader.line_num, row[0].strip().replace("\\", "/").removeprefix("./"), row[1].strip()


def _walk(root: Path) -> tuple[list[bytes], Counter[str]]:
    """List the relative paths of the images below `root`, and count other files by extension."""
    names: list[bytes] = []
    others: Counter[str] = Counter()
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
                    if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                        continue
                    if _leads_to(entry.is_dir):
                        pending.append((entry.path, prefix + entry.name + b"/", above | {identity}))
                    elif (
                        _leads_to(entry.is_file) or entry.is_symlink()
                    ):  # a dangling link is an image that cannot be read
                        extension = os.fsdecode(os.path.splitext(entry.name)[1]).lower()
                        if extension[1:] in EXTENSIONS:
                            names.append(prefix + entry.name)
                        else:
                            others[printable(extension) or "without extension"] += 1
        except NotADirectoryError as error:
            raise DataError(f"{printable(root)} is a file; expected a folder of images") from error
        except FileNotFoundError as error:
            raise DataError(f"{printable(os.fsdecode(folder))} does not exist") from error
        except OSError as error:
            raise DataError(f"cannot read the folder {printable(os.fsdecode(folder))}: {error.strerror}") from error
    return names, others


def _leads_to(test: Callable[[], bool]) -> bool:
    """Ask an entry of a folder what it is; a link that leads to itself is nothing."""
    try:
        return test()
    except OSError:
        return False


def _read_file(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise ImageError("empty file")
    return data


def _top_folder(name: str) -> str | None:
    folder, slash, _ = name.partition("/")
    return folder if slash else None


def _image_and_label(value: Any) -> tuple[Any, str | None]:
    """Take an item of the user's object apart."""
    if isinstance(value, Mapping):
        image, label = value.get("image"), value.get("label")
    elif isinstance(value, tuple | list):
        image, label = value[0] if value else None, value[1] if len(value) > 1 else None
    else:
        return value, None
    if isinstance(label, np.ndarray | torch.Tensor) and label.ndim == 0:
        label = label.item()
    return image, None if label is None else str(label)


def printable(name: str | os.PathLike[str]) -> str:
    """A name that every terminal and file can take: bytes that are not UTF-8 read ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
