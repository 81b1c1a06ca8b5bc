import enum
import errno
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoforge.data.decode import decode
from dinoforge.data.kinds import IMAGE_EXTENSIONS
from dinoforge.data.labels import labels_of
from dinoforge.data.sources import FolderSource, SequenceSource, Source, open_source, printable
from dinoforge.errors import DataError, ImageError


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def test_folder_is_walked_and_sorted(tmp_path: Path) -> None:
    folder(tmp_path, "b/2.PNG", "b/10.jpg", "a/deep/er/1.Tiff", "z.webp", "readme.txt", "noextension")
    folder(tmp_path, ".hidden/1.png", ".2.png", "__MACOSX/3.png", "b/._2.PNG")
    source = open_source(tmp_path)
    assert names(source) == ["a/deep/er/1.Tiff", "b/10.jpg", "b/2.PNG", "z.webp"]
    assert source.item(1).image == b"b/10.jpg"
    assert [source.item(index).label for index in range(4)] == ["a", "b", "b", None]
    assert source.labels() == ["a", "b", "b", None]


def test_every_extension_in_any_case(tmp_path: Path) -> None:
    folder(tmp_path, *[f"{extension}.{extension.upper()}" for extension in IMAGE_EXTENSIONS])
    assert len(FolderSource(str(tmp_path))) == len(IMAGE_EXTENSIONS)
    named = "jpg jpeg jfif jpe png webp tif tiff bmp gif jp2 j2k jpx heic heif avif jxl ppm pgm pbm pnm npy"
    assert set(named.split()) <= IMAGE_EXTENSIONS


def test_labels_are_top_folders(tmp_path: Path) -> None:
    source = FolderSource(folder(tmp_path, "cat/1.png", "cat/x/2.png", "dog/1.png"))
    assert source.labels() == ["cat", "cat", "dog"]


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    folder(tmp_path, "a/1.jpg", "a/2.dcm", "b/3.DCM", "b/4.jfif", "b/5.jpe", "labels.csv", "b/notes")
    source = FolderSource(tmp_path)
    assert names(source) == ["a/1.jpg", "b/4.jfif", "b/5.jpe"]
    assert source.left_out == {".dcm (DICOM)": 2, ".csv (table)": 1, "without extension": 1}


def test_a_stray_image_leaves_the_others_their_labels(tmp_path: Path) -> None:
    source = FolderSource(folder(tmp_path, "cat/1.png", "dog/1.png", "dog/2.png", "overview.png"))
    assert source.labels() == ["cat", "dog", "dog", None]
    found = labels_of(source)
    assert found.said == "2 classes from sub-folders; 1 image lies in none and takes no part: overview.png"
    assert found.values == source.labels()


def test_parts_of_a_split_are_no_classes(tmp_path: Path) -> None:
    source = FolderSource(
        folder(tmp_path, *[f"{part}/{c}/{i}.png" for part in ("train", "val") for c in "ab" for i in (1, 2)])
    )
    assert source.labels() == ["a", "a", "b", "b"] * 2
    assert [source.item(index).label for index in (0, 7)] == ["a", "b"]
    assert labels_of(source).said == "2 classes from sub-folders of train/ and val/"


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    data, elsewhere = folder(tmp_path / "data", "a/1.png"), folder(tmp_path / "elsewhere", "2.png")
    (data / "linked").symlink_to(elsewhere)
    (data / "a" / "loop").symlink_to(data)
    (data / "self.png").symlink_to(data / "self.png")
    (data / "3.png").symlink_to(elsewhere / "2.png")
    (data / "gone.png").symlink_to(elsewhere / "gone.png")
    source = FolderSource(data)
    assert names(source) == ["3.png", "a/1.png", "gone.png", "linked/2.png", "self.png"]
    assert source.item(0).image == b"2.png"
    for index in (2, 4):
        with pytest.raises(ImageError):
            source.item(index)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"caf\xe9/\xff.png")).write_bytes(b"data")
    source = FolderSource(tmp_path)
    assert source.item(0).image == b"data"
    assert printable(source.name(0)) == "caf\\xe9/\\xff.png"
    assert os.fsencode(source.name(0)) == b"caf\xe9/\xff.png"
    assert printable(source.labels()[0]) == "caf\\xe9"  # type: ignore[index]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_are_not_images(tmp_path: Path) -> None:
    folder(tmp_path, "1.png")
    os.mkfifo(tmp_path / "2.png")
    assert names(FolderSource(tmp_path)) == ["1.png"]


