"""Output that stops nothing, and tables."""

import errno
import io
import subprocess
import sys

import pytest
from rich.console import Console

from dinoforge.system.terminal import Patient, patient, table


class Broken(io.StringIO):
    """A stream that fails as long as it is told to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        if self.error:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("I/O operation on closed file"),
    ],
)
def test_what_cannot_be_written_is_left_out_until_it_can(error):
    stream = Broken(error)
    out = Patient(stream)
    print("lost", file=out, flush=True)
    out.writelines(["lost"])
    stream.error = None
    print("kept", file=out, flush=True)
    assert stream.getvalue() == "kept\n"


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", b"40?40 ? a\n"), ("cp1252", "40×40 ? a\n".encode("cp1252"))]
)
def test_letters_that_the_encoding_lacks(encoding, expected):
    raw = io.BytesIO()
    out = Patient(io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
    print("40×40 → a", file=out, flush=True)
    assert raw.getvalue() == expected


def test_a_console_gets_its_stream_back():
    stream = Broken(BrokenPipeError())
    console = Console(file=stream)
    with patient(console):
        console.print("lost")
        assert isinstance(console.file, Patient)
    assert console.file is stream
    del console
    assert not stream.closed


@pytest.mark.processes
@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "| true"])
@pytest.mark.parametrize("command", ["explain", "compare small dinov2", "--help", "explain --recipe nothing"])
def test_commands_end_in_peace_when_nobody_reads(command, redirection):
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m dinoforge {command} {redirection}"], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_columns_of_a_table_are_as_wide_as_their_widest_cell():
    rows = [["part", "tokens", ""], ["head", "1,024", "×"], ["whole backbone", "7", ""]]
    assert table(rows, right=[1]).splitlines() == [
        "part            tokens",
        "head             1,024  ×",
        "whole backbone       7",
    ]
    assert table([["a", "b"], ["long", "c"]]) == "a     b\nlong  c"


def test_a_row_that_lacks_a_cell_is_no_table():
    with pytest.raises(ValueError, match="zip"):
        table([["a", "b"], ["c"]])
