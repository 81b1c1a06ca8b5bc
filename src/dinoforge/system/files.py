"""Writing files so that each is whole or not there."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from dinoforge.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

_STRANGERS = frozenset(
    {
        ".ds_store",  # macOS
        ".localized",
        ".spotlight-v100",
        ".fseventsd",
        ".trashes",
        ".temporaryitems",
        "network trash folder",
        "temporary items",
        "__macosx",  # archives that macOS made
        "desktop.ini",  # Windows
        "thumbs.db",
        "ehthumbs.db",
        "$recycle.bin",
        "recycler",
        "recycled",
        "system volume information",
        "found.000",
        "lost+found",  # ext4
        ".directory",  # KDE
        "@eadir",  # Synology: thumbnails
        "@tmp",
        "#recycle",
        "#snapshot",
        "@recycle",  # QNAP
        "@recently-snapshot",
        ".@__thumb",
        ".snapshot",
        ".stfolder",  # Syncthing
        ".gitkeep",
        ".gitignore",
        ".keep",
        "__pycache__",
    }
)
"""Names, in lower case, of what systems put into any folder: metadata, copies, thumbnails and deleted files."""

_STRANGE_BEGINNINGS = ("._", ".trash-", ".nfs", ".fuse_hidden", ".smbdelete", ".dropbox")
"""How names of that kind begin that have a number or another name in them."""

_NO_FOLDER_SYNC = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "EACCES", "EPERM", "EISDIR")
    if hasattr(errno, name)
}
"""How file systems, such as SMB and some FUSE, say that they do not bring a folder's names to disk by themselves."""


def is_stranger(name: str) -> bool:
    """Whether a name belongs to a file or folder that systems put beside those of users."""
    return name.lower() in _STRANGERS or name.lower().startswith(_STRANGE_BEGINNINGS)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path``, sync it to disk, and only then give it its name.

    Raises:
        RunError: The disk is full or the file cannot be written; whatever was at ``path`` before is still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        _set_mode(temporary, mode)
        sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors tell a full disk their own way
        raise writing_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a place for a file or folder, and move what is there to ``path`` unless an error was raised.

    Files that are written beside it, such as the weights of a large ONNX file, come along. So does nothing else.

    Raises:
        RunError: Something is at ``path`` already, the disk is full, or the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    if path.exists():
        raise RunError(f"{path} exists: choose another place with --out, or delete it if you no longer need it")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        probe = aside / ".mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        yield aside / path.name
        for file in aside.rglob("*"):
            if file.is_file():
                _set_mode(file, mode)
                sync(file)
        for entry in sorted(aside.iterdir(), key=lambda entry: entry.name == path.name):  # it comes last
            entry.rename(path.with_name(entry.name))
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = writing_error(path, error)  # before what was written is removed, or a full disk has room again
        raise reason from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text by ``write_atomically``."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def writing_error(path: Path, error: Exception) -> RunError:
    """The error for a user whose disk does not take a file."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and _is_full(path.parent)):
        return RunError(f"no space left to write {path}: free some, then run the same command again to continue")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return RunError(f"cannot write {path} ({reason}): choose another place with --out")


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < 2**20
    except OSError:
        return False


def _set_mode(file: Path, mode: int) -> None:
    """Gives a file the permissions that a new one has; safetensors leaves its own to their owner alone."""
    if file.stat().st_mode != mode:
        with suppress(OSError):  # on file systems without permissions
            file.chmod(stat.S_IMODE(mode))


def sync(file: Path) -> None:
    """Sync a file's content to disk."""
    with file.open("r+b") as stream:  # Windows syncs what may be written alone
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a folder's names to disk, where the file system does that when asked.

    Raises:
        OSError: The disk failed.
    """
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same contents always make the same bytes.

    Args:
        tensors: Contiguous tensors on the CPU by name.
        path: The file to write.
        metadata: Texts for its header.

    Raises:
        SafetensorError, OSError: The file cannot be written.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=dict(metadata))
    order_header(path)


def order_header(path: Path) -> None:
    """Sort the metadata in a safetensors file's header, which the library writes in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(ordered) == length:  # or else another version of the library writes JSON otherwise
            file.seek(8)
            file.write(ordered)
