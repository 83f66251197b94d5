"""Neighbour lists within a cutoff, of one structure or of many molecules at once.

An edge (sender j -> receiver i) stands for the vector ``r_ij = x[i] - x[j] + shift`` with
``|r_ij| < cutoff``; ``shift = image @ cell`` is a lattice vector, zero in a molecule. Every pair
has both directions; an atom is its own neighbour only through a periodic image. Edges are sorted
by receiver, then sender, then image.

Molecules of up to ``DENSE_LIMIT`` atoms go through dense distance matrices, a whole chunk of equal
sizes at once (QM7 at 5 Å: 4 us a molecule against 20 us for one compiled cell-list call each);
larger and periodic structures through matscipy's compiled cell list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from orbq.errors import InputError
from orbq.preprocess.check import enclosing_box, heights
from orbq.preprocess.flat import ragged_rows

DENSE_LIMIT = 256  # atoms; the cell list overtakes the distance matrix between 300 and 500
MIN_HEIGHT = 0.1  # Å of a periodic cell; an atom has cutoff/height images on either side
MAX_CELLS = 1 << 27  # of a cell list, 8 bytes each
_DENSE_BLOCK = 1 << 18  # pairs held at once in dense blocks: 2 MB per float64 array, in cache


class NeighborList(NamedTuple):
    """Edges of one structure: senders [E] int32, receivers [E] int32, shifts [E, 3] float64 Å."""

    senders: np.ndarray
    receivers: np.ndarray
    shifts: np.ndarray


# --------------------------------------------------------------------------- one structure


def neighbor_list(
    positions: np.ndarray,
    cutoff: float,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | bool = False,
) -> NeighborList:
    """Edges of one structure with ``|x[receiver] - x[sender] + shift| < cutoff``.

    positions [n, 3] Å, cutoff Å, cell [3, 3] lattice vectors in rows, pbc [3] bool or one bool.
    Returns senders, receivers [E] int32 and Cartesian shifts [E, 3] float64 Å.
    Raises InputError for a cutoff that is not positive, positions that are not finite, or a
    periodic cell without volume.
    """
    positions = np.asarray(positions, np.float64).reshape(-1, 3)
    periodic = np.broadcast_to(np.asarray(pbc, bool), (3,))
    check_cutoff(cutoff)
    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(1))[0])
        raise InputError(f"atom {atom}: position {positions[atom]} is not finite")
    if periodic.any():
        box = np.zeros((3, 3)) if cell is None else np.asarray(cell, np.float64)
        senders, receivers, images = cell_list(positions, cutoff, box, periodic)
        return NeighborList(senders, receivers, images @ box)
    _, senders, receivers = molecule_edges(positions, np.array([len(positions)]), cutoff)
    return NeighborList(senders, receivers, np.zeros((len(senders), 3)))


def check_cutoff(cutoff: float) -> None:
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise InputError(f"cutoff {cutoff} Å: it must be a positive, finite number")


def cell_list(
    positions: np.ndarray, cutoff: float, cell: np.ndarray, pbc: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers [E] int32 and images [E, 3] int of one structure, by matscipy."""
    from matscipy.neighbours import neighbour_list

    if len(positions) == 0:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 3), np.int32)
    box, origin = enclosing_box(positions, cell, pbc)
    _check_box(box, pbc, cutoff)
    i, j, images = neighbour_list(
        "ijS", positions=positions, cell=box, pbc=pbc, cutoff=cutoff, cell_origin=origin
    )
    order = np.lexsort((-images[:, 2], -images[:, 1], -images[:, 0], j, i))
    # matscipy: |x[j] - x[i] + S cell|; with receiver i the image changes sign
    return j[order].astype(np.int32), i[order].astype(np.int32), -images[order]


def _check_box(box: np.ndarray, pbc: np.ndarray, cutoff: float) -> None:
    """Refuse a box that would need an absurd number of images, or of cells of a cell list."""
    height = heights(box)
    if (height[pbc] < MIN_HEIGHT).any():
        raise InputError(
            f"the cell is {height[pbc].min():.3g} Å thin: at least {MIN_HEIGHT} Å needed; reduce it"
            " (ase.build.niggli_reduce)"
        )
    n_cells = float(np.prod(np.maximum(height / cutoff, 1.0)))
    if not n_cells <= MAX_CELLS:
        raise InputError(
            f"the atoms lie in a box of {' x '.join(f'{h:.3g}' for h in height)} Å, {n_cells:.3g} "
            f"times the cube of the cutoff: at most {MAX_CELLS:.3g}; are the positions in Å?"
        )


# --------------------------------------------------------------------------- many molecules


def molecule_edges(
    positions: np.ndarray, n_atoms: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of B molecules at once: counts [B] int64, senders and receivers [E] int32.

    positions [A, 3]: the molecules one after another, ``n_atoms`` [B] atoms each. Atoms are counted
    from 0 inside each molecule.
    """
    starts = np.cumsum(n_atoms) - n_atoms
    counts = np.zeros(len(n_atoms), np.int64)
    found = list(_blocks(positions, starts, n_atoms, cutoff))
    for block in found:
        counts[block[0]] = block[1]
    edge_starts = np.cumsum(counts) - counts
    senders, receivers = np.empty((2, int(counts.sum())), np.int32)
    for which, n_edges, block_senders, block_receivers in found:
        to = ragged_rows(edge_starts[which], n_edges)
        senders[to], receivers[to] = block_senders, block_receivers
    return counts, senders, receivers


def _blocks(
    positions: np.ndarray, starts: np.ndarray, n_atoms: np.ndarray, cutoff: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Equal-sized molecules in blocks: (which [b], edges of each [b], senders, receivers)."""
    for n in np.unique(n_atoms).tolist():
        which = np.flatnonzero(n_atoms == n)
        if n > DENSE_LIMIT:
            for w in which.tolist():
                x = positions[starts[w] : starts[w] + n]
                edges = cell_list(x, cutoff, np.zeros((3, 3)), np.zeros(3, bool))
                yield np.array([w]), np.array([len(edges[0])]), edges[0], edges[1]
            continue
        size = max(1, _DENSE_BLOCK // max(n * n, 1))
        for k in range(0, len(which), size):
            part = which[k : k + size]
            yield part, *_dense(positions, starts[part], n, cutoff)


def _dense(
    positions: np.ndarray, starts: np.ndarray, n: int, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of b molecules of n atoms from their distance matrices [b, n, n]."""
    x = positions[starts[:, None] + np.arange(n)]  # [b, n, 3]
    squared = np.zeros((len(starts), n, n))
    for axis in range(3):
        column = np.ascontiguousarray(x[:, :, axis])
        difference = column[:, :, None] - column[:, None, :]
        difference *= difference
        squared += difference
    atoms = np.arange(n)
    squared[:, atoms, atoms] = np.inf
    near = squared < cutoff * cutoff
    flat = np.flatnonzero(near)
    pair = flat % (n * n) if n else flat
    counts = near.reshape(len(starts), -1).sum(1)
    return counts, (pair % max(n, 1)).astype(np.int32), (pair // max(n, 1)).astype(np.int32)
