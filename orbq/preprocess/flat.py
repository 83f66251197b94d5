"""Flat arrays with offsets: gather ragged rows, append to files, give pages back.

A ragged array of S pieces is one flat array and ``offsets`` [S + 1]; piece ``i`` is rows
``offsets[i]:offsets[i + 1]``. Nothing here loops over the pieces in Python.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np


def ragged_rows(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Row numbers [sum(counts)] int64 of the pieces that start at ``starts`` with ``counts`` rows.

    The pieces may lie in any order and overlap: ``starts=[7, 0], counts=[2, 3]`` gives
    ``[7, 8, 0, 1, 2]``.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)


def release(array: np.ndarray) -> None:
    """Give the resident pages of a memory-mapped array back to the operating system.

    They stay in the page cache and are mapped again on the next read, so this bounds the resident
    memory of a process that reads a data set larger than memory. Does nothing for other arrays.
    """
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class FlatWriter:
    """Appends chunks along the first axis of a ``.npy`` file whose final length is unknown.

    The header is written with length 0 and again on ``close``; NumPy pads it so that a longer first
    axis does not change its size. The file is flushed to the disk before ``close`` returns.
    """

    def __init__(self, path: Path, dtype: str, trailing: tuple[int, ...] = ()) -> None:
        self._path, self._dtype, self._trailing = path, np.dtype(dtype), trailing
        self.length = 0
        self._file = path.open("wb")
        self._data_start = self._write_header()

    def append(self, chunk: np.ndarray) -> None:
        """Write ``chunk`` [n, *trailing] after what is there, cast to the file's type."""
        if chunk.shape[1:] != self._trailing:
            raise ValueError(f"{self._path}: rows {chunk.shape[1:]}, not {self._trailing}")
        self._file.write(np.ascontiguousarray(chunk, self._dtype).data)
        self.length += len(chunk)

    def close(self) -> None:
        """Write the final length and make sure that everything is on the disk."""
        self._file.seek(0)
        if self._write_header() != self._data_start:
            raise ValueError(f"{self._path}: the header grew with {self.length} rows")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without finishing."""
        self._file.close()

    def _write_header(self) -> int:
        shape = (self.length, *self._trailing)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


FAR = 100.0  # Å from the origin, beyond which float32 knows positions to less than 1e-5 Å


def near_origin(positions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Positions [n, 3] of structures with ``counts`` [S] atoms, those of any structure that reaches
    beyond FAR relative to its centre: to be called before they are rounded to float32."""
    if not len(positions) or np.abs(positions).max() <= FAR:
        return positions
    starts = np.cumsum(counts) - counts
    far = np.maximum.reduceat(np.abs(positions).max(1), starts) > FAR
    centre = np.add.reduceat(positions, starts) / counts[:, None]
    return positions - np.repeat(np.where(far[:, None], centre, 0.0), counts, axis=0)


def folded(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Positions [n, 3] of one structure; if atoms lie FAR and more than a cell from its centre, as
    after long diffusion, each moved by whole lattice vectors into the cell: float32 would not know
    their distances, and neighbour lists count lattice vectors in 16 bits."""
    if not pbc.any():
        return positions
    limit = FAR + np.linalg.norm(cell, axis=1).sum()
    if np.abs(positions - positions.mean(0)).max() <= limit:
        return positions
    from ase.geometry import complete_cell

    full = complete_cell(np.where(pbc[:, None], cell, 0.0))
    steps = np.floor(positions @ np.linalg.inv(full)) * pbc
    return positions - steps @ full
