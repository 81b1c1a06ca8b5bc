"""Each kind of trouble of a folder that has all of them is found, and named in text, JSON and page."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from . import troubled as made

# Code -> words that name it, and an image that has it.
EXPECTED = [
    ("unreadable", "is an HTML page, not an image", "train/cat/page.jpg"),
    ("unreadable", "is a git-lfs pointer, not an image: run git lfs pull", "train/cat/pointer.jpg"),
    ("unreadable", "empty file", "train/cat/empty.jpg"),
    ("unreadable", "truncated: the first", "train/cat/cut.jpg"),
    ("misnamed", "1 file named .jpg holds another thing: HTML page", "train/cat/page.jpg"),
    ("misnamed", "1 file named .jpg holds another thing: git-lfs pointer", "train/cat/pointer.jpg"),
    ("misnamed", "1 file named .jpg holds HEIC, and is read as HEIC", "train/cat/phone.jpg"),
    ("refused", "has 5 channels (uint16 x5, OME-TIFF, axes CYX), expected 3", "train/cat/five.ome.tif"),
    ("mixed_channels", "3 in 36, 1 in 4, 4 in 1, 5 in 1", "train/cat/five.ome.tif"),
    ("mixed_depths", "6 images have more than 8 bits, 36 others have 8", "train/cat/holes.tif"),
    ("narrow_range", "1 image has uint16 values of no more than 3,900, others up to 60,000", "train/cat/twelve.png"),
    ("narrow_range", "100 to 3,000, fill 4.4% of the type's range", "train/cat/nodata.tif"),
    ("no_data", "no data in 25.0% of its values, by the tag -9999: these become level 0", "train/cat/nodata.tif"),
    ("no_data", "no data in 12.5% of its values, by NaN", "train/cat/holes.tif"),
    ("band_left_out", "1 image with one more band beside the picture, such as infrared", "train/cat/infrared.tif"),
    ("laid_over_white", "1 image with transparency is laid over white", "train/cat/glass.png"),
    ("planes", "1 file has 7 planes (z): the first is taken", "train/cat/stack.ome.tif"),
    ("bare_cmyk", "1 CMYK JPEG without Adobe's marker", "train/cat/ink.jpg"),
    ("orientation", "1 image with an EXIF orientation that is none of 1 to 8: ignored", "train/cat/turned.jpg"),
    ("repaired", "1 JPEG file without its end, with all rows there: read", "train/cat/endless.jpg"),
    ("colour_profile", "which is not applied", "train/cat/profile.png"),
    ("extreme_aspect", "1 image more than 4 times as long as wide", "train/cat/long.png"),
    ("tiny", "2 images below 16 pixels on the shorter side", "train/cat/dot.png"),
    ("blank", "2 images of one single colour", "train/cat/blank.png"),
    ("strays", "1 image lies in none and takes no part: val/stray.png", None),
    ("split_folders", "folders are parts of a split: 37 in train, 9 in val", None),
    ("same_files_across_parts", "lies in more than one part of the split", "train/cat/copy.png = val/dog/copied.png"),
    ("same_files_across_classes", "lies in more than one class", "train/cat/copy.png = val/dog/copied.png"),
    ("same_pixels", "same pixels in different files", "train/cat/0.png = train/cat/bitmap.bmp"),
    ("near_duplicates", "that are nearly the same", "train/dog/near.png ~ val/dog/nearly.jpg"),
    ("near_duplicates_across_parts", "lies in more than one part", "train/dog/near.png ~ val/dog/nearly.jpg"),
    ("left_out", "left out 5 files: 1 .dcm (DICOM), 1 .mp4 (video), 1 .txt (text), 1 hidden, 1 in @eaDir", None),
    ("odd_names", "1 name with line ends", "train/cat/line\\nend.png"),
]


@pytest.mark.parametrize(("code", "words", "name"), EXPECTED)
def test_each_is_named_in_text_json_and_page(told, code, words, name):
    found = [one for one in told.json["troubles"] if one["code"] == code and words in one["said"]]
    assert len(found) == 1, [one["said"] for one in told.json["troubles"] if one["code"] == code]
    (one,) = found
    assert name is None or name in one["examples"]
    text = " ".join(told.text.split())
    assert one["said"] in text
    page = html.unescape(told.page.read_text(encoding="utf-8"))
    assert one["said"] in page
    assert f">{code}<" in page
    if name is not None:
        assert name in page
        assert name in text


def test_the_documentation_lists_every_key_and_every_code(told):
    root = Path(__file__).parents[2]
    listed = set(re.findall(r"`([a-z_0-9]+)`", (root / "docs" / "inspect.md").read_text(encoding="utf-8")))
    source = (root / "src" / "dinoforge" / "inspection" / "troubles.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'(?:Trouble\(|facts,)\s*"([a-z_]+)"', source)) | {
        "same_files",
        "same_pixels",
        "near_duplicates",
    }
    assert len(codes) > 25
    assert codes <= listed
    assert {one["code"].partition("_across")[0] for one in told.json["troubles"]} <= codes

    def keys(value):
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    free = ("ends", "kinds", "modes", "left_out", "profiles", "orientations")
    assert set(told.json) <= listed
    stable = {key: value for key, value in told.json.items() if key not in free}
    labels = {**stable["labels"], "classes": {}, "parts": {}}
    assert keys({**stable, "labels": labels}) <= listed


def test_nothing_else_is_said(told):
    """A trouble that is not there is not found."""
    expected = {code for code, _, _ in EXPECTED} | {"same_files"}
    assert {one["code"] for one in told.json["troubles"]} == expected


def test_what_costs_images_comes_first(told):
    serious = [one["serious"] for one in told.json["troubles"]]
    assert serious == sorted(serious, reverse=True)
    lines = told.text.splitlines()
    assert any(line.startswith("  ! ") and "HTML page" in line for line in lines)
    assert any(line.startswith("  - ") and "laid over white" in line for line in lines)


def test_kinds_are_told_by_content(told):
    assert told.json["ends"] == {".png": 30, ".jpg": 10, ".tif": 5, ".bmp": 1}
    assert told.json["kinds"]["HEIC"] == 1
    assert told.json["kinds"]["HTML page"] == 1
    assert told.json["kinds"]["git-lfs pointer"] == 1
    assert told.json["kinds"]["empty file"] == 1
    assert sum(told.json["kinds"].values()) == told.json["sampling"]["images"] == told.json["images"] == 46
    assert told.json["modes"]["RGB;16"] == 1
    assert "1 RGB, 16 bits" in told.text
    assert "1 RGB, 16 bits" in told.page.read_text(encoding="utf-8")


def test_unreadable_images_with_their_reasons(told):
    reasons = dict(told.json["unreadable"])
    assert set(reasons) == {f"train/cat/{name}" for name in ("page.jpg", "pointer.jpg", "empty.jpg", "cut.jpg")}
    assert reasons["train/cat/empty.jpg"] == "empty file"


def test_labels_as_they_would_be_read(told):
    labels = told.json["labels"]
    assert labels["classes"] == {"cat": 33, "dog": 12}
    assert labels["without"] == 1
    assert labels["parts"] == {"train": 37, "val": 9}


def test_header_data(told):
    assert told.json["orientations"] == {"6": 1, "99": 1}
    (profile,) = told.json["profiles"]
    assert "Lab" in profile


def test_sizes(told):
    sizes = told.json["sizes"]
    assert sizes["flattest"] == {"name": "train/cat/long.png", "value": 32}
    assert sizes["smallest"] == {"name": "train/cat/dot.png", "value": 1}
    assert sizes["width"] == {"min": 1, "median": 64, "max": 64}


def test_text_is_bounded_and_aligned(told):
    lines = told.text.splitlines()
    assert len(lines) < 250
    assert max(map(len, lines[: lines.index("") + 1])) <= 110
    labels = [line[:11] for line in lines[: lines.index("")] if line[0] != " "]
    assert all(label.endswith(" ") for label in labels)


def addresses(page: str) -> list[str]:
    """What a page asks for."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "iframe")
            found.extend(value for name, value in attributes if name in ("src", "href"))

    Reader().feed(page)
    return found


