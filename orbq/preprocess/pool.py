"""The structures of one or more data sets seen as one sequence, with their sizes at a cutoff."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from orbq.errors import InputError
from orbq.preprocess.neighbor_cache import DatasetLike, Neighbors, neighbors
from orbq.schema import FIELDS


class Part(NamedTuple):
    """Structures of one data set in a pool.

    dataset: flat arrays by name. indices: [n] structures of it, in pool order; None for all.
    ignore: fields (schema.FIELDS, as "energy") whose labels are not to be used, as if absent.
    """

    dataset: DatasetLike
    indices: np.ndarray | None = None
    ignore: tuple[str, ...] = ()


class Pool:
    """Structures of several data sets as one sequence of P items.

    parts: as given. cutoff: Å. rows: per part, [n] int64 structures of its data set.
    starts: [n_parts + 1] int64, items of part p are ``starts[p]:starts[p + 1]``.
    edges: per part, the neighbour list of its data set.
    n_nodes, n_edges: [P] int32, atoms and directed edges of every item.

    Raises InputError for a pool without structures, an index out of range, or an unknown field in
    ``ignore``.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        cutoff: float,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.cutoff = float(cutoff)
        self.rows = tuple(_rows(part, number) for number, part in enumerate(self.parts))
        self.starts = np.cumsum([0, *(len(rows) for rows in self.rows)])
        if self.starts[-1] == 0:
            raise InputError("the pool holds no structure: give at least one data set with one")
        known: dict[int, Neighbors] = {}
        for part in self.parts:
            if id(part.dataset) not in known:
                known[id(part.dataset)] = neighbors(part.dataset, cutoff, progress)
        self.edges = tuple(known[id(part.dataset)] for part in self.parts)
        offsets = [part.dataset.arrays["offsets"] for part in self.parts]
        self.n_nodes = _sizes(offsets, self.rows)
        self.n_edges = _sizes([edges.offsets for edges in self.edges], self.rows)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def split(self, items: np.ndarray) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Of ascending items [n]: (part, their slice in ``items``, their rows in its data set)."""
        bounds = np.searchsorted(items, self.starts)
        for p, (a, b) in enumerate(pairwise(bounds.tolist())):
            if b > a:
                yield p, slice(a, b), self.rows[p][items[a:b] - self.starts[p]]

    def labelled(self, field: str) -> np.ndarray:
        """[P] bool: items whose ``field`` is present, not masked and not ignored."""
        parts = zip(self.parts, self.rows, strict=True)
        return np.concatenate([part_labels(part, rows, field) for part, rows in parts])


def part_labels(part: Part, rows: np.ndarray, field: str) -> np.ndarray:
    """[n] bool: which of these rows of the part's data set carry ``field`` and may use it."""
    arrays = part.dataset.arrays
    if field in part.ignore or field not in arrays:
        return np.zeros(len(rows), bool)
    mask = arrays.get(f"{field}_mask")
    return np.ones(len(rows), bool) if mask is None else np.asarray(mask[rows], bool)


def _rows(part: Part, number: int) -> np.ndarray:
    unknown = [name for name in part.ignore if name not in FIELDS]
    if unknown:
        raise InputError(
            f"part {number} of the pool ignores {unknown[0]!r}: the fields are {', '.join(FIELDS)}"
        )
    size = len(part.dataset)
    if part.indices is None:
        return np.arange(size)
    rows = np.asarray(part.indices, np.int64).reshape(-1)
    bad = np.flatnonzero((rows < 0) | (rows >= size))
    if len(bad):
        raise InputError(
            f"part {number} of the pool: index {rows[bad[0]]} lies outside the {size} structures of"
            f" {part.dataset.path or 'its data set'}"
        )
    return rows


def _sizes(offsets: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    each = [np.diff(np.asarray(o)).astype(np.int32)[r] for o, r in zip(offsets, rows, strict=True)]
    return np.concatenate(each)
