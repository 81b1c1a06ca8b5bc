"""JPEGs that lack their end, of kinds that are not read, and CMYK."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoforge.data.decode import decode
from dinoforge.errors import ImageError
from pictures import COLOUR, encoded


def test_cmyk_by_adobes_marker() -> None:
    stored = np.zeros((16, 16, 4), np.uint8)
    stored[:] = 255, 0, 0, 255  # what Adobe's programs write for red, and others for black
    data = encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=100)
    assert decode(data, channels=3)[8, 8].tolist() == [255, 0, 0]
    place = data.index(b"\xff\xee")
    size = struct.unpack_from(">H", data, place + 2)[0]
    unmarked = data[:place] + data[place + 2 + size :]
    assert decode(unmarked, channels=3)[8, 8].tolist() == [0, 0, 0]
    red = encoded(Image.fromarray(stored, "CMYK"), "JPEG", quality=100)  # stored as 0, 255, 255, 0
    red = red[:place] + red[place + 2 + size :]
    for image in (red, Image.open(io.BytesIO(red))):
        assert decode(image, channels=3)[8, 8].tolist() == [255, 0, 0]


SMOOTH = Image.fromarray(COLOUR).resize((200, 120), Image.Resampling.BICUBIC)
JPEGS = [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}, {"subsampling": 0}]


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("reduction", [1, 2])
def test_jpeg_without_its_end_is_read(options: dict[str, Any], reduction: int) -> None:
    data = encoded(SMOOTH, "JPEG", quality=90, **options)
    whole = decode(data, channels=3, reduction=reduction)
    for lost in (1, 2):
        assert np.array_equal(decode(data[:-lost], channels=3, reduction=reduction), whole)


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("lost", [4, 8, 50, 0.5])
def test_jpeg_without_rows_is_refused(options: dict[str, Any], lost: float) -> None:
    data = encoded(SMOOTH, "JPEG", quality=90, **options)
    kept = int(len(data) * lost) if lost < 1 else len(data) - int(lost)
    scans = options.get("progressive") and lost < 1
    words = "truncated: its last scans" if scans else r"truncated: the first \d+% of its rows are there"
    with pytest.raises(ImageError, match=words):
        decode(data[:kept], channels=3)


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_progressive_jpeg_without_its_last_scan_is_refused(subsampling: int, mode: str) -> None:
    data = encoded(SMOOTH.convert(mode), "JPEG", quality=90, progressive=True, subsampling=subsampling)
    assert np.array_equal(decode(data[:-2], channels=3), decode(data, channels=3))
    with pytest.raises(ImageError, match="truncated: its last scans"):
        decode(data[: data.rindex(b"\xff\xda")], channels=3)


def test_jpeg_cut_between_restart_intervals_is_refused() -> None:
    data = encoded(SMOOTH, "JPEG", quality=90, restart_marker_rows=1)
    for mark in (b"\xff\xd0", b"\xff\xd6"):
        with pytest.raises(ImageError, match="truncated: the first"):
            decode(data[: data.rindex(mark)], channels=3)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"\xff\xc1\x00\x0b\x0c", "is JPEG of 12 bits, which is not read"),
        (b"\xff\xc3\x00\x0b\x10", "is lossless JPEG of 16 bits, which is not read"),
        (b"\xff\xf7\x00\x0b\x08", "is JPEG-LS, which is not read"),
        (b"\xff\xc0\x00\x0b\x08", "damaged"),
    ],
)
def test_jpeg_of_other_kinds_is_not_called_damaged(frame: bytes, words: str) -> None:
    data = b"\xff\xd8\xff\xfe\x00\x04\xff\xc3" + frame + b"\x00\x10\x00\x10\x01\x01\x11\x00\xff\xda" + b"\0" * 40
    with pytest.raises(ImageError, match=words):
        decode(data, channels=3)
