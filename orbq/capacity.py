"""Single structures padded to sizes that a compiled program has met before, or nearly."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

import jraph
import numpy as np

from orbq.preprocess.neighbors import NeighborList
from orbq.schema import Structure

_STEPS = 16  # capacities per doubling: rounding up pads an array by at most 1/16
# edges come and go in dynamics: by a few per cent in a molecule, in a large structure by chance
_HEADROOM, _DEVIATIONS = 0.05, 4
FEW_NODES, FEW_EDGES = 8, 64  # padding that costs nothing


class Capacity(NamedTuple):
    """Padded sizes: nodes and edges, of which at least one of each is padding."""

    n_node: int
    n_edge: int

    def holding(self, n_atoms: int, n_edges: int) -> Capacity:
        """This capacity if the structure fits and fills half of it, else a new one."""
        fits = n_atoms < self.n_node <= 2 * (n_atoms + FEW_NODES)
        if fits and n_edges < self.n_edge <= 2 * (n_edges + FEW_EDGES):
            return self
        n_node = self.n_node if fits else rounded_up(n_atoms + 1)
        spare = min(_HEADROOM * n_edges, _DEVIATIONS * n_edges**0.5)
        return Capacity(n_node, rounded_up(int(n_edges + spare) + 16))


class Capacities:
    """The capacities that a program has been compiled for; threads may share them."""

    def __init__(self) -> None:
        self._known: list[Capacity] = []
        self._lock = Lock()

    def holding(self, n_atoms: int, n_edges: int) -> Capacity:
        """The smallest known one that the structure fits and fills by half, else a new one."""
        with self._lock:
            for known in self._known:
                if known.holding(n_atoms, n_edges) is known:
                    return known
            new = Capacity(0, 0).holding(n_atoms, n_edges)
            self._known = sorted([*self._known, new], key=lambda c: (c.n_edge, c.n_node))
            return new


def rounded_up(n: int) -> int:
    """The next of 8, 9, ..., 32, 34, 36, ..., 64, 68, ...: sixteen sizes per doubling."""
    step = 1
    while n > 2 * _STEPS * step:
        step *= 2
    return max(8, -(-n // step) * step)


def padded(
    structure: Structure, edges: NeighborList, capacity: Capacity, cutoff: float, dtype: np.dtype
) -> tuple[np.ndarray, jraph.GraphsTuple, np.ndarray]:
    """Positions, graph and cell of one structure, padded as ``preprocess.pack`` pads."""
    n, e = len(structure.numbers), len(edges.senders)
    n_node, n_edge = capacity
    positions = np.zeros((n_node, 3), dtype)
    positions[:n] = structure.positions - structure.positions.mean(0)  # spares float32 its digits
    numbers = np.zeros(n_node, np.int32)
    numbers[:n] = structure.numbers
    shifts = np.zeros((n_edge, 3), dtype)
    shifts[:e], shifts[e:, 0] = edges.shifts, 2 * cutoff
    senders, receivers = np.full((2, n_edge), n_node - 1, np.int32)
    senders[:e], receivers[:e] = edges.senders, edges.receivers
    cell = np.zeros((2, 3, 3), dtype)
    cell[0] = structure.cell
    graph = jraph.GraphsTuple(
        nodes={"numbers": numbers},
        edges={"shifts": shifts},
        senders=senders,
        receivers=receivers,
        n_node=np.array([n, n_node - n], np.int32),
        n_edge=np.array([e, n_edge - e], np.int32),
        globals={
            "total_charge": np.array([structure.total_charge, 0], dtype),
            "spin_multiplicity": np.array([structure.spin_multiplicity, 1], dtype),
            "mask": np.array([True, False]),
        },
    )
    return positions, graph, cell