def test_names_of_files_cannot_break_the_page(tmp_path, inspect):
    evil = "<img src=x onerror=alert(1)> @BODY@"
    folder = tmp_path / evil
    folder.mkdir()
    for number in range(3):
        Image.fromarray(made.picture(number)).save(folder / f"{evil}{number}.png")
    (folder / f"{evil}.jpg").write_bytes(b"<html>")
    page = tmp_path / "page.html"
    assert inspect(folder, "--report", page)[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt; @BODY@.jpg") >= 2
    assert text.count("</html>") == 1
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses(text))


def test_thousands_of_damaged_files_are_bounded_in_print_and_all_in_json(tmp_path, inspect):
    for number in range(120):
        (tmp_path / f"{number:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([number]) * number)
    code, line = inspect(tmp_path, "--json")
    assert code == 0
    found = json.loads(line)
    assert len(found["unreadable"]) == 120
    assert found["sizes"] is None
    assert found["cost"] is None
    assert found["advice"] == []
    code, text = inspect(tmp_path)
    assert code == 0
    assert "readable   0 of 120" in text
    assert len(text.splitlines()) < 80
    page = tmp_path / "page.html"
    assert inspect(tmp_path, "--report", page)[0] == 0
    assert "no image could be read" in page.read_text(encoding="utf-8")


def test_scales_that_one_range_cannot_hold(tmp_path, inspect):
    """Degrees and counts together: the range of both makes nothing of the degrees."""
    for number in range(12):
        (tmp_path / f"{number:02}.tif").write_bytes(
            made.tiff(made.ramp(250, 310, np.float32, number))
            if number % 2
            else made.tiff(made.ramp(0, 90_000, np.uint32, number))
        )
    found = json.loads(inspect(tmp_path, "--json")[1])
    (few,) = [one for one in found["troubles"] if one["code"] == "few_levels"]
    assert few["serious"]
    assert "float32" in few["said"]
    assert "0 of 255 levels" in few["said"]


def test_untagged_nodata_is_suspected(tmp_path, inspect):
    for number in range(12):
        values = made.ramp(0, 2000, np.int16, number)
        values[:16] = -9999
        (tmp_path / f"{number:02}.tif").write_bytes(made.tiff(values))
    found = json.loads(inspect(tmp_path, "--json")[1])
    (one,) = [one for one in found["troubles"] if one["code"] == "suspected_nodata"]
    assert one["way"] == "data.nodata=-9999"
    assert {"key": "data.nodata", "value": "-9999"}.items() <= found["advice"][-1].items()
    assert found["command"].endswith("data.nodata=-9999")
    again = json.loads(inspect(tmp_path, "--json", "data.nodata=-9999")[1])
    assert "suspected_nodata" not in {one["code"] for one in again["troubles"]}
    assert again["no_data"] == 0.25


def test_ordinary_values_are_not_suspected(tmp_path, inspect):
    for number in range(12):
        values = made.ramp(-9999, 9999, np.int16, number)
        (tmp_path / f"{number:02}.tif").write_bytes(made.tiff(values))
    found = json.loads(inspect(tmp_path, "--json")[1])
    assert "suspected_nodata" not in {one["code"] for one in found["troubles"]}


def codes_of(inspect, folder, *keys):
    return {one["code"]: one for one in json.loads(inspect(folder, "--json", *keys)[1])["troubles"]}


def test_values_outside_what_full_takes(tmp_path, inspect):
    for number in range(12):
        (tmp_path / f"{number:02}.tif").write_bytes(made.tiff(made.ramp(-1000, 2000, np.int16, number)))
    outside = codes_of(inspect, tmp_path)["outside_range"]
    assert "values from -1,000 to 2,000 lie outside what data.sixteen_bit=full takes" in outside["said"]
    assert "measured, is used instead" in outside["said"]
    assert not outside["serious"]


def test_hot_pixels_are_serious_where_each_image_has_its_own_range(tmp_path, inspect):
    for number in range(12):
        values = made.ramp(0, 3000, np.uint16, number)
        values[5, 5] = 65000
        (tmp_path / f"{number:02}.tif").write_bytes(made.tiff(values))
    keys = ["student.in_chans=1", "data.mean=0.5", "data.std=0.25"]
    hot = codes_of(inspect, tmp_path, *keys)["hot_pixels"]
    assert "a few values reach 65,000" in hot["said"]
    assert not hot["serious"]
    assert codes_of(inspect, tmp_path, *keys, "data.sixteen_bit=minmax")["hot_pixels"]["serious"]


def test_transparency_without_a_picture_is_dropped(tmp_path, inspect):
    for number in range(4):
        pixels = np.dstack([made.picture(number), np.zeros((64, 64), np.uint8)])
        (tmp_path / f"{number}.png").write_bytes(made.encoded(pixels, "PNG"))
    found = codes_of(inspect, tmp_path)
    assert found["alpha_dropped"]["images"] == 4
    assert "laid_over_white" not in found


def test_opaque_images_with_an_alpha_channel_are_no_trouble(tmp_path, inspect):
    for number in range(4):
        pixels = np.dstack([made.picture(number), np.full((64, 64), 255, np.uint8)])
        (tmp_path / f"{number}.png").write_bytes(made.encoded(pixels, "PNG"))
    assert set(codes_of(inspect, tmp_path)) == {"no_labels"}


def test_huge_images_are_advised_to_be_cut(tmp_path, inspect):
    Image.new("1", (5100, 5100)).save(tmp_path / "huge.png")
    huge = codes_of(inspect, tmp_path)["huge"]
    assert huge["examples"] == ["huge.png"]
    assert "tiles" in huge["way"]


def test_good_images_are_no_trouble(tmp_path, inspect):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(20):
            content = made.encoded(made.picture(number + 20 * (name == "dog")), "JPEG")
            (tmp_path / name / f"{number}.jpg").write_bytes(content)
    assert codes_of(inspect, tmp_path) == {}
    assert "Nothing is wrong with what was looked at." in inspect(tmp_path)[1]
