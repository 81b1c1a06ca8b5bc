"""The lock by which only one process at a time writes a run.

``RUN/.lock`` names the process that does, and changes every few seconds as long as it lives. A second one is refused;
a lock whose holder is gone is told and taken. No lock of the file system is needed, which network disks often lack:
making a file that must not be there yet, and renaming, work on all of them.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dinoforge.errors import RunError
from dinoforge.system.files import writing_error

BEAT_SECONDS = 10.0
_SILENCE = 4 * BEAT_SECONDS  # silence after which a holder on another machine is gone
_TRIES = 5  # attempts at a lock that others take and leave meanwhile


class LockLostError(RunError):
    """Another process has taken the run, so that this one must not write to it any more."""


class RunLock:
    """Holds a run's lock as long as the context lasts.

    Args:
        run: The run directory, which exists.
        say: Tells the user of a lock that is taken over or waited for.
        beat: Seconds between two signs of life.

    Raises:
        RunError: On entering: another process holds it, or it cannot be written.
    """

    def __init__(self, run: Path, say: Callable[[str], object], *, beat: float = BEAT_SECONDS) -> None:
        self.path = run / ".lock"
        self._say, self._beat = say, beat
        self._own = {"token": uuid.uuid4().hex, "beats": 0, **_this_process()}
        self._lost: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._live, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        for _ in range(_TRIES):
            if self._make():
                self._thread.start()
                return self
            held = _read(self.path)
            if held is not None:
                self._take_from(held)
        raise RunError(f"{self.path.parent}: other processes take and leave the run all the time")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        held = _read(self.path)
        if held is not None and held.get("token") == self._own["token"]:
            with suppress(OSError):  # a lock that stays is taken over by the next process
                self.path.unlink()

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the run."""
        return self._lost is not None

    def check(self) -> None:
        """Raise LockLostError if another process has taken the run."""
        if self.is_lost:
            raise LockLostError(
                f"{self.path.parent} was taken over by {self._lost} while this process showed no sign of life: it "
                "stops without writing"
            )

    def __call__(self, report: object) -> None:
        """``check`` as a hook of the training loop."""
        self.check()

    def _make(self) -> bool:
        """Make the file; False where there is one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        except OSError as error:
            raise writing_error(self.path, error) from error
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self._own, file)
        return True

    def _take_from(self, held: dict[str, Any]) -> None:
        """Remove the lock of a process that is gone.

        Raises:
            RunError: It lives.
        """
        alive = _is_alive(held)
        if alive is None:
            alive = self._watch(held)
        if alive:
            raise RunError(
                f"{self.path.parent} is written by {_words(held)}: choose another --out, or stop that process first. "
                f"If it is gone for sure, delete {self.path}"
            )
        aside = self.path.with_name(f".lock.{self._own['token']}")
        try:
            self.path.rename(aside)  # of several that try, one succeeds
            moved = _read(aside)
            if moved is not None and moved.get("token") != held.get("token"):  # another one was quicker
                aside.rename(self.path)
                return
            aside.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise writing_error(self.path, error) from error
        self._say(f"lock     {_words(held)} is gone without a word: its run is taken over")

    def _watch(self, held: dict[str, Any]) -> bool:
        """Whether a process that cannot be looked up still shows signs of life."""
        try:
            silent = _now(self.path.parent) - self.path.stat().st_mtime
        except OSError:
            silent = 0.0
        if silent > 3 * _SILENCE:
            return False
        patience = _SILENCE * self._beat / BEAT_SECONDS
        self._say(f"lock     {_words(held)} has the run: waiting {patience:.0f} s for a sign of life")
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(self._beat / 5)
            now = _read(self.path)
            if now is None or now.get("token") != held.get("token"):
                return False  # it was left; whoever has it now is asked next
            if now.get("beats") != held.get("beats"):
                return True
        return False

    def _live(self) -> None:
        """Show signs of life until the context ends or another process has taken the lock."""
        while not self._done.wait(self._beat):
            held = _read(self.path)
            if held is not None and held.get("token") != self._own["token"]:
                self._lost = _words(held)
                return
            self._own["beats"] += 1
            with suppress(OSError):  # a disk that is full or away for a while; the next sign may get through
                self.path.write_text(json.dumps(self._own), encoding="utf-8")


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "begun": _begun(os.getpid()),
        "machine": _machine(),
        "since": f"{datetime.now():%Y-%m-%d %H:%M}",
    }


def _machine() -> str | None:
    """A text that tells machines and containers of the same name apart; None where processes cannot be looked up."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _begun(pid: int) -> str | None:
    """When a process began, in ticks; None for one that is not there, or is dead and not yet collected."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _is_alive(held: dict[str, Any]) -> bool | None:
    """Whether a lock's process lives; None if it cannot be looked up from here."""
    machine = _machine()
    if machine is None or held.get("machine") != machine or not isinstance(held.get("pid"), int):
        return None
    return _begun(held["pid"]) is not None and _begun(held["pid"]) == held.get("begun")


def _read(path: Path) -> dict[str, Any] | None:
    """A lock's content; None where there is none, empty while it is being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _now(folder: Path) -> float:
    """The time by the clock of the disk, which may be another machine's."""
    probe = folder / f".lock.{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _words(held: dict[str, Any]) -> str:
    if "pid" not in held:
        return "a process that has not told its name"
    return f"process {held['pid']} on {held.get('host', 'an unknown machine')}, since {held.get('since', '?')}"
