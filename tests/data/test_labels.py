import os
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dinoforge.data.labels import label_table, labels_of, read_labels
from dinoforge.data.names import in_table, printable
from dinoforge.data.sources import FolderSource, SequenceSource, Source, open_source
from dinoforge.errors import DataError


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


@pytest.fixture
def animals(tmp_path: Path) -> FolderSource:
    return FolderSource(folder(tmp_path / "animals", "a/1.png", "a/2.png", "b/3.png"))


def table(tmp_path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path = tmp_path / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding, "surrogateescape"))
    return path


def sequence(*names: str) -> Source:
    return SequenceSource(list(names))


PLAIN = ["1.png", "2.png", "3.png"]
CAT = ["cat", "dog", "cat"]


@pytest.mark.parametrize(
    "content",
    [
        "a/1.png,cat\na/2.png,dog\nb/3.png,cat\n",
        "file,label\na/1.png,cat\na/2.png,dog\nb/3.png,cat\n",
        "\ufefffile;label;more\r\n1.png;cat;x\r\n2.png;dog;x\r\n3.png;cat;x\r\n",
        "./a/1.png\tcat\n\na\\2.png\tdog\n3.png\tcat\nelse/where.png\tcow\n",
        'name,label\n"a/1.png","cat"\n2.png, dog \n3.png,cat\n3.png,cat\n',
        "animals/a/1.png,cat\nanimals/a/2.png,dog\nanimals/b/3.png,cat\n",  # from the folder above
    ],
)
def test_tables_of_many_forms(tmp_path: Path, animals: FolderSource, content: str) -> None:
    path = table(tmp_path, content)
    found = label_table(path, animals)
    assert found.values == CAT == read_labels(path, animals)
    assert found.said == "2 classes from labels.csv"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a/1.png,cat\nb/3.png,dog\n", "no label for 1 of 3 images, such as a/2.png"),
        ("a/1.png,cat\na/2.png,\nb/3.png,dog\n", "no label for 1 of 3 images, such as a/2.png"),
        ("x/1.png,cat\nx/2.png,cat\nx/3.png,cat\n", "3 of 3 images.*names in the table look like: x/1.png"),
        ("a/1.png,cat\n1.png,dog\n", "line 2: '1.png' is labelled both 'cat' and 'dog'"),
        ("a/1.png\n", "line 1: expected a file name and a label"),
        ("", "no label for 3 of 3"),
        ('1.png,cat\n2.png,"dog\n3.png,cat\n', "line 2: a quote is opened there and never closed"),
        ('1.png,"cat" or dog\n2.png,dog\n3.png,cat\n', "line 1: .*expected after"),
        ("file,label\n1.png,cat, black\n2.png,dog\n3.png,cat\n", "line 2: 3 columns, but 2 in the first row.*commas"),
        (b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0" + b"[Content_Types].xml", "not a table of text: save it as CSV"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is PNG, not a table of text"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, animals: FolderSource, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_table(table(tmp_path, content), animals)


def test_ambiguous_and_missing_tables(tmp_path: Path) -> None:
    source = FolderSource(folder(tmp_path / "d", "1.png", "a/1.png", "a/2.png", "b/2.png"))
    path = table(tmp_path, "1.png,top\n2.png,cat\n")
    with pytest.raises(DataError, match=r"line 2: '2.png' could be any of a/2.png, b/2.png"):
        label_table(path, source)
    path.write_text("1.png,top\na/1.png,cat\na/2.png,cat\nb/2.png,dog\n")
    assert label_table(path, source).values == ["top", "cat", "cat", "dog"]
    with pytest.raises(DataError, match="cannot read labels"):
        label_table(tmp_path / "missing.csv", source)


# Encodings

UMLAUTS = "name,label\n1.png,Küche\n2.png,Bär\n3.png,Küche\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_marks_tell_encodings(tmp_path: Path, encoding: str, newline: str, separator: str) -> None:
    text = UMLAUTS.replace("\n", newline).replace(",", separator)
    found = label_table(table(tmp_path, text, encoding), sequence(*PLAIN))
    assert found.values == ["Küche", "Bär", "Küche"]
    assert found.notes == ()


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("cp1252", "as Windows-1252, since it is no UTF-8"), ("utf-16-le", "as UTF-16"), ("utf-16-be", "as UTF-16")],
)
def test_encodings_without_a_mark_are_said(tmp_path: Path, encoding: str, said: str) -> None:
    found = label_table(table(tmp_path, UMLAUTS, encoding), sequence(*PLAIN))
    assert found.values == ["Küche", "Bär", "Küche"]
    assert len(found.notes) == 1
    assert said in found.notes[0]


