"""The headers of TIFFs, read without a library: the first directory, and what further ones say in a few tags.

That takes a tenth of the time that tifffile needs to open a file.
"""

import io
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

NEW_SUBFILE_TYPE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
DESCRIPTION, ORIENTATION, SAMPLES, MAX_SAMPLE_VALUE, PLANAR, SUB_IFDS = 270, 274, 277, 281, 284, 330
STRIPS = (273, 279)  # their offsets and sizes
INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, S_MAX_SAMPLE_VALUE, GDAL_NODATA = 332, 338, 339, 341, 42113
GEO = frozenset({33550, 33922, 34264, 34735})
# Private tags that say nothing about further planes: copyright, ICC, EXIF, geography, GDAL.
HARMLESS = GEO | {33432, 34377, 34665, 34675, 34736, 34737, 37724, 42112, GDAL_NODATA, 50838, 50839}

REDUCED, MASK = 1, 4  # bits of NewSubfileType
COLOUR_MAP = 320
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, TRANSPARENCY, SEPARATED, YCBCR = range(7)
PILLOW_SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, SEPARATED: 4, YCBCR: 3, 8: 3}
# None, CCITT, LZW, JPEG, deflate, PackBits
PILLOW_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32946})
JPEG = frozenset({6, 7})
FORMATS = {1: "BB", 2: "1s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "1s", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}
LENGTHS = {kind: struct.calcsize(f"={form}") for kind, form in FORMATS.items()}


@dataclass(frozen=True)
class OnDisk:
    """An open file, of which slices are read."""

    file: BinaryIO
    size: int

    @classmethod
    def of(cls, file: BinaryIO) -> "OnDisk":
        return cls(file, file.seek(0, io.SEEK_END))

    def __getitem__(self, where: slice) -> bytes:
        start, stop = where.start or 0, min(where.stop, self.size)  # a header may say anything
        if start >= stop:
            return b""
        self.file.seek(start)
        return self.file.read(stop - start)


# What tells pages of one kind from others: size, bits, compression, photometric, samples, layout, prediction, tiles.
OF_KIND = frozenset({NEW_SUBFILE_TYPE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, 266, SAMPLES, PLANAR})
OF_KIND |= frozenset({317, 322, 323, EXTRA_SAMPLES, SAMPLE_FORMAT})


def equal_pages(data: OnDisk) -> int | None:
    """Count the pages of a TIFF that says nothing of what they are, if all are of one kind; else None.

    tifffile finds the same in ten times the time.
    """
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+" or data[3:4] == b"+"
    number, start, size, offset = ("Q", 8, 20, "Q") if big else ("H", 2, 12, "I")
    room = struct.calcsize(offset)
    seen: set[int] = set()
    kind: list[bytes] | None = None
    try:
        place = unpack(order + offset, data, 8 if big else 4)[0]
        while place:
            if place in seen:
                return None
            seen.add(place)
            count = min(unpack(order + number, data, place)[0], 4096)
            body = data[place + start : place + start + size * count]
            own = []
            for at in range(0, len(body), size):
                entry = body[at : at + size]
                tag, form, length = struct.unpack(order + "HH" + offset, entry[:-room])
                if tag in (DESCRIPTION, SUB_IFDS) or (tag > 32767 and tag not in HARMLESS):
                    return None
                if tag == NEW_SUBFILE_TYPE and entry[-room:].strip(b"\0") not in (b"", b"\2"):  # 2: one of several
                    return None
                if tag in OF_KIND:
                    stored = length * struct.calcsize(order + FORMATS.get(form, "Q"))
                    if stored > room:
                        value = struct.unpack(order + offset, entry[-room:])[0]
                        entry = entry[:-room] + data[value : value + stored]
                    own.append(entry)
            if kind is not None and own != kind:
                return None
            kind = own
            place = unpack(order + offset, data, place + start + size * count)[0]
    except (struct.error, OverflowError):
        return None
    return len(seen)


def may_have_mask(data: OnDisk) -> bool:
    """Whether a page says that it is a mask, or pages cannot be followed; tifffile takes ten times as long for it."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+" or data[3:4] == b"+"
    number, start, size, offset = ("Q", 8, 20, "Q") if big else ("H", 2, 12, "I")
    seen: set[int] = set()
    try:
        place = unpack(order + offset, data, 8 if big else 4)[0]
        while place:
            if place in seen:
                return True
            seen.add(place)
            count = unpack(order + number, data, place)[0]
            body = data[place + start : place + start + size * min(count, 4096)]
            for tag, _, value in struct.iter_unpack(f"{order}H{size - 2 - struct.calcsize(offset)}s{offset}", body):
                # The bits of a short number are at the beginning: whichever order, mask bits are in one of its bytes.
                if tag == NEW_SUBFILE_TYPE and any(byte & MASK for byte in value.to_bytes(8, "little")):
                    return True
            place = unpack(order + offset, data, place + start + size * count)[0]
    except (struct.error, OverflowError):
        return True
    return False


@dataclass(frozen=True)
class Directory:
    """What matters of the first directory."""

    plain: bool  # an 8-bit picture of a kind that Pillow reads right
    more: bool  # further directories follow
    alone: bool  # nothing hints at more than this one picture
    order: str  # < or >: of its bytes
    big: bool  # BigTIFF
    tags: dict[int, tuple[Any, ...]]  # values; () where there are too many or of an unknown kind
    kinds: dict[int, int]  # the TIFF type of each tag
    spans: dict[int, tuple[str, int, int]]  # of strips: letter of their type, number, where they stand
    distinct: bool  # no tag is there twice


def first_directory(data: "bytes | OnDisk") -> Directory | None:
    """Read the first directory of a TIFF, which is much faster than opening it; None where that does not work out."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+" or data[3:4] == b"+"
    try:
        start = unpack(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        count = unpack(order + ("Q" if big else "H"), data, start)[0]
        start, size, offset = (start + 8, 20, "Q") if big else (start + 2, 12, "I")
        tags: dict[int, tuple[Any, ...]] = {}
        kinds: dict[int, int] = {}
        spans: dict[int, tuple[str, int, int]] = {}
        room = size - 4 - struct.calcsize(order + offset)  # for a value within its entry
        entries = data[start : start + size * min(count, 4096)]
        whole = entries[: len(entries) // size * size]
        for i, (tag, kind, number, there) in enumerate(struct.iter_unpack(f"{order}HH{offset}{room}s", whole)):
            form = FORMATS.get(kind)
            tags[tag], kinds[tag] = (), kind
            if form is None:
                continue
            length = number * LENGTHS[kind]
            at = start + size * (i + 1) - room if length <= room else unpack(order + offset, there, 0)[0]
            if tag in STRIPS:
                spans[tag] = form, number, at
            if number > 64 and tag not in (DESCRIPTION, COLOUR_MAP):
                continue
            form = f"{number}s" if form == "1s" else form * number
            tags[tag] = struct.unpack(order + form, there[:length] if length <= room else data[at : at + length])
        if len(whole) < size * min(count, 4096):
            return None
        more = unpack(order + offset, data, start + size * count)[0] != 0
    except (struct.error, OverflowError, MemoryError):
        return None
    samples, photometric = single(tags, SAMPLES, 1), single(tags, PHOTOMETRIC, -1)
    description = b"".join(tags.get(DESCRIPTION, (b"",)))
    private = {tag for tag in tags if tag > 32767} - HARMLESS
    alone = not (
        more
        or private
        or SUB_IFDS in tags
        or single(tags, NEW_SUBFILE_TYPE, 0) & (REDUCED | MASK)
        or description.startswith(b"ImageJ=")
        or b"OME>" in description[-16:]
        or b'"truncated"' in description
    )
    single_bits = set(tags.get(BITS, (1,)))
    plain = (
        not big
        and PILLOW_SAMPLES.get(photometric) == samples
        and (single_bits == {8} or (samples == 1 and single_bits <= {1, 2, 4}))
        and not (photometric == WHITE_IS_ZERO and single_bits == {8})  # Pillow turns it over, before any range counts
        and not (photometric == PALETTE and max(tags.get(COLOUR_MAP, ()), default=0) <= 255)  # colours of 8 bits
        and set(tags.get(SAMPLE_FORMAT, (1,))) == {1}
        and single(tags, COMPRESSION, 1) in PILLOW_COMPRESSIONS
        and not {EXTRA_SAMPLES, GDAL_NODATA} & set(tags)
        and not single(tags, NEW_SUBFILE_TYPE, 0) & (REDUCED | MASK)
        and not description.startswith(b"ImageJ=")
        and b"OME>" not in description[-16:]
    )
    return Directory(plain, more, alone, order, big, tags, kinds, spans, distinct=len(tags) == len(whole) // size)


def unpack(form: str, data: "bytes | OnDisk", at: int) -> tuple[Any, ...]:
    return struct.unpack(form, data[at : at + struct.calcsize(form)])


def single(tags: dict[int, tuple[Any, ...]], tag: int, default: int) -> int:
    values = tags.get(tag)
    return values[0] if values and isinstance(values[0], int) else default
