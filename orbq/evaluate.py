"""Errors of a trained run on the structures of a data set.

Every structure is predicted once, in packed batches; labels stay in float64 and are compared with
total predictions (reference energies included). A label that a structure lacks is masked. Charges
that follow from a target the run predicts are scored too (orbital, shell and atomic charges from
the on-site block), so that runs with different targets can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orbq import inference
from orbq.data import split_of
from orbq.errors import InputError
from orbq.inference import BatchPredictor, budget_of, predict_pool
from orbq.losses import needed_targets, value_of
from orbq.models.potential import Prediction
from orbq.orbitals import MAX_Z, SYMBOLS, parts
from orbq.preprocess.flat import ragged_rows
from orbq.preprocess.pack import PackedBatch
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.store import Dataset, check_atoms
from orbq.run import Run
from orbq.schema import FIELDS
from orbq.scores import ENERGIES, FORCES, PER_STRUCTURE, Cost, Evaluation, Values
from orbq.splits import PARTS
from orbq.targets import CHARGE_TARGETS, TARGETS

ALL = "all"
IDENTITY = ("content_hash", "group")
# charges that follow from others, by what turns values [n, k] of a target into them
DERIVED: dict[str, Callable[[str, np.ndarray], np.ndarray | None]] = {
    "orbital": inference.orbital_charges,
    "shell": inference.shell_charges,
    "atomic": lambda target, values: inference.atomic_charges(target, values)[:, None],
}


# --------------------------------------------------------------------------- which structures


def is_own(run: Run, dataset: Dataset) -> bool:
    """Whether ``run`` was trained on these structures, in this order and with these groups.

    The arrays that the division into parts follows from have the same SHA-256; labels, whose last
    bits depend on the machine that made them, may differ.
    """
    trained_on = (run.info.get("data") or [{}])[0].get("arrays", {})
    arrays = dataset.manifest["arrays"]
    return all(name in arrays and trained_on.get(name) == arrays[name] for name in IDENTITY)


def split_rows(run: Run, dataset: Dataset, split: str | None = None) -> tuple[str, np.ndarray]:
    """Name and structures of a part of a data set: "train", "validation", "test" or "all".

    split: None for "test" if the run was trained on this data set, else "all".
    Raises InputError for another name, for a part of a data set that is not the run's own, and for
    a part without structures.
    """
    own = is_own(run, dataset)
    name = split or ("test" if own else ALL)
    if name not in (*PARTS, ALL):
        raise InputError(f"split {name!r}: give one of {', '.join((*PARTS, ALL))}")
    if name == ALL:
        return name, np.arange(len(dataset))
    if not own:
        trained_on = run.info.get("data") or [{}]
        raise InputError(
            f"the run was not trained on {dataset.path} but on {trained_on[0].get('path', '?')}, "
            f"and only that is divided into training and test: use split {ALL!r}"
        )
    rows = split_of(run.config, dataset)[name]
    if len(rows) == 0:
        raise InputError(
            f"the {name} split of {dataset.path} is empty (data.{name}_fraction of the run's "
            f"configuration): use split {ALL!r} or another data set"
        )
    return name, rows


def _known(run: Run, dataset: Dataset, rows: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """[n] bool: structures whose elements the run knows; {symbol: structures} of the others."""
    table = np.zeros(MAX_Z + 1, bool)
    table[list(run.elements)] = True
    for references in run.references.values():
        table &= references.known
    offsets, n_node = np.asarray(dataset["offsets"]), dataset.n_atoms[rows]
    atoms = ragged_rows(offsets[rows], n_node)
    numbers = np.asarray(dataset["numbers"][atoms])
    check_atoms(dataset.path, numbers, np.asarray(dataset["positions"][atoms]))
    structure = np.repeat(np.arange(len(rows)), n_node)
    strange = ~table[numbers]
    known = np.bincount(structure[strange], minlength=len(rows)) == 0
    pairs = np.unique(np.stack([numbers[strange], structure[strange]]), axis=1)
    which, count = np.unique(pairs[0], return_counts=True)
    return known, {SYMBOLS[z]: int(n) for z, n in zip(which, count, strict=True)}


# --------------------------------------------------------------------------- evaluation


def evaluate(
    run: Run,
    dataset: Dataset,
    indices: np.ndarray | None = None,
    targets: Sequence[str] | None = None,
    batch_size: float = 16,
    progress: Callable[[int, int], None] | None = None,
    split: str | None = None,
) -> Evaluation:
    """Predict structures of a data set and compare them with their labels.

    indices: [n] structures; None for those of ``split`` ("train", "validation", "test" or "all",
    see ``split_rows``; None for all). targets: labels to compare: "energy", "forces", "stress" and
    targets the run has a head for; None for all that it was trained on and the data has.
    batch_size: structures a batch on average. progress: called with (done, all structures).

    Raises InputError for a target that the run does not predict, when no label is left, or when
    every structure holds an element that the run does not know.
    """
    started = time.monotonic()
    if indices is None:
        indices = split_rows(run, dataset, split or ALL)[1]
    rows = np.asarray(indices, np.int64)
    known, left_out = _known(run, dataset, rows)
    if not known.any():
        raise InputError(
            f"none of the {len(rows)} structures of {dataset.path} can be evaluated: they hold "
            f"{', '.join(left_out)}, the run knows {', '.join(SYMBOLS[z] for z in run.elements)}"
        )
    names = _labels(run, dataset, rows[known], targets)
    pool = Pool([Part(dataset, rows[known])], run.potential.architecture.cutoff)
    predictor = BatchPredictor(run, needed_targets(names))
    budget = budget_of(pool, batch_size)
    collected = _Collected(run, pool, names)
    n_edges, n_batches = 0, 0
    for packed, out in predict_pool(predictor, pool, budget):
        collected.put(packed, out)
        n_edges, n_batches = (
            n_edges + int(pool.n_edges[packed.index[packed.mask]].sum()),
            n_batches + 1,
        )
        if progress is not None:
            progress(collected.done, len(pool))
    return Evaluation(
        rows=rows[known],
        n_node=pool.n_nodes.astype(np.int64),
        numbers=collected.numbers,
        references=collected.references,
        values=collected.values(),
        left_out=left_out,
        n_left_out=int((~known).sum()),
        cost=Cost(
            time.monotonic() - started,
            predictor.compilations,
            n_edges / max(n_batches * budget.n_edge, 1),
        ),
    )


def _labels(
    run: Run, dataset: Dataset, rows: np.ndarray, wanted: Sequence[str] | None
) -> tuple[str, ...]:
    """Labels to compare. Raises InputError as ``evaluate`` does."""
    weights = run.config.loss.weights
    heads = [name for name, _ in run.potential.architecture.heads]
    trained = ["energy"] if weights.energy > 0 else []
    trained += ["forces"] if weights.energy > 0 or weights.forces > 0 else []
    derived = ["stress"] if trained else []  # of any run with energies, if it is asked for
    possible = [*trained, *(derived if wanted or weights.stress > 0 else []), *heads]
    for name in wanted or ():
        if name not in possible:
            raise InputError(
                f"{name!r} cannot be evaluated: the run was trained to predict "
                f"{', '.join(possible)}"
            )
    method = run.potential.constants.method
    if other := _other_labels(dataset.method, method):
        left = [n for n in possible if n not in other]
        if clash := [n for n in wanted or (() if left else possible) if n in other]:
            raise InputError(
                f"{', '.join(clash)}: {dataset.path} is labelled with {dataset.method}, the run "
                f"was trained on {method}; label the structures with --method {method}"
            )
        possible = left
    found = [n for n in (wanted or possible) if _labelled(dataset, rows, n).any()]
    missing = [n for n in (wanted or ()) if n not in found]
    if missing or not found:
        raise InputError(
            f"none of the {len(rows)} structures of {dataset.path} has a label of "
            f"{', '.join(missing or possible)}: use another data set, or `orbq predict` for "
            "predictions without labels"
        )
    return tuple(found)


def not_compared(run: Run, dataset: Dataset) -> str | None:
    """Which of the run's predictions have no counterpart in the labels of another xTB method."""
    method = run.potential.constants.method
    heads = [name for name, _ in run.potential.architecture.heads]
    lost = [name for name in heads if name in _other_labels(dataset.method, method)]
    if not lost:
        return None
    return (
        f"not compared: {', '.join(lost)}: {dataset.path} is labelled with {dataset.method}, the "
        f"run was trained on {method}"
    )


