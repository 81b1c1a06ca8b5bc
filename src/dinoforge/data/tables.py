"""Tables as text, whose encoding and separator are found rather than assumed."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dinoforge.data.kinds import kind_of
from dinoforge.errors import DataError

SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas", "|": "vertical bars", " ": "blanks"}
"""Separators of cells, and their names."""


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Args:
        rows: The line number and the cells of each row that is not blank.
        separator: The separator of cells.
        notes: The guesses that were made, a sentence each.
        error: The line and the reason where the text cannot be read to its end.
    """

    rows: list[tuple[int, list[str]]]
    separator: str
    notes: tuple[str, ...] = ()
    error: str | None = None

    @cached_property
    def width(self) -> int:
        """The number of columns of the first row."""
        return len(trimmed(self.rows[0][1])) if self.rows else 0

    @cached_property
    def evenness(self) -> float:
        """The share of rows that have the most frequent number of columns, if that is at least two."""
        counts = Counter(len(cells) for _, cells in self.rows)
        columns, rows = counts.most_common(1)[0] if counts else (0, 0)
        return rows / len(self.rows) if columns > 1 and self.error is None else 0.0


def read_table(path: Path, fit: Callable[[Table], tuple[float, ...]]) -> Table:
    """Read a table by the encoding and the separator that fit best.

    Args:
        path: The file.
        fit: A function that rates a reading, the larger the better; the most even one of equals is taken.

    Raises:
        DataError: The file cannot be read, is no text, or no reading of it comes to its end.
    """
    readings = []
    for text, notes in _texts(path):
        hint = re.match(r"\"?sep=(.)\"?(\r\n?|\n)", text)  # Excel's own
        text = text[hint.end() :] if hint else text
        for separator in [hint[1]] if hint else SEPARATORS:
            if separator in text or separator == ",":
                table = _parsed(text, separator, notes, first_line=2 if hint else 1)
                readings.append(((*fit(table), table.evenness), table))
    _, best = max(readings, key=lambda reading: reading[0])  # the first of equals
    if best.error is not None:
        raise DataError(f"{path}, {best.error}")
    return best


def trimmed(cells: list[str]) -> list[str]:
    """Take empty cells off the end of a row."""
    end = len(cells)
    while end and not cells[end - 1].strip():
        end -= 1
    return cells[:end]


def _texts(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Decode a file by each encoding that it may be in, the likeliest first, with notes on guesses."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read labels from {path}: {error.strerror}") from error
    for mark, encoding, errors in (
        (codecs.BOM_UTF8, "utf-8", "surrogateescape"),
        (codecs.BOM_UTF32_LE, "utf-32-le", "replace"),  # before UTF-16, with whose mark it begins
        (codecs.BOM_UTF32_BE, "utf-32-be", "replace"),
        (codecs.BOM_UTF16_LE, "utf-16-le", "replace"),
        (codecs.BOM_UTF16_BE, "utf-16-be", "replace"),
    ):
        if data.startswith(mark):
            return [(data[len(mark) :].decode(encoding, errors), ())]
    if b"\0" in data:
        for zeros, others, encoding in ((data[1::2], data[::2], "utf-16-le"), (data[::2], data[1::2], "utf-16-be")):
            if 2 * zeros.count(0) > len(zeros) and not others.count(0):
                return [(data.decode(encoding, "replace"), (f"{path.name}: read as UTF-16, as its zero bytes tell",))]
        raise DataError(f"{path} is {kind_of(data).words}, not a table of text: save it as CSV in UTF-8")
    try:
        return [(data.decode("utf-8"), ())]
    except UnicodeDecodeError:
        pass
    try:
        text, encoding = data.decode("cp1252"), "Windows-1252"
    except UnicodeDecodeError:
        text, encoding = data.decode("latin-1"), "Latin-1"
    note = f"{path.name}: read as {encoding}, since it is no UTF-8; save it as UTF-8 if letters look wrong"
    # Names of files that are not UTF-8 themselves may stand in a table as their bytes.
    return [(text, (note,)), (data.decode("utf-8", "surrogateescape"), ())]


def _parsed(text: str, separator: str, notes: tuple[str, ...], first_line: int) -> Table:
    """Take a text apart by the rules of RFC 4180."""
    # Lines end as lines of files do: U+2028 and form feeds are parts of cells. Quotes quote after blanks, too.
    skip = separator == " " or re.search(rf'{re.escape(separator)} +"', text) is not None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=skip, strict=True)
    rows: list[tuple[int, list[str]]] = []
    begun = first_line  # the line on which the row begins
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((begun, cells))
            begun = reader.line_num + first_line
    except csv.Error as error:
        cause = "a quote is opened there and never closed" if "end of data" in str(error) else str(error)
        return Table(rows, separator, notes, f"line {begun}: {cause}")
    return Table(rows, separator, notes)
