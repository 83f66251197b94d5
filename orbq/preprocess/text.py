"""Text files, compressed or not, read a line at a time: no line, and no damage, takes the memory.

A line longer than ``MAX_LINE`` is refused before it is held, so that a file that unpacks to a
million times its size costs no more than one that does not.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from orbq.errors import InputError

MAX_LINE = 1 << 22  # characters; a comment line of extxyz may hold an array
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# what reading a truncated or corrupt file raises; MemoryError: a header that claims the absurd
DAMAGED = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, MemoryError)


def open_text(path: Path) -> TextIO:
    """UTF-8 text, with or without a byte-order mark, unpacked as the name's ending says."""
    stream: TextIO = OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig")
    return stream


def read_line(stream: TextIO, name: object) -> str:
    """The next line with its end, "" at the end of the file.

    Raises InputError, which begins with ``name``, for one longer than ``MAX_LINE``.
    """
    line = stream.readline(MAX_LINE + 1)
    if len(line) > MAX_LINE:
        raise InputError(
            f"{name}: a line that begins {line[:20]!r} is longer than {MAX_LINE:,} characters: not "
            "text of this format; copy or make the file again"
        )
    return line


def lines_of(stream: TextIO, name: object) -> Iterator[str]:
    """Every line of ``read_line``."""
    while line := read_line(stream, name):
        yield line
