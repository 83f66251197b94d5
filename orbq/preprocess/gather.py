"""Read scattered pieces of flat arrays: from memory, or from the file of a large mapped array.

Pieces of an array that is larger than memory are read with ``preadv`` and not through its mapping:
a page fault in a mapped file makes up to megabytes around it resident, a read nothing at all. It
is also the cheaper of the two once pages must be given back (QM7-sized structures, on-site blocks
and forces: 2 us an array and structure).
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbq.errors import OrbqError
from orbq.preprocess.flat import ragged_rows

READ_ABOVE = 1 << 26  # bytes; a mapped array below is left to the page cache


class Span(NamedTuple):
    """Pieces of a flat array: first row [n] and number of rows [n] of each, and every row."""

    starts: np.ndarray
    counts: np.ndarray
    rows: np.ndarray


def span(starts: np.ndarray, counts: np.ndarray) -> Span:
    """The pieces of ``counts`` [n] rows that begin at ``starts`` [n]."""
    return Span(starts, counts, ragged_rows(starts, counts))


class Gatherer:
    """Pieces of one flat array [A, ...], one after another.

    array: in memory, or memory-mapped; the file of a mapped array of more than READ_ABOVE bytes is
    kept open and read.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = np.asarray(array)
        self._trailing = self._array.shape[1:]
        self._row_bytes = self._array.itemsize * int(np.prod(self._trailing, dtype=np.int64))
        self._file: int | None = None
        place = _file_of(array) if array.nbytes > READ_ABOVE and hasattr(os, "preadv") else None
        if place is not None:
            self._path, self._offset = place
            self._file = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            weakref.finalize(self, os.close, self._file)
            if hasattr(os, "posix_fadvise"):  # the pieces are scattered: do not read ahead
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def __call__(self, pieces: Span) -> np.ndarray:
        """Rows of the pieces, [sum(counts), ...], in the array's own type.

        Raises OrbqError when the file has become shorter than the array.
        """
        if self._file is None:
            return self._array[pieces.rows]
        rows = np.empty((len(pieces.rows), *self._trailing), self._array.dtype)
        if rows.nbytes == 0:
            return rows
        target, file, preadv, to = rows.data.cast("B"), self._file, os.preadv, 0
        starts = (pieces.starts * self._row_bytes + self._offset).tolist()
        for start, size in zip(starts, (pieces.counts * self._row_bytes).tolist(), strict=True):
            if preadv(file, (target[to : to + size],), start) != size:
                raise OrbqError(
                    f"{self._path} ends before byte {start + size}: it was changed while it was"
                    f" read; `orbq verify {self._path.parent}` tells what is damaged"
                )
            to += size
        return rows


def _file_of(array: Any) -> tuple[Path, int] | None:
    """File and first byte of an array that maps a file to its end, None for any other."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array.filename is not None:
            path = Path(str(array.filename))
            whole = array.flags.c_contiguous and path.stat().st_size == array.offset + array.nbytes
            return (path, array.offset) if whole else None
        array = array.base
    return None
