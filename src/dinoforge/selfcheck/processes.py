"""Programs that a check starts: each has a deadline, its output in a file, and a certain end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

MARK = "DINOFORGE_SELFCHECK"
"""Environment variable by which a program and whatever it starts are known: ranks are in sessions of their own."""

_POSIX = os.name == "posix"
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Args:
        code: Exit code, negative for a signal; None for a program that had to be ended at its deadline.
        output: What the program printed.
        seconds: Seconds that the program ran.
    """

    code: int | None
    output: str
    seconds: float

    def tail(self, lines: int = 8) -> tuple[str, ...]:
        """The last lines of the output."""
        printed = [line.rstrip() for line in self.output.splitlines() if line.strip()]
        return tuple(printed[-lines:]) or ("(it printed nothing)",)

    @property
    def told(self) -> str:
        """How the program ended, in words."""
        if self.code is None:
            return f"had not ended after {self.seconds:.0f} s"
        if self.code < 0:
            return f"was ended by {signal.Signals(-self.code).name} after {self.seconds:.1f} s"
        return f"ended with exit code {self.code} after {self.seconds:.1f} s"


class Program:
    """A Python module that runs as a program; whatever is left of it ends with the context.

    Args:
        arguments: The module, and its arguments.
        folder: The folder for the output.
        seconds: Seconds from now to the deadline.
        environment: Variables to add to those of this program, of which those that make a rank are left out.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, *, seconds: float, environment: Mapping[str, str] | None = None
    ) -> None:
        number = uuid.uuid4().hex[:12]
        self.mark = f"{os.environ.get(MARK, '')}/{number}"
        self.started = time.monotonic()
        self.seconds = seconds
        self._path = folder / f"output-{number}.txt"
        inherited = {key: value for key, value in os.environ.items() if key not in _OF_RANKS}
        with self._path.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=inherited
                | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
                | dict(environment or {})
                | {MARK: self.mark},
                start_new_session=_POSIX,  # Ctrl-C is for this program, which ends the others
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def output(self) -> str:
        """The output of the program so far."""
        return self._path.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > self.seconds

    def wait(self) -> Ended:
        """Wait until the program has ended, by itself or at its deadline."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(max(0.0, self.started + self.seconds - time.monotonic()))
        seconds = time.monotonic() - self.started
        self.kill()
        return Ended(code, self.output, seconds)

    def kill(self) -> None:
        """End the program by SIGKILL (on Windows, TerminateProcess), with all that it has started."""
        end(self.mark, self.process.pid if self.running else None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)

    def ranks(self) -> list[int]:
        """Process ids of the ranks that it runs now, by rank."""
        if _has_proc():
            of_ranks = {
                int(environment["RANK"]): pid
                for pid, environment in _marked(self.mark).items()
                if "RANK" in environment and _parent(pid) == self.process.pid
            }
            return [of_ranks[rank] for rank in sorted(of_ranks)]
        return sorted(pid for pid, (parent, _) in _table().items() if parent == self.process.pid)


def run(arguments: Sequence[str], folder: Path, *, seconds: float) -> Ended:
    """Run a Python module to its end, or until its deadline."""
    with Program(arguments, folder, seconds=seconds) as program:
        return program.wait()


def end(mark: str, pid: int | None = None) -> None:
    """Kills the processes that carry a mark, or one that starts with it; and, where marks cannot be read, the process
    ``pid`` and those that it has started, as far as they are still known to be its own.
    """
    if _has_proc():
        deadline = time.monotonic() + 10
        while (found := _marked(mark)) and time.monotonic() < deadline:  # one may be starting another
            for each in found:
                with contextlib.suppress(OSError):
                    os.kill(each, signal.SIGKILL)
            time.sleep(0.02)
    elif pid is not None and _POSIX:
        for each in [*_descendants(pid), pid]:
            with contextlib.suppress(OSError):
                os.kill(each, signal.SIGKILL)
    elif pid is not None:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(pid)], capture_output=True, check=False)


def _has_proc() -> bool:
    return Path("/proc/self/environ").exists()


def _marked(mark: str) -> dict[int, dict[str, str]]:
    """The environment of each living process with the mark."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            text = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:  # another user's, or gone
            continue
        environment = dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
        if f"{environment.get(MARK, '')}/".startswith(f"{mark}/"):
            found[int(folder.name)] = environment
    return found


def _parent(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])


def _table() -> dict[int, tuple[int, str]]:
    """Parent and command of each process of this machine."""
    rows = subprocess.run(["ps", "-axo", "pid=,ppid=,command="], capture_output=True, text=True, check=False).stdout
    split = [row.split(None, 2) for row in rows.splitlines()]
    return {int(row[0]): (int(row[1]), row[2]) for row in split if len(row) == 3}


def _descendants(pid: int) -> list[int]:
    """The processes that a process has started, those that they have started, and so on; the last ones first."""
    children: dict[int, list[int]] = {}
    for each, (parent, _) in _table().items():
        children.setdefault(parent, []).append(each)
    found, level = [], [pid]
    while level:
        level = [child for each in level for child in children.get(each, [])]
        found += level
    return found[::-1]
