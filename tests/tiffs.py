"""TIFFs of rasters and microscopes, for the tests of several files."""

import io
from typing import Any

import numpy as np
import tifffile

DEEP = np.random.default_rng(0).integers(0, 65536, (40, 50, 5), dtype=np.uint16)
PLACE = [(33550, "d", 3, (10.0, 10.0, 0.0), True)]  # GeoTIFF: the size of a pixel
PLANES = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4)[..., None, None] * np.ones((8, 9), np.uint16) * 257


def tiff(values: np.ndarray, **options: Any) -> bytes:
    """Write a TIFF, as grey bands unless `options` say otherwise."""
    buffer = io.BytesIO()
    if "photometric" not in options:
        options["photometric"] = "minisblack"
        if values.ndim == 3 and "planarconfig" not in options and not {"ome", "imagej", "metadata"} & set(options):
            options |= {"planarconfig": "contig"}
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def nodata(text: str) -> list[tuple[int, str, int, str, bool]]:
    return [(42113, "s", 0, text, True)]


def pages(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for page in values:
            file.write(page, metadata=None, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


def packed_twelve(values: np.ndarray) -> bytes:
    """A TIFF of 12 bits a value, from one with room for 16: two values take three bytes."""
    flat = values.ravel().astype(np.uint32)
    pairs = (flat[::2] << 12) | flat[1::2]
    body = np.stack([pairs >> 16, pairs >> 8 & 255, pairs & 255], axis=1).astype(np.uint8).tobytes()
    data = bytearray(tiff(values.astype(np.uint16), metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages.first.tags
        start, bits, count = file.pages.first.dataoffsets[0], tags[258].valueoffset, tags[279].valueoffset
    data[start : start + len(body)] = body
    data[bits : bits + 2] = (12).to_bytes(2, "little")
    data[count : count + 4] = len(body).to_bytes(4, "little")
    return bytes(data)
