"""Every plane of a file as an image of its own: counted from headers, named, labelled, decoded."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dinoforge
from dinoforge.data import tiff
from dinoforge.data.decode import decode, read_values
from dinoforge.data.headers import count_planes, size_and_kind
from dinoforge.data.labels import label_table, labels_of
from dinoforge.data.names import original_name, printable
from dinoforge.data.planes import PlanesOf, taken_apart
from dinoforge.data.sources import FolderSource, OnePlane, SequenceSource, Source, open_source
from dinoforge.data.survey import measure_range
from dinoforge.errors import DataError, ImageError, RecipeError

RNG = np.random.default_rng(0)


def stack(planes: int, *more: int, dtype: Any = np.uint16) -> Any:
    """Planes of 6 x 8 pixels; plane i is filled with 257 · (i + 1)."""
    levels = np.arange(1, planes + 1).reshape(-1, *[1] * (2 + len(more)))
    values = np.broadcast_to(levels * (1 if dtype == np.uint8 else 257), (planes, *more, 6, 8))
    return np.ascontiguousarray(values, dtype)


def tif(values: Any, **keys: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **({"metadata": None} | keys))
    return stream.getvalue()


def pages(*images: Any, **keys: Any) -> bytes:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, **keys) as file:
        for image in images:
            file.write(image, metadata=None)
    return stream.getvalue()


def moving(format: str, frames: int) -> bytes:
    images = [Image.new("RGB", (8, 6), (40 * i, 255 - 40 * i, 20)) for i in range(frames)]
    if format == "GIF":
        images = [image.quantize(8) for image in images]
    stream = io.BytesIO()
    more = {"lossless": True} if format == "WEBP" else {}
    if frames > 1:
        more |= {"save_all": True, "append_images": images[1:]}
    images[0].save(stream, format, **more)
    return stream.getvalue()


KINDS: dict[str, tuple[bytes, int, str]] = {
    "ome z": (tif(stack(5), ome=True, metadata={"axes": "ZYX"}), 5, "z"),
    "ome tz": (tif(stack(3, 2), ome=True, metadata={"axes": "TZYX"}), 6, "t, z"),
    "ome tcz": (tif(stack(3, 4, 2), ome=True, metadata={"axes": "TCZYX"}), 6, "t, z"),
    "ome channels": (tif(stack(4), ome=True, metadata={"axes": "CYX"}), 1, ""),
    "imagej": (tif(stack(5), imagej=True, metadata={"axes": "ZYX"}), 5, "z"),
    "imagej channels": (tif(stack(3, 2), imagej=True, metadata={"axes": "ZCYX"}), 3, "z"),
    "shaped": (tif(stack(7), metadata={"axes": "ZYX"}), 7, "z"),
    "pages": (pages(*stack(6)), 6, "page"),
    "pages of BigTIFF": (pages(*stack(6), bigtiff=True), 6, "page"),
    "big-endian pages": (pages(*stack(6), byteorder=">"), 6, "page"),
    "colour pages": (pages(*RNG.integers(0, 256, (4, 6, 8, 3), np.uint8)), 4, "page"),
    "pages of two sizes": (pages(*stack(2), np.zeros((3, 4), np.uint16)), 2, "page"),
    "one": (tif(stack(1)[0]), 1, ""),
    "8-bit picture": (tif(RNG.integers(0, 256, (6, 8, 3), np.uint8), photometric="rgb"), 1, ""),
    "planar": (tif(stack(4, dtype=np.uint8), photometric="rgb", planarconfig="separate"), 1, ""),
    "gif": (moving("GIF", 5), 5, "frame"),
    "still gif": (moving("GIF", 1), 1, ""),
    "webp": (moving("WEBP", 3), 3, "frame"),
    "still webp": (moving("WEBP", 1), 1, ""),
    "apng": (moving("PNG", 4), 4, "frame"),
    "png": (moving("PNG", 1), 1, ""),
    "jpeg": (moving("JPEG", 1), 1, ""),
}


def write(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_planes_are_counted_from_headers(kind: str) -> None:
    data, planes, along = KINDS[kind]
    assert count_planes(data) == (planes, along)
    assert count_planes(io.BytesIO(data)) == (planes, along)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_planes_are_counted_as_can_be_decoded(kind: str) -> None:
    data, planes, _ = KINDS[kind]
    for plane in range(planes):
        decode(data, channels=None, plane=plane)
    with pytest.raises(ImageError, match=f"has {planes} plane"):
        decode(data, channels=None, plane=planes)


def test_quick_counts_are_those_of_the_library() -> None:
    """Pages of one kind are counted without tifffile, which has the last word where that finds nothing."""
    quick = {kind: tiff.count_quickly(io.BytesIO(data)) for kind, (data, _, _) in KINDS.items() if tiff.is_tiff(data)}
    assert quick["pages"] == quick["pages of BigTIFF"] == quick["big-endian pages"] == (6, "page")
    assert quick["one"] == quick["planar"] == (1, "")
    assert quick["ome z"] is quick["imagej"] is quick["shaped"] is quick["pages of two sizes"] is None


def test_pages_that_are_channels_are_no_planes() -> None:
    data = pages(*stack(5))
    assert count_planes(data, channels=5) == (1, "")
    assert count_planes(data, channels=1) == count_planes(data, channels=4) == (5, "page")


def test_thumbnails_and_masks_are_no_planes() -> None:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        for plane in stack(3):
            file.write(plane, metadata=None)
        file.write(np.zeros((3, 4), np.uint16), metadata=None, subfiletype=1)
    assert count_planes(stream.getvalue()) == (3, "page")


@given(place=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 900))
@settings(max_examples=300, deadline=None)
def test_damaged_headers_are_refused_or_counted(place: int, value: int, cut: int) -> None:
    data = bytearray(KINDS["pages"][0])
    data[place % len(data)] = value
    try:
        planes, _ = count_planes(bytes(data[: len(data) - cut]))
    except ImageError:
        return
    assert 1 <= planes <= 1000


# --- the source ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write(
        tmp_path / "images",
        **{
            "a/flat.png": moving("PNG", 1),
            "a/stack.tif": KINDS["ome z"][0],
            "b/broken.tif": b"II*\0 but no more",
            "b/moving.gif": moving("GIF", 3),
            "b/photo.jpg": moving("JPEG", 1),
        },
    )


def test_every_plane_is_an_image(mixed: Path) -> None:
    source = PlanesOf(FolderSource(mixed), 1)
    assert names(source) == [
        "a/flat.png",
        *(f"a/stack.tif#{i}" for i in range(5)),
        "b/broken.tif",
        *(f"b/moving.gif#{i}" for i in range(3)),
        "b/photo.jpg",
    ]
    assert len(source) == 11
    for index in range(1, 6):
        assert (decode(source.item(index).image, channels=1, plane="each") == index).all()
        assert (read_values(source.item(index).image, channels=1, plane="each").values == 257 * index).all()
        assert size_and_kind(source.item(index).image)[:2] == (8, 6)
        assert source.item(index).name == source.name(index)
    reds = [decode(source.item(index).image, channels=3)[0, 0, 0] for index in (7, 8, 9)]
    assert np.allclose(reds, [0, 40, 80], atol=2)
    assert isinstance(source.item(0).image, bytes)
    assert isinstance(source.item(10).image, bytes)  # large JPEGs are decoded at a scale that their crops need
    with pytest.raises(IndexError):
        source.name(11)


def test_what_cannot_be_read_is_one_image_and_refused_at_its_turn(mixed: Path) -> None:
    (mixed / "b" / "gone.tif").symlink_to("nowhere")
    source = PlanesOf(FolderSource(mixed), 1)
    broken, gone = names(source).index("b/broken.tif"), names(source).index("b/gone.tif")
    with pytest.raises(ImageError):
        decode(source.item(broken).image, channels=1, plane="each")
    with pytest.raises(ImageError, match="cannot be read"):
        source.item(gone)


def test_a_file_that_grew_planes_meanwhile_is_refused_and_not_cut(tmp_path: Path) -> None:
    source = PlanesOf(FolderSource(write(tmp_path, **{"x.tif": tif(stack(1)[0]), "y.tif": KINDS["pages"][0]})), 1)
    write(tmp_path, **{"x.tif": KINDS["pages"][0], "y.tif": tif(stack(1)[0])})
    with pytest.raises(ImageError, match=r"has 6 planes \(page\)"):
        decode(source.item(0).image, channels=1, plane="each")
    with pytest.raises(ImageError, match="has 1 plane"):
        decode(source.item(6).image, channels=1, plane="each")


def test_names_round_trip_through_files_of_names(tmp_path: Path) -> None:
    source = PlanesOf(FolderSource(write(tmp_path, **{"a\n#1\\.tif": KINDS["pages"][0]})), 1)
    for name in names(source):
        assert original_name(printable(name)) == name
        assert len(printable(name).splitlines()) == 1


def test_the_index_is_compact_and_travels(mixed: Path) -> None:
    source = PlanesOf(SequenceSource([mixed / "a/stack.tif"] * 5000), 1)
    assert len(source) == 25_000
    copy = pickle.loads(pickle.dumps(PlanesOf(FolderSource(mixed), 1)))
    assert names(copy) == names(PlanesOf(FolderSource(mixed), 1))
    assert copy.fingerprint() == PlanesOf(FolderSource(mixed), 1).fingerprint()


def test_the_fingerprint_tells_other_counts_apart(tmp_path: Path) -> None:
    def fingerprint(first: int, second: int) -> str:
        files = {"a.tif": pages(*stack(first)), "b.tif": pages(*stack(second))}
        return PlanesOf(FolderSource(write(tmp_path, **files)), 1).fingerprint()

    found = {fingerprint(2, 3), fingerprint(3, 2), fingerprint(4, 1), FolderSource(tmp_path).fingerprint()}
    assert len(found) == 4
    assert fingerprint(2, 3) in found


def test_sequences_of_bytes_pictures_and_arrays() -> None:
    gif = Image.open(io.BytesIO(moving("GIF", 3)))
    paged = Image.open(io.BytesIO(KINDS["pages"][0]))
    source = PlanesOf(SequenceSource([(KINDS["ome z"][0], "x"), (gif, "y"), (paged, "z"), (np.zeros((4, 4)), "x")]), 1)
    assert len(source) == 5 + 3 + 6 + 1
    assert source.name(6) == "item 1#1"
    assert source.labels() == ["x"] * 5 + ["y"] * 3 + ["z"] * 6 + ["x"]
    assert (decode(source.item(4).image, channels=1) == 5).all()
    assert decode(source.item(7).image, channels=3)[0, 0, 0] == pytest.approx(80, abs=2)
    assert (decode(source.item(13).image, channels=1) == 6).all()


def test_taken_apart_only_where_it_is_asked_for(mixed: Path) -> None:
    source = FolderSource(mixed)
    for plane in (None, "max", "3"):
        assert taken_apart(source, plane, 1) is source
    apart = taken_apart(source, "each", 1)
    assert isinstance(apart, PlanesOf)
    assert taken_apart(apart, "each", 1) is apart
    assert len(taken_apart(apart, "each", 5)) == 11  # an OME stack says itself that these are no channels
    assert str(apart) == ("each is an image: 11 in 5 files, up to 5 in one; 2 files with several (z in 1, frame in 1)")


def test_values_are_measured_over_planes(tmp_path: Path) -> None:
    values = np.linspace(0, 3900, 48).reshape(6, 8)
    write(tmp_path, **{"x.tif": pages(*(np.asarray(values / 8**i, np.uint16) for i in (2, 1, 0)))})
    first = measure_range(FolderSource(tmp_path), channels=1)
    every = measure_range(taken_apart(FolderSource(tmp_path), "each", 1), channels=1, plane="each")
    assert first is not None
    assert every is not None
    assert (first.high, every.high) == (63, 4095)


def test_one_image_alone_cannot_be_each_plane() -> None:
    data = KINDS["ome z"][0]
    with pytest.raises(ImageError, match=r"has 5 planes \(z\), and data.plane=each makes an image of each"):
        decode(data, channels=1, plane="each")
    with pytest.raises(RecipeError, match="makes several images of a file"):
        dinoforge.read_image(data, plane="each")
    flat = tif(stack(1)[0])
    assert (decode(flat, channels=1, plane="each") == decode(flat, channels=1)).all()
    assert (decode(OnePlane(data, 3), channels=1, plane="max") == 4).all()


# --- labels ----------------------------------------------------------------------------------------------------------


def test_sub_folders_label_every_plane(mixed: Path) -> None:
    found = labels_of(PlanesOf(FolderSource(mixed), 1))
    assert found.values == ["a"] * 6 + ["b"] * 5
    assert found.said == labels_of(FolderSource(mixed)).said
    assert PlanesOf(FolderSource(mixed), 1).item(3).label == "a"
    (note,) = found.notes
    assert note.startswith("planes of one file are alike, and can lie on both sides of a split")
    (mixed / "a/stack.tif").unlink()
    (mixed / "b/moving.gif").unlink()
    assert labels_of(PlanesOf(FolderSource(mixed), 1)).notes == ()


def test_a_row_for_a_file_labels_its_planes(mixed: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("file,label\na/flat.png,u\nstack.tif,v\nb/broken.tif,w\nmoving.gif,x\nphoto.jpg,y\n")
    found = label_table(table, PlanesOf(open_source(mixed), 1))
    assert found.values == ["u", *["v"] * 5, "w", *["x"] * 3, "y"]


def test_a_row_for_a_plane_labels_it_alone(mixed: Path, tmp_path: Path) -> None:
    source = PlanesOf(open_source(mixed), 1)
    table = tmp_path / "labels.csv"
    table.write_text("".join(f"{name},{number}\n" for number, name in enumerate(names(source))))
    assert label_table(table, source).values == [str(number) for number in range(11)]
    table.write_text(table.read_text() + "a/stack.tif,another\n")
    with pytest.raises(DataError, match="is labelled both"):
        label_table(table, source)
