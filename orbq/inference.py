"""Predictions of many structures: packed batches of one shape, so that little is compiled.

``predict_pool`` runs over the structures of data sets, ``predict_structures`` over a stream of
structures of any length, in constant memory, ``predict_members`` with several runs at once,
``BatchPredictor.one`` takes a single structure.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ase.stress import full_3x3_to_voigt_6_stress

from orbq import orbitals
from orbq.capacity import FEW_EDGES, Capacities, Capacity, padded
from orbq.compiled import Counted, configure_jax
from orbq.data import to_batch
from orbq.errors import InputError
from orbq.models.potential import Params, Prediction, predict
from orbq.preprocess.neighbors import neighbor_list
from orbq.preprocess.pack import Budget, PackedBatch, Packer, measure_budget
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.prefetch import prefetch
from orbq.run import Run, load
from orbq.run_files import run_directory, stored_config
from orbq.schema import Structure
from orbq.targets import TARGETS

CHUNK_BATCHES = 16  # batches per chunk of a stream: enough to pack well, little to hold
_SMALLEST, _LARGEST = 0.5, 2.5  # edges of a kept budget over those asked for

RESOLVED = ("onsite", "density", "orbital")  # targets that hold the ten orbital charges


def open_run(path: str | Path) -> Run:
    """Load a run and set this process's precision and compilation cache as in its training."""
    configure_jax(stored_config(run_directory(path)))
    return load(path)


class Predicted(NamedTuple):
    """Predictions of one structure of n atoms.

    energy: total, reference energies included, eV (float64). forces: [n, 3] eV/Å. targets: per
    asked-for target [n, k] in its unit ("xtb_energy": a float, total; "stress": [3, 3] eV/Å^3, of
    structures that are periodic in three directions alone).
    """

    energy: float
    forces: np.ndarray
    targets: dict[str, Any]


class BatchPredictor:
    """A run's compiled program for packed batches.

    targets: what is predicted beside energies and forces, names of the run's heads and "stress".
    """

    def __init__(self, run: Run, targets: Sequence[str] = ()) -> None:
        self.run, self.targets = run, tuple(targets)
        self.dtype = np.dtype(run.config.training.precision)

        def program(params: Params, positions: Any, graph: Any) -> Prediction:
            return predict(run.potential, params, positions, graph, self.targets)

        self._program = Counted(program)
        self._budgets: dict[int, list[Budget]] = {}  # by batch size
        self._capacities = Capacities()

    @property
    def compilations(self) -> int:
        """How many shapes of batches and of single structures have been compiled."""
        return self._program.compilations

    def __call__(self, packed: PackedBatch) -> Prediction:
        """The prediction, padding included, without reference energies; JAX arrays that may still
        be on their way."""
        batch = to_batch(packed, with_cell="stress" in self.targets)
        out: Prediction = self._program(self.run.params, batch.positions, batch.graph)
        return out

    def one(self, structure: Structure) -> Predicted:
        """The prediction of one structure, padded to a shape that the next ones are likely to fit.

        It must have passed ``Run.structure``.
        """
        n, cutoff = len(structure.numbers), self.run.potential.architecture.cutoff
        edges = neighbor_list(structure.positions, cutoff, structure.cell, structure.pbc)
        capacity = self._capacities.holding(n, len(edges.senders))
        positions, graph, cell = padded(structure, edges, capacity, cutoff, self.dtype)
        if "stress" in self.targets:
            graph = graph._replace(globals={**graph.globals, "cell": cell})
        out = jax.device_get(self._program(self.run.params, positions, graph))
        return _one(self.run, structure, out, 0, slice(0, n))

    def chunk(self, chunk: Sequence[Structure], pool: Pool, batch_size: int) -> list[Predicted]:
        """Predictions of the structures of ``pool``, which are those of ``chunk``, in its order."""
        known = self._budgets.setdefault(batch_size, [])
        budget = budget_of(pool, batch_size, known)
        if budget not in known:
            budget = _roomy(budget, pool)
            known.extend({budget}.difference(known))
        found: dict[int, Predicted] = {}
        for packed, out in predict_pool(self, pool, budget):
            ends = np.cumsum(packed.n_node)
            for place, item in enumerate(packed.index[packed.mask].tolist()):
                atoms = slice(int(ends[place] - packed.n_node[place]), int(ends[place]))
                found[item] = _one(self.run, chunk[item], out, place, atoms)
        return [found[i] for i in range(len(chunk))]


def predict_pool(
    predictor: BatchPredictor, pool: Pool, budget: Budget
) -> Iterator[tuple[PackedBatch, Prediction]]:
    """Every structure of a pool once, in batches, as NumPy arrays; ``index`` of a batch tells which
    ones. The device computes one batch while the one before is read and the next one is packed."""
    packer = Packer(pool, budget, targets=(), dtype=predictor.dtype)
    ahead: tuple[PackedBatch, Prediction] | None = None
    for packed in prefetch(map(packer.batch, packer.plan(0))):
        begun = packed, predictor(packed)
        if ahead is not None:
            yield jax.device_get(ahead)
        ahead = begun
    if ahead is not None:
        yield jax.device_get(ahead)


def budget_of(pool: Pool, batch_size: float, known: Sequence[Budget] = ()) -> Budget:
    """A budget for ``batch_size`` structures a batch on average.

    It is the tightest of ``known`` that every structure fits and that is not far from what is asked
    for, so that another one, and with it a compilation, comes only with structures of another kind.
    """
    largest = np.array([pool.n_nodes.max() + 1, pool.n_edges.max() + 1, 2])
    wanted = batch_size * max(float(pool.n_edges.mean()), 1.0)
    least = _SMALLEST * min(wanted, pool.n_edges.sum())
    for budget in sorted(known, key=lambda b: b.n_edge):
        limit = _LARGEST * wanted + FEW_EDGES
        if (largest <= np.array(budget)).all() and least < budget.n_edge < limit:
            return budget
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # crowded batches matter in training alone
        return measure_budget(pool, batch_size)


