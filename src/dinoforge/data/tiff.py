"""TIFF as rasters and microscopes write it: any bands, bits and sample formats, planes, pages, masks.

tifffile reads them; it is imported when the first such file is opened. Plain 8-bit pictures are left to Pillow, which
is faster: `read` and `describe` return None for them.

- Nothing is laid over white: in a TIFF the fourth band marked as alpha may as well be infrared.
- Channels: the samples of a pixel, the planes of a planar file, and the axis C of OME and ImageJ metadata. Pages
  without metadata could be anything: they are channels where exactly so many are wanted, else the first page is the
  image (8-bit pages are the sheets of a document where three channels are wanted).
- z, time and whatever else: one plane, `plane` in the file's order, or the brightest value of all of them.
- Pages that say that they are a reduced image or a mask are not the image.
- No data: GDAL's tag, its internal mask, and NaN.
- Bits: those of the file, also where OME's SignificantBits or a MaxSampleValue of 2^n - 1 says that fewer are used.
- Values where white is 0 are inverted.
"""

import io
import logging
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinoforge.data.values import Bool, Samples, Scaling, check_size, to_levels
from dinoforge.errors import ImageError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

Plane = int | Literal["max"] | None
Values = npt.NDArray[Any]

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_NEW_SUBFILE_TYPE, _WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_DESCRIPTION, _ORIENTATION, _SAMPLES, _MAX_SAMPLE_VALUE, _PLANAR, _SUB_IFDS = 270, 274, 277, 281, 284, 330
_STRIPS = (273, 279)  # their offsets and sizes
_ROWS_PER_STRIP = 278
_ONE_IF_PLAIN = frozenset({_COMPRESSION, 266, _ORIENTATION, 317})  # and order of bits, predictor
_SINGLE = _ONE_IF_PLAIN | {_NEW_SUBFILE_TYPE, _WIDTH, _LENGTH, _PHOTOMETRIC, _SAMPLES, _PLANAR, _ROWS_PER_STRIP}
_INK_SET, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _S_MAX_SAMPLE_VALUE, _GDAL_NODATA = 332, 338, 339, 341, 42113
_GEO = frozenset({33550, 33922, 34264, 34735})
_TYPES = {(1, 8): "u1", (1, 16): "u2", (1, 32): "u4", (2, 8): "i1", (2, 16): "i2", (2, 32): "i4"}
_TYPES |= {(3, 32): "f4", (3, 64): "f8"}  # by SampleFormat and bits
# Largest values, colour maps, tiles.
_NOT_PLAIN = frozenset({_MAX_SAMPLE_VALUE, _S_MAX_SAMPLE_VALUE, 320, 322, 323, 324, 325})
_IMAGEJ = frozenset({b"ImageJ", b"images", b"channels", b"hyperstack", b"mode", b"loop", b"unit", b"min", b"max"})
_NOT_PLAIN_OME = (b"BinaryOnly", b"MetadataOnly", b"BinData", b"Modulo", b"UUID FileName", b"<!", b"<Plate")
# Private tags that say nothing about further planes: copyright, ICC, EXIF, geography, GDAL.
_HARMLESS = _GEO | {33432, 34377, 34665, 34675, 34736, 34737, 37724, 42112, _GDAL_NODATA, 50838, 50839}

