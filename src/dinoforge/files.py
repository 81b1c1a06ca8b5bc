"""Files that are whole or not there."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from dinoforge.errors import RunError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` make a file beside ``path``, brings it to disk, and only then gives it its name.

    Raises:
        RunError: no space, or not writable; whatever was at ``path`` before is still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
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
    """Gives a place for a file or folder of this name, and puts what is there at ``path`` if nothing was raised.

    Files that are written beside it, such as the weights of a large ONNX file, come along. So does nothing else.

    Raises:
        RunError: something is at ``path``; no space, or not writable.
    """
    aside = path.with_name(f".{path.name}.partial")
    if path.exists():
        raise RunError(f"{path} exists: choose another place with --out, or delete it if you no longer need it")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside / path.name
        for file in aside.rglob("*"):
            if file.is_file():
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
    """``write_atomically`` for a text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def writing_error(path: Path, error: Exception) -> RunError:
    """What to tell a user whose disk does not take a file."""
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


def sync(file: Path) -> None:
    """Brings a file's content to disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Brings a folder's names to disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
