"""Files that are the same, wherever they lie."""

import math
import time

import pytest

from dinoforge.data.sources import FolderSource
from dinoforge.inspection import copies

LONG = 3 * 2**16


@pytest.fixture
def source(tmp_path):
    """Names tell what is the same; sizes are equal in all but one."""
    contents = {
        "a/same.png": b"x" * LONG,
        "b/same.png": b"x" * LONG,
        "a/other_end.png": b"x" * (LONG - 1) + b"y",
        "a/other_start.png": b"y" + b"x" * (LONG - 1),
        "a/short.png": b"x",
        "c/short.png": b"x",
        "c/shorter.png": b"",
        "c/shortest.png": b"",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return FolderSource(tmp_path)


def names(source, groups):
    return sorted(sorted(source.name(index) for index in group) for group in groups)


def test_content_decides(source):
    groups, compared, total = copies.same_files(source, math.inf)
    assert names(source, groups) == [["a/same.png", "b/same.png"], ["a/short.png", "c/short.png"]]
    assert compared == len(source)
    assert total == 4 * LONG + 2


def test_a_file_that_is_gone_is_in_no_group(source):
    source.path(1).unlink()
    source.path(2).unlink()
    (source.root / "b" / "same.png").unlink()
    groups, compared, _ = copies.same_files(source, math.inf)
    assert all("same" not in name for group in names(source, groups) for name in group)
    assert compared == len(source)


def test_time_that_is_up_is_said(source):
    groups, compared, total = copies.same_files(source, time.monotonic() - 1)
    assert (groups, compared, total) == ([], 0, None)


def test_groups_across_parts_and_classes():
    every = ["train/cat/1.png", "train/cat/2.png", "val/cat/3.png", "test/dog/4.png", "train/dog/5.png"]
    told = copies.told(
        "pixels", [[0, 1], [0, 2], [0, 4], [0, 3]], every.__getitem__, [name.split("/")[1] for name in every]
    )
    assert (told.groups, told.images) == (4, 8)
    assert told.across_parts == 2
    assert told.part_examples == (("train/cat/1.png", "val/cat/3.png"), ("train/cat/1.png", "test/dog/4.png"))
    assert told.across_classes == 2
    assert told.class_examples == (("train/cat/1.png", "train/dog/5.png"), ("train/cat/1.png", "test/dog/4.png"))


def test_images_without_a_label_are_no_other_class():
    told = copies.told("files", [[0, 1]], ["a.png", "b/c.png"].__getitem__, [None, "b"])
    assert told.across_classes == 0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train/x.png", "train"),
        ("a/Val/b/x.png", "val"),
        ("cats/x.png", None),
        ("train.png", None),
        ("test2017/x.png", "test2017"),
    ],
)
def test_parts_are_told_by_folders(name, part):
    assert copies.part_of(name) == part


def test_groups_within_known_ones_are_left_out():
    assert copies.without([[0, 1], [2, 3], [1, 4]], [[0, 1, 5], [2], [3]]) == [[2, 3], [1, 4]]
