import csv
import io
import os
from pathlib import Path

import pytest

from dinoforge.data.names import in_table, original_name, printable

AWKWARD = [
    "a\nb.jpg",
    "r\rr.jpg",
    "tab\there.jpg",
    "a\u2028b.png",
    "c\x0cd.png",
    "e\u0085f.png",
    "g\x1ch.png",
    "vertical\x0btab.png",
    "\ufeffmark.png",
    "e\x1b[31mred.jpg",
    "back\\slash.jpg",
    "back\\nslash.jpg",
    'quote".jpg',
    '"quote.jpg',
    os.fsdecode(b"Mu\xf1oz.jpg"),
    "Mu\\xf1oz.jpg",  # the text of the name before
    "\ud800.jpg",
    " space .jpg",
    "\U0001f600.jpg",
    "f\u00fc.png",
    "per%cent,comma.jpg",
]


@pytest.mark.parametrize("name", AWKWARD)
def test_the_name_comes_back(name: str) -> None:
    assert original_name(printable(name)) == name
    assert original_name(in_table(printable(name))) == name


def test_every_character_comes_back() -> None:
    name = "".join(map(chr, [*range(1, 0x250), *range(0x2000, 0x2100), *range(0xD800, 0xE000), 0xFEFF, 0x1F600]))
    assert original_name(in_table(printable(name))) == name


def test_different_names_stay_different() -> None:
    assert len({in_table(printable(name)) for name in AWKWARD}) == len(AWKWARD)


def test_a_file_of_names_has_a_line_for_each(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("".join(f"{in_table(printable(name))}\n" for name in AWKWARD), encoding="utf-8")
    text = file.read_text(encoding="utf-8")
    assert [original_name(line) for line in text.splitlines()] == AWKWARD
    with file.open(encoding="utf-8") as lines:
        assert len(list(lines)) == len(AWKWARD)
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row[0] for row in csv.reader(lines, delimiter="\t")]
    assert [original_name(row) for row in rows] == AWKWARD
    assert len(list(csv.reader(io.StringIO(text)))) == len(AWKWARD)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a/b.png", "a/b.png"),
        ("f\u00fc \U0001f600.png", "f\u00fc \U0001f600.png"),
        ("a\u2028b", "a\\u2028b"),
        ("a\x85b", "a\\u0085b"),
        ("\x1b\x7f", "\\x1b\\x7f"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("a\\b", "a\\\\b"),
    ],
)
def test_how_names_are_written(name: str, text: str) -> None:
    assert printable(name) == text
    assert printable(Path(name)) == text
