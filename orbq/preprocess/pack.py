"""Batches of one fixed shape from a pool of structures: NumPy in, NumPy out.

A ``PackedBatch`` follows jraph's padding: real structures first, then one padding structure that
holds every padding node and edge, then empty ones. Padding edges join the last node to itself with
a shift of twice the cutoff, so that they lie beyond it and no model needs a mask. What a structure
lacks (an energy, forces, charges) is masked for each target on its own, and is 0 there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from orbq.errors import InputError
from orbq.preprocess.flat import near_origin
from orbq.preprocess.gather import Gatherer, Span, span
from orbq.preprocess.plan import Budget, Fill, check_fits, choose_budget, fill_rates, make_plan
from orbq.preprocess.pool import Part, Pool, part_labels
from orbq.preprocess.prefetch import prefetch
from orbq.preprocess.references import References
from orbq.preprocess.rotate import ROTATE, Turn, random_rotations, turned
from orbq.schema import FIELDS
from orbq.targets import TARGETS

__all__ = [
    "Budget", "Fill", "PackedBatch", "Packer", "Part", "Pool", "fill", "measure_budget", "prefetch",
]  # fmt: skip

ENERGIES = ("energy", "xtb_energy")  # their reference energies are subtracted
_RAW = ("energy", "forces", "stress", "xtb_energy", "xtb_forces")  # fields that are targets as such


class PackedBatch(NamedTuple):
    """One batch of N nodes, E edges and M structures, padding included. Units eV, Å, e.

    positions: [N, 3] float, padding 0. numbers: [N] int32, padding 0.
    shifts: [E, 3] float, r_ij = x[receiver] - x[sender] + shift; padding (2 cutoff, 0, 0).
    senders, receivers: [E] int32, receivers ascending; padding N - 1.
    n_node, n_edge: [M] int32 sizes, padding structures included.
    total_charge: [M] float, padding 0. spin_multiplicity: [M] float, padding 1.
    cell: [M, 3, 3] float lattice vectors in rows, 0 without a cell.
    mask: [M] bool, real structures.
    targets: "energy", "xtb_energy" [M] (reference energies subtracted in float64 before the cast)
        and "forces", "xtb_forces" [N, 3], "stress" [M, 3, 3], "<target>" [N, k], all float; and
        "<name>/mask" bool: [M] per structure, [N] for forces, [N, k] for a target. 0 where False.
    index: [M] int64, place in the pool, ascending; padding -1.
    """

    positions: np.ndarray
    numbers: np.ndarray
    shifts: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    n_node: np.ndarray
    n_edge: np.ndarray
    total_charge: np.ndarray
    spin_multiplicity: np.ndarray
    cell: np.ndarray
    mask: np.ndarray
    targets: dict[str, np.ndarray]
    index: np.ndarray  # type: ignore[assignment]  # the field hides tuple.index


def measure_budget(pool: Pool, batch_size: float) -> Budget:
    """The budget for ``batch_size`` structures a batch on average (see ``plan.choose_budget``)."""
    return choose_budget(pool.n_nodes, pool.n_edges, batch_size)


def fill(batch: PackedBatch) -> Fill:
    """Real over padded nodes, edges and graphs of one batch."""
    real = batch.mask
    sizes = batch.n_node[real].sum(), batch.n_edge[real].sum(), real.sum()
    padded = len(batch.numbers), len(batch.senders), len(real)
    return Fill(*(float(s) / p for s, p in zip(sizes, padded, strict=True)))


class _Place(NamedTuple):
    """Where the structures of one part go in a batch, and where they come from.

    part: index in the pool. rows: [m] structures of its data set; atoms, near: their atoms and
    edges in its flat arrays. structures, nodes, edges: slices of the batch. turn: of its frames.
    """

    part: int
    rows: np.ndarray
    atoms: Span
    near: Span
    structures: slice
    nodes: slice
    edges: slice
    turn: Turn | None


class Packer:
    """Batches of a pool: one shape, every structure once an epoch, order fixed by (seed, epoch).

    pool, budget: what to pack into what. targets: names of what is fitted: "energy", "forces",
    "stress", "xtb_energy", "xtb_forces" or a name of ``targets.TARGETS``. references: reference
    energies for each of the ENERGIES among them. dtype: float32 or float64 of the batches. rotate:
    one of rotate.ROTATE, how the structures of an epoch's batches are turned.

    Raises InputError for an unknown target or rotation, energies without references, or a structure
    larger than the budget.
    """

    def __init__(
        self,
        pool: Pool,
        budget: Budget,
        targets: tuple[str, ...] | list[str],
        references: Mapping[str, References] | None = None,
        seed: int = 0,
        dtype: Any = np.float32,
        rotate: str = "none",
    ) -> None:
        if rotate not in ROTATE:
            raise InputError(f"unknown rotation {rotate!r}; known: {', '.join(ROTATE)}")
        self.rotate = rotate
        self.pool, self.budget, self.targets = pool, budget, tuple(targets)
        self.references = dict(references or {})
        self.seed, self.dtype = int(seed), np.dtype(dtype)
        for name in self.targets:
            _check_target(name, self.references)
        check_fits(pool.n_nodes, pool.n_edges, budget)
        self._arrays = [_plain(part.dataset.arrays) for part in pool.parts]
        self._gather = [self._gatherers(p) for p in range(len(pool.parts))]

    # ----------------------------------------------------------------- which structures

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as places in the pool; a pure function of (seed, epoch).

        Every structure of the pool is in exactly one of them.
        """
        return make_plan(self.pool.n_nodes, self.pool.n_edges, self.budget, self.seed, epoch)

    def n_batches(self, epoch: int, shard: tuple[int, int] = (0, 1)) -> int:
        """Batches that each of ``shard[1]`` processes gets in an epoch."""
        return -(-len(self.plan(epoch)) // shard[1])

    def fill(self, epoch: int) -> Fill:
        """Mean fill of the batches of an epoch."""
        return fill_rates(self.plan(epoch), self.pool.n_nodes, self.pool.n_edges, self.budget)

    def n_labelled(self) -> dict[str, int]:
        """For each target, how many structures of the pool carry all the fields it needs."""
        counts = {}
        for name in self.targets:
            every = np.logical_and.reduce([self.pool.labelled(f) for f in _fields(name)])
            counts[name] = int(every.sum())
        return counts

    # ----------------------------------------------------------------- batches

    def epoch(
        self,
        epoch: int,
        start_batch: int = 0,
        shard: tuple[int, int] = (0, 1),
        n_batches: int | None = None,
    ) -> Iterator[PackedBatch]:
        """The batches of an epoch from ``start_batch`` on; shard: (this process, processes).

        Over all processes every structure comes exactly once; every process gets the same number
        of batches, the last ones empty where they do not divide evenly. n_batches: that number, if
        it is to be larger (so that all epochs are equally long).

        Raises InputError for a shard out of range or ``n_batches`` too small.
        """
        which, of = shard
        if not 0 <= which < of:
            raise InputError(f"shard {which} of {of}: give 0 <= shard < number of processes")
        plan = self.plan(epoch)
        length = -(-len(plan) // of)
        if n_batches is not None and n_batches < length:
            raise InputError(f"epoch {epoch} has {length} batches per process, not {n_batches}")
        mine = plan[which::of]
        mine += [np.zeros(0, np.int64)] * ((n_batches or length) - len(mine))
        for items in mine[start_batch:]:
            yield self.batch(items, epoch)

    def batch(self, items: np.ndarray, epoch: int | None = None) -> PackedBatch:
        """These structures of the pool as one batch, in ascending order.

        epoch: whose random rotations they get, if the packer rotates; None for the stored frames.

        Raises InputError when they do not fit the budget.
        """
        items = np.sort(np.asarray(items, np.int64))
        self._check_batch(items)
        batch = self._empty()
        m = len(items)
        n_node, n_edge = self.pool.n_nodes[items], self.pool.n_edges[items]
        node_ends, edge_ends = np.cumsum([0, *n_node]), np.cumsum([0, *n_edge])
        matrices = self._rotations(items, epoch)
        batch.index[:m], batch.mask[:m] = items, True
        for sizes, real, padded in zip(
            (batch.n_node, batch.n_edge), (n_node, n_edge), self.budget[:2], strict=True
        ):
            sizes[:m] = real
            sizes[m] = padded - real.sum()
        for part, some, rows in self.pool.split(items):
            a, b = some.start, some.stop
            atoms = span(self._arrays[part]["offsets"][rows], n_node[a:b])
            near = span(self.pool.edges[part].offsets[rows], n_edge[a:b])
            nodes, edges = slice(node_ends[a], node_ends[b]), slice(edge_ends[a], edge_ends[b])
            turn = None
            if matrices is not None:
                turn = Turn(matrices[some], np.repeat(np.arange(b - a), n_node[a:b]))
            place = _Place(part, rows, atoms, near, some, nodes, edges, turn)
            self._put_inputs(batch, place)
            self._put_edges(batch, place, node_ends[a:b])
            for name in self.targets:
                self._put_target(batch, place, name)
        return batch

    def _rotations(self, items: np.ndarray, epoch: int | None) -> np.ndarray | None:
        if self.rotate == "none" or epoch is None:
            return None
        return random_rotations(self.seed, epoch, items, self.rotate == "improper")

    def _empty(self) -> PackedBatch:
        n, e, m = self.budget
        shifts = np.zeros((e, 3), self.dtype)
        shifts[:, 0] = 2 * self.pool.cutoff
        senders, receivers = np.full((2, e), n - 1, np.int32)
        sizes = np.zeros((2, m), np.int32)
        targets: dict[str, np.ndarray] = {}
        for name in self.targets:
            shape, mask = _target_shape(name, n, m)
            targets[name] = np.zeros(shape, self.dtype)
            targets[f"{name}/mask"] = np.zeros(mask, bool)
        return PackedBatch(
            positions=np.zeros((n, 3), self.dtype),
            numbers=np.zeros(n, np.int32),
            shifts=shifts,
            senders=senders,
            receivers=receivers,
            n_node=sizes[0],
            n_edge=sizes[1],
            total_charge=np.zeros(m, self.dtype),
            spin_multiplicity=np.ones(m, self.dtype),
            cell=np.zeros((m, 3, 3), self.dtype),
            mask=np.zeros(m, bool),
            targets=targets,
            index=np.full(m, -1, np.int64),
        )

    def _put_inputs(self, batch: PackedBatch, place: _Place) -> None:
        arrays, gather = self._arrays[place.part], self._gather[place.part]
        positions = near_origin(gather["positions"](place.atoms), place.atoms.counts)
        batch.positions[place.nodes] = turned("positions", positions, place.turn)
        batch.numbers[place.nodes] = gather["numbers"](place.atoms)
        batch.total_charge[place.structures] = arrays["total_charge"][place.rows]
        batch.spin_multiplicity[place.structures] = arrays["spin_multiplicity"][place.rows]
        if "cell" in arrays:
            batch.cell[place.structures] = turned("cell", arrays["cell"][place.rows], place.turn)

    def _put_edges(self, batch: PackedBatch, place: _Place, first_node: np.ndarray) -> None:
        gather, n_edge = self._gather[place.part], place.near.counts
        base = np.repeat(first_node, n_edge)
        batch.senders[place.edges] = base + gather["/senders"](place.near)
        batch.receivers[place.edges] = base + gather["/receivers"](place.near)
        batch.shifts[place.edges] = 0.0
        if "/images" in gather:
            cell = turned("cell", self._arrays[place.part]["cell"][place.rows], place.turn)
            images = gather["/images"](place.near)
            cells = np.repeat(cell, n_edge, axis=0)
            batch.shifts[place.edges] = np.einsum("ei,eij->ej", images, cells)

    def _put_target(self, batch: PackedBatch, place: _Place, name: str) -> None:
        """Write one target and its mask; both stay 0 and False where a structure lacks it."""
        part, arrays = self.pool.parts[place.part], self._arrays[place.part]
        fields = _fields(name)
        labelled = np.logical_and.reduce([part_labels(part, place.rows, f) for f in fields])
        if not labelled.any():
            return
        n_node, to = place.atoms.counts, place.structures
        if FIELDS[fields[0]].per == "atom":
            to, labelled = place.nodes, np.repeat(labelled, n_node)
            values = {field: self._gather[place.part][field](place.atoms) for field in fields}
        else:
            values = {field: arrays[field][place.rows] for field in fields}
        values = {field: turned(field, array, place.turn) for field, array in values.items()}
        numbers = batch.numbers[place.nodes]
        if name in ENERGIES:
            charge = arrays["total_charge"][place.rows]
            result = values[name] - self.references[name].of_many(numbers, n_node, charge)
            mask = labelled
        elif name in _RAW:
            result, mask = values[name], labelled
        else:
            target = TARGETS[name]
            result = target.extract(values, slice(None))
            mask = target.mask(numbers, labelled, part.dataset.method)
        batch.targets[f"{name}/mask"][to] = mask
        spread = mask.reshape(mask.shape + (1,) * (result.ndim - mask.ndim))
        batch.targets[name][to] = np.where(spread, result, 0.0)

    def _gatherers(self, part: int) -> dict[str, Gatherer]:
        """What reads the per-atom arrays of a part that batches need, and (with "/") its edges."""
        arrays, near = self._arrays[part], self.pool.edges[part]
        names = {"positions", "numbers"}.union(*(_fields(name) for name in self.targets))
        atoms = {n: a for n, a in arrays.items() if n in names and FIELDS[n].per == "atom"}
        edges = {"/senders": near.senders, "/receivers": near.receivers}
        if near.images is not None:
            edges["/images"] = near.images
        return {name: Gatherer(array) for name, array in {**atoms, **edges}.items()}

    def _check_batch(self, items: np.ndarray) -> None:
        wanted = self.pool.n_nodes[items].sum(), self.pool.n_edges[items].sum(), len(items)
        if any(w > size - 1 for w, size in zip(wanted, self.budget, strict=True)):
            raise InputError(
                f"{wanted[2]} structures with {wanted[0]} atoms and {wanted[1]} edges do not fit"
                f" {self.budget} less its padding: pack fewer, or use the batches of plan(epoch)"
            )


def _plain(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays without NumPy's memmap class, whose indexing is slow."""
    return {name: np.asarray(array) for name, array in arrays.items()}


def _fields(name: str) -> tuple[str, ...]:
    """Arrays of the data set that a target needs."""
    return (name,) if name in _RAW else TARGETS[name].fields


def _check_target(name: str, references: Mapping[str, References]) -> None:
    known = list(dict.fromkeys([*_RAW, *TARGETS]))
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown target {name!r}{hint} Known: {', '.join(known)}")
    if name in ENERGIES and name not in references:
        raise InputError(
            f"target {name!r} needs reference energies: fit them on the training structures"
            " (references.fit_pool_references), or say References.zero()"
        )


def _target_shape(name: str, n: int, m: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a target's values and of its mask in a batch of n nodes and m structures."""
    if name not in _RAW:
        return (n, TARGETS[name].k), (n, TARGETS[name].k)
    length = n if FIELDS[name].per == "atom" else m
    return (length, *FIELDS[name].shape), (length,)
