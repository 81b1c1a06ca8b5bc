"""Checks before data workers start: room for their batches, a script that they can import, images that can be sent."""

import copyreg
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import util
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch

from dinoforge.errors import DataError
from dinoforge.system import distributed

SHM = Path("/dev/shm")
UNGUARDED = 86  # exit code of a worker that would have started the run again
_NOT_THERE = 87  # exit code of a trial in whose script a class is missing
_DESCRIPTORS_OF_A_WORKER = 4  # two pipes here: to its queue, and to see it end
_SPARE_DESCRIPTORS = 64  # descriptors for files of the run, and ten that PyTorch keeps free
_SOCKET_PATH = {"darwin": 104}.get(sys.platform, 108) - 1  # characters
_SECONDS_TO_IMPORT = 600.0  # the script, in a worker: as long as a batch may take


def refuse_second_start() -> None:
    """End this process at once if it is a worker that is still importing the script that started it.

    Every function that starts workers, or writes files that a second start would overwrite, calls this first: under
    spawn and forkserver a script without a main guard runs again in each worker. The rest of the script does not run;
    the process that started the worker says why, see `Workers.failure`.
    """
    # multiprocessing asks the same before it starts a process.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # closed, or None
                stream.flush()
        os._exit(UNGUARDED)


@dataclass(frozen=True)
class Needs:
    """The needs of workers and of the batches in flight.

    Args:
        workers: The number of processes.
        batches: The most batches in flight: those made ahead, and the one in use.
        batch_bytes: The bytes of a batch's tensors.
        batch_tensors: The number of a batch's tensors, and so of its file descriptors.
        key: The key of the recipe or the option that sets the number of workers.
    """

    workers: int
    batches: int
    batch_bytes: int
    batch_tensors: int
    key: str = "train.num_workers"


def require_room(needs: Needs) -> None:
    """Check before workers start that they can hand their batches over; otherwise a batch would never come.

    The soft limit of open files is raised where the hard limit allows it.

    Raises:
        DataError: There is too little shared memory, too few file descriptors, or no folder for sockets.
    """
    _require_shared_memory(needs)
    _require_descriptors(needs)
    _require_sockets(needs.key)


def _require_shared_memory(needs: Needs) -> None:
    room = _shared_memory()
    if room is None:
        return
    free, total = room
    wanted = needs.batches * needs.batch_bytes
    ranks = distributed.local_world_size()  # they share it, and others may have taken their part already
    if wanted <= free and ranks * wanted <= total:
        return
    of_ranks = f" for each of {ranks} ranks" if ranks > 1 else ""
    raise DataError(
        f"{SHM} has {_mebibytes(free)} free of {_mebibytes(total)}, and batches in flight take up to "
        f"{_mebibytes(wanted)}{of_ranks}. {more_shared_memory(ranks * wanted, needs.key)}"
    )