_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _TRANSPARENCY, _SEPARATED, _YCBCR = range(7)
_PILLOW_SAMPLES = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _SEPARATED: 4, _YCBCR: 3, 8: 3}
# None, CCITT, LZW, JPEG, deflate, PackBits
_PILLOW_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32946})
_JPEG = frozenset({6, 7})
_FORMATS = {1: "BB", 2: "1s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "1s", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}
_LENGTHS = {kind: struct.calcsize(f"={form}") for kind, form in _FORMATS.items()}


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as TIFF or BigTIFF does."""
    return data[:4] in _MAGIC


def read(data: bytes, *, channels: int | None, plane: Plane, max_pixels: int) -> Samples | None:
    """Read a TIFF's values, or return None for a picture that Pillow reads right.

    Args:
        data: The file.
        channels: Channels wanted: they decide what pages without metadata are. None: the first page.
        plane: Index of the plane along z, time and unknown axes; ``max``: the largest value of all planes; None: 0.
        max_pixels: Largest H·W.

    Raises:
        ImageError: Truncated, too large, no such plane, or of a kind that is not read.
    """
    head = _first_directory(data)
    if head is not None and head.plain and not head.more:
        check_plane(plane, 1)
        return None
    lying = None if head is None else _lying(data, head, channels)
    if lying is not None:
        check_plane(plane, 1)
        check_size(lying.shape[1], lying.shape[0], max_pixels)
        return lying.samples(data)
    with _opened(data) as file:
        found = _find(file, head, channels)
        if found.for_pillow and plane in (None, 0):
            return None
        check_size(found.key.imagewidth, found.key.imagelength, max_pixels)
        return _samples(found, data, channels, plane)


def describe(data: bytes, channels: int | None = None) -> tuple[int, int, str] | None:
    """Tell a TIFF's upright width, height and kind from its headers; None for a picture that Pillow reads right.

    Raises:
        ImageError: No image in it.
    """
    head = _first_directory(data)
    if head is not None and head.plain and not head.more:
        return None
    lying = None if head is None else _lying(data, head, channels)
    if lying is not None:
        return lying.shape[1], lying.shape[0], lying.kind
    with _opened(data) as file:
        found = _find(file, head, channels)
        width, height = found.key.imagewidth, found.key.imagelength
        if _orientation(found.key) >= 5:
            width, height = height, width
        return width, height, _kind(found)


@dataclass(frozen=True)
class Stored:
    """Values as `read` gives them.

    Args:
        dtype: Their type.
        count: Their number.
        channels: Channels that they have.
        planar: Whether they lie channel by channel.
        held: Bytes that they take, beside those of the file.
        peak: Bytes that reading them takes at most.
    """

    dtype: np.dtype[Any]
    count: int
    channels: int
    planar: bool
    held: int
    peak: int


def count_planes(file: BinaryIO, channels: int | None = None) -> tuple[int, str]:
    """Count the planes of an open TIFF from its headers: along z, time, pages and unknown axes.

    Args:
        file: Seekable; only what is needed of it is read.
        channels: Channels wanted: they decide what pages without metadata are, as for ``read``.

    Returns:
        Their number, and along what they lie, such as ``z, t``; '' for one.

    Raises:
        ImageError: No image in it. What else tifffile raises of damaged files comes as it is.
    """
    quick = count_quickly(file, channels)
    if quick is not None:
        return quick
    head = _first_directory(_OnDisk.of(file))
    file.seek(0)
    with _opened(file) as opened:
        return _along(_find(opened, head, channels))


def count_quickly(file: BinaryIO, channels: int | None = None) -> tuple[int, str] | None:
    """As ``count_planes`` where neither OME, ImageJ nor others say what the pages are, else None; for any thread."""
    data = _OnDisk.of(file)
    head = _first_directory(data)
    if head is not None and (head.alone or (head.plain and not head.more)):
        return 1, ""
    pages = _equal_pages(data)
    return (pages, "page") if pages is not None and pages > 1 and pages != channels else None


def stored(data: bytes, channels: int | None, plane: Plane) -> Stored | None:
    """Tell from the headers what `read` will hold in memory; None for a picture that Pillow reads.

    Raises:
        ImageError: No image in it.
    """
    head = _first_directory(data)
    if head is not None and head.plain and not head.more:
        return None
    with _opened(data) as file:
        found = _find(file, head, channels)
        if found.for_pillow and plane in (None, 0):
            return None
        key, series = found.key, found.pages
        dtype = np.dtype(key.dtype)
        size = key.imagewidth * key.imagelength * found.channels * dtype.itemsize
        planar = int(key.planarconfig) == 2 or any(found.axes[i] != "S" for i in found.channel_axes)
        lies_there = key.is_contiguous if series is None else series.dataoffset is not None
        if lies_there and dtype.newbyteorder(key.parent.byteorder).isnative:
            held = peak = 0
        elif lies_there or series is None:
            held = peak = size
        elif math.prod(found.shape[: len(found.shape) - len(key.shape)]) == len(series):
            held, peak = size, 2 * size  # pages, and then all in one array
        else:
            held = peak = math.prod(found.shape) * dtype.itemsize  # every plane
        if plane == "max" and found.planes > 1:
            held, peak = size, max(peak, held) + 2 * size
        if int(key.photometric) == _WHITE_IS_ZERO:
            held, peak = size, max(peak, held + size)
        if int(key.photometric) in (_PALETTE, _SEPARATED):
            pixels = key.imagewidth * key.imagelength
            return Stored(np.dtype(np.uint8), 3 * pixels, 3, planar, 3 * pixels, max(peak, held + 14 * pixels))
        return Stored(dtype, size // dtype.itemsize, found.channels, planar, held, peak)


def _along(found: "_Found") -> tuple[int, str]:
    """The number of planes, and their axes in words."""
    letters = [found.axes[i] for i in found.plane_axes if found.shape[i] > 1]
    if set(letters) <= set("QI"):
        return found.planes, "page" if letters else ""
    return found.planes, ", ".join(letter.lower() for letter in letters)


@dataclass(frozen=True)
class _OnDisk:
    """An open file, of which slices are read."""

    file: BinaryIO
    size: int

    @classmethod
    def of(cls, file: BinaryIO) -> "_OnDisk":
        return cls(file, file.seek(0, io.SEEK_END))

    def __getitem__(self, where: slice) -> bytes:
        start, stop = where.start or 0, min(where.stop, self.size)  # a header may say anything
        if start >= stop:
            return b""
        self.file.seek(start)
        return self.file.read(stop - start)


# What tells pages of one kind from others: size, bits, compression, photometric, samples, layout, prediction, tiles.
_OF_KIND = frozenset({_NEW_SUBFILE_TYPE, _WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, 266, _SAMPLES, _PLANAR})
_OF_KIND |= frozenset({317, 322, 323, _EXTRA_SAMPLES, _SAMPLE_FORMAT})


def _equal_pages(data: _OnDisk) -> int | None:
    """Count the pages of a TIFF that says nothing of what they are, if all are of one kind; else None.

    tifffile finds the same in ten times the time.
    """
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+" or data[3:4] == b"+"
    number, start, size, offset = ("Q", 8, 20, "Q") if big else ("H", 2, 12, "I")
    room = struct.calcsize(offset)
    seen: set[int] = set()
    kind: list[bytes] | None = None
    try:
        place = _unpack(order + offset, data, 8 if big else 4)[0]
        while place:
            if place in seen:
                return None
            seen.add(place)
            count = min(_unpack(order + number, data, place)[0], 4096)
            body = data[place + start : place + start + size * count]
            own = []
            for at in range(0, len(body), size):
                entry = body[at : at + size]
                tag, form, length = struct.unpack(order + "HH" + offset, entry[:-room])
                if tag in (_DESCRIPTION, _SUB_IFDS) or (tag > 32767 and tag not in _HARMLESS):
                    return None
                if tag == _NEW_SUBFILE_TYPE and entry[-room:].strip(b"\0") not in (b"", b"\2"):  # 2: one of several
                    return None
                if tag in _OF_KIND:
                    stored = length * struct.calcsize(order + _FORMATS.get(form, "Q"))
                    if stored > room:
                        value = struct.unpack(order + offset, entry[-room:])[0]
                        entry = entry[:-room] + data[value : value + stored]
                    own.append(entry)
            if kind is not None and own != kind:
                return None
            kind = own
            place = _unpack(order + offset, data, place + start + size * count)[0]
    except (struct.error, OverflowError):
        return None
    return len(seen)


@dataclass(frozen=True)
class _Directory:
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


def _first_directory(data: "bytes | _OnDisk") -> _Directory | None:
    """Read the first directory of a TIFF, which is much faster than opening it; None where that does not work out."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+" or data[3:4] == b"+"
    try:
        start = _unpack(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        count = _unpack(order + ("Q" if big else "H"), data, start)[0]
        start, size, offset = (start + 8, 20, "Q") if big else (start + 2, 12, "I")
        tags: dict[int, tuple[Any, ...]] = {}
        kinds: dict[int, int] = {}
        spans: dict[int, tuple[str, int, int]] = {}
        room = size - 4 - struct.calcsize(order + offset)  # for a value within its entry
        entries = data[start : start + size * min(count, 4096)]
        whole = entries[: len(entries) // size * size]
        for i, (tag, kind, number, there) in enumerate(struct.iter_unpack(f"{order}HH{offset}{room}s", whole)):
            form = _FORMATS.get(kind)
            tags[tag], kinds[tag] = (), kind
            if form is None:
                continue
            length = number * _LENGTHS[kind]
            at = start + size * (i + 1) - room if length <= room else _unpack(order + offset, there, 0)[0]
            if tag in _STRIPS:
                spans[tag] = form, number, at
            if number > 64 and tag != _DESCRIPTION:
                continue
            form = f"{number}s" if form == "1s" else form * number
            tags[tag] = struct.unpack(order + form, there[:length] if length <= room else data[at : at + length])
        if len(whole) < size * min(count, 4096):
            return None
        more = _unpack(order + offset, data, start + size * count)[0] != 0
    except (struct.error, OverflowError, MemoryError):
        return None
    samples, photometric = _one(tags, _SAMPLES, 1), _one(tags, _PHOTOMETRIC, -1)
    description = b"".join(tags.get(_DESCRIPTION, (b"",)))
    private = {tag for tag in tags if tag > 32767} - _HARMLESS
    alone = not (
        more
        or private
        or _SUB_IFDS in tags
        or _one(tags, _NEW_SUBFILE_TYPE, 0) & (_REDUCED | _MASK)
        or description.startswith(b"ImageJ=")
        or b"OME>" in description[-16:]
        or b'"truncated"' in description
    )
    single_bits = set(tags.get(_BITS, (1,)))
    plain = (
        not big
        and _PILLOW_SAMPLES.get(photometric) == samples
        and (single_bits == {8} or (samples == 1 and single_bits <= {1, 2, 4}))
        and set(tags.get(_SAMPLE_FORMAT, (1,))) == {1}
        and _one(tags, _COMPRESSION, 1) in _PILLOW_COMPRESSIONS
        and not {_EXTRA_SAMPLES, _GDAL_NODATA} & set(tags)
        and not _one(tags, _NEW_SUBFILE_TYPE, 0) & (_REDUCED | _MASK)
        and not description.startswith(b"ImageJ=")
        and b"OME>" not in description[-16:]
    )
    return _Directory(plain, more, alone, order, big, tags, kinds, spans, distinct=len(tags) == len(whole) // size)


@dataclass(frozen=True)
class _Lying:
    """Values that lie in a file one after the other, without compression."""

    start: int
    dtype: np.dtype[Any]  # with the order of bytes
    shape: tuple[int, int, int]  # [H, W, C]
    planar: bool
    colour: int = 0
    nodata: tuple[float, ...] = ()
    family: str = "TIFF"
    axes: str = ""
    rgb: bool = False

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> str:
        """As `_kind` says it."""
        words = [f"{self.dtype.newbyteorder('=')} x{self.shape[2]}", self.family]
        if self.axes:
            words.append(f"axes {self.axes}")
        if self.rgb and self.shape[2] > 3:
            words.append(_more_bands(self.shape[2]))
        words += [f"nodata {number:.10g}" for number in self.nodata]
        return ", ".join(words)

    def samples(self, data: bytes) -> Samples:
        """As `_samples` gives them."""
        height, width, channels = self.shape
        shape = (channels, height, width) if self.planar else self.shape
        values: Values = np.frombuffer(data, self.dtype, math.prod(shape), self.start).reshape(shape)
        if not (self.dtype.isnative and values.flags.aligned):
            values = values.astype(self.dtype.newbyteorder("="))
        values = values.transpose(1, 2, 0) if self.planar else values
        return Samples(values, None, self.colour, nodata=self.nodata, kind=self.kind)


def _lying(data: bytes, head: _Directory, channels: int | None) -> _Lying | None:
    """Find a file's values where nothing has to be decoded, inverted, turned, limited, or chosen among planes.

    To open such a file tifffile takes longer than its values take to become levels. Whatever is not plainly so is left
    to it, and damaged files as well: None.
    """
    one = _lying_page(data, head)
    if one is None or head.alone or not head.more:
        return one if head.alone else None
    return _lying_pages(data, head, one, channels)


def _lying_page(data: bytes, head: _Directory) -> _Lying | None:
    """The values of the first page."""
    tags, forms = head.tags, head.kinds
    samples, bits, width, height = (_one(tags, *one) for one in ((_SAMPLES, 1), (_BITS, 0), (_WIDTH, 0), (_LENGTH, 0)))
    kinds = tags.get(_SAMPLE_FORMAT, (1,))
    layout = _one(tags, _PLANAR, 1)
    if (
        not head.distinct
        or any(len(tags[tag]) != 1 or forms[tag] not in (3, 4) for tag in _SINGLE & tags.keys())
        or any(not tags[tag] or forms[tag] != 3 for tag in (_BITS, _SAMPLE_FORMAT, _EXTRA_SAMPLES) if tag in tags)
        or any(not tags[tag] or forms[tag] != 2 for tag in (_DESCRIPTION, _GDAL_NODATA) if tag in tags)
        or not 0 < samples <= 64
        or min(width, height) <= 0
        or (kinds[:1] + tags.get(_BITS, ())[:1]) not in _TYPES
        or set(kinds) != {kinds[0]}
        or tags[_BITS] != (bits,) * samples
        or len(kinds) not in (1, samples)
        or _one(tags, _PHOTOMETRIC, -1) not in (_BLACK_IS_ZERO, _RGB)
        or layout not in (1, 2)
        or any(_one(tags, tag, 1) != 1 for tag in _ONE_IF_PLAIN)
        or not _NOT_PLAIN.isdisjoint(tags)
    ):
        return None
    rows = min(_one(tags, _ROWS_PER_STRIP, height), height)
    starts, sizes = (_numbers(data, head, tag) for tag in _STRIPS)
    if rows <= 0 or not starts or not sizes or len(starts) != len(sizes):
        return None
    needed = width * height * samples * bits // 8
    if len(starts) != -(-height // rows) * (samples if layout == 2 else 1) or sum(sizes) != needed:
        return None
    if starts[0] < 8 or starts[0] + needed > len(data):
        return None
    if any(start + size != following for start, size, following in zip(starts, sizes, starts[1:], strict=False)):
        return None
    is_rgb = _one(tags, _PHOTOMETRIC, -1) == _RGB
    extra = tags.get(_EXTRA_SAMPLES, ())
    is_alpha = len(extra) == 1 and extra[0] in (1, 2)
    return _Lying(
        starts[0],
        np.dtype(head.order + _TYPES[kinds[0], bits]),
        (height, width, samples),
        planar=samples > 1 and layout == 2,
        colour=3 if is_rgb and samples >= 3 else 1 if samples == 1 or (samples == 2 and is_alpha) else 0,
        nodata=_nodata_said(b"".join(tags[_GDAL_NODATA]).decode("latin-1")) if _GDAL_NODATA in tags else (),
        family="GeoTIFF" if not _GEO.isdisjoint(tags) else "BigTIFF" if head.big else "TIFF",
        rgb=is_rgb,
    )


def _lying_pages(data: bytes, head: _Directory, first: _Lying, channels: int | None) -> _Lying | None:
    """The values of pages that are one image's channels, each behind the other, as OME or others say it."""
    tags = head.tags
    is_more = _SUB_IFDS in tags or _EXTRA_SAMPLES in tags or any(tag > 32767 for tag in tags)
    if is_more or first.rgb or first.shape[2] != 1 or _one(tags, _NEW_SUBFILE_TYPE, 0) or min(first.shape[:2]) < 2:
        return None
    pages = _pages_behind(data, head, first)
    if pages is None or pages < 2:
        return None
    said = _channels_in_words(b"".join(tags.get(_DESCRIPTION, (b"",))), pages, first)
    if said is None:
        return None
    family, letter = said
    if letter != "C" and (pages != channels or (channels == 3 and first.dtype.itemsize == 1)):
        return None
    return replace(
        first,
        shape=(*first.shape[:2], pages),
        planar=True,
        colour=0,
        family=family or first.family,
        axes=f"{letter}YX",
    )


def _pages_behind(data: bytes, head: _Directory, first: _Lying) -> int | None:
    """Count the pages, if each is of the first one's kind and lies behind the one before it; else None."""
    number, before, size, offset = ("Q", 8, 20, "Q") if head.big else ("H", 2, 12, "I")
    form, room = f"{head.order}H{size - 2}s", size - 2
    kind: dict[int, bytes] | None = None
    place, pages = _unpack(head.order + offset, data, 8 if head.big else 4)[0], 0
    length = first.end - first.start
    try:
        while place:
            count = _unpack(head.order + number, data, place)[0]
            entries = data[place + before : place + before + size * count]
            own = {tag: body for tag, body in struct.iter_unpack(form, entries) if tag in _OF_KIND or tag in _STRIPS}
            if kind is None:
                kind = {tag: body for tag, body in own.items() if tag in _OF_KIND}
            else:
                spans = [own.pop(tag, b"") for tag in _STRIPS]
                at, there = (_one_number(head, body[:room]) for body in spans)
                if own != kind or (at, there) != (first.start + pages * length, length):
                    return None
            pages += 1
            place = _unpack(head.order + offset, data, place + before + size * count)[0]
            if pages > 64:
                return None
    except (struct.error, OverflowError):
        return None
    return pages if first.start + pages * length <= len(data) else None


def _one_number(head: _Directory, body: bytes) -> int | None:
    """The value of an entry without its tag, if it is a single number."""
    form = {3: "H", 4: "I", 16: "Q"}.get(_unpack(head.order + "H", body, 0)[0])
    count = _unpack(head.order + ("Q" if head.big else "I"), body, 2)[0]
    if form is None or count != 1:
        return None
    return int(_unpack(head.order + form, body, 10 if head.big else 6)[0])


def _channels_in_words(description: bytes, pages: int, first: _Lying) -> tuple[str, str] | None:
    """The family of the file ('': any) and the letter of the axis along which its pages lie; None where it is not so
    plain."""
    height, width, _ = first.shape
    text = description.rstrip(b"\0")
    if not text:
        return "", "I"
    shaped = re.fullmatch(rb'\{"shape": \[(\d+), (\d+), (\d+)\](?:, "axes": "(C)YX")?\}', text)
    if shaped:
        is_so = [int(n) for n in shaped.groups()[:3]] == [pages, height, width]
        return ("", "C" if shaped[4] else "Q") if is_so else None
    if text.startswith(b"ImageJ="):
        said = dict(line.partition(b"=")[::2] for line in text.split(b"\n") if line)
        is_so = {said.get(b"images"), said.get(b"channels")} == {b"%d" % pages} and said.keys() <= _IMAGEJ
        return ("ImageJ TIFF", "C") if is_so else None
    if not text.rstrip().endswith(b"</OME>") or any(word in text for word in _NOT_PLAIN_OME):
        return None
    pixels, data = re.findall(rb"<Pixels\s([^<>]*)>", text), re.findall(rb"<TiffData\b([^<>]*)>", text)
    if len(pixels) != 1 or len(data) != 1 or len(re.findall(rb"<Image\s", text)) != 1:
        return None
    is_so = (
        dict(re.findall(rb'(\w+)="([^"]*)"', data[0])).items() <= {b"IFD": b"0", b"PlaneCount": b"%d" % pages}.items()
        and data[0].rstrip().endswith(b"/")
        and set(re.findall(rb'SamplesPerPixel="([^"]*)"', text)) <= {b"1"}
    )
    attributes = dict(re.findall(rb'(\w+)="([^"]*)"', pixels[0]))
    names = {"f": "float", "d": "double"}
    dtype = names.get(first.dtype.char, first.dtype.newbyteorder("=").name).encode()
    sizes = {b"SizeX": b"%d" % width, b"SizeY": b"%d" % height, b"SizeC": b"%d" % pages, b"SizeZ": b"1", b"SizeT": b"1"}
    is_so = is_so and (sizes | {b"Type": dtype}).items() <= attributes.items() and b"SignificantBits" not in attributes
    return ("OME-TIFF", "C") if is_so and attributes.get(b"DimensionOrder", b"")[:2] == b"XY" else None


def _numbers(data: bytes, head: _Directory, tag: int) -> tuple[int, ...] | None:
    """The offsets or sizes of all strips; None where they are not there."""
    if tag not in head.spans or head.kinds[tag] not in (3, 4, 16):
        return None
    form, number, at = head.spans[tag]
    length = {"H": 2, "I": 4, "Q": 8}.get(form)
    if length is None or at + number * length > len(data):
        return None
    return struct.unpack_from(f"{head.order}{number}{form}", data, at)


def _unpack(form: str, data: "bytes | _OnDisk", at: int) -> tuple[Any, ...]:
    return struct.unpack(form, data[at : at + struct.calcsize(form)])


def _one(tags: dict[int, tuple[Any, ...]], tag: int, default: int) -> int:
    values = tags.get(tag)
    return values[0] if values and isinstance(values[0], int) else default


@contextmanager
def _opened(data: bytes | BinaryIO) -> "Iterator[TiffFile]":
    import tifffile  # not before it is needed

    logger = logging.getLogger("tifffile")
    before = logger.disabled
    logger.disabled = True  # what matters is raised
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        # Not _multifile: no file leads to another one.
        with tifffile.TiffFile(stream, _multifile=False) as file:
            yield file
    finally:
        logger.disabled = before
        if isinstance(data, bytes):
            stream.close()  # tifffile's objects refer to each other, and would keep the file until they are collected


@dataclass(frozen=True)
class _Found:
    """The image of a file."""

    key: "TiffPage"
    pages: Any  # the series that it belongs to; None: this page alone
    axes: str
    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]  # C before S
    plane_axes: tuple[int, ...]
    mask: "TiffPage | None"
    family: str
    for_pillow: bool

    @property
    def planes(self) -> int:
        return math.prod(self.shape[i] for i in self.plane_axes)

    @property
    def channels(self) -> int:
        return math.prod(self.shape[i] for i in self.channel_axes)


def _find(file: "TiffFile", head: _Directory | None, channels: int | None) -> _Found:
    """Find the image: not a thumbnail, not a mask; and what its axes are."""
    key: TiffPage = file.pages.first
    pages, axes, shape, mask = None, key.axes, key.shape, None
    if head is None or not head.alone:
        if head is None or head.more:
            mask = _mask(file)
        whole = [s for s in file.series if s.keyframe is not None and not s.keyframe.subfiletype & (_REDUCED | _MASK)]
        if not whole:
            whole = [s for s in file.series if s.keyframe is not None and not s.keyframe.subfiletype & _MASK]
        if not whole:
            raise ImageError("a TIFF without an image")
        pages = whole[0]
        key, axes, shape = pages.keyframe, pages.axes, pages.shape
        if sorted(a for a in axes if a in "YX") != ["X", "Y"]:
            pages, axes, shape = None, key.axes, key.shape
    if mask is not None and (mask.imagewidth, mask.imagelength) != (key.imagewidth, key.imagelength):
        mask = None
    if file.is_ome:
        family = "OME-TIFF"
    elif file.is_imagej:
        family = "ImageJ TIFF"
    else:
        family = "GeoTIFF" if any(tag in key.tags for tag in _GEO) else "BigTIFF" if file.is_bigtiff else "TIFF"
    known = tuple(sorted((i for i, a in enumerate(axes) if a in "CS"), key=lambda i: axes[i]))
    planes = tuple(i for i, a in enumerate(axes) if a not in "CSYX")
    if math.prod(shape[i] for i in known) == 1 and math.prod(shape[i] for i in planes) == channels:
        unknown = tuple(i for i in planes if shape[i] > 1)
        document = channels == 3 and key.dtype is not None and key.dtype.itemsize == 1
        if len(unknown) == 1 and axes[unknown[0]] in "QI" and not document:
            known, planes = unknown, tuple(i for i in planes if i not in unknown)
    for_pillow = (
        head is not None
        and head.plain
        and mask is None
        and key.index == 0
        and file.pages.first.offset == key.offset
        and not any(axes[i] in "CQI" and shape[i] > 1 for i in known)
        and math.prod(shape[i] for i in known) in (1, 3, 4)
    )
    return _Found(key, pages, axes, shape, known, planes, mask, family, for_pillow)


def _mask(file: "TiffFile") -> "TiffPage | None":
    """Find GDAL's internal mask, which is a page of its own."""
    for page in file.pages:
        found = page.aspage()
        if found.subfiletype & (_REDUCED | _MASK) == _MASK:
            return found
    return None


def _samples(found: _Found, data: bytes, channels: int | None, plane: Plane) -> Samples:
    check_plane(plane, found.planes)
    key = found.key
    photometric = int(key.photometric) if key.photometric is not None else _BLACK_IS_ZERO
    _check_photometric(found, photometric)
    nodata = _nodata(key)
    limit = _limit(key)
    white_is_zero = photometric == _WHITE_IS_ZERO
    numbers = range(found.planes) if plane == "max" else [plane or 0]
    values: Values | None = None
    for number in numbers:
        one = _plane(found, data, number)
        values = one if values is None else _larger(values, one, nodata, smaller=white_is_zero)
    assert values is not None
    valid = _valid(found, data)
    colour = 0
    if photometric in (_RGB, _YCBCR) and key.samplesperpixel >= 3 and values.shape[2] == key.samplesperpixel:
        colour = 3
    elif values.shape[2] == 1 or (values.shape[2] == 2 and _is_alpha(key)):
        colour = 1
    if white_is_zero:
        values, nodata = _inverted(values, nodata, limit)
    elif photometric == _PALETTE and key.colormap is not None and values.shape[2] == 1:
        valid = _both(valid, nodata, values)
        table = (np.asarray(key.colormap) >> 8).astype(np.uint8)  # [3, 2^bits]
        values, colour, nodata, limit = np.moveaxis(table[:, values[:, :, 0]], 0, -1), 3, (), None
    elif photometric == _SEPARATED and channels != values.shape[2]:
        ink = to_levels(Samples(values[:, :, :4], limit=limit), Scaling())
        valid = _both(valid, nodata, values)
        picture = Image.frombytes("CMYK", ink.shape[1::-1], ink.tobytes())
        values, colour, nodata, limit = np.asarray(picture.convert("RGB")), 3, (), None
    orientation = _orientation(key)
    values = upright(values, orientation)
    valid = None if valid is None else upright(valid, orientation)
    return Samples(values, limit, colour, alpha=False, nodata=nodata, valid=valid, kind=_kind(found))


def upright(array: Values, orientation: int) -> Values:
    """Turn an array [H, W, …] as its EXIF orientation, 1…8, says."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def check_plane(plane: Plane, planes: int) -> None:
    """Refuse the index of a plane that a file does not have.

    Raises:
        ImageError: As said.
    """
    if isinstance(plane, int) and not 0 <= plane < planes:
        have = "1 plane" if planes == 1 else f"{planes} planes"
        raise ImageError(f"has {have}, counted from 0, but data.plane={plane}")


def _check_photometric(found: _Found, photometric: int) -> None:
    key = found.key
    name = getattr(key.photometric, "name", str(photometric))
    if photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _TRANSPARENCY):
        return
    if photometric == _YCBCR and int(key.compression) in _JPEG:
        return
    ink_set = key.tags.get(_INK_SET)
    if photometric == _SEPARATED and key.samplesperpixel >= 4 and (ink_set is None or ink_set.value == 1):
        return
    if photometric in (32803, 34892):
        raise ImageError("a camera's raw data in TIFF, which is not read: develop it to TIFF or JPEG")
    raise ImageError(f"a TIFF of {key.bitspersample}-bit {name} colours, which is not read: save it as RGB")


def _plane(found: _Found, data: bytes, number: int) -> Values:
    """The values of one plane: [H, W, C]."""
    index = np.unravel_index(number, [found.shape[i] for i in found.plane_axes]) if found.plane_axes else ()
    where: list[Any] = [slice(None)] * len(found.axes)
    for axis, at in zip(found.plane_axes, index, strict=True):
        where[axis] = int(at)
    values = _values(found, data, tuple(where))
    kept = [i for i in range(len(found.axes)) if i not in found.plane_axes]
    order = [found.axes.index("Y"), found.axes.index("X"), *found.channel_axes]
    values = values.transpose([kept.index(i) for i in order])
    return values.reshape(*values.shape[:2], -1)


def _values(found: _Found, data: bytes, where: tuple[Any, ...]) -> Values:
    """What stands at an index of the image's axes; only the pages that it needs are decoded."""
    key, series = found.key, found.pages
    if series is None:
        _check_complete([key], data)
        if key.is_contiguous:
            return _as_it_lies(found, data, key.dataoffsets[0], where)
        values: Values = np.asarray(key.asarray(maxworkers=1))[where]
        return values
    if series.dataoffset is not None:
        return _as_it_lies(found, data, series.dataoffset, where)
    pages = [series[i] for i in range(len(series))]
    if any(page is None for page in pages):
        raise ImageError("its metadata names planes that are not in the file: keep each image in a file of its own")
    tail = key.shape
    lead = found.shape[: len(found.shape) - len(tail)]
    if math.prod(lead) != len(pages) or found.shape[len(lead) :] != tail:
        _check_complete(pages, data)
        values = np.asarray(series.asarray(maxworkers=1)).reshape(found.shape)
        return values[where]  # type: ignore[no-any-return]
    chosen = np.arange(len(pages)).reshape(lead)[where[: len(lead)]]
    flat = [pages[i] for i in np.ravel(chosen)]
    _check_complete(flat, data)
    values = np.stack([np.asarray(page.asarray(maxworkers=1)) for page in flat])
    values = values.reshape(*np.shape(chosen), *tail)
    return values[(..., *where[len(lead) :])]


def _as_it_lies(found: _Found, data: bytes, start: int, where: tuple[Any, ...]) -> Values:
    """View values that are stored without compression, one after the other, at an index of the image's axes."""
    dtype = np.dtype(found.key.dtype).newbyteorder(found.key.parent.byteorder)
    size = math.prod(found.shape)
    if start + size * dtype.itemsize > len(data):
        raise ImageError(f"truncated: {len(data)} bytes, {start + size * dtype.itemsize} expected")
    values: Values = np.frombuffer(data, dtype, size, start).reshape(found.shape)[where]
    if dtype.isnative and values.flags.aligned:
        return values
    return values.astype(dtype.newbyteorder("="))


def _check_complete(pages: Sequence[Any], data: bytes) -> None:
    """Refuse a file whose strips or tiles lie beyond its end: they would be read as zeros."""
    for page in pages:
        spans = list(zip(page.dataoffsets, page.databytecounts, strict=False))
        lost = sum(offset + count > len(data) for offset, count in spans)
        if lost:
            raise ImageError(f"truncated: {lost} of {len(spans)} strips or tiles lie beyond the end of the file")
        if not spans:
            raise ImageError("damaged: a page without data")
        if int(page.compression) == 1 and not any(offset == 0 for offset, _ in spans):
            stored = sum(count for _, count in spans) * 8
            bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
            needed = page.imagewidth * page.imagelength * page.samplesperpixel * bits
            if stored < needed and int(page.photometric) != _YCBCR:
                raise ImageError(f"damaged: {stored // 8} bytes of data, {-(-needed // 8)} expected")


def _larger(values: Values, other: Values, nodata: tuple[float, ...], smaller: bool) -> Values:
    """The brighter of two planes, value by value, or the one that has data."""
    brighter = (np.fmin if smaller else np.fmax)(values, other)  # NaN only where both are
    for number in nodata:
        brighter = np.where(values == number, other, np.where(other == number, values, brighter))
    return brighter


def _inverted(values: Values, nodata: tuple[float, ...], limit: int | None) -> tuple[Values, tuple[float, ...]]:
    """White is 0: turn values over within the bits that they have."""
    if values.dtype == np.bool_:
        return ~values, ()
    if values.dtype.kind != "u":
        raise ImageError(f"white is said to be 0 of {values.dtype} values, which has no black: save it with black as 0")
    top = limit or np.iinfo(values.dtype).max
    return np.asarray(top, values.dtype) - values, tuple(top - number for number in nodata)


def _both(valid: Bool | None, nodata: tuple[float, ...], values: Values) -> Bool | None:
    """The mask, less what is no data by its number in all channels: before values become others."""
    for number in nodata:
        has = (values != number).any(axis=2)
        valid = has if valid is None else valid & has
    return valid


def _valid(found: _Found, data: bytes) -> Bool | None:
    if found.mask is None:
        return None
    _check_complete([found.mask], data)
    mask = np.asarray(found.mask.asarray(maxworkers=1)) != 0
    return np.asarray(mask if mask.ndim == 2 else mask.any(axis=mask.shape.index(min(mask.shape))))


def _nodata(key: "TiffPage") -> tuple[float, ...]:
    tag = key.tags.get(_GDAL_NODATA)
    if tag is None:
        return ()
    return _nodata_said(str(tag.value))


def _nodata_said(text: str) -> tuple[float, ...]:
    text = text.strip(" \0\n")
    try:
        number = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text.replace(",", "."))
    except ValueError:
        return ()  # such as an empty string
    return () if math.isnan(number) else (number,)


def _limit(key: "TiffPage") -> int | None:
    """The largest value, where fewer bits are used than the type has."""
    dtype = key.dtype
    if dtype is None or dtype.kind != "u":
        return None
    bits = max(np.ravel(key.bitspersample))
    limits = [2 ** int(bits) - 1] if bits < dtype.itemsize * 8 else []
    for tag in (_MAX_SAMPLE_VALUE, _S_MAX_SAMPLE_VALUE):
        said = key.tags.get(tag)
        if said is None:
            continue
        numbers = [int(v) for v in np.ravel(said.value) if isinstance(v, int | float | np.number)]
        top = max(numbers, default=0)
        if 255 < top < np.iinfo(dtype).max and top & (top + 1) == 0:  # 2^n - 1, not the largest of this image
            limits.append(top)
    if key.is_ome:
        bits_said = re.search(r'<Pixels\b[^>]*\bSignificantBits="(\d+)"', key.description)
        if bits_said and 8 < int(bits_said[1]) < dtype.itemsize * 8:
            limits.append(2 ** int(bits_said[1]) - 1)
    return min(limits, default=None)


def _is_alpha(key: "TiffPage") -> bool:
    return len(key.extrasamples) == 1 and int(key.extrasamples[0]) in (1, 2)


def _orientation(key: "TiffPage") -> int:
    tag = key.tags.get(_ORIENTATION)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _more_bands(channels: int) -> str:
    return "RGB and 1 more band" if channels == 4 else f"RGB and {channels - 3} more bands"


def _kind(found: _Found) -> str:
    key = found.key
    photometric = int(key.photometric) if key.photometric is not None else _BLACK_IS_ZERO
    channels = found.channels
    if photometric in (_PALETTE, _SEPARATED):
        channels = 3
    words = [f"{key.dtype} x{channels}", found.family]
    if set(found.axes) - set("YXS"):
        words.append(f"axes {''.join(a for a, n in zip(found.axes, found.shape, strict=True) if n > 1 or a in 'YX')}")
    if photometric == _RGB and found.channels > 3 and found.channels == key.samplesperpixel:
        words.append(_more_bands(found.channels))
    elif photometric == _PALETTE:
        words.append("palette")
    elif photometric == _SEPARATED:
        words.append("CMYK")
    elif photometric == _WHITE_IS_ZERO:
        words.append("white is 0")
    limit = _limit(key)
    if limit is not None:
        words.append(f"{limit.bit_length()} bits")
    words += [f"nodata {number:.10g}" for number in _nodata(key)]
    if found.mask is not None:
        words.append("mask")
    if found.planes > 1:
        letters = [found.axes[i] for i in found.plane_axes if found.shape[i] > 1]
        if set(letters) <= set("QI"):
            words.append(f"page 1 of {found.planes}")
        else:
            words.append(f"plane 1 of {found.planes} ({', '.join(a.lower() for a in letters)})")
    return ", ".join(words)
