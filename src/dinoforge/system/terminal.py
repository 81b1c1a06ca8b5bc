"""Text for the terminal: streams whose faults stop nothing, and tables.

A write fails where nobody reads the output any more, and where the encoding lacks a letter; neither may end a run.
"""

import io
import os
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, NoReturn, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console


class Patient(io.TextIOBase):
    """A text stream that never raises, and leaves out what cannot be written.

    After a pipe is closed, a terminal is gone or a disk is full, later lines are tried again, since a disk may have
    room by then. Letters that the encoding lacks become ``?``.

    Args:
        stream: Where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            with suppress(OSError, ValueError):
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):  # ValueError: closed
            pass
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self.flush()  # the stream is not ours to close, and this is called when a Patient is collected

    @property
    def closed(self) -> bool:
        return False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self._stream, "errors", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # such as buffer


def be_patient() -> None:
    """Make this program's standard output and error patient."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program began, or a program without a console on Windows
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, Patient):
            setattr(sys, name, Patient(stream))


@contextmanager
def patient(console: "Console") -> Iterator[None]:
    """Make a console write patiently meanwhile."""
    before = console.file
    console.file = cast(IO[str], Patient(cast(TextIO, before)))
    try:
        yield
    finally:
        console.file = before


def table(rows: Sequence[Sequence[str]], *, right: Container[int] = ()) -> str:
    """Lay out a table as text, with two spaces between columns.

    Args:
        rows: Cells, as many in each row; at least one row.
        right: Columns that are aligned to the right, from 0; the others are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)


def leave(code: int) -> NoReturn:
    """End the program at once with an exit code, so that no handler at the interpreter's end prints a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
