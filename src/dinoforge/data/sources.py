"""Sources of images: an index in, one undecoded image with its name and label out.

A source never holds pixels and never decodes; it is cheap to pickle and cheap to share with worker processes.
"""

import errno
import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from dinoforge.data.classes import class_folders, few
from dinoforge.data.folders import no_images, walk
from dinoforge.data.kinds import IMAGE_EXTENSIONS
from dinoforge.data.names import printable as printable
from dinoforge.errors import DataError, ImageError

EXTENSIONS = IMAGE_EXTENSIONS

RawImage = bytes | Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class OnePlane:
    """One plane (z, time, page, frame) of an image with several; `dinoforge.data.decode` reads no other.

    Args:
        image: The image with all planes.
        number: The number of the plane, from 0.
    """

    image: RawImage
    number: int


@dataclass(frozen=True)
class Item:
    """One image as it lies in its source, not decoded.

    Args:
        image: Encoded bytes, a PIL image, an array [H, W] or [H, W, C], a tensor [H, W] or [C, H, W], or one plane of
            such an image.
        name: The name of the image in messages.
        label: The class of the image, where the source knows one; training never sees it.
    """

    image: RawImage | OnePlane
    name: str
    label: str | None = None


@runtime_checkable
class Source(Protocol):
    """A finite, ordered collection of images."""

    def __len__(self) -> int: ...

    def item(self, index: int) -> Item:
        """Fetch one image.

        Raises:
            ImageError: The image cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Name one image without reading it."""
        ...

    def labels(self) -> list[str | None] | None:
        """Give one label per image, None for one without; or None if no label is known without reading the images."""
        ...

    def fingerprint(self) -> str:
        """Hash the number and names of the images: two sources with one fingerprint order their images alike."""
        ...


def open_source(data: object) -> Source:
    """Make a source of the user's data.

    Args:
        data: A folder's path, a Source, or any object with ``__len__`` and ``__getitem__`` (see SequenceSource).

    Raises:
        DataError: `data` is none of these, or holds no images.
    """
    if isinstance(data, str | os.PathLike):
        if not os.fspath(data).strip():
            raise DataError("data: the path is empty, as when a variable is not set: expected a folder")
        return FolderSource(Path(data).expanduser())
    if isinstance(data, Source):
        return data
    return SequenceSource(data)


