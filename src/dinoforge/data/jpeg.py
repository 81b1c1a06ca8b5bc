"""JPEG files that lack their end, or are of a kind that is not read, or are CMYK without Adobe's marker."""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops

from dinoforge.errors import ImageError

_END = b"\xff\xd9"
_CONVERT = "which is not read: convert it to PNG or TIFF"
_FILLERS = (b"\x00" * 64, b"\x55" * 64, b"\xaa" * 64)


def unread_kind(data: bytes) -> str:
    """Name the kind of a sound JPEG that the decoder does not take, such as 12 bits or lossless; '' for others."""
    place = 2
    while place + 5 <= len(data) and data[place] == 0xFF:
        mark = data[place + 1]
        if mark == 0xFF:  # a filler
            place += 1
            continue
        if mark == 0xF7:
            return f"is JPEG-LS, {_CONVERT}"
        if 0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC):  # a frame begins
            if mark in (0xC3, 0xC7, 0xCB, 0xCF):
                return f"is lossless JPEG of {data[place + 4]} bits, {_CONVERT}"
            return f"is JPEG of {data[place + 4]} bits, {_CONVERT}" if data[place + 4] != 8 else ""
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return ""


def without_end(data: bytes, load: Callable[[bytes], Image.Image]) -> Image.Image:
    """Decode a JPEG that lacks its last bytes, if all of its rows are there.

    The decoder does not say which rows it has made up. So the file is completed in several ways: rows that are there
    come out the same in all of them, and what was missing does not.

    Args:
        data: The file.
        load: A function that decodes a file to pixels.

    Raises:
        ImageError: Rows are missing.
    """
    body = data[:-1] if data.endswith(b"\xff") else data  # half of the mark of the end
    if not _has_all_scans(body):
        raise ImageError("truncated: its last scans, which hold the details, are missing")
    ends = list(_FILLERS)
    if b"\xff\xdd" in body:  # restart intervals: without the mark of the next one, fillers are skipped
        marks = re.findall(rb"\xff([\xd0-\xd7])", body)
        mark = 0xD0 + (marks[-1][0] - 0xD0 + 1) % 8 if marks else 0xD0
        ends += [bytes([0xFF, mark]) + filler for filler in _FILLERS]
    first = load(body + ends[0] + _END)
    pixels = np.asarray(first)
    missing = np.zeros(pixels.shape[0], np.bool_)
    for end in ends[1:]:
        other = np.asarray(load(body + end + _END))
        missing |= (pixels != other).reshape(len(missing), -1).any(axis=1)
    if missing.any():
        share = int(missing.argmax()) / len(missing)
        raise ImageError(f"truncated: the first {share:.0%} of its rows are there")
    return first


def _has_all_scans(data: bytes) -> bool:
    """Whether every coefficient of a progressive JPEG has come down to its last bit; True for other JPEGs."""
    place, progressive = 2, False
    left: dict[int, set[int]] = {}  # component -> coefficients that are not complete
    while place + 4 <= len(data):
        place = data.find(b"\xff", place)
        if place < 0 or place + 4 > len(data):
            break
        mark, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if mark in (0x00, 0xFF) or 0xD0 <= mark <= 0xD9:  # a byte of the data, a filler, or a mark without a body
            place += 1 if mark == 0xFF else 2
            continue
        body = data[place + 4 : place + 2 + size]
        if mark in (0xC2, 0xCA) and len(body) >= 6:
            progressive = True
            left = {component: set(range(64)) for component in body[6::3]}
        elif mark == 0xDA and body and len(body) >= 4 + 2 * body[0]:
            count = body[0]
            first, last, bits = body[1 + 2 * count : 4 + 2 * count]
            if bits & 15 == 0:
                for i in range(count):
                    left.get(body[1 + 2 * i], set()).difference_update(range(first, last + 1))
        place += 2 + size
    return not progressive or not any(left.values())


def plain_cmyk(picture: Image.Image) -> Image.Image:
    """Undo Pillow's inversion of a CMYK JPEG that has no marker of Adobe's: only their programs store it inverted."""
    if picture.mode == "CMYK" and picture.format == "JPEG" and "adobe" not in picture.info:
        return ImageChops.invert(picture)
    return picture


def opened(data: bytes) -> Image.Image:
    """Open a JPEG, and no other format."""
    return Image.open(io.BytesIO(data), formats=("JPEG",))
