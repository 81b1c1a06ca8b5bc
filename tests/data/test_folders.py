import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoforge.data.folders import left_out_in_words, no_images, walk


def put(root: Path, *names: str, data: bytes = b"data") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    """20 images among 200 files of other kinds, as radiology, microscopy and archives have them."""
    put(tmp_path, *[f"photo{i:02}.jpg" for i in range(20)])
    put(tmp_path, *[f"slice{i:02}.dcm" for i in range(60)], *[f"vol{i:02}.nii.gz" for i in range(50)])
    put(tmp_path, *[f"slide{i:02}.SVS" for i in range(40)], *[f"all{i:02}.h5" for i in range(26)], "a.xyz")
    put(tmp_path, *[f"noext{i:02}" for i in range(23)], data=encoded("PNG"))
    contents = walk(tmp_path)
    assert len(contents.names) == 20
    assert contents.left_out == {
        ".dcm (DICOM)": 60,
        ".nii.gz (NIfTI)": 50,
        ".svs (whole slide)": 40,
        ".h5 (HDF5)": 26,
        "without extension (PNG by content)": 23,
        ".xyz": 1,
    }
    assert left_out_in_words(contents.left_out) == (
        "200 files: 60 .dcm (DICOM), 50 .nii.gz (NIfTI), 40 .svs (whole slide), 26 .h5 (HDF5), "
        "23 without extension (PNG by content), 1 .xyz"
    )


def test_new_kinds_of_images_are_taken(tmp_path: Path) -> None:
    ends = "jpe jfif JFIF jp2 j2k jpx heic HEIF avif jxl ppm pgm pbm pnm npy".split()
    put(tmp_path, *[f"{i:02}.{end}" for i, end in enumerate(ends)])
    contents = walk(tmp_path)
    assert contents.names == [f"{i:02}.{end}".encode() for i, end in enumerate(ends)]
    assert contents.left_out == {}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("IM.0001", b"\0" * 128 + b"DICM\x02\0\0\0", "without extension (DICOM by content)"),
        ("1.2.840.113619.2", b"\0" * 128 + b"DICM\x02\0\0\0", "without extension (DICOM by content)"),
        ("photo.jpg?width=200", encoded("JPEG"), "without extension (JPEG by content)"),
        ("photo.jpg_large", encoded("JPEG"), ".jpg_large (JPEG by content)"),
        ("tile.bin", encoded("TIFF"), ".bin (TIFF by content)"),
        ("README", b"about the images", "without extension"),
        ("tile.bin", b"\x01\x02\x03", ".bin"),
        ("a.txt", b"about the images", ".txt (text)"),
        ("Thumbs.db", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Thumbs.db"),
        (".DS_Store", b"\0\0\0\1Bud1", "hidden"),
        ("._00.jpg", b"\0\5\x16\7", "hidden"),
    ],
)
def test_what_a_file_that_is_left_out_is(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    put(tmp_path, "1.png")
    put(tmp_path, name, data=data)
    assert walk(tmp_path).left_out == {words: 1}


def test_some_of_the_files_without_extension_are_images(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "README")
    put(tmp_path, "scan", data=encoded("BMP"))
    assert walk(tmp_path).left_out == {"without extension (some BMP by content)": 2}


def test_few_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "1.png", *[f"noext{i:03}" for i in range(100)], *[f"{i:03}.dcm" for i in range(100)])
    opened = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: bool(opened.append(path)) or isfile(path))
    walk(tmp_path)
    assert len(opened) == 16


