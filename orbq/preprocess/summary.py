"""What a data set holds, in constant memory: composition, ranges, labels, faults, edges."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from orbq.orbitals import SYMBOLS
from orbq.preprocess.flat import release
from orbq.preprocess.pack import measure_budget
from orbq.preprocess.plan import Budget, Fill, fill_rates, make_plan
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.read import Failure
from orbq.preprocess.store import Dataset, check_atoms
from orbq.schema import FIELDS

BLOCK = 1 << 14  # structures read at a time


class Range(NamedTuple):
    """Smallest, mean and largest value, and the structures where the extremes are; NaN if none."""

    low: float
    mean: float
    high: float
    low_at: int
    high_at: int


class Summary(NamedTuple):
    """What a data set holds.

    elements: symbol -> (structures with it, atoms of it). charges, multiplicities: value ->
    structures. energy: eV per atom. forces, xtb_forces: norm on an atom, eV/Å. charge: xTB atomic
    charges, e. coverage: label -> structures that have it. duplicates: structures that repeat an
    earlier one. groups: distinct group names. failures: pattern -> (number, an example).
    """

    structures: int
    atoms: int
    sizes: Range
    elements: dict[str, tuple[int, int]]
    charges: dict[int, int]
    multiplicities: dict[int, int]
    periodic: int
    ranges: dict[str, tuple[Range, str]]
    coverage: dict[str, int]
    duplicates: int
    groups: int
    failures: dict[tuple[str, str], tuple[int, str]]


class Edges(NamedTuple):
    """Graphs at a cutoff, and the batches that ``batch_size`` gives. neighbors: of an atom; least
    and greatest mean of a structure, and the mean over all atoms."""

    cutoff: float
    edges: int
    neighbors: Range
    batch_size: int
    budget: Budget
    fill: Fill


def summarise(dataset: Dataset) -> Summary:
    """Read a data set once and describe it."""
    counters: dict[str, Counter[int]] = {"total_charge": Counter(), "spin_multiplicity": Counter()}
    with_element, of_element = np.zeros(len(SYMBOLS), int), np.zeros(len(SYMBOLS), int)
    tracks = {name: _Track() for name in ("sizes", *_RANGES)}
    periodic = 0
    for rows, atoms, starts in _blocks(dataset):
        numbers = np.asarray(dataset["numbers"][atoms])
        check_atoms(dataset.path, numbers, dataset["positions"][atoms])
        of_element += np.bincount(numbers, minlength=len(SYMBOLS))
        structure_of = np.repeat(np.arange(len(starts)), np.diff([*starts, len(numbers)]))
        pairs = np.unique(structure_of * len(SYMBOLS) + numbers)
        with_element += np.bincount(pairs % len(SYMBOLS), minlength=len(SYMBOLS))
        for name, counter in counters.items():
            counter.update(np.asarray(dataset[name][rows]).tolist())
        periodic += int(np.count_nonzero(dataset["pbc"][rows].any(1)))
        tracks["sizes"].add(np.diff([*starts, len(numbers)]), np.arange(rows.start, rows.stop))
        for name in _RANGES:
            _add_range(dataset, name, rows, atoms, structure_of, tracks[name])
        for array in dataset.arrays.values():
            release(array)
    return Summary(
        structures=len(dataset),
        atoms=len(dataset["numbers"]),
        sizes=tracks["sizes"].result(),
        elements={
            SYMBOLS[z]: (int(with_element[z]), int(of_element[z]))
            for z in np.flatnonzero(of_element)
        },
        charges=dict(sorted(counters["total_charge"].items())),
        multiplicities=dict(sorted(counters["spin_multiplicity"].items())),
        periodic=periodic,
        ranges={name: (tracks[name].result(), unit) for name, unit in _RANGES.items()},
        coverage={
            name: int(np.count_nonzero(dataset.mask(name)))
            for name, field in FIELDS.items()
            if field.maskable
        },
        duplicates=len(dataset) - _distinct(dataset["content_hash"]),
        groups=_distinct(dataset["group"]),
        failures=failure_patterns(dataset),
    )


# what a range is taken of -> its unit; the energies are per atom, the forces norms
_RANGES = {
    "energy": "eV/atom",
    "forces": "eV/Å",
    "dft_charges": "e",
    "xtb_energy": "eV/atom",
    "xtb_forces": "eV/Å",
    "xtb_charges": "e",
}


def _blocks(dataset: Dataset) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(structures, their atoms, first atom of each within the block), a block at a time."""
    for start in range(0, len(dataset), BLOCK):
        bounds = np.asarray(dataset.offsets[start : start + BLOCK + 1])
        rows = slice(start, start + len(bounds) - 1)
        yield rows, slice(int(bounds[0]), int(bounds[-1])), bounds[:-1] - bounds[0]


