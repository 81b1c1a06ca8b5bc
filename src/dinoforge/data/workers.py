"""Data workers: how they start, and why one has ended; `preflight` checks before whether they can start."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import queues
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, get_worker_info

from dinoforge.data.preflight import (
    SHM,
    TOO_MANY_FILES,
    UNGUARDED,
    more_shared_memory,
    script_of_workers,
    unguarded,
    with_advice,
)
from dinoforge.errors import DataError, WorkerError
from dinoforge.system.signals import STOP_SIGNALS

T = TypeVar("T")

LOOK_SECONDS = 1.0
"""The time between two checks of the workers while a batch is waited for."""

_WORDS = 500  # bytes of a worker's last words


# --- in the worker ----------------------------------------------------------------------------------------------------


class Table:
    """A table in shared memory where workers say what they do, for the time when they can no longer tell.

    Args:
        number: The number of workers.
        key: The key of the recipe or the option that sets their number.

    Raises:
        DataError: There is no shared memory.
    """

    def __init__(self, number: int, key: str = "train.num_workers") -> None:
        self.places = torch.full((number, 2), -1, dtype=torch.int64)
        """The process of each worker, and the index of the image that it reads, -1 between two."""
        self.words = torch.zeros((number, _WORDS), dtype=torch.uint8)
        """The reason of each worker that could not send a batch."""
        if number:
            try:
                self.places.share_memory_()
                self.words.share_memory_()
            except (RuntimeError, OSError) as error:
                raise DataError(
                    f"data workers cannot be given shared memory: {with_advice(str(error), key)}"
                ) from error

    def word(self, worker: int) -> str:
        """Read a worker's last words."""
        return bytes(self.words[worker].tolist()).rstrip(b"\0").decode(errors="replace")


def start_worker(worker: int, table: Table) -> None:
    """Set a worker up: it leaves stopping to the main process, and reports failures that would be silent otherwise.

    The data set's attribute `on_image`, if there is one, is set to the function that notes the image before it is read.

    Args:
        worker: The worker's number.
        table: The table where it leaves word.
    """
    torch.set_num_threads(1)
    table.places[worker, 0] = os.getpid()
    info = get_worker_info()
    assert info is not None
    if hasattr(info.dataset, "on_image"):
        info.dataset.on_image = partial(_note, table, worker)
    for number in STOP_SIGNALS:  # the main process gets them too, and ends its workers when it is done
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = partial(_on_error, table, worker)
    # A batch that cannot be sent would be dropped, by a thread that nobody hears.
    if hasattr(queues.Queue, "_on_queue_feeder_error"):
        queues.Queue._on_queue_feeder_error = staticmethod(partial(_on_unsent, table, worker))


def _note(table: Table, worker: int, index: int) -> None:
    table.places[worker, 1] = index


def _on_unsent(table: Table, worker: int, error: Exception, batch: object) -> None:
    if not isinstance(error, BrokenPipeError):  # the main process takes no more, which it does as it stops
        _leave_word(table, worker, error)


