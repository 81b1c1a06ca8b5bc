"""Names for the parts of a step, for profiles and for stopwatches.

On an accelerator the host only queues work, and PyTorch runs the backward pass in a thread of its own, so neither the
host's clock nor a profile of the calling thread says how long a part took. There the device stamps the time itself, at
both ends of each part.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function

PHASES = ("teacher", "student", "losses", "backward", "clipping", "optimizer", "moving average")
"""The parts of a step, in order."""


class Stopwatch:
    """Times parts on one device.

    Args:
        device: The device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: list[tuple[str, Callable[[], float]]] = []

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Time the work done meanwhile as a part of that name."""
        event = {"cuda": torch.cuda.Event, "mps": torch.mps.Event}.get(self._device.type)
        if event is None:
            started = time.perf_counter()
            yield
            seconds = time.perf_counter() - started
            self._parts.append((name, lambda: seconds))
            return
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._parts.append((name, lambda: first.elapsed_time(last) / 1e3))

    def seconds(self) -> dict[str, float]:
        """Seconds of all parts by name; the device must have finished them."""
        total: dict[str, float] = {}
        for name, seconds in self._parts:
            total[name] = total.get(name, 0.0) + seconds()
        return total


_running: ContextVar[Stopwatch | None] = ContextVar("_running", default=None)


@contextmanager
def timed_by(stopwatch: Stopwatch) -> Iterator[None]:
    """Let the stopwatch time every phase of this thread meanwhile."""
    before = _running.set(stopwatch)
    try:
        yield
    finally:
        _running.reset(before)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name the work done meanwhile in a profile, and time it if a stopwatch runs."""
    stopwatch = _running.get()
    with record_function(name):
        if stopwatch is None:
            yield
        else:
            with stopwatch.timing(name):
                yield
