"""Runs the parts of a self-check one after the other, and gathers their lines."""

import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dinoforge.selfcheck.lines import Line, fail, not_here
from dinoforge.selfcheck.part import PARTS, command, other_output, read
from dinoforge.selfcheck.processes import Ended, Program
from dinoforge.selfcheck.settings import Settings
from dinoforge.version import __version__

_LOOK_SECONDS = 0.05
_BESIDE = {"steps": ("placement",), "ranks": ("memory",)}
"""Parts that are started together: neither measures a time that matters, and often each keeps one thread busy."""
_LONGEST_FOLDER = 103 - len("/pymp-12345678/listener-12345678")
"""In which multiprocessing can make its sockets, whose paths may have so many characters."""
_ONE_THREAD = ("placement", "memory")
"""Parts that are no slower on one thread, and much faster on a machine that is busy."""


@dataclass(frozen=True)
class SelfcheckResult:
    """The lines of a self-check, and its verdict."""

    lines: tuple[Line, ...]
    settings: Settings
    seconds: float

    @property
    def passed(self) -> bool:
        return all(line.status != "FAIL" for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        lines = [line.as_json() for line in self.lines]
        asked = {key: value for key, value in self.settings.as_json().items() if key != "folder"}
        environment: dict[str, Any] = {"dinoforge": __version__, "python": platform.python_version()}
        for line in lines:
            if line["values"].get("part") == "environment":
                environment[line["name"]] = line["values"] | {"text": line["text"]}
        return {
            "passed": self.passed,
            "asked": asked,
            "environment": environment,
            "lines": lines,
            "seconds": round(self.seconds, 1),
        }

    def summary(self) -> str:
        """The last line for people."""
        counts = {status: sum(line.status == status for line in self.lines) for status in ("ok", "FAIL", "not here")}
        told = f"{counts['ok']} ok, {counts['FAIL']} FAIL, {counts['not here']} not here, in {self.seconds:.0f} s"
        if self.passed:
            return f"passed: {told}"
        return f"FAILED: {told}. Paste all of this into a bug report."


def selfcheck(
    *,
    device: str = "auto",
    nproc: str | None = None,
    short: bool = False,
    only: Sequence[str] = (),
    on_line: Callable[[Line], object] = lambda line: None,
) -> SelfcheckResult:
    """Looks at everything that a user of this machine will meet.

    Args:
        device: One of ``auto``, ``cpu``, ``cuda``, ``cuda:N`` and ``mps``.
        nproc: Number of ranks to start, or ``auto`` for one on each GPU; None leaves out what needs ranks.
        short: Whether to leave out what takes long on a CPU.
        only: Names of ``PARTS``; empty for all.
        on_line: Receives each line as soon as it is there.
    """
    started = time.monotonic()
    found: list[Line] = []
    with (
        tempfile.TemporaryDirectory(prefix="dinoforge-", ignore_cleanup_errors=True) as folder,
        _Parts(Settings(device, nproc, short, Path(folder))) as parts,
    ):
        settings = parts.settings
        wanted = [name for name in PARTS if not only or name in only]
        usable = True
        for name in wanted:
            if not usable:
                lines: Iterator[Line] = iter([not_here(name, "needs the device that failed above")])
            else:
                for other in (name, *_BESIDE.get(name, ())):
                    if other in wanted:
                        parts.start(other)
                lines = parts.lines_of(name)
            for line in lines:
                line = replace(line, values={"part": name} | line.values)
                usable &= not (name == "environment" and line.name == "device" and line.status == "FAIL")
                found.append(line)
                on_line(line)
    return SelfcheckResult(tuple(found), settings, time.monotonic() - started)


class _Parts:
    """Parts that run in processes of their own; whatever is left of them ends with the context.

    Args:
        settings: Settings of the check.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._programs: dict[str, Program] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in self._programs.values():
            program.kill()

    def start(self, name: str) -> None:
        """Starts a part, unless it has been."""
        if name not in self._programs:
            folder = self.settings.folder / name
            folder.mkdir()
            settings = replace(self.settings, folder=folder)
            environment = {"OMP_NUM_THREADS": "1"} if name in _ONE_THREAD else {}
            if len(str(self.settings.folder)) <= _LONGEST_FOLDER:
                # What libraries leave there when they are killed goes with the folder.
                environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.settings.folder))
            program = Program(command(name, settings), folder, seconds=PARTS[name], environment=environment)
            self._programs[name] = program

    def lines_of(self, name: str) -> Iterator[Line]:
        """The findings of a part as they come; its crash or hang is one of them."""
        program = self._programs[name]
        told = 0
        while True:
            over = not program.running or program.late
            for line in read(program.output)[told:]:
                told += 1
                yield line
            if over:
                break
            time.sleep(_LOOK_SECONDS)
        ended = program.wait()
        shutil.rmtree(self.settings.folder / name, ignore_errors=True)  # runs of some hundred megabytes
        if ended.code == 0 and told:
            return
        rest = Ended(ended.code, other_output(ended.output), ended.seconds)
        yield fail(name, f"this part {ended.told}, after {told} lines", rest.tail(12))
