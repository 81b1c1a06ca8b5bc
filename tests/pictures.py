"""Small pictures and their files, for the tests of several rooms."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

_RNG = np.random.default_rng(0)
GREY = _RNG.integers(0, 256, (12, 20), dtype=np.uint8)
COLOUR = _RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
DEEP = _RNG.integers(0, 65536, (12, 20), dtype=np.uint16)
DEEP[0, :3] = 0, 128, 65535


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Encode a picture by Pillow."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png(rows: np.ndarray, *, bits: int, colour_type: int) -> bytes:
    """A PNG of uint16 samples [H, W, C], which Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = rows.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