def _on_error(
    table: Table, worker: int, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report an error of the main thread, or of the thread that hands out file descriptors, without which none arrives.

    Errors of a closed connection are passed over: the main process closes it as it stops.
    """
    if isinstance(error, ConnectionError | EOFError):
        return
    if isinstance(error, OSError) and threading.current_thread() is not threading.main_thread():
        _leave_word(table, worker, error)
    sys.__excepthook__(kind, error, trace)


def _leave_word(table: Table, worker: int, error: BaseException) -> NoReturn:
    """Say why, and end this process."""
    word = f"{type(error).__name__}: {error}".encode(errors="replace")[:_WORDS]
    table.words[worker, : len(word)] = torch.tensor(list(word), dtype=torch.uint8)
    os._exit(1)


# --- in the main process ----------------------------------------------------------------------------------------------


class Workers:
    """The worker processes of one loader, and the words for their failures.

    Args:
        table: The table where they leave word.
        key: The key of the recipe or the option that sets their number.
    """

    def __init__(self, table: Table, key: str = "train.num_workers") -> None:
        self.table = table
        self._key = key
        self._processes: list[BaseProcess] = []

    def start(self, loader: DataLoader[T]) -> Iterator[T]:
        """Start the workers, if the loader has any.

        Raises:
            DataError: They cannot be started.
        """
        before = set(multiprocessing.active_children())
        try:
            with _same_sigchld_handler(), _no_opencv_threads():
                batches = iter(loader)
        except (OSError, EOFError, RuntimeError) as error:
            if not loader.num_workers:
                raise
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            _drop_what_is_half_made(error)
            raise DataError(f"data workers cannot be started: {self._why(error)}") from error
        children = set(multiprocessing.active_children()) - before
        # Workers that have ended already are no children any more.
        self._processes = list(getattr(batches, "_workers", children)) if loader.num_workers else []
        return batches

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Start the workers, and yield all batches of the loader.

        Raises:
            DataError: The workers cannot be started, or a batch cannot be fetched.
            WorkerError: A worker was killed.
        """
        batches = self.start(loader)
        try:
            yield from batches
        except (RuntimeError, OSError, EOFError) as error:
            if failure := self.failure(error):
                raise failure from None
            raise
        finally:
            del batches  # asks them to leave, and waits a few seconds for each
            self.kill()

    def kill(self) -> None:
        """Kill the workers that did not leave by themselves; a stopped or stuck one would be waited for at exit."""
        for process in multiprocessing.active_children():
            if process in self._processes:
                process.kill()

    def failure(
        self, error: BaseException, naming: Callable[[list[int]], str] = lambda indices: ""
    ) -> DataError | None:
        """Explain an error that came instead of a batch; None if it has nothing to do with the workers.

        Args:
            error: The error.
            naming: A function that names the images, by index, that workers were at; -1 stands for between two.
        """
        if not self._processes:
            return None
        gone = self._gone()
        if not gone:
            is_of_fetching = isinstance(error, OSError) or any(sign in str(error) for sign in TOO_MANY_FILES)
            return DataError(f"a batch cannot be fetched: {self._why(error)}") if is_of_fetching else None
        codes = {self._processes[worker].exitcode for worker in gone}
        if UNGUARDED in codes:
            return DataError(unguarded(multiprocessing.get_start_method(), self._key))
        for word in filter(None, map(self.table.word, gone)):
            return DataError(f"a data-loading worker cannot send its batch: {self._why(word)}")
        began = [worker for worker in gone if self.table.places[worker, 0] >= 0]
        if not began:
            return DataError(
                f"data workers ended with exit code {max(filter(None, codes), default=0)} before they began: why, they "
                f"have printed{_imports()}. {self._key}=0 needs none"
            )
        if -getattr(signal, "SIGBUS", 0) in codes:
            return DataError(f"a data-loading worker ran out of shared memory. {more_shared_memory(0, self._key)}")
        return WorkerError(
            f"a data-loading worker was killed{naming(self.table.places[began, 1].tolist())}. Most often the system "
            f"does that for lack of memory or of shared memory ({SHM}): use fewer {self._key} or smaller batches "
            "(train.batch_size_per_gpu). If it is always the same image, take that out"
        )

    def _gone(self) -> list[int]:
        """The numbers of the workers that have ended."""
        for _ in range(10):  # a worker that was just killed takes a moment to be gone
            alive = multiprocessing.active_children()
            if gone := [number for number, process in enumerate(self._processes) if process not in alive]:
                return gone
            time.sleep(0.1)
        return []

    def _why(self, error: BaseException | str) -> str:
        return with_advice(error if isinstance(error, str) else f"{type(error).__name__}: {error}", self._key)


def _drop_what_is_half_made(error: BaseException) -> None:
    """Let go of an iterator that could not be made, without its complaints on the terminal."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def _imports() -> str:
    script = script_of_workers()
    if script is None or multiprocessing.get_start_method() == "fork":
        return ""
    return f"; they import {script} first"


class Watch(threading.Thread):
    """A thread that kills the workers when a batch takes too long.

    A thread is needed because a batch's memory is fetched from its worker in a read that has no timeout: only the
    worker's death ends it if the worker is stopped. The thread counts checks and not time, so that a run that was
    stopped itself, such as by Ctrl-Z, has not waited.

    Args:
        workers: The workers.
        timeout: The longest wait for a batch in seconds.
    """

    def __init__(self, workers: Workers, timeout: float) -> None:
        super().__init__(name="watch over data-loading workers", daemon=True)
        self.hung: int | None = None
        """The index of the image at which a worker hung; -1 for between two, None while none did."""
        self._workers = workers
        self._timeout = timeout
        self._number = 0  # the number of the next batch
        self._waiting = False
        self._stopped = threading.Event()

    def wait_for(self, batches: Iterator[T]) -> T:
        """Fetch the next batch."""
        self._waiting = True  # until the batch comes, through any number of calls
        batch = next(batches)
        self._waiting = False
        self._number += 1
        return batch

    def run(self) -> None:
        """Check now and then."""
        interval = min(self._timeout, LOOK_SECONDS)
        places = self._workers.table.places
        waited, number = 0.0, 0
        while not self._stopped.wait(interval):
            waited = waited + interval if self._waiting and self._number == number else 0.0
            number = self._number
            if waited >= self._timeout:
                # Batches are made in turn, so it is this worker's.
                self.hung = int(places[number % len(places), 1])
                self._workers.kill()
                return

    def stop(self) -> None:
        """End the checks."""
        self._stopped.set()


@contextmanager
def _no_opencv_threads() -> Iterator[None]:
    """End OpenCV's threads before a fork: a worker would wait for them for ever, and they do not survive it."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


@contextmanager
def _same_sigchld_handler() -> Iterator[None]:
    """Undo torch's SIGCHLD handler, which raises a dead worker's error wherever the main thread happens to be.

    Without it the death is found when the next batch is waited for, where it can be told as what it is.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
