"""Checkpoints of a run: everything that it needs to continue, in a folder for each step.

step_00000100/
    shard-….safetensors   every tensor, by torch.distributed.checkpoint
    state.json            every number
    SHA256SUMS            of the files above, as `sha256sum --check` reads it

A folder is written aside, brought to disk, and only then gets its name; it loses its name before it is deleted. So
whatever moment the process is killed at, a folder with a checkpoint's name is a whole checkpoint, and what later
happens to its files is found by their sums. There is no pickle in it: nothing in a checkpoint can run code.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dinoforge.errors import RunError, WeightsError
from dinoforge.system import distributed
from dinoforge.system.files import is_stranger, order_header, sync, sync_folder, writing_error

_NAME = re.compile(r"step_(\d{8,})")
_STATE, _SUMS = "state.json", "SHA256SUMS"
FILE_BYTES = 2**26
"""Rough size of a file of tensors. A file is put together in memory, so this bounds what writing takes beside them."""


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def path_of(run: Path, step: int) -> Path:
    return folder_of(run) / f"step_{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints that a run has, in rising order."""
    folder = folder_of(run)
    names = [m for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))] if folder.is_dir() else []
    return sorted(int(m[1]) for m in names)


def save(
    run: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, file_bytes: int = FILE_BYTES
) -> Path:
    """Write the state after ``step`` steps; the checkpoint is complete or not there.

    Args:
        run: The run directory.
        step: Steps done so far.
        tensors: Tensors by name, on any device.
        values: Everything else, as JSON has it.
        file_bytes: Rough size of a file of tensors.

    Raises:
        RunError: The disk is full, or the checkpoint cannot be written.
    """
    path = path_of(run, step)
    # A name of this process: what another user's process left may be in the way for good.
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write_tensors(aside, tensors, file_bytes)
        for file in aside.glob("*.safetensors"):
            order_header(file)
        (aside / _STATE).write_text(json.dumps(values), encoding="utf-8")
        written = [file for file in sorted(aside.iterdir()) if not is_stranger(file.name)]
        sums = [f"{_sum_of(file)}  {file.name}\n" for file in written]
        (aside / _SUMS).write_text("".join(sums), encoding="utf-8")
        for file in [*written, aside / _SUMS]:
            sync(file)
        sync_folder(aside)
        _remove(path)
        aside.rename(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors tell a full disk their own way
        reason = writing_error(path, error)  # before what was written is removed, or a full disk has room again
        raise reason from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def load(run: Path, step: int, tensors: Mapping[str, Tensor], *, verify: bool = True) -> dict[str, Any]:
    """Read the state after ``step`` steps: fill ``tensors``, and return the values.

    A sharded tensor gets its shard, however the checkpoint was made: on any number of ranks, sharded or not.

    Args:
        run: The run directory.
        step: Step of the checkpoint.
        tensors: The tensors to fill, by name.
        verify: Whether to compare the sums first, as ``newest`` does.

    Raises:
        WeightsError: The checkpoint is damaged (the sums find any changed byte), or is of other networks.
    """
    path = path_of(run, step)
    values = _verified(path) if verify else _values(path)
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    reader = HuggingFaceStorageReader(str(path))
    own = [str(path / name) for name in _sums(path)]
    # It would read whatever ends in .safetensors, such as ._shard-….safetensors.
    reader.fs.ls = lambda path: own  # type: ignore[method-assign]
    try:
        with _own_errors():
            read(dict(tensors), storage_reader=reader, no_dist=True)
    except (OSError, RuntimeError, ValueError, AssertionError, SafetensorError) as error:
        raise WeightsError(f"the checkpoint {path} does not fit this run: {error}") from error
    return values


def newest(run: Path) -> tuple[int | None, list[str]]:
    """The step of the newest checkpoint that is whole.

    Damaged ones are set aside as ``….damaged``: they must not count among the checkpoints that are kept.

    Returns:
        Its step, None if there is no checkpoint yet; and a sentence on each damaged one.

    Raises:
        WeightsError: There are checkpoints, and none is whole.
    """
    damage = []
    for step in reversed(steps(run)):
        try:
            _verified(path_of(run, step))
        except WeightsError as error:
            damage.append(str(error))
            continue
        for bad in (s for s in steps(run) if s > step):
            path = path_of(run, bad)
            aside = path.with_name(path.name + ".damaged")
            try:
                _remove(aside)
                path.rename(aside)
            except OSError as error:
                raise RunError(f"cannot set the damaged checkpoint {path} aside: {error.strerror}") from error
        return step, damage
    if damage:
        raise WeightsError(
            f"{'; '.join(damage)}. No other checkpoint is left: restore one, or delete {folder_of(run)} to start anew"
        )
    return None, []


def prune(run: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Delete all checkpoints but the newest ``keep_last`` and those at multiples of ``keep_every``.

    Raises:
        RunError: A checkpoint cannot be deleted.
    """
    for step in steps(run)[:-keep_last]:
        if keep_every is None or step % keep_every:
            try:
                _remove(path_of(run, step))
            except OSError as error:
                raise RunError(f"cannot delete the old checkpoint {path_of(run, step)}: {error.strerror}") from error


def clean(run: Path) -> list[str]:
    """Delete what a killed process left half written or half deleted.

    Returns:
        A sentence on each that cannot be deleted, such as another user's; it only takes room.
    """
    kept = []
    if (folder := folder_of(run)).is_dir():
        for left in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.deleted")]:
            try:
                shutil.rmtree(left)
            except OSError as error:
                kept.append(f"{left}, half of a checkpoint, cannot be deleted: {error.strerror}. It only takes room")
    return kept


def _remove(path: Path) -> None:
    """Takes its name from a folder before its files, so that it is never seen with some of them."""
    if path.exists():
        gone = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.deleted")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)  # what stays, as a file that is open elsewhere, goes at the next start


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], file_bytes: int) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    files: dict[str, int] = {}
    room, number = file_bytes, 1
    for name, tensor in tensors.items():
        if tensor.nbytes > room < file_bytes:
            room, number = file_bytes, number + 1
        files[name] = number
        room -= tensor.nbytes
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _own_errors():
        write(dict(tensors), storage_writer=writer, no_dist=True)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Takes an error out of what torch.distributed.checkpoint wraps it in, which is no ``Exception``."""
    from torch.distributed.checkpoint.api import CheckpointException

    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from None


def _verified(path: Path) -> dict[str, Any]:
    """The values of a checkpoint, if every byte of its files is as it was written; other files do not matter."""
    damaged = f"the checkpoint {path} is damaged"
    sums = _sums(path)
    try:
        if missing := [name for name in sorted(sums) if not (path / name).is_file()]:
            raise WeightsError(f"{damaged}: {', '.join(missing)} missing")
        if wrong := [name for name, digest in sorted(sums.items()) if _sum_of(path / name) != digest]:
            raise WeightsError(f"{damaged}: the checksum of {', '.join(wrong)} is wrong")
    except OSError as error:
        raise WeightsError(f"{damaged}: {error.filename} cannot be read ({error.strerror})") from error
    return _values(path)


def _sums(path: Path) -> dict[str, str]:
    """Files of a checkpoint and their sums."""
    try:
        lines = (path / _SUMS).read_text(encoding="ascii").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"the checkpoint {path} is damaged: {_SUMS} cannot be read ({type(error).__name__})"
        ) from error
    if _STATE not in sums:  # cut off, or empty
        raise WeightsError(f"the checkpoint {path} is damaged: {_SUMS} does not name {_STATE}")
    return sums


def _values(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"the checkpoint {path} is damaged: {_STATE} cannot be read ({type(error).__name__})"
        ) from error
    return values


def _sum_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def whole(tensors: Mapping[str, Tensor], *, copy: bool) -> dict[str, Tensor]:
    """The tensors as they are now, sharded ones put together for the first rank to save; every rank has to call this.

    Args:
        tensors: The tensors of this rank by name.
        copy: Whether to make copies in main memory, to be saved while training goes on.

    Returns:
        Nothing on other ranks than the first.
    """
    result = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            full = distributed.whole(tensor)
            if not distributed.is_first():
                continue
            if full is tensor:
                result[name] = full.detach().to("cpu", copy=True) if copy else full
            else:  # a copy already, which must not stay on the device
                result[name] = full.detach().to("cpu")
    return result