def test_bytes_without_meaning_in_windows_1252_are_latin_1(tmp_path: Path) -> None:
    found = label_table(table(tmp_path, b"1.png,B\xe4r\n2.png,\x81\n3.png,x\n"), sequence(*PLAIN))
    assert found.values == ["Bär", "\x81", "x"]
    assert "Latin-1" in found.notes[0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_match_by_their_bytes(tmp_path: Path) -> None:
    names = [
        b"Mu\xf1oz.jpg",
        b"r\rr.jpg",
        b"back\\slash.jpg",
        b"Mu\\xf1oz.jpg",
        b'quote".jpg',
        b" space .jpg",
        b"a\nb.jpg",
    ]
    labels = ["cat", "dog", "cow", "pig", "hen", "fox", "ape"]
    source = FolderSource(folder(tmp_path / "d", *map(os.fsdecode, names)))
    rows = [
        b'"%s",%s\n' % (name.replace(b'"', b'""'), label.encode()) for name, label in zip(names, labels, strict=True)
    ]
    found = label_table(table(tmp_path, b"".join(rows)), source)
    assert found.values == [labels[names.index(os.fsencode(source.name(i)))] for i in range(len(names))]
    assert found.notes == ()


# Separators and cells


@pytest.mark.parametrize(
    "content",
    [
        "name;label;size, mm\n1.png;cat;3,5\n2.png;dog;3,5\n3.png;cat;4,5\n",
        "sep=;\n1.png;cat\n2.png;dog\n3.png;cat\n",
        "sep=^\r\n1.png^cat\r\n2.png^dog\r\n3.png^cat\r\n",
        "1.png cat\n2.png dog\n3.png  cat\n",
        '"1.png","cat"\r\n"2.png","dog"\r\n"3.png","cat"\r\n',
        '1.png, "cat"\n2.png, "dog"\n3.png, "cat"\n',
        ",file,label\n0,1.png,cat\n1,2.png,dog\n2,3.png,cat\n",  # as pandas writes its index
        "label\tfile\ncat\t1.png\ndog\t2.png\ncat\t3.png\n",
        "cat,1.png\ndog,2.png\ncat,3.png\n",
        "file,label\n1.png,cat\n2.png,dog\n3.png,cat\n,\n",
        "1.png,cat,\n2.png,dog,\n3.png,cat,\n",
    ],
)
def test_separators_and_columns_are_found(tmp_path: Path, content: str) -> None:
    assert label_table(table(tmp_path, content), sequence(*PLAIN)).values == CAT


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ('"scan, left.png";cat\nscan 2.png;dog\n', ["cat", "dog"]),
        ("scan, left.png;cat\nscan 2.png;dog\n", ["cat", "dog"]),
        ('"scan, left.png",cat\n"scan 2.png",dog\n', ["cat", "dog"]),
        ("scan, left.png\tcat, black\nscan 2.png\tdog\n", ["cat, black", "dog"]),
        ('"scan, left.png","cat\nblack"\nscan 2.png,"5"" dog"\n', ["cat\nblack", '5" dog']),
        ('"scan, left.png",5" cat\nscan 2.png,dog\n', ['5" cat', "dog"]),
    ],
)
def test_cells_that_hold_separators(tmp_path: Path, content: str, labels: Sequence[str]) -> None:
    source = sequence("scan, left.png", "scan 2.png")
    assert label_table(table(tmp_path, content), source).values == labels


def test_line_ends_that_are_parts_of_names(tmp_path: Path) -> None:
    names = ["a\u2028b.png", "c\x0cd.png", "e\u0085f.png", "g\x1ch.png", "i\x0bj.png", "plain.png"]
    content = "".join(f"{name},{i}\n" for i, name in enumerate(names))
    assert label_table(table(tmp_path, content), sequence(*names)).values == ["0", "1", "2", "3", "4", "5"]


def test_names_as_dinoforge_writes_them(tmp_path: Path) -> None:
    names = ["a\u2028b.png", "r\rr.png", "tab\there.png", '"q.png', "back\\slash.png"]
    content = "".join(f"{in_table(printable(name))},{i}\n" for i, name in enumerate(names))
    assert label_table(table(tmp_path, content), sequence(*names)).values == ["0", "1", "2", "3", "4"]


# Columns


@pytest.mark.parametrize(
    ("header", "rows", "labels"),
    [
        ("file,split,label", ["train,cat", "val,dog", "train,cat"], CAT),
        ("image_id,fold,Target", ["0,cat", "1,dog", "0,cat"], CAT),
        ("path,split,animal", ["train,cat", "val,dog", "test,cat"], CAT),  # the only one that can be it
        ("filename,width,height,class", ["4,5,cat", "4,5,dog", "4,6,cat"], CAT),
        ("name,x,y,label", ["1,2,cat", "3,4,dog", "5,6,cat"], CAT),
        ("name,y", ["0", "1", "0"], ["0", "1", "0"]),
        ("image,label,label_name", ["0,cat", "1,dog", "0,cat"], ["0", "1", "0"]),  # the same classes twice
        ("image,class,label", ["tissue,cat", "bone,dog", "bone,cat"], CAT),
        ("image,Klasse", ["cat", "dog", "cat"], CAT),
    ],
)
def test_the_header_tells_the_column(tmp_path: Path, header: str, rows: Sequence[str], labels: Sequence[str]) -> None:
    content = "\n".join([header, *(f"{name},{row}" for name, row in zip(PLAIN, rows, strict=True))])
    found = label_table(table(tmp_path, content), sequence(*PLAIN))
    assert found.values == labels
    assert bool(found.notes) == (header.count(",") > 1)


