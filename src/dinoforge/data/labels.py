"""Labels of images: from their folders, from the data, or from a table, with notes on guesses.

Nothing is assumed about a table's columns: the names are in the column that names most images, the labels in the column
whose header says so, or in the only other one. Guesses are told, and columns that could mean two things are refused.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dinoforge.data.classes import is_split
from dinoforge.data.kinds import IMAGE_EXTENSIONS, OTHER_EXTENSIONS, extension
from dinoforge.data.names import original_name, printable
from dinoforge.data.planes import PlanesOf
from dinoforge.data.sources import FolderSource, SequenceSource, Source
from dinoforge.data.tables import SEPARATORS, Table, read_table, trimmed
from dinoforge.errors import DataError

_NAME_HEADERS = frozenset("file filename image imagename img imagepath path filepath name imageid".split())
_LABEL_HEADERS = (
    frozenset("label labels labelname classlabel".split()),
    frozenset("class classes classname target targets category y".split()),
)
"""Headers of the column of labels, the plainest ones first."""
_OTHER_HEADERS = frozenset(
    "split set subset fold partition phase usage part istrain istest isval index id unnamed0 width height size bytes "
    "depth channels md5 sha1 sha256 hash checksum url link date time timestamp datetime lat lon latitude longitude x "
    "xmin xmax ymin ymax bbox format mode mime license comment comments note notes".split()
)
"""Headers of columns that are never the label."""
_SAMPLED_ROWS = 2000  # by which the column of names is found; all rows where these name no image exactly

Row = tuple[int, list[str]]
"""The line number and the cells of a row."""

Hits = Mapping[int, tuple[int, int]]
"""The number of cells in each column that name images as they are, and by some comparison."""


@dataclass(frozen=True)
class Labels:
    """The labels of a source's images.

    Args:
        values: The label of each image, None for an image that has none and takes no part; None where there are none.
        said: The kind of the labels, or the reason why there are none, such as
            ``2 classes from sub-folders of train/ and val/``.
        notes: The guesses that were made while they were read, a sentence each.
    """

    values: list[str | None] | None
    said: str
    notes: tuple[str, ...] = ()


def labels_of(source: Source) -> Labels:
    """Take the labels that a source knows by itself, without reading images."""
    values = source.labels()
    if isinstance(source, PlanesOf):
        found = labels_of(source.files)
        return replace(found, values=values, notes=found.notes + _of_planes(source, values))
    if isinstance(source, FolderSource):
        return Labels(values, source.classes.said)
    if values is None:
        why = source.why_no_labels() if isinstance(source, SequenceSource) else "the data give none"
        return Labels(None, f"none: {why}")
    said = f"{_classes(values)} from the data"
    strays = [index for index, label in enumerate(values) if label is None]
    if strays:
        take = "has none and takes" if len(strays) == 1 else "have none and take"
        said += f"; {_count(len(strays), 'image')} {take} no part, such as {printable(source.name(strays[0]))}"
    return Labels(values, said)


def read_labels(path: str | os.PathLike[str], source: Source) -> list[str]:
    """Read one label for each image of a source from a table; see ``label_table``."""
    return [label for label in label_table(path, source).values or () if label is not None]


def label_table(path: str | os.PathLike[str], source: Source) -> Labels:
    """Read one label for each image of a source from a table.

    A table names an image by its relative path, by a path from further up, or, where only one image has it, by its base
    name. Where that fits no image, names are compared in Unicode's normal form, without their ends, and with small and
    capital letters alike; this is said. Rows about images that the source lacks are ignored. Where every plane of a
    file is an image, the name of the file means all of them.

    Args:
        path: A file of text in UTF-8, UTF-16 or Windows-1252, with commas, semicolons, tabs, vertical bars or blanks
            between columns, as ``read_table`` finds out.
        source: The images.

    Raises:
        DataError: The table cannot be read; it has no column that could be the label, or several; it names an image
            ambiguously, labels one twice differently, or leaves images without a label.
    """
    path = Path(path)
    names = _Names(source)
    hits: dict[int, Hits] = {}

    def fit(table: Table) -> tuple[int, int]:
        hits[id(table)] = found = _hits(table, names)
        return max(found.values(), default=(0, 0))

    table = read_table(path, fit)
    columns = _columns(path, table, names, hits[id(table)])
    writer = _Writer(path, source)
    rest: list[tuple[int, str, str]] = []  # rows whose names fit no image as they are
    for line, cells in columns.body:
        cell, label = _name_and_label(path, line, cells, columns, table)
        found = names.find(cell)
        if found:
            writer.give(line, cell, label, found)
        else:
            rest.append((line, cell, label))
    notes = [*table.notes, *columns.notes]
    for words, key in _FALLBACKS.items():
        if rest and None in writer.values:
            before = len(rest)
            rest = _give_by(key, rest, names, writer)
            if fitted := before - len(rest):
                notes.append(f"{path.name}: {_count(fitted, 'name')} fit only {words}")

    missing = [index for index, label in enumerate(writer.values) if label is None]
    if missing:
        examples = ", ".join(printable(source.name(index)) for index in missing[:3])
        strangers = ", ".join(printable(cell.strip()) for _, cell, _ in rest[-3:])
        hint = f"; names in the table look like: {strangers}" if strangers else ""
        raise DataError(f"{path}: no label for {len(missing)} of {len(source)} images, such as {examples}{hint}")
    notes += _of_planes(source, writer.values)
    return Labels(writer.values, f"{_classes(writer.values)} from {printable(path.name)}", tuple(notes))


def _of_planes(source: Source, values: Sequence[str | None] | None) -> tuple[str, ...]:
    """A note on accuracies over planes, which are alike within a file."""
    if values is None or not isinstance(source, PlanesOf) or len(source) == len(source.files):
        return ()
    return (
        "planes of one file are alike, and can lie on both sides of a split: accuracies look better than they are on "
        "other files, as eval --test measures them",
    )


class _Writer:
    """Labels of images, each of which gets one label."""

    def __init__(self, path: Path, source: Source) -> None:
        self.values: list[str | None] = [None] * len(source)
        self._path, self._source = path, source

    def give(self, line: int, cell: str, label: str, found: Sequence[Sequence[int]]) -> None:
        """Label the images that a cell names.

        Args:
            line: The number of the cell's line.
            cell: The cell.
            label: The label; '' for none.
            found: The images that it names, as ``_Names.find`` gives them.

        Raises:
            DataError: The name is ambiguous, or an image has another label already.
        """
        where = f"{self._path}, line {line}: '{printable(cell.strip())}'"
        if len(found) > 1:
            examples = ", ".join(printable(self._source.name(group[0])) for group in found[:3])
            raise DataError(f"{where} could be any of {examples}: give the relative path")
        for index in found[0] if label else ():
            before = self.values[index]
            if before not in (None, label):
                raise DataError(f"{where} is labelled both '{printable(before or '')}' and '{printable(label)}'")
            self.values[index] = label


# Names


class _Names:
    """The names that a table may have for the images of a source."""

    def __init__(self, source: Source) -> None:
        self.indices: defaultdict[str, list[int]] = defaultdict(list)
        for index in range(len(source)):
            self.indices[source.name(index)].append(index)
        if isinstance(source, PlanesOf):  # the name of a file means all of its planes
            for index in range(len(source)):
                file, plane = source.place(index)
                if plane is not None:
                    self.indices[source.files.name(file)].append(index)
            source = source.files
        self._by_base: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.indices:
            self._by_base[_base(name)].append(name)
        # "cats/1.png" and "/data/cats/1.png" are 1.png of the folder /data/cats.
        root = Path(os.path.abspath(source.root)).as_posix() if isinstance(source, FolderSource) else ""
        folders = root.strip("/").split("/")
        self._above = [f"{root}/", *("/".join(folders[i:]) + "/" for i in range(len(folders)))] if root else []

    def find(self, cell: str) -> list[list[int]]:
        """Find the images that a cell names, one group for each name that it may be: several groups are ambiguous."""
        for name in _spellings(cell):
            if name in self.indices:
                return [self.indices[name]]
            if "/" not in name and name in self._by_base:  # a path that is not there is not the same as a base name
                return [self.indices[found] for found in self._by_base[name]]
        for name in _spellings(cell):
            for above in self._above:
                if name.startswith(above) and (found := name.removeprefix(above)) in self.indices:
                    return [self.indices[found]]
        return []

    @cached_property
    def _loose(self) -> set[str]:
        return {_loosest(text) for name in self.indices for text in (name, _base(name))}

    def is_like(self, cell: str) -> bool:
        """Whether a cell names an image by the loosest comparison."""
        return any(_loosest(name) in self._loose for name in _spellings(cell))


def _spellings(cell: str) -> Iterator[str]:
    """The names that a cell may mean: itself, then without blanks around it, with slashes, and unescaped."""
    stripped = cell.strip()
    seen = set()
    for name in (cell, stripped, stripped.replace("\\", "/"), original_name(stripped)):
        for spelling in (name, name.removeprefix("./")):
            if spelling and spelling not in seen:
                seen.add(spelling)
                yield spelling


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _without_end(name: str) -> str:
    name = _normal(name)
    end = extension(name)
    return name[: -len(end) - 1] if end in IMAGE_EXTENSIONS or end in OTHER_EXTENSIONS else name


def _loosest(name: str) -> str:
    return _without_end(name).casefold()


_FALLBACKS: Mapping[str, Callable[[str], str]] = {
    "in Unicode's normal form (a letter with an accent can be written in two ways)": _normal,
    "without the ends of file names": _without_end,
    "with small and capital letters alike": lambda name: _normal(name).casefold(),
    "without the ends of file names, and with small and capital letters alike": _loosest,
}
"""Comparisons of names that fit no image as they are, from strict to loose, in words."""


def _give_by(
    key: Callable[[str], str], rows: Sequence[tuple[int, str, str]], names: _Names, writer: _Writer
) -> list[tuple[int, str, str]]:
    """Give labels by a looser comparison to images that have none; return the rows that fit none."""
    by_key: defaultdict[str, list[list[int]]] = defaultdict(list)
    for name, indices in names.indices.items():
        if writer.values[indices[0]] is None:
            for text in {key(name), key(_base(name))}:
                by_key[text].append(indices)
    rest = []
    for line, cell, label in rows:
        found = next((by_key[text] for name in _spellings(cell) if (text := key(name)) in by_key), None)
        if found is None:
            rest.append((line, cell, label))
        else:
            writer.give(line, cell, label, found)
    return rest


# Columns


@dataclass(frozen=True)
class _Columns:
    """The columns of names and labels, and the rows below the header."""

    name: int
    label: int
    body: list[Row]  # below the header
    notes: tuple[str, ...] = ()


def _hits(table: Table, names: _Names) -> Hits:
    """Count in a sample of the rows which columns name images."""
    for step in dict.fromkeys((max(1, len(table.rows) // _SAMPLED_ROWS), 1)):
        found: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
        for _, cells in table.rows[::step]:
            for column, cell in enumerate(cells if len(cells) > 1 else ()):
                exact = bool(names.find(cell))
                found[column][0] += exact
                found[column][1] += exact or names.is_like(cell)
        if any(exact for exact, _ in found.values()):
            break
    return {column: (exact, like) for column, (exact, like) in sorted(found.items()) if like}


def _columns(path: Path, table: Table, names: _Names, hits: Hits) -> _Columns:
    """Tell names, labels and other columns apart.

    Raises:
        DataError: No column, or more than one, could be the names or the labels.
    """
    first = table.rows[0][1] if table.rows else []
    words = [_word(cell) for cell in first]
    if hits:
        name = max(hits, key=lambda column: hits[column])  # the first of equals
        cell = first[name] if name < len(first) else ""
        has_header = not names.find(cell) and (not names.is_like(cell) or words[name] in _NAME_HEADERS)
    else:
        has_header = bool(_NAME_HEADERS.union(*_LABEL_HEADERS).intersection(words))
        name = next((column for column, word in enumerate(words) if word in _NAME_HEADERS), 0)
    header = [cell.strip() for cell in first] if has_header else []
    body = table.rows[1:] if has_header else table.rows
    alike = [column for column in hits if column != name and 2 * hits[column][0] > hits[name][0] > 0]
    for column in alike:
        for line, cells in body:
            own, other = (names.find(cells[c]) if c < len(cells) else [] for c in (name, column))
            if own and other and own != other:
                both = f"{_called(header, name)} and {_called(header, column)}"
                raise DataError(f"{path}, line {line}: the columns {both} name different images: leave one out")
    others = [column for column in range(table.width) if column != name and column not in alike]
    label = _label_column(path, header, body, others)
    unused = [_called(header, column) for column in others if column != label]
    note = f"{path.name}: the label is column {_called(header, label)}; not used: {', '.join(unused)}"
    return _Columns(name, label, body, (note,) if unused else ())


def _label_column(path: Path, header: Sequence[str], body: Sequence[Row], others: Sequence[int]) -> int:
    """Find the column of labels among those that are not names."""
    words = {column: _word(header[column]) for column in others if header}
    if "x" in words.values():  # coordinates
        words = {column: "x" if word == "y" else word for column, word in words.items()}
    for headers in _LABEL_HEADERS:
        said = [column for column in others if words.get(column) in headers]
        if any(not _say_the_same(body, said[0], column) for column in said[1:]):
            raise DataError(_ambiguous(path, header, said))
        if said:
            return said[0]
    possible = [
        column
        for column in others
        if not (header and (words[column] in _OTHER_HEADERS or not header[column]))
        and not all(map(is_split, _cells(body, column)))
    ]
    if len(possible) > 1:
        raise DataError(_ambiguous(path, header, possible))
    if possible:
        return possible[0]
    if not any(len(cells) > 1 for _, cells in body):
        return 1  # rows without it are refused one by one
    shown = ", ".join(_called(header, column) for column in others[:6])
    only = f"beside the names there {'is' if len(others) == 1 else 'are'} only {shown}" if shown else "all name images"
    raise DataError(
        f"{path}: no column holds labels: {only}; call the column of labels 'label' in the first row, or add it"
    )


def _ambiguous(path: Path, header: Sequence[str], columns: Sequence[int]) -> str:
    shown = ", ".join(_called(header, column) for column in columns[:6]) + (", …" if len(columns) > 6 else "")
    way = "call one of them 'label' in the first row" if header else "add a first row that calls one of them 'label'"
    return f"{path}: each of the columns {shown} could be the label: {way}, or leave the others out"


def _name_and_label(path: Path, line: int, cells: list[str], columns: _Columns, table: Table) -> tuple[str, str]:
    """Take the name and the label out of a row."""
    if len(cells) < 2:
        raise DataError(f"{path}, line {line}: expected a file name and a label, got '{printable(cells[0])}'")
    if len(trimmed(cells)) > table.width:
        separators = SEPARATORS.get(table.separator, f"'{table.separator}'")
        raise DataError(
            f"{path}, line {line}: {len(trimmed(cells))} columns, but {table.width} in the first row: put quotes "
            f"around cells that hold {separators}"
        )
    name, label = (cells[column] if column < len(cells) else "" for column in (columns.name, columns.label))
    return name, label.strip()


def _say_the_same(body: Sequence[Row], one: int, other: int) -> bool:
    """Whether two columns tell the same images apart, as numbers and names of classes do."""
    pairs = {(_cell(cells, one), _cell(cells, other)) for _, cells in body}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _cells(body: Sequence[Row], column: int) -> set[str]:
    """The different cells of a column that are not empty."""
    return {cell for _, cells in body if (cell := _cell(cells, column))}


def _cell(cells: Sequence[str], column: int) -> str:
    return cells[column].strip() if column < len(cells) else ""


def _word(header: str) -> str:
    """Reduce a header to its small letters and digits: ``Image_ID`` to ``imageid``."""
    return re.sub(r"[\W_]", "", header).lower()


def _called(header: Sequence[str], column: int) -> str:
    if column < len(header) and header[column]:
        return f"'{printable(header[column])}'"
    return f"number {column + 1}"


def _classes(values: Sequence[str | None]) -> str:
    count = len(set(values) - {None})
    return f"{count:,} class{'' if count == 1 else 'es'}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
