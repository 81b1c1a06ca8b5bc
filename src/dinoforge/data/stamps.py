"""Sizes and dates of a data set's files, which tell files that were replaced under their old names."""

from collections.abc import Mapping
from dataclasses import dataclass

from dinoforge.data.names import in_table, original_name, printable
from dinoforge.data.planes import PlanesOf
from dinoforge.data.sampling import spaced
from dinoforge.data.sources import FolderSource, Source

MOST = 10_000
"""The most files that are asked, evenly spaced; each is a question to the storage."""

_SECONDS = 2  # the tolerated difference of dates, which some file systems round


@dataclass(frozen=True)
class Stamp:
    """The size and date of a file, which change with its content.

    Args:
        size: The size in bytes.
        date: The date of the last change in seconds since 1970.
    """

    size: int
    date: int


def stamps_of(source: Source, most: int = MOST) -> dict[str, Stamp]:
    """Ask a data set's files for their stamps.

    Args:
        source: The data set.
        most: The most files that are asked, evenly spaced.

    Returns:
        Names and stamps; empty for data that are no files. Files that are gone are left out.
    """
    files = source.files if isinstance(source, PlanesOf) else source
    if not isinstance(files, FolderSource):
        return {}
    found = {}
    for index in spaced(len(files), most):
        try:
            status = files.path(index).stat()
        except OSError:  # it is told when it is its turn
            continue
        found[files.name(index)] = Stamp(status.st_size, int(status.st_mtime))
    return found


def as_text(stamps: Mapping[str, Stamp]) -> str:
    """Write one line for each file: name, size, date."""
    return "".join(f"{in_table(printable(name))}\t{s.size}\t{s.date}\n" for name, s in stamps.items())


def from_text(text: str) -> dict[str, Stamp]:
    """Read lines of ``as_text``; lines that a kill has torn are left out."""
    found = {}
    for line in text.split("\n"):
        name, *numbers = line.split("\t")
        if len(numbers) == 2 and all(number.lstrip("-").isdecimal() for number in numbers):
            found[original_name(name)] = Stamp(*map(int, numbers))
    return found


def what_changed(before: Mapping[str, Stamp], now: Mapping[str, Stamp]) -> str | None:
    """Say how many files were replaced under the same names; None if none was, as far as stamps show."""
    both = [name for name in before if name in now]
    sizes = [name for name in both if before[name].size != now[name].size]
    dates = [name for name in both if name not in set(sizes) and abs(before[name].date - now[name].date) > _SECONDS]
    if sizes:
        name = sizes[0]
        also = f", {len(dates):,} more another date" if dates else ""
        return (
            f"{len(sizes):,} of {len(both):,} files that were asked have another size than when the run began{also}, "
            f"such as {printable(name)} ({before[name].size:,} bytes then, {now[name].size:,} now): it goes on with "
            "what they hold now, and its end is not that of a run on either"
        )
    if dates and len(dates) < len(both):
        return (
            f"{len(dates):,} of {len(both):,} files that were asked have another date than when the run began, such as "
            f"{printable(dates[0])}: if their content is another one, the run goes on with that"
        )
    if dates:
        return "all files have other dates than when the run began, as in a copy of them; their sizes are the same"
    return None
