"""The lines of a self-check: what was looked at, the outcome, and the numbers."""

import math
import textwrap
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "FAIL", "not here"]

_NAME_COLUMN = 18  # where a line's name begins, after the status and the seconds
_TEXT_COLUMN = 46
_WIDTH = 120
_MODULE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Line:
    """A finding of a self-check.

    Args:
        name: What was looked at.
        status: The outcome; ``not here`` where this machine cannot show it, for the reason in ``text``.
        text: The numbers, or the reason, in a sentence or less.
        values: The numbers for programs, as JSON can hold them.
        details: Further lines, such as the last ones that a command printed.
        seconds: Seconds that it took; None if they say nothing.
    """

    name: str
    status: Status
    text: str
    values: dict[str, Any] = field(default_factory=dict)
    details: tuple[str, ...] = ()
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The line as JSON has it; numbers that are not finite as text."""
        return {
            "name": self.name,
            "status": self.status,
            "text": self.text,
            "values": _plain(self.values),
            "details": list(self.details),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> "Line":
        """Read what ``as_json`` returned."""
        return cls(**(read | {"details": tuple(read["details"])}))

    def after(self, seconds: float) -> "Line":
        """The line with the time that it took, unless it has one or nothing was done."""
        known = self.seconds is not None or self.status == "not here"
        return self if known else replace(self, seconds=round(seconds, 2))


def ok(name: str, text: str, details: tuple[str, ...] = (), **values: Any) -> Line:
    return Line(name, "ok", text, values, details)


def fail(name: str, text: str, details: tuple[str, ...] = (), **values: Any) -> Line:
    return Line(name, "FAIL", text, values, details)


def not_here(name: str, reason: str, **values: Any) -> Line:
    return Line(name, "not here", reason, values)


def judged(passed: bool, name: str, text: str, details: tuple[str, ...] = (), **values: Any) -> Line:
    """A line that is ``ok`` if ``passed``, else ``FAIL``."""
    return Line(name, "ok" if passed else "FAIL", text, values, details)


def failure_of(name: str, error: BaseException) -> Line:
    """A line of an exception: its type and message, and where in this package it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_absolute()]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_MODULE)]
    where = tuple(f"at {_short(f.filename)}:{f.lineno} in {f.name}: {f.line}" for f in (ours or frames)[-3:])
    first, *rest = str(error).splitlines() or [""]
    return fail(name, f"{type(error).__name__}: {first}", (*rest[:8], *where), error=type(error).__name__)


def guarded(name: str, look: Callable[[], Line]) -> Line:
    """Call ``look`` for a line; an exception in it becomes a failure."""
    try:
        return look()
    except Exception as error:
        return failure_of(name, error)


def all_guarded(name: str, lines: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """Yield the lines that come; an exception ends them with a failure."""
    try:
        yield from lines()
    except Exception as error:
        yield failure_of(name, error)


def line_text(line: Line) -> str:
    """The line for people: status, seconds, name and text in columns."""
    seconds = "" if line.seconds is None else f"{line.seconds:.1f} s"
    head = f"{line.status:<8} {seconds:>8}".ljust(_NAME_COLUMN) + line.name.ljust(_TEXT_COLUMN - _NAME_COLUMN - 1) + " "
    indent = " " * _TEXT_COLUMN
    rows = [
        *textwrap.wrap(line.text, _WIDTH - _TEXT_COLUMN, break_long_words=False, break_on_hyphens=False),
        *(row[: 2 * _WIDTH] for row in line.details),
    ]
    return "\n".join((head + row if number == 0 else indent + row).rstrip() for number, row in enumerate(rows or [""]))


def percent(value: float) -> str:
    """A share with three digits."""
    return f"{100 * value:.3g} %"


def _short(path: str) -> str:
    return str(Path(path).relative_to(_MODULE.parent)) if Path(path).is_relative_to(_MODULE) else path


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
