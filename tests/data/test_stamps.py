"""Files that were replaced under their old names."""

import os
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import dinoforge
from dinoforge.data.sources import SequenceSource, open_source
from dinoforge.data.stamps import MOST, Stamp, as_text, from_text, stamps_of, what_changed
from report_sizes import SIZES

THEN = {f"{i}.png": Stamp(100 + i, 1_000_000) for i in range(4)}


def test_what_is_written_comes_back(tmp_path):
    names = ["a.png", "tab\tline\n.png", 'quo"te.png', "back\\slash.png", os.fsdecode(b"\xff.png")]
    stamps = {name: Stamp(i, -i) for i, name in enumerate(names)}
    assert from_text(as_text(stamps)) == stamps
    assert from_text(as_text(stamps)[:-3] + "x") == dict(list(stamps.items())[:-1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"1.png": Stamp(101, 1_000_002)}, None),
        ({"4.png": Stamp(7, 7)}, None),
        (
            {"1.png": Stamp(55, 1_000_000)},
            "1 of 4 files .* have another size than when the run began, such",
        ),
        (
            {"1.png": Stamp(55, 9), "2.png": Stamp(102, 9)},
            r"another size .* 1 more another date, such as 1.png \(101 byte",
        ),
        ({"2.png": Stamp(102, 9)}, "1 of 4 files that were asked have another date .* such as 2.png"),
        (
            {name: Stamp(s.size, 9) for name, s in THEN.items()},
            "all files have other dates .* sizes are the same",
        ),
    ],
)
def test_what_changed_is_said(changes, said):
    found = what_changed(THEN, THEN | changes)
    assert found is None if said is None else re.search(said, found)


def test_files_are_asked_in_bounded_number(tmp_path):
    assert stamps_of(SequenceSource([np.zeros((4, 4), np.uint8)])) == {}
    for i in range(30):
        Image.new("L", (4, 4)).save(tmp_path / f"{i:02}.png")
    source = open_source(tmp_path)
    (tmp_path / "00.png").unlink()
    found = stamps_of(source, 10)
    assert len(found) == 9
    assert found["29.png"].size == (tmp_path / "29.png").stat().st_size
    assert MOST == 10_000


def test_a_continued_run_says_that_images_were_replaced(tmp_path):
    (tmp_path / "data").mkdir()

    def put(name, side):
        pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / name)

    for i in range(16):
        put(f"{i:02}.png", 40)

    def run(steps):
        console = Console(record=True, width=300)
        keys = SIZES | {"train.steps": 6, "train.max_minutes": None, "probe.every_minutes": None}
        hooks = {"checkpoint.every_steps": steps}
        dinoforge.train(tmp_path / "data", "small", tmp_path / "run", console=console, **keys | hooks)
        return console.export_text()

    class Stopped(Exception):
        pass

    def stop(self, metrics):
        if metrics["step"] == 3:
            raise Stopped

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dinoforge.runs.display.Display.__call__", stop)
        with pytest.raises(Stopped):
            run(2)
    assert len((tmp_path / "run" / "images.tsv").read_text().splitlines()) == 16
    put("05.png", 60)
    said = run(2)
    assert "1 of 16 files that were asked have another size than when the run began" in said
    assert "such as 05.png" in said
