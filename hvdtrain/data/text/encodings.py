"""Bytes as UTF-8 text, and what to do with those that are none."""

from __future__ import annotations

import re
from pathlib import Path

from hvdtrain.errors import DataError, reason_of

CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a]")
"""Signs that no text has, in whatever encoding of one byte."""
_LOOKED_AT = 4096
# How files begin that hold text, but are none.
_PACKED = {
    b"\x1f\x8b": "it is compressed by gzip: decompress it",
    b"BZh": "it is compressed by bzip2: decompress it",
    b"\xfd7zXZ": "it is compressed by xz: decompress it",
    b"\x28\xb5\x2f\xfd": "it is compressed by Zstandard: decompress it",
    b"PK\x03\x04": "it is a zip archive, as documents of Word are, too: unpack it, or save it as plain text",
    b"%PDF": "it is a PDF: convert it, as with pdftotext",
}


def text_of(raw: bytes, encoding: str = "utf-8") -> str:
    """Return bytes as text, "utf-8" or "utf-8-sig".

    Raises:
        UnicodeDecodeError: they are no UTF-8, or are UTF-16 of plain letters, which is UTF-8 of as many zeros.
    """
    text = raw.decode(encoding)
    if _is_wide(raw):
        at = raw.index(0)
        raise UnicodeDecodeError("utf-8", raw, at, at + 1, "zeros between letters, as of UTF-16")
    return text


def read_text(path: Path, called: str) -> str:
    """Return a file of UTF-8 text, whole, without its mark.

    Args:
        path: the file.
        called: what a message calls it, such as "--file a.txt".

    Raises:
        DataError: it cannot be read, or is no UTF-8 text; says what to do.
    """
    try:
        raw = path.read_bytes()
        return text_of(raw, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{called} is not UTF-8 text: {how_to_convert(raw)}") from error
    except OSError as error:
        raise DataError(f"{called} cannot be read: {reason_of(error)}") from error


def _is_wide(raw: bytes) -> bool:
    """Return whether more than a quarter of the bytes are zeros."""
    return raw.count(0) > len(raw) // 4


def how_to_convert(raw: bytes) -> str:
    """Return what to do with bytes that are not UTF-8."""
    for begin, advice in _PACKED.items():
        if raw.startswith(begin):
            return advice
    head = raw[:_LOOKED_AT]
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "convert it, as with iconv -f utf-16 -t utf-8"
    if _is_wide(head) or (head and _is_wide(raw)):
        order = "be" if head[::2].count(0) > head[1::2].count(0) else "le"
        return f"convert it, as with iconv -f utf-16{order} -t utf-8"
    if CONTROL.search(head):
        return "it is no text at all, as pictures and archives are none: leave it out"
    return "convert it, as with iconv -f latin1 -t utf-8"