def test_unreadable_files(tmp_path: Path) -> None:
    source = FolderSource(folder(tmp_path, "1.png", "2.png", "3.png"))
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").unlink()
    (tmp_path / "3.png").mkdir()
    for index, reason in enumerate(["No such file", "empty file", "directory"]):
        with pytest.raises(ImageError, match=reason):
            source.item(index)
    with pytest.raises(IndexError):
        source.item(3)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("a,b")
    empty = tmp_path / "empty"
    empty.mkdir()
    other = folder(tmp_path / "other", "1.txt", "2.txt", "3.dcm")
    for path, message in (
        (tmp_path / "missing", "does not exist"),
        (file, "is a file"),
        (empty, "no files at all"),
        (other, r"found only others, 3 files: 2 .txt \(text\), 1 .dcm \(DICOM\)"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(path)


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse(path: bytes) -> Any:  # root, who runs many a test, may read everything
        if path.endswith(b"/b"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read the folder .*/b: Permission denied"):
        open_source(tmp_path)


def test_index_is_compact(tmp_path: Path) -> None:
    folder(tmp_path, *[f"some_folder/image_{index:06}.png" for index in range(500)])
    source = FolderSource(tmp_path)
    data = pickle.dumps(source)
    assert len(data) / 500 < 60
    copy = pickle.loads(data)
    assert names(copy) == names(source)
    assert copy.fingerprint() == source.fingerprint()


def test_fingerprint_tells_sources_apart(tmp_path: Path) -> None:
    one = FolderSource(folder(tmp_path / "one", "a.png", "b.png")).fingerprint()
    assert FolderSource(folder(tmp_path / "two", "a.png", "b.png")).fingerprint() == one
    assert FolderSource(folder(tmp_path / "three", "a.png", "c.png")).fingerprint() != one
    assert FolderSource(folder(tmp_path / "four", "a.png", "b.png", "c.png")).fingerprint() != one
    assert SequenceSource(["a", "b"]).fingerprint() != SequenceSource(["a", "c"]).fingerprint()
    assert SequenceSource(np.zeros((2, 3, 3))).fingerprint() != SequenceSource(np.zeros((3, 3, 3))).fingerprint()


def test_sequences_of_every_kind(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    path = tmp_path / "1.png"
    Image.fromarray(pixels).save(path)
    items = [
        path,
        str(path),
        path.read_bytes(),
        Image.fromarray(pixels),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
        (pixels, 7),
        [pixels, torch.tensor(7)],
        {"image": pixels, "label": "seven"},
    ]
    source = open_source(items)
    assert isinstance(source, SequenceSource)
    assert len(source) == 9
    for index in range(9):
        assert np.array_equal(decode(source.item(index).image, channels=3), pixels)
    assert [source.item(index).label for index in range(9)] == [None] * 6 + ["7", "7", "seven"]
    assert names(source)[:3] == [str(path), str(path), "item 2"]
    assert source.labels() is None
    assert open_source(items[6:]).labels() == ["7", "7", "seven"]
    assert open_source(source) is source


def test_arrays_and_data_sets_are_sequences() -> None:
    class Squares:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
            if index == 1:
                raise KeyError("lost")
            return np.full((4, 4), index, np.uint8), f"class {index}"

    source = open_source(Squares())
    assert source.item(2).label == "class 2"
    assert source.item(2).name == "item 2"
    assert source.labels() is None
    with pytest.raises(ImageError, match="KeyError: 'lost'"):
        source.item(1)
    assert decode(open_source(np.zeros((5, 4, 3, 3), np.uint8)).item(4).image, channels=3).shape == (4, 3, 3)
    assert decode(open_source(torch.zeros(5, 3, 4, 2)).item(4).image, channels=3).shape == (4, 2, 3)


@pytest.mark.parametrize("data", [3, None, {"a": 1}, [], iter([1]), np.zeros((0, 4, 4))])
def test_objects_that_are_no_sequence(data: object) -> None:
    with pytest.raises(DataError, match=r"expected a folder|is empty"):
        open_source(data)


def test_items_that_are_no_images(tmp_path: Path) -> None:
    source = open_source([17, (), {"pixels": 1}, tmp_path / "missing.png", "nul\0.png"])
    for index in range(5):
        with pytest.raises(ImageError):
            source.item(index)


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("cat", "cat"),
        (3, "3"),
        (True, "True"),
        (np.int64(3), "3"),
        (torch.tensor(3), "3"),
        (np.array(3), "3"),
        (Colour.RED, "Colour.RED"),
        ("", None),
        (None, None),
        (float("nan"), None),  # what a table has where nothing stands
        (np.zeros((4, 4)), None),  # a mask: of a large one only the corners would be told apart
        (torch.tensor([0, 1]), None),
        ([0, 1], None),
        ({"boxes": []}, None),
        (Image.new("L", (4, 4)), None),
    ],
)
def test_labels_are_texts_and_numbers(label: object, expected: str | None) -> None:
    pixels = np.zeros((2, 2), np.uint8)
    assert open_source([(pixels, label)]).item(0).label == expected
    assert open_source([{"image": pixels, "label": label}]).item(0).label == expected


def test_a_list_in_which_few_items_lack_a_label() -> None:
    pixels = np.zeros((2, 2), np.uint8)
    items = [(pixels, "cat"), (pixels, "dog"), (pixels, None), (pixels, "cat"), (pixels, "dog")]
    found = labels_of(open_source(items))
    assert found.values == ["cat", "dog", None, "cat", "dog"]
    assert found.said == "2 classes from the data; 1 image has none and takes no part, such as item 2"


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([np.zeros((2, 2))] * 3, "none: the items hold no text or number beside the image"),
        (
            [(np.zeros((2, 2)), "cat" if i < 12 else None) for i in range(24)],
            "none: 12 of 24 items have no text or number beside the image, such as item 12",
        ),
        (np.zeros((5, 4, 4)), "none: data of type ndarray are not asked for labels, since that would read the images"),
    ],
)
def test_why_data_have_no_labels_is_said(items: object, said: str) -> None:
    found = labels_of(open_source(items))
    assert found.values is None
    assert found.said == said