def _shared_memory() -> tuple[int, int] | None:
    """The free bytes and all bytes of shared memory in `SHM`; None where tensors for other processes lie elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        room = os.statvfs(SHM)
    except OSError:  # then the first shared tensor says what is wrong
        return None
    return room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize


def more_shared_memory(wanted: int, key: str) -> str:
    gibibytes = max(1, -(-wanted * 5 // (4 * 2**30)))
    return (
        f"Start the container with --shm-size={gibibytes}g (docker) or an emptyDir of medium Memory at {SHM} "
        f"(Kubernetes), or use fewer {key} ({key}=0 needs none) or smaller batches"
    )


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB" if number < 100 * 2**20 else f"{number / 2**20:,.0f} MiB"


def _require_descriptors(needs: Needs) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    by_descriptor = torch.multiprocessing.get_sharing_strategy() == "file_descriptor"
    wanted = (
        _open_descriptors()
        + needs.workers * _DESCRIPTORS_OF_A_WORKER
        + needs.batches * needs.batch_tensors * by_descriptor
        + _SPARE_DESCRIPTORS
    )
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard == resource.RLIM_INFINITY or wanted <= hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS has a limit of its own below an infinite one
            hard = soft
        else:
            return
    raise DataError(
        f"{needs.workers} data workers need about {wanted:,} open files, and {hard:,} are allowed. "
        f"{_more_descriptors(wanted, needs.key)}"
    )


def _open_descriptors() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(os.listdir(folder))
    return 64


def _more_descriptors(wanted: int, key: str) -> str:
    return (
        f"Allow more (ulimit -n {max(4096, 2 * wanted)}; docker: --ulimit nofile={max(4096, 2 * wanted)}), "
        f"or use fewer {key} ({key}=0 needs none)"
    )


def _require_sockets(key: str) -> None:
    """Make a socket like those through which multiprocessing passes file descriptors."""
    if sys.platform == "win32" or not hasattr(socket, "AF_UNIX"):
        return
    # Newer versions of Python look for a shorter folder where the usual one is too long.
    choose = getattr(util, "_get_base_temp_dir", None)
    try:
        base = str(choose(tempfile)) if choose else tempfile.gettempdir()
    except OSError as error:
        raise DataError(
            f"there is no temporary folder to write to, where data workers need sockets: {error}. {_other_folder(key)}"
        ) from error
    try:
        with (
            tempfile.TemporaryDirectory(prefix="pymp-", dir=base) as folder,
            socket.socket(socket.AF_UNIX) as trial,
        ):
            path = os.path.join(folder, "listener-12345678")
            if len(os.fsencode(path)) > _SOCKET_PATH:
                raise DataError(
                    f"the temporary folder {base} has {len(os.fsencode(base))} characters: data workers make sockets "
                    f"there, whose paths may have {_SOCKET_PATH}, so the folder "
                    f"{_SOCKET_PATH - len(os.fsencode(path)) + len(os.fsencode(base))}. {_other_folder(key)}"
                )
            trial.bind(path)
    except OSError as error:
        raise DataError(
            f"data workers need sockets in the temporary folder {base}, and none can be made there: "
            f"{error.strerror or error}. {_other_folder(key)}"
        ) from error


def _other_folder(key: str) -> str:
    return f"Set TMPDIR to another folder, such as /tmp or (docker) --tmpfs /tmp, or set {key}=0"


def require_sendable(data: object, key: str = "train.num_workers") -> None:
    """Check that workers can be given the user's images where they do not inherit them (spawn, forkserver).

    Args:
        data: The images.
        key: The key of the recipe or the option that sets the number of workers.

    Raises:
        DataError: A part of the images cannot be pickled, workers cannot import the script, the script lacks a main
            guard, or this process may have no workers.
    """
    if multiprocessing.current_process().daemon:
        raise DataError(
            "this process is itself a worker of multiprocessing (daemonic), which may start no data workers: "
            f"set {key}=0, or start it by other means"
        )
    method = multiprocessing.get_start_method()
    if method == "fork":
        return
    script = script_of_workers()
    if script is not None and not script.exists():
        raise DataError(
            f"data workers are started by {method} here and import the script first, but there is no {script}, as when "
            f"Python reads it from its standard input. Save it as a file, or set {key}=0"
        )
    trial = _Trial(main_is_importable=script is not None)
    try:
        trial.dump(data)
    except Exception as error:  # __reduce__ and __getstate__ may raise anything
        holder = _holder(data, trial.last)
        which = f"{holder[1]!r} of {type(holder[0]).__name__} is " if holder else "it holds "
        raise DataError(
            f"the images cannot be given to data workers, which are started by {method} here and get a copy: {which}"
            f"{_described(trial.last)}: {error}. Make them objects of a class that stands at the top of a module and "
            f"opens its files in __getitem__, or set {key}=0"
        ) from error

    if script is not None:
        _require_importable(script, frozenset(trial.of_script), method, key)


@cache  # a loader that starts again finds the same script
def _require_importable(script: Path, names: frozenset[str], method: str, key: str) -> None:
    """Let one process import the script before all workers do.

    A worker that ends while it imports, or before it has read the images, would be waited for without end.

    Args:
        script: The script.
        names: Names of classes and functions that the script has to define.
        method: The way in which processes are started.
        key: The key of the recipe or the option that sets the number of workers.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=exec, args=(_LOOK_FOR.format(names=sorted(names), code=_NOT_THERE),)
    )
    process.start()
    try:
        process.join(_SECONDS_TO_IMPORT)
        code = process.exitcode
    finally:
        process.kill()
    if code == 0:
        return
    if code == UNGUARDED:
        raise DataError(unguarded(method, key))
    if code == _NOT_THERE:
        raise DataError(
            f"data workers are started by {method} here and import {script} first, which then lacks "
            f'{" or ".join(sorted(names))}: move that out of  if __name__ == "__main__":  or set {key}=0'
        )
    how = f"takes more than {_SECONDS_TO_IMPORT:.0f} s" if code is None else f"fails there (exit code {code})"
    raise DataError(
        f"data workers are started by {method} here and import {script} first, which {how}: what is printed above says "
        f'why. Put all but definitions under  if __name__ == "__main__":  or set {key}=0'
    )