class FolderSource:
    """All images below a folder, sorted by relative path.

    Images are found by the ends of their names (`dinoforge.data.kinds.EXTENSIONS`, any case), through symbolic links
    like ``find -L``. Hidden files and folders are left out, and so are folders that systems put beside images:
    thumbnails (``@eaDir``, ``thumbnails``), deleted files (``$RECYCLE.BIN``, ``lost+found``), residue of archives
    (``__MACOSX``). Names that are not valid UTF-8 work: as Python strings they carry surrogate escapes, and in messages
    the offending bytes read ``\\xNN``.

    The index is one bytes object and one array of offsets: the length of a path plus 8 bytes per image.

    Args:
        root: The folder.

    Raises:
        DataError: The folder does not exist, is not a folder, cannot be read, or holds no images.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        contents = walk(self.root)
        if not contents.names:
            raise DataError(no_images(self.root, contents))
        self.left_out: Mapping[str, int] = contents.left_out
        """The number of files that are left out by kind, in words such as ``.dcm (DICOM)``."""
        self.classes = class_folders(contents.names)
        """The sub-folders that are labels, or the reason why none are."""
        self._names = b"".join(contents.names)
        self._offsets = np.cumsum([0, *map(len, contents.names)], dtype=np.int64)  # [count + 1]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def name(self, index: int) -> str:
        """Give the relative path of an image with forward slashes, e.g. ``cats/tom.jpg``."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return os.fsdecode(self._names[self._offsets[index] : self._offsets[index + 1]])

    def path(self, index: int) -> Path:
        """Give the path of an image's file."""
        return self.root / self.name(index)

    def item(self, index: int) -> Item:
        """Read one file.

        Raises:
            ImageError: The file vanished, may not be read, or is empty.
        """
        name = self.name(index)
        return Item(image=_read_file(self.root / name), name=name, label=self.classes.label(name))

    def labels(self) -> list[str | None] | None:
        """Give the sub-folder that is each image's class, by `classes`; None where no sub-folders are classes."""
        if self.classes.depth is None:
            return None
        return [self.classes.label(self.name(index)) for index in range(len(self))]

    def fingerprint(self) -> str:
        """Hash the sorted relative paths."""
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
        # Zarr's arrays have a shape and no length.
        has_length = hasattr(items, "__len__") or (isinstance(getattr(items, "shape", None), tuple) and items.shape)
        if isinstance(items, Mapping) or not (has_length and hasattr(items, "__getitem__")):
            raise DataError(
                f"data: expected a folder, or an object with __len__ and items by position, got {type(items).__name__}"
            )
        self._items = items
        if len(self) == 0:
            raise DataError(f"data: the {type(items).__name__} is empty")

    def __len__(self) -> int:
        return len(self._items) if hasattr(self._items, "__len__") else int(self._items.shape[0])

    def name(self, index: int) -> str:
        """Give the path of an item in a list of paths, else ``item 17``."""
        path = self._path(index)
        return f"item {index}" if path is None else path

    def path(self, index: int) -> Path | None:
        """Give the path of an item's file; None where the items are not a list of paths."""
        path = self._path(index)
        return None if path is None else Path(path)

    def _path(self, index: int) -> str | None:
        if isinstance(self._items, list | tuple):
            image, _ = _image_and_label(self._items[index])
            if isinstance(image, str | os.PathLike):
                return os.fsdecode(image)
        return None

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

    def labels(self) -> list[str | None] | None:
        """Give the labels of a list or tuple in which all items but a few have one.

        It is None where more items lack one, and for other objects, whose items would have to be read.
        """
        if not isinstance(self._items, list | tuple):
            return None
        labels = [label for _, label in map(_image_and_label, self._items)]
        return labels if few(labels.count(None), len(labels)) else None

    def why_no_labels(self) -> str:
        """Say why `labels` gives none."""
        if not isinstance(self._items, list | tuple):
            return (
                f"data of type {type(self._items).__name__} are not asked for labels, since that would read the images"
            )
        without = [index for index, item in enumerate(self._items) if _image_and_label(item)[1] is None]
        if len(without) == len(self):
            return "the items hold no text or number beside the image"
        first = self.name(without[0])
        return f"{len(without):,} of {len(self):,} items have no text or number beside the image, such as {first}"

    def fingerprint(self) -> str:
        """Hash the number of items, and their paths in a list of paths."""
        digest = hashlib.sha256(f"sequence {len(self)}\n".encode())
        if isinstance(self._items, list | tuple):
            for index in range(len(self)):
                digest.update(os.fsencode(self.name(index)) + b"\0")
        return digest.hexdigest()


_STORAGE = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EAGAIN", "EREMOTEIO", "ENETDOWN", "ENETRESET")
    if hasattr(errno, name)
}
"""Errors by which storage, such as a network drive, says that it has failed for the moment."""

_PATIENCE = (0.1, 0.5, 2.0)
"""The waits in seconds before failed storage is asked again, since an image that is left out changes a run."""


def _read_file(path: Path) -> bytes:
    try:
        data = _read_patiently(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise ImageError("empty file")
    return data


def _read_patiently(path: Path) -> bytes:
    for seconds in _PATIENCE:
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
        time.sleep(seconds)
    return path.read_bytes()


def _image_and_label(value: Any) -> tuple[Any, str | None]:
    """Take an item of the user's object apart into image and label."""
    if isinstance(value, Mapping):
        image, label = value.get("image"), value.get("label")
    elif isinstance(value, tuple | list):
        image, label = value[0] if value else None, value[1] if len(value) > 1 else None
    else:
        return value, None
    if isinstance(label, np.ndarray | torch.Tensor) and label.ndim == 0:
        label = label.item()
    # Masks, boxes and one-hot rows are not classes, and a table's NaN means that there is no class.
    if not isinstance(label, str | bytes | int | float | np.generic | Enum) or label != label:
        return image, None
    return image, str(label) or None
