"""Requests that a run stop: signals, and a time."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Generic, Self, TypeVar

from dinoforge.system.signals import STOP_SIGNALS

T = TypeVar("T")


LONG_SECONDS = 1.0
"""A wait that is ended: one that lasts so long stands still where it waits, and not between two lines of a library that
has just taken a lock, which would never be left again."""


class StopWaitingError(BaseException):
    """A signal came during the wait for the next batch. No ``Exception``, since what reads images catches those."""


class Stop:
    """Whether training should stop: on Ctrl-C and other signals, after a time.

    The first signal has the step finished and saved. A second Ctrl-C leaves at once: a program by its end, Python's
    caller by KeyboardInterrupt. Signals that are ignored, as nohup ignores SIGHUP, stay ignored.

    Args:
        minutes: Minutes after which to stop; None: never.
        is_program: Whether this process is ours to end, as the command line's is.
    """

    def __init__(self, minutes: float | None, *, is_program: bool) -> None:
        self.reason: str | None = None
        self._deadline = None if minutes is None else time.monotonic() + minutes * 60
        self._is_program = is_program
        self._previous: dict[int, Any] = {}
        self._is_waiting = False
        self._waits = 0  # so far
        self._is_nudge = False
        self._left = threading.Event()
        self._nudging = threading.Thread(target=self._nudge, name="end of long waits", daemon=True)

    def __call__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "max_minutes"
        return self.reason is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
            self._nudging.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._nudging.ident is not None:
            self._nudging.join()
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Make a signal raise StopWaitingError meanwhile, if the wait is long."""
        self._waits += 1
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def _nudge(self) -> None:
        """Send the signal again to the main thread where it waits for long."""
        seen, since = 0, time.monotonic()
        while not self._left.wait(LONG_SECONDS / 5):
            if self._waits != seen:
                seen, since = self._waits, time.monotonic()
            is_long = self._is_waiting and time.monotonic() - since >= LONG_SECONDS
            number = getattr(signal, self.reason or "", None)  # none for max_minutes
            if is_long and number is not None and hasattr(signal, "pthread_kill"):
                self._is_nudge = True
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                since = time.monotonic()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_nudge:
            self._is_nudge = False
            if self._is_waiting:
                self._is_waiting = False
                raise StopWaitingError
            return
        if self.reason is not None and number == signal.SIGINT:
            for worker in multiprocessing.active_children():  # or else they would complain of being left
                with suppress(OSError):
                    worker.kill()
            if self._is_program:
                os._exit(130)  # files are written aside and renamed, so nothing is left half-written
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


class Interruptible(Generic[T]):
    """An iterator that gives None in place of the next item when a signal ends a long wait for it.

    Args:
        items: The iterator.
        stop: What receives signals.
    """

    def __init__(self, items: Iterator[T], stop: Stop) -> None:
        self._items, self._stop = items, stop

    def __iter__(self) -> Iterator[T | None]:
        return self

    def __next__(self) -> T | None:
        try:
            with self._stop.waiting():
                return next(self._items)
        except StopWaitingError:
            return None