_LOOK_FOR = """
import operator, sys
for name in {names!r}:
    try:
        operator.attrgetter(name)(sys.modules["__main__"])
    except AttributeError:
        sys.exit({code})
"""
"""A program rather than a function of this module, whose import would take longer."""


def unguarded(method: str, key: str) -> str:
    return (
        f"data workers are started by {method} here and import the script first ({script_of_workers()}), "
        f'which then starts all over. Put what starts it under  if __name__ == "__main__":  or set {key}=0'
    )


def script_of_workers() -> Path | None:
    """Find the script that workers import; None if there is no file, as in a notebook, a console or python -c."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    path = getattr(main, "__file__", None)
    if path is None or (name or "").rpartition(".")[2] == "__main__" or Path(path).stem == "ipython":
        return None
    return Path(getattr(multiprocessing.process, "ORIGINAL_DIR", None) or "", path)


class _Discard:
    def write(self, data: Any) -> int:
        return len(data)


class _Trial(pickle.Pickler):
    """A pickler to nowhere that shows what fails; it passes over objects that surely work and may be large."""

    def __init__(self, *, main_is_importable: bool) -> None:
        super().__init__(_Discard(), pickle.HIGHEST_PROTOCOL)
        self._main_is_importable = main_is_importable
        self.dispatch_table = _reducers()
        self.last: object = None
        """The object that was pickled last."""
        self.of_script: set[str] = set()
        """Names of classes and functions that the main module defines."""

    def reducer_override(self, item: Any) -> Any:
        self.last = item
        if isinstance(item, torch.Tensor) or (isinstance(item, np.ndarray) and not item.dtype.hasobject):
            return int, ()
        if type(item).__module__.partition(".")[0] == "multiprocessing":  # locks and queues go with a process alone
            return int, ()
        if isinstance(item, type | FunctionType) and item.__module__ == "__main__":
            self.of_script.add(item.__qualname__)
            if self._main_is_importable:
                return NotImplemented
            raise pickle.PicklingError(
                "it is defined in a notebook, a console or python -c, which no worker can import"
            )
        return NotImplemented


def _reducers() -> dict[type, Callable[[Any], Any]]:
    """The functions by which multiprocessing pickles objects that pickle alone does not."""
    return {**copyreg.dispatch_table, **getattr(ForkingPickler, "_extra_reducers", {})}


def _holder(data: object, item: object, depth: int = 4) -> tuple[object, str] | None:
    """Find the object within `data` that has `item` as an attribute, and the attribute's name."""
    values = getattr(data, "__dict__", None)
    if not isinstance(values, dict) or isinstance(data, type) or depth == 0:
        return None
    for name, value in values.items():
        if value is item:
            return data, name
    return next(filter(None, (_holder(value, item, depth - 1) for value in values.values())), None)


def _described(item: object) -> str:
    if isinstance(item, type | FunctionType):
        return f"{item.__module__}.{item.__qualname__}"
    kind = type(item)
    return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"


TOO_MANY_FILES = ("Too many open files", "ancdata")  # the latter says that a file descriptor did not arrive


def with_advice(text: str, key: str) -> str:
    """Add to the system's words an advice that may help."""
    if any(sign in text for sign in TOO_MANY_FILES):
        text = "too many open files"
        advice = _more_descriptors(0, key)
    elif "pymp-" in text or "AF_UNIX" in text or "temporary directory" in text:
        advice = _other_folder(key)
    elif "shared memory" in text or "torch_" in text or "No space left" in text:
        room = _shared_memory()
        free = f"{SHM} has {_mebibytes(room[0])} free of {_mebibytes(room[1])}. " if room else ""
        advice = free + more_shared_memory(0, key)
    else:
        advice = f"{key}=0 needs none"
    return f"{text}. {advice}"