def test_an_array_without_a_length_is_a_sequence() -> None:
    class Array:  # as zarr's, whose len() raises
        shape = (3, 4, 5, 3)

        def __getitem__(self, index: int) -> np.ndarray:
            return np.full(self.shape[1:], index, np.uint8)

    source = open_source(Array())
    assert len(source) == 3
    assert isinstance(source.item(2).image, np.ndarray)
    Array.shape = ()
    with pytest.raises(DataError, match="got Array"):
        open_source(Array())


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_current_folder(path: str) -> None:
    with pytest.raises(DataError, match="the path is empty"):
        open_source(path)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert len(open_source("~")) == 1


@pytest.mark.parametrize(
    ("number", "times", "read"), [(errno.EIO, 3, True), (errno.ESTALE, 1, True), (errno.EIO, 9, False)]
)
def test_storage_that_fails_for_a_moment_is_asked_again(tmp_path, monkeypatch, number, times, read) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    source = open_source(tmp_path)
    whole, slept, failures = Path.read_bytes, [], [OSError(number, os.strerror(number))] * times

    def flaky(path: Path) -> bytes:
        if failures:
            raise failures.pop()
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    monkeypatch.setattr("dinoforge.data.sources.time.sleep", slept.append)
    if read:
        assert source.item(0).image == whole(tmp_path / "a.png")
        assert len(slept) == times
    else:
        with pytest.raises(ImageError, match=f"cannot be read: {os.strerror(number)}"):
            source.item(0)
        assert len(slept) == 3


def test_a_file_that_is_gone_is_not_waited_for(tmp_path, monkeypatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    monkeypatch.setattr("dinoforge.data.sources.time.sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(ImageError, match="No such file"):
        source.item(0)