def _roomy(budget: Budget, pool: Pool) -> Budget:
    """With room for structures that have a few more edges than the largest: the next ones, as of a
    trajectory that comes piece by piece."""
    largest = Capacity(0, 0).holding(int(pool.n_nodes.max()), int(pool.n_edges.max()))
    return budget._replace(n_edge=max(budget.n_edge, largest.n_edge))


# --------------------------------------------------------------------------- streams


class StructureSet:
    """Structures in memory, as flat arrays like those of a stored data set."""

    path: Path | None = None
    method = orbitals.GFN1  # no labels: of no consequence

    def __init__(self, structures: Sequence[Structure]) -> None:
        sizes = [len(s.numbers) for s in structures]
        self.arrays: Mapping[str, np.ndarray] = {
            "offsets": np.cumsum([0, *sizes], dtype=np.int64),
            "numbers": np.concatenate([s.numbers for s in structures]).astype(np.int32),
            "positions": np.concatenate([s.positions for s in structures]),
            "cell": np.array([s.cell for s in structures], np.float64),
            "pbc": np.array([s.pbc for s in structures], bool),
            "total_charge": np.array([s.total_charge for s in structures], np.int32),
            "spin_multiplicity": np.array([s.spin_multiplicity for s in structures], np.int32),
        }

    def __len__(self) -> int:
        return len(self.arrays["total_charge"])


def checked_batch_size(structures: Any, batch_size: Any) -> int:
    """The batch size. Raises InputError where it is no whole number above 0, or ``structures`` can
    be none."""
    if isinstance(structures, str | Path) or not isinstance(structures, Iterable):
        raise InputError(
            f"{structures!r} is no structure: give an ase.Atoms, or several, as ase.io.read or "
            "iread gives them"
        )
    number = isinstance(batch_size, int | float | np.integer)
    if not number or not 1 <= batch_size < np.inf or batch_size % 1:
        raise InputError(f"batch_size is {batch_size!r}: it must be a whole number above 0")
    return int(batch_size)


def predict_structures(
    predictor: BatchPredictor, structures: Iterable[Structure], batch_size: int = 16
) -> Iterator[Predicted]:
    """Predictions of a stream of structures, in its order, in constant memory.

    Structures are taken in chunks; a new shape is compiled only when they no longer suit the one
    before (``budget_of``). They must have passed ``Run.structure``.
    """
    for (predicted,) in predict_members([predictor], structures, batch_size):
        yield predicted


def predict_members(
    predictors: Sequence[BatchPredictor], structures: Iterable[Structure], batch_size: int = 16
) -> Iterator[tuple[Predicted, ...]]:
    """As ``predict_structures``, by several runs: their predictions of one structure together."""
    stream = iter(structures)
    while chunk := list(islice(stream, CHUNK_BATCHES * batch_size)):
        pools: dict[float, Pool] = {}
        found = []
        for predictor in predictors:
            cutoff = predictor.run.potential.architecture.cutoff
            if cutoff not in pools:
                pools[cutoff] = Pool([Part(StructureSet(chunk))], cutoff)
            found.append(predictor.chunk(chunk, pools[cutoff], batch_size))
        yield from zip(*found, strict=True)


def _one(run: Run, structure: Structure, out: Prediction, place: int, atoms: slice) -> Predicted:
    targets: dict[str, Any] = {}
    for name, values in out.charges.items():
        if name == "xtb_energy":
            reference = run.reference_energy(structure, name)
            targets[name] = float(values[place]) + reference
        else:
            targets[name] = np.asarray(values[atoms])
    if out.stress is not None and structure.pbc.all():
        targets["stress"] = np.asarray(out.stress[place])
    energy = float(out.energy[place]) + run.reference_energy(structure)
    return Predicted(energy, np.asarray(out.forces[atoms]), targets)


# --------------------------------------------------------------------------- in other forms


def voigt(stress: np.ndarray) -> np.ndarray:
    """A stress [3, 3] as ASE keeps it: xx, yy, zz, yz, xz, xy, float64."""
    return full_3x3_to_voigt_6_stress(np.asarray(stress, np.float64))


def atomic_charges(target: str, values: np.ndarray) -> np.ndarray:
    """Atomic charges [n] (e, float64) from the values [n, k] of a charge target."""
    weights = TARGETS[target].charge
    if weights is None:
        raise KeyError(f"{target!r} is not a charge target")
    return np.asarray(values, np.float64) @ weights


def shell_charges(target: str, values: np.ndarray) -> np.ndarray | None:
    """Charges of the shells s, s', p, d [n, 4] (e); None where the target does not hold them."""
    if target == "shell":
        return np.asarray(values, np.float64)
    slots = orbital_charges(target, values)
    if slots is None:
        return None
    shell = [slots[:, columns].sum(1) for columns in orbitals.SHELL_SLOTS]
    return np.stack(shell, axis=1)


def orbital_charges(target: str, values: np.ndarray) -> np.ndarray | None:
    """Ten orbital charges [n, 10] (e); None where the target does not hold them."""
    if target == "orbital":
        return np.asarray(values, np.float64)
    if target in RESOLVED:
        return orbitals.orbital_charges(np.asarray(values, np.float64))
    return None