def _distinct(names: np.ndarray) -> int:
    """How many different byte strings there are among ``names`` [S], empty ones apart.

    They are told apart by 64 bits, which is all that is kept of each.
    """
    keys = [np.empty(0, np.int64)]
    for start in range(0, len(names), BLOCK):
        block = [name for name in names[start : start + BLOCK].tolist() if name]
        keys.append(np.fromiter(map(hash, block), np.int64, len(block)))
        release(names)
    key = np.concatenate(keys)
    key.sort()
    return int(np.count_nonzero(key[1:] != key[:-1])) + bool(len(key))


def _add_range(
    dataset: Dataset,
    name: str,
    rows: slice,
    atoms: slice,
    structure_of: np.ndarray,
    track: _Track,
) -> None:
    field = "onsite" if name == "xtb_charges" else name
    mask = np.asarray(dataset.mask(field)[rows])
    if not mask.any():
        return
    structures = np.arange(rows.start, rows.stop)
    if FIELDS[field].per == "structure":
        values = dataset[field][rows] / np.bincount(structure_of)
        track.add(values[mask], structures[mask])
        return
    values = atom_values(dataset, name, atoms)
    known = mask[structure_of]
    track.add(values[known], structures[structure_of[known]])


def atom_values(dataset: Dataset, name: str, atoms: slice) -> np.ndarray:
    """One number per atom: norms of forces, charges; ``name`` as in Summary.ranges."""
    if name == "xtb_charges":
        scale = np.array([1.0, 1.0, np.sqrt(3.0), np.sqrt(5.0)])  # traces of the shell blocks
        return dataset["onsite"][atoms, :4] @ scale
    values = np.asarray(dataset[name][atoms])
    return np.linalg.norm(values, axis=1) if values.ndim == 2 else values


class _Track:
    """Running smallest, mean and largest value."""

    def __init__(self) -> None:
        self.low, self.high, self.total, self.count = np.inf, -np.inf, 0.0, 0
        self.low_at = self.high_at = -1

    def add(self, values: np.ndarray, structures: np.ndarray) -> None:
        if len(values) == 0:
            return
        i, j = int(np.argmin(values)), int(np.argmax(values))
        if values[i] < self.low:
            self.low, self.low_at = float(values[i]), int(structures[i])
        if values[j] > self.high:
            self.high, self.high_at = float(values[j]), int(structures[j])
        self.total, self.count = self.total + float(values.sum()), self.count + len(values)

    def result(self) -> Range:
        if not self.count:
            return Range(np.nan, np.nan, np.nan, -1, -1)
        mean = self.total / self.count
        return Range(self.low, mean, self.high, self.low_at, self.high_at)


class Reasons:
    """Why structures were left out; reasons that differ in their numbers alone are one."""

    def __init__(self) -> None:
        self._number: Counter[tuple[str, str]] = Counter()
        self._example: dict[tuple[str, str], str] = {}

    def add(self, failure: Failure) -> None:
        """Count one more."""
        words = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", failure.reason)
        key = (failure.kind, words)
        self._number[key] += 1
        self._example.setdefault(key, f"{failure.file} frame {failure.frame}: {failure.reason}")

    def patterns(self) -> dict[tuple[str, str], tuple[int, str]]:
        """(kind, reason without its numbers) -> (how many, an example), most frequent first."""
        return {key: (n, self._example[key]) for key, n in self._number.most_common()}

    def total(self) -> int:
        """Structures left out."""
        return self._number.total()

    def commonest(self) -> str:
        """The most frequent reason: how many, their kind and an example; "" if there is none."""
        for (kind, _), (number, example) in self.patterns().items():
            return f"{number:,} {kind}, e.g. {example}"
        return ""


def failure_patterns(dataset: Dataset) -> dict[tuple[str, str], tuple[int, str]]:
    """(kind, reason without its numbers) -> (how many, an example), most frequent first."""
    reasons = Reasons()
    for entry in dataset.failures():
        reasons.add(Failure(entry["file"], entry["frame"], entry["reason"], entry["kind"]))
    return reasons.patterns()


def edges(dataset: Dataset, cutoff: float, batch_size: int) -> Edges:
    """Neighbours within ``cutoff`` (Å), and how well batches of ``batch_size`` are filled.

    Raises InputError for a cutoff that is not positive.
    """
    pool = Pool([Part(dataset)], cutoff)
    budget = measure_budget(pool, batch_size)
    plan = make_plan(pool.n_nodes, pool.n_edges, budget, seed=0, epoch=0)
    track = _Track()
    track.add(pool.n_edges / pool.n_nodes, np.arange(len(pool)))
    n_edges = int(pool.n_edges.sum(dtype=np.int64))
    return Edges(
        cutoff=cutoff,
        edges=n_edges,
        neighbors=track.result()._replace(mean=n_edges / int(pool.n_nodes.sum(dtype=np.int64))),
        batch_size=batch_size,
        budget=budget,
        fill=fill_rates(plan, pool.n_nodes, pool.n_edges, budget),
    )