def _other_labels(first: str, second: str) -> set[str]:
    """The targets whose labels by two xTB methods are not of the same quantity: charges are of the
    first of several methods joined, energies and forces of all."""
    if first == second:
        return set()
    energies = {"xtb_energy", "xtb_forces"}
    same_orbitals = parts(first)[0] == parts(second)[0]
    return energies if same_orbitals else set(TARGETS) - {"dft"}


def _labelled(dataset: Dataset, rows: np.ndarray, name: str) -> np.ndarray:
    """[n] bool: which structures carry a label."""
    fields = (name,) if name in FIELDS else TARGETS[name].fields
    return np.logical_and.reduce([np.asarray(dataset.mask(f))[rows] for f in fields])


class _Collected:
    """Predictions of a pool, filled in batch by batch."""

    def __init__(self, run: Run, pool: Pool, names: tuple[str, ...]) -> None:
        self.run, self.pool, self.names, self.done = run, pool, names, 0
        self.dataset, self.rows = pool.parts[0].dataset, pool.rows[0]
        n_node = pool.n_nodes.astype(np.int64)
        self.starts = np.cumsum(n_node) - n_node
        offsets = np.asarray(self.dataset.arrays["offsets"])
        self.atoms = ragged_rows(offsets[self.rows], n_node)
        self.numbers = np.asarray(self.dataset.arrays["numbers"][self.atoms])
        self.references = {n: self._references(n) for n in names if n in ENERGIES}
        self.predicted = {n: np.zeros(self._shape(n)) for n in names}

    def _references(self, name: str) -> np.ndarray:
        charge = np.asarray(self.dataset.arrays["total_charge"][self.rows])
        if name not in self.run.references:
            return np.zeros(len(self.rows))
        return self.run.references[name].of_many(self.numbers, self.pool.n_nodes, charge)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in ENERGIES:
            return (len(self.rows),)
        if name in PER_STRUCTURE:
            return (len(self.rows), int(np.prod(FIELDS[name].shape)))
        return (len(self.atoms), 3 if name in FORCES else TARGETS[name].k)

    def put(self, packed: PackedBatch, out: Prediction) -> None:
        """Take the real structures of a batch."""
        items, n = packed.index[packed.mask], packed.n_node[packed.mask]
        nodes, m = ragged_rows(self.starts[items], n), len(items)
        for name, target in self.predicted.items():
            values = np.asarray(value_of(name, out))
            if name in ENERGIES:
                target[items] = values[:m] + self.references[name][items]
            elif name in PER_STRUCTURE:
                target[items] = values[:m].reshape(m, -1)
            else:
                target[nodes] = values[: len(nodes)]
        self.done += m

    def values(self) -> dict[str, Values]:
        """Everything predicted beside its labels, and the charges that follow from it."""
        out = {n: self._compared(n, p) for n, p in self.predicted.items()}
        for source in [n for n in self.predicted if n in CHARGE_TARGETS and n != "dft"]:
            for name, derive in DERIVED.items():
                derived = None if name in out else derive(source, self.predicted[source])
                if derived is not None:
                    out[name] = self._compared(name, derived)._replace(source=source)
        return out

    def _compared(self, name: str, predicted: np.ndarray) -> Values:
        labelled = _labelled(self.dataset, self.rows, name)  # type: ignore[arg-type]
        arrays: Mapping[str, Any] = self.dataset.arrays
        if name in ENERGIES:
            label, mask = np.asarray(arrays[name][self.rows], np.float64), labelled
        elif name in PER_STRUCTURE:
            label = np.asarray(arrays[name][self.rows], np.float64).reshape(len(self.rows), -1)
            mask = np.broadcast_to(labelled[:, None], label.shape)
        else:
            mask = np.repeat(labelled, self.pool.n_nodes)
            if name in FORCES:
                label = np.asarray(arrays[name][self.atoms], np.float64)
                mask = np.repeat(mask[:, None], 3, axis=1)
            else:
                label = TARGETS[name].extract(arrays, self.atoms)
                mask = TARGETS[name].mask(self.numbers, mask, self.dataset.method)
        return Values(predicted, np.where(mask, label, 0.0), mask)
