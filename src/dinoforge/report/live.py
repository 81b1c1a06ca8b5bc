"""A report that a run writes about itself while it trains."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

SHARE = 0.02  # share of a run's time that reports may take


class Live:
    """Writes a report every so many minutes.

    Training waits meanwhile, so that both do not fight for the machine; in return at most ``SHARE`` of its time goes
    into reports: after one that took long, the next comes later. Nothing of the run changes, random states included,
    and an error is told and costs only the report.

    Args:
        write: Writes the report.
        every_minutes: Minutes between reports, above 0.
        say: Tells the user.
    """

    def __init__(self, write: Callable[[], object], *, every_minutes: float, say: Callable[[str], object]) -> None:
        self.write, self.every_minutes, self.say = write, every_minutes, say
        self.seconds = 0.0  # spent
        self._due = time.monotonic() + 60 * every_minutes

    def __call__(self, _: object) -> None:
        """Write the report after a step, if it is time."""
        if time.monotonic() >= self._due:
            self.make()

    def make(self) -> bool:
        """Writes the report now; whether that went well."""
        started = time.monotonic()
        try:
            with _random_states_kept():
                self.write()
        except Exception as error:  # whatever it is, it is no reason to lose a run
            self.say(f"no report  {type(error).__name__}: {error}. Training is not touched by that.")
            done = False
        else:
            done = True
        took = time.monotonic() - started
        self.seconds += took
        self._due = time.monotonic() + max(60 * self.every_minutes, took / SHARE)
        return done


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Global random states are afterwards what they were: a user's data set may draw from them when it is read."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