JUNK = [
    "@eaDir/00.jpg/SYNOPHOTO_THUMB_M.jpg",
    "a/@eaDir/00.jpg/SYNOPHOTO_THUMB_M.jpg",
    "$RECYCLE.BIN/$R1.jpg",
    "$Recycle.Bin/S-1-5/$R2.jpg",
    "lost+found/1.jpg",
    "System Volume Information/1.jpg",
    "__MACOSX/a/00.jpg",
    ".thumbnails/1.jpg",
    ".ipynb_checkpoints/00-checkpoint.jpg",
    ".Trash-1000/files/1.jpg",
    "#recycle/1.jpg",
    "@Recycle/1.jpg",
    "thumbnails/00.jpg",
    "a/Thumbnails/00.jpg",
]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_left_out_and_counted(tmp_path: Path, junk: str) -> None:
    put(tmp_path, "a/00.jpg", "b/00.jpg", junk)
    contents = walk(tmp_path)
    assert contents.names == [b"a/00.jpg", b"b/00.jpg"]
    folder = next(part for part in junk.split("/") if part not in ("a", "00.jpg"))
    assert contents.left_out == {f"in {folder}": 1}


def test_what_only_looks_like_junk_is_kept(tmp_path: Path) -> None:
    put(tmp_path, "lost/1.jpg", "recycle/1.jpg", "thumbs/1.jpg", "eaDir/1.jpg", "thumbnails.jpg")
    assert len(walk(tmp_path).names) == 5
    assert len(walk(put(tmp_path / "only", "thumbnails/1.jpg", "thumbnails/2.jpg")).names) == 2  # all that there is


def test_a_run_inside_its_own_data_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "runs/x/run.json", "runs/x/recipe.yaml", "runs/x/figures/crops.png", "recipe.yaml")
    put(tmp_path, "b/run.json", "b/2.jpg")  # half of it says nothing
    contents = walk(tmp_path)
    assert contents.names == [b"a/1.jpg", b"b/2.jpg"]
    assert contents.left_out["in x (a run of dinoforge)"] == 3


def test_an_array_in_many_files_is_one(tmp_path: Path) -> None:
    put(tmp_path, "1.png", *[f"image.zarr/0/{i}.{j}" for i in range(4) for j in range(4)], "image.zarr/.zattrs")
    assert walk(tmp_path).left_out == {".zarr (Zarr)": 1}


def test_a_folder_of_junk_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "1.png", "lost+found/1.png")
    scandir = os.scandir

    def refuse(path: bytes) -> object:  # root, who runs many a test, may read everything
        if os.fsencode(path).endswith(b"lost+found"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert walk(tmp_path).names == [b"1.png"]


def test_large_folders_of_junk_are_counted_to_a_limit(tmp_path: Path) -> None:
    put(tmp_path, "1.png", *[f".git/objects/{i}/a" for i in range(20)])
    assert walk(tmp_path, most_counted=5).left_out == {"or more in .git": 5}


def test_the_way_out_of_a_folder_without_images(tmp_path: Path) -> None:
    put(tmp_path, "1.dcm", "2.dcm", data=b"\0" * 128 + b"DICM\x02\0\0\0")
    text = no_images(tmp_path, walk(tmp_path))
    assert "found only others, 2 files: 2 .dcm (DICOM). The way out: DICOM: convert it to PNG, TIFF or .npy" in text
    put(tmp_path / "b", "1", data=encoded("PNG"))
    assert "The way out: give PNG files the end .png" in no_images(tmp_path, walk(tmp_path / "b"))


def test_many_kinds_are_summed_up() -> None:
    assert left_out_in_words({f".k{i}": 20 - i for i in range(14)}).endswith(", 9 .k11, 15 of other kinds")
    assert left_out_in_words({"hidden": 1}) == "1 file: 1 hidden"
    assert left_out_in_words({"without extension": 12_000}) == "12,000 files: 12,000 without extension"


def test_what_gdal_lays_beside_rasters_is_said_by_name(tmp_path: Path) -> None:
    put(tmp_path, "a.tif", "a.tif.msk", "a.tif.ovr", "a.tif.aux.xml", "a.tfw", "other.xml")
    assert walk(tmp_path).left_out == {
        ".msk (GDAL mask, not applied)": 1,
        ".ovr (GDAL overviews)": 1,
        ".aux.xml (GDAL metadata, not applied)": 1,
        ".tfw (place on the map)": 1,
        ".xml": 1,
    }
