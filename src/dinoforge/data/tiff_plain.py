"""Values of TIFFs that lie in the file as they are, viewed by the headers alone, without tifffile.

tifffile takes longer to open such a file than its values take to become levels. Only files whose values plainly lie
there go this way; the result equals that of the long way, ``dinoforge.data.tiff`` through tifffile, and tests hold the
two together.
"""

import math
import re
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoforge.data import tiff_headers as headers
from dinoforge.data.values import Samples

Values = npt.NDArray[Any]

_ROWS_PER_STRIP = 278
_ONE_IF_PLAIN = frozenset({headers.COMPRESSION, 266, headers.ORIENTATION, 317})  # and order of bits, predictor
_SINGLE = _ONE_IF_PLAIN | {
    headers.NEW_SUBFILE_TYPE,
    headers.WIDTH,
    headers.LENGTH,
    headers.PHOTOMETRIC,
    headers.SAMPLES,
    headers.PLANAR,
    _ROWS_PER_STRIP,
}
_TYPES = {(1, 8): "u1", (1, 16): "u2", (1, 32): "u4", (2, 8): "i1", (2, 16): "i2", (2, 32): "i4"}
_TYPES |= {(3, 32): "f4", (3, 64): "f8"}  # by SampleFormat and bits
# Largest values, colour maps, tiles.
_NOT_PLAIN = frozenset({headers.MAX_SAMPLE_VALUE, headers.S_MAX_SAMPLE_VALUE, 320, 322, 323, 324, 325})
_IMAGEJ = frozenset({b"ImageJ", b"images", b"channels", b"hyperstack", b"mode", b"loop", b"unit", b"min", b"max"})
_NOT_PLAIN_OME = (b"BinaryOnly", b"MetadataOnly", b"BinData", b"Modulo", b"UUID FileName", b"<!", b"<Plate")


@dataclass(frozen=True)
class Plain:
    """Values that lie in a file one after the other, without compression.

    Args:
        start: The place of the first value in the file.
        dtype: The type of the values, with its order of bytes.
        shape: Height, width and channels.
        planar: Whether the values lie channel by channel.
        colour: The number of leading channels that are a picture, as in ``Samples``.
        nodata: The values that mean no data.
        family: The kind of TIFF in words, such as ``GeoTIFF``.
        axes: Letters of the axes, such as ``CYX``; '' for one page.
        rgb: Whether the first three channels are RGB.
    """

    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, int, int]
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
        """Type and number of channels, and what else was found, in the words of ``TiffImage.kind``."""
        words = [f"{self.dtype.newbyteorder('=')} x{self.shape[2]}", self.family]
        if self.axes:
            words.append(f"axes {self.axes}")
        if self.rgb and self.shape[2] > 3:
            words.append(more_bands(self.shape[2]))
        words += [f"nodata {number:.10g}" for number in self.nodata]
        return ", ".join(words)

    def samples(self, data: bytes) -> Samples:
        """View the values as ``dinoforge.data.tiff`` reads them."""
        height, width, channels = self.shape
        shape = (channels, height, width) if self.planar else self.shape
        values: Values = np.frombuffer(data, self.dtype, math.prod(shape), self.start).reshape(shape)
        if not (self.dtype.isnative and values.flags.aligned):
            values = values.astype(self.dtype.newbyteorder("="))
        values = values.transpose(1, 2, 0) if self.planar else values
        return Samples(values, None, self.colour, nodata=self.nodata, kind=self.kind)


def find(data: bytes, head: headers.Directory, channels: int | None) -> Plain | None:
    """Find a file's values where nothing has to be decoded, inverted, turned, limited, or chosen among planes.

    Args:
        data: The file.
        head: Its first directory.
        channels: The number of channels wanted, which decides what pages without metadata are.

    Returns:
        The values; None for all other files, and for damaged ones, which are left to tifffile.
    """
    one = _page(data, head)
    if one is None or head.alone or not head.more:
        return one if head.alone else None
    return _pages(data, head, one, channels)


