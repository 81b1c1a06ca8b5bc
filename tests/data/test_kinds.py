import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from dinoforge.data import kinds
from dinoforge.data.kinds import EXTENSIONS, IMAGE_EXTENSIONS, OTHER_EXTENSIONS, Kind, extension, kind_of


def encoded(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (5, 3)).save(file, kind)
    return file.getvalue()


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((2, 2)))
    return file.getvalue()


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"content")
    return file.getvalue()


def container(major: bytes, *compatible: bytes) -> bytes:
    """The first box of an ISO base media file."""
    body = major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + b"\0\0\0\x10mdat"


def nifti(byte_order: str = "<") -> bytes:
    return struct.pack(byte_order + "i", 348) + bytes(340) + b"n+1\0" + bytes(100)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF"])
def test_what_pillow_writes_is_told(kind: str) -> None:
    assert kind_of(encoded(kind)) == Kind(kind, is_image=True)
    assert kind_of(encoded(kind)[:64]).name == kind  # the first bytes are enough


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encoded("PPM"), "Netpbm"),
        (encoded("PPM", "L"), "Netpbm"),
        (encoded("PPM", "1"), "Netpbm"),
        (b"P5\n# by a scanner\n2 2\n255\n....", "Netpbm"),
        (b"P3 2 2 255 1 2 3", "Netpbm"),
        (b"MM\0+\0\x08\0\0", "TIFF"),
        (b"II+\0\x08\0\0\0", "TIFF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 ", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (container(b"heic", b"mif1", b"heic"), "HEIC"),
        (container(b"mif1", b"mif1", b"heic"), "HEIC"),
        (container(b"avif", b"mif1", b"miaf"), "AVIF"),
        (container(b"mif1", b"mif1", b"avif"), "AVIF"),
        (numpy_file(), "NumPy array"),
    ],
)
def test_other_images_are_told(data: bytes, name: str) -> None:
    kind = kind_of(data)
    assert (kind.name, kind.is_image) == (name, True)
    assert kind.name in EXTENSIONS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file"),
        (bytes(10_000), "a file of zeros alone"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "a git-lfs pointer"),
        (b"/annex/objects/SHA256E-s3--12.jpg\n", "a git-annex pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf<html lang='en'>", "an HTML page"),
        (b"<!-- cached --><html>", "an HTML page"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b'{"error": "quota"}', "JSON"),
        (b"iVBORw0KGgoAAAANSUhEUg==", "an image as base64 text"),
        (b"a note on the images", "text"),
        ("ein Bär".encode(), "text"),
        (bytes(128) + b"DICM\x02\0\0\0UL", "DICOM"),
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", "DICOM"),
        (nifti(), "NIfTI"),
        (nifti(">"), "NIfTI"),
        (gzip.compress(nifti()), "NIfTI"),
        (gzip.compress(b"notes"), "a gzip archive"),
        (b"\x89HDF\r\n\x1a\n\0", "HDF5"),
        (b"%PDF-1.7\n", "PDF"),
        (zipped("cat.png"), "a ZIP archive"),
        (zipped("arr_0.npy"), "a NumPy archive"),
        (zipped("[Content_Types].xml"), "an Office document"),
        (container(b"isom", b"iso2", b"mp41"), "a video"),
        (container(b"qt  "), "a video"),
        (container(b"crx ", b"isom"), "camera raw"),
        (b"\x1aE\xdf\xa3\x93B\x82\x88matroska", "a video"),
        (b"RIFF\x10\0\0\0AVI LIST", "a video"),
        (b"8BPS\0\x01", "Photoshop"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "a macOS metadata file"),
        (b"\x01\x02\x03\x04\x05", "a file of a kind that is not known"),
        (b"BM is a brand of cars, as everybody knows", "text"),
        (b"P1 is the first of them", "text"),
    ],
)
def test_what_is_no_image_is_told_in_words(data: bytes, words: str) -> None:
    kind = kind_of(data)
    assert kind.words == words
    assert not kind.is_image


def test_a_cut_character_is_still_text() -> None:
    assert kind_of(b"x" * 4095 + "ä".encode()) is kinds.TEXT


def test_a_refusal_says_what_it_is_and_the_way_out() -> None:
    assert kinds.GIT_LFS.refusal == "is a git-lfs pointer, not an image: run git lfs pull"
    assert kinds.HTML.refusal == "is an HTML page, not an image: its download failed, so fetch it again"
    assert kinds.TEXT.refusal == "is text, not an image"
    assert kinds.DICOM.refusal.startswith("is DICOM, which is not read: convert it")
    assert kinds.HEIC.refusal == "is HEIC"


def test_a_name_can_belie_the_content() -> None:
    assert not kinds.HEIC.is_named("phone/IMG_1.JPG")
    assert kinds.HEIC.is_named("phone/IMG_1.HEIC")
    assert kinds.JPEG.is_named("a.b/c.jfif")
    assert kinds.HTML.is_named("cat.jpg")  # no name tells an HTML page


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("a/b.PNG", "png"),
        ("a.d/b", ""),
        ("scan.nii.gz", "nii.gz"),
        ("a.tar.gz", "tar.gz"),
        ("notes.gz", "gz"),
        (".png", ""),
        ("v1.2.ome.tif", "tif"),
        ("end.", ""),
        ("nii.gz", "gz"),
    ],
)
def test_extension(name: str, end: str) -> None:
    assert extension(name) == end


def test_no_extension_means_two_things() -> None:
    assert len(IMAGE_EXTENSIONS) == sum(map(len, EXTENSIONS.values()))
    assert not IMAGE_EXTENSIONS & set(OTHER_EXTENSIONS)
    everything = [*IMAGE_EXTENSIONS, *OTHER_EXTENSIONS]
    assert all(end == end.lower() and not end.startswith(".") for end in everything)
