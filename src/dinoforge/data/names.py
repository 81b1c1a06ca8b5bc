"""Names of images as text that every terminal, file and reader can take, and back again.

A file's name may hold anything but a zero byte: line ends of all kinds, bytes that are not UTF-8, the codes that move a
terminal's cursor. Written as it is, such a name breaks a list of names apart: Python's ``splitlines`` alone knows ten
kinds of line ends.
"""

import os
import re

_UNSAFE = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_ESCAPED = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|[\\nrt])")
_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LONG = {short: character for character, short in _SHORT.items()}


def printable(name: str | os.PathLike[str]) -> str:
    r"""Write a name on one line of UTF-8; ``original_name`` gives the name back.

    ``\n``, ``\r`` and ``\t`` stand for line end, carriage return and tab, ``\xNN`` for other control characters and
    for bytes that are not UTF-8 (which Python holds as surrogate escapes), ``\uNNNN`` for U+0080 to U+009F, U+2028,
    U+2029, U+FEFF and lone surrogates, and ``\\`` for a backslash. Everything else stands for itself.
    """
    return _UNSAFE.sub(_escape, os.fsdecode(name))


def original_name(text: str) -> str:
    """Restore the name that ``printable`` or ``in_table`` wrote."""
    return _ESCAPED.sub(_unescape, text)


def in_table(printed: str) -> str:
    r"""Escape quotes as ``\x22`` in a printable name, since they begin a cell of several lines in files of lines."""
    return printed.replace('"', "\\x22")


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if short := _SHORT.get(character):
        return short
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def _unescape(match: re.Match[str]) -> str:
    text = match[0]
    if text in _LONG:
        return _LONG[text]
    code = int(text[2:], 16)
    return chr(code + 0xDC00 if text[1] == "x" and code >= 0x80 else code)