def _page(data: bytes, head: headers.Directory) -> Plain | None:
    """Find the values of the first page."""
    tags, forms = head.tags, head.kinds
    samples, bits, width, height = (
        headers.single(tags, *one)
        for one in ((headers.SAMPLES, 1), (headers.BITS, 0), (headers.WIDTH, 0), (headers.LENGTH, 0))
    )
    kinds = tags.get(headers.SAMPLE_FORMAT, (1,))
    layout = headers.single(tags, headers.PLANAR, 1)
    if (
        not head.distinct
        or any(len(tags[tag]) != 1 or forms[tag] not in (3, 4) for tag in _SINGLE & tags.keys())
        or any(
            not tags[tag] or forms[tag] != 3
            for tag in (headers.BITS, headers.SAMPLE_FORMAT, headers.EXTRA_SAMPLES)
            if tag in tags
        )
        or any(not tags[tag] or forms[tag] != 2 for tag in (headers.DESCRIPTION, headers.GDAL_NODATA) if tag in tags)
        or not 0 < samples <= 64
        or min(width, height) <= 0
        or (kinds[:1] + tags.get(headers.BITS, ())[:1]) not in _TYPES
        or set(kinds) != {kinds[0]}
        or tags[headers.BITS] != (bits,) * samples
        or len(kinds) not in (1, samples)
        or headers.single(tags, headers.PHOTOMETRIC, -1) not in (headers.BLACK_IS_ZERO, headers.RGB)
        or layout not in (1, 2)
        or any(headers.single(tags, tag, 1) != 1 for tag in _ONE_IF_PLAIN)
        or not _NOT_PLAIN.isdisjoint(tags)
    ):
        return None
    rows = min(headers.single(tags, _ROWS_PER_STRIP, height), height)
    starts, sizes = (_numbers(data, head, tag) for tag in headers.STRIPS)
    if rows <= 0 or not starts or not sizes or len(starts) != len(sizes):
        return None
    needed = width * height * samples * bits // 8
    if len(starts) != -(-height // rows) * (samples if layout == 2 else 1) or sum(sizes) != needed:
        return None
    if starts[0] < 8 or starts[0] + needed > len(data):
        return None
    if any(start + size != following for start, size, following in zip(starts, sizes, starts[1:], strict=False)):
        return None
    is_rgb = headers.single(tags, headers.PHOTOMETRIC, -1) == headers.RGB
    extra = tags.get(headers.EXTRA_SAMPLES, ())
    is_alpha = len(extra) == 1 and extra[0] in (1, 2)
    return Plain(
        starts[0],
        np.dtype(head.layout.order + _TYPES[kinds[0], bits]),
        (height, width, samples),
        planar=samples > 1 and layout == 2,
        colour=3 if is_rgb and samples >= 3 else 1 if samples == 1 or (samples == 2 and is_alpha) else 0,
        nodata=nodata_said(b"".join(tags[headers.GDAL_NODATA]).decode("latin-1"))
        if headers.GDAL_NODATA in tags
        else (),
        family="GeoTIFF" if not headers.GEO.isdisjoint(tags) else "BigTIFF" if head.layout.big else "TIFF",
        rgb=is_rgb,
    )


def _pages(data: bytes, head: headers.Directory, first: Plain, channels: int | None) -> Plain | None:
    """Find the values of pages that are one image's channels, one behind the other, by OME's or others' metadata."""
    tags = head.tags
    is_more = headers.SUB_IFDS in tags or headers.EXTRA_SAMPLES in tags or any(tag > 32767 for tag in tags)
    if (
        is_more
        or first.rgb
        or first.shape[2] != 1
        or headers.single(tags, headers.NEW_SUBFILE_TYPE, 0)
        or min(first.shape[:2]) < 2
    ):
        return None
    pages = _pages_behind(data, head, first)
    if pages is None or pages < 2:
        return None
    said = _channels_in_words(b"".join(tags.get(headers.DESCRIPTION, (b"",))), pages, first)
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


def _pages_behind(data: bytes, head: headers.Directory, first: Plain) -> int | None:
    """Count the pages, if each is of the first one's kind and lies behind the one before it; else None."""
    layout = head.layout
    form, room = f"{layout.order}H{layout.size - 2}s", layout.size - 2
    kind: dict[int, bytes] | None = None
    pages, length = 0, first.end - first.start
    try:
        for entries in headers.directories(data, layout):
            own = {
                tag: body
                for tag, body in struct.iter_unpack(form, entries)
                if tag in headers.OF_KIND or tag in headers.STRIPS
            }
            if kind is None:
                kind = {tag: body for tag, body in own.items() if tag in headers.OF_KIND}
            else:
                spans = [own.pop(tag, b"") for tag in headers.STRIPS]
                at, there = (_one_number(layout, body[:room]) for body in spans)
                if own != kind or (at, there) != (first.start + pages * length, length):
                    return None
            pages += 1
            if pages > 64:
                return None
    except (struct.error, OverflowError):
        return None
    return pages if first.start + pages * length <= len(data) else None


def _one_number(layout: headers.Layout, body: bytes) -> int | None:
    """Read the value of an entry without its tag, if it is a single number."""
    form = {3: "H", 4: "I", 16: "Q"}.get(headers.unpack(layout.order + "H", body, 0)[0])
    count = headers.unpack(layout.order + layout.offset, body, 2)[0]
    if form is None or count != 1:
        return None
    return int(headers.unpack(layout.order + form, body, 10 if layout.big else 6)[0])


def _channels_in_words(description: bytes, pages: int, first: Plain) -> tuple[str, str] | None:
    """Find the family of the file, '' for any, and the letter of the axis along which pages lie; None if unclear."""
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


def _numbers(data: bytes, head: headers.Directory, tag: int) -> tuple[int, ...] | None:
    """Read the offsets or sizes of all strips; None where they are not there."""
    if tag not in head.spans or head.kinds[tag] not in (3, 4, 16):
        return None
    form, number, at = head.spans[tag]
    length = {"H": 2, "I": 4, "Q": 8}.get(form)
    if length is None or at + number * length > len(data):
        return None
    return struct.unpack_from(f"{head.layout.order}{number}{form}", data, at)


def nodata_said(text: str) -> tuple[float, ...]:
    """Read the number in GDAL's tag of values without data; none for NaN, and for text that is no number."""
    text = text.strip(" \0\n")
    try:
        number = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text.replace(",", "."))
    except ValueError:
        return ()  # such as an empty string
    return () if math.isnan(number) else (number,)


def more_bands(channels: int) -> str:
    """Name the bands of a picture in RGB with more than three channels."""
    return "RGB and 1 more band" if channels == 4 else f"RGB and {channels - 3} more bands"