def test_columns_that_are_not_used_are_said(tmp_path: Path) -> None:
    content = "file,split,label\n1.png,train,cat\n2.png,val,dog\n3.png,val,cat\n"
    found = label_table(table(tmp_path, content), sequence(*PLAIN))
    assert found.notes == ("labels.csv: the label is column 'label'; not used: 'split'",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,split\n1.png,train\n2.png,val\n3.png,val\n", "no column holds labels: .* only 'split'"),
        ("1.png,train\n2.png,val\n3.png,val\n", "no column holds labels: .* only number 2"),
        ("file,width\n1.png,3\n2.png,4\n3.png,5\n", "no column holds labels: .* only 'width'"),
        ("image,path\n1.png,1.png\n2.png,2.png\n3.png,3.png\n", "no column holds labels: all name images"),
        ("image,animal,breed\n1.png,cat,x\n2.png,dog,y\n3.png,cat,z\n", "the columns 'animal', 'breed' could be"),
        ("image,cat,dog\n1.png,1,0\n2.png,0,1\n3.png,1,1\n", "each of the columns 'cat', 'dog' could be the label"),
        ("1.png,cat,old\n2.png,dog,old\n3.png,cat,new\n", "number 2, number 3 could be the label: add a first row"),
        ("image,label,labels\n1.png,a,x\n2.png,a,y\n3.png,b,y\n", "'label', 'labels' could be the label"),
        ("left,right,label\n1.png,2.png,a\n2.png,3.png,b\n3.png,1.png,b\n", "'left' and 'right' name different images"),
    ],
)
def test_columns_that_could_mean_anything_are_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_table(table(tmp_path, content), sequence(*PLAIN))


def test_labels_that_are_names_of_images_too(tmp_path: Path) -> None:
    names = ["0.png", "1.png", "2.png", "cat.png"]
    content = "file,label\n0.png,1\n1.png,2\n2.png,0\ncat.png,cat\n"
    assert label_table(table(tmp_path, content), sequence(*names)).values == ["1", "2", "0", "cat"]


# Names


@pytest.mark.parametrize(
    ("in_source", "in_table", "said"),
    [
        (unicodedata.normalize("NFD", "fü1.png"), unicodedata.normalize("NFC", "fü1.png"), "in Unicode's normal form"),
        (unicodedata.normalize("NFC", "fü1.png"), unicodedata.normalize("NFD", "fü1.png"), "in Unicode's normal form"),
        ("scan1.png", "scan1", "without the ends of file names"),
        ("scan1.png", "scan1.tif", "without the ends of file names"),
        ("scan1.5.png", "scan1.5", "without the ends of file names"),
        ("scan1.png", "SCAN1.PNG", "with small and capital letters alike"),
        ("scan1.png", "Scan1", "without the ends of file names, and with small and capital letters alike"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_looser_comparisons_are_said(tmp_path: Path, in_source: str, in_table: str, said: str, encoding: str) -> None:
    content = f"name,label\n{in_table},cat\nplain.png,dog\n"
    found = label_table(table(tmp_path, content, encoding), sequence(in_source, "plain.png"))
    assert found.values == ["cat", "dog"]
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"labels.csv: 1 name fit only {said}")


def test_looser_comparisons_come_last(tmp_path: Path) -> None:
    names = ["A.png", "a.png", "a.tif"]
    found = label_table(table(tmp_path, "A.png,1\na.png,2\na.tif,3\n"), sequence(*names))
    assert (found.values, found.notes) == (["1", "2", "3"], ())
    with pytest.raises(DataError, match=r"line 1: 'a' could be any of a.png, a.tif"):
        label_table(table(tmp_path, "a,1\nb.png,2\n"), sequence("a.png", "a.tif", "b.png"))


def test_blanks_and_backslashes_in_names(tmp_path: Path) -> None:
    names = [" a.png", "b .png", "sub/c.png", "d\\e.png", "f g.png"]
    content = " a.png,1\nb .png,2\nsub\\c.png,3\nd\\e.png,4\n f g.png ,5\n"
    assert label_table(table(tmp_path, content), sequence(*names)).values == ["1", "2", "3", "4", "5"]


def test_an_image_that_comes_twice(tmp_path: Path) -> None:
    source = sequence("d/1.png", "d/2.png", "d/1.png")
    assert label_table(table(tmp_path, "1.png,cat\n2.png,dog\n"), source).values == ["cat", "dog", "cat"]


def test_a_large_table_about_many_other_images(tmp_path: Path) -> None:
    rows = [f"other{i}.png,x,{i % 7}" for i in range(30_000)]
    rows[11_111:11_111] = ["1.png,train,cat", "2.png,val,dog", "3.png,val,cat"]
    found = label_table(table(tmp_path, "\n".join(["name,split,label", *rows])), sequence(*PLAIN))
    assert found.values == CAT


def test_labels_of_other_sources() -> None:
    class Data:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> np.ndarray:
            return np.zeros((2, 2), np.uint8)

    found = labels_of(open_source(Data()))
    assert found.values is None
    assert found.said.startswith("none: data of type Data are not asked for labels")
