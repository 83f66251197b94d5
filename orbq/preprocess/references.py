"""Reference energies of atoms and of charge, in float64, that keep large totals out of float32.

    E0(structure) = sum over atoms of element[Z] + charge * Q

Fitted by least squares on the training structures alone, atoms and the slope in the total charge Q
together; where the composition alone tells the charge, the atoms first, and the slope on what they
leave. Elements that occur in fixed ratios only cannot be told apart; they get the solution of least
norm, with a warning. Isolated-atom energies may be given instead.

A guide is another energy of the same structures, less its own reference energies: GFN1-xTB's, of
which many more structures are known. Its multiple joins the fit of the atoms and is left out of
E0, so that what the guide explains is not taken for energies of atoms (a control variate).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbq.errors import InputError
from orbq.orbitals import MAX_Z, SYMBOLS
from orbq.preprocess.flat import ragged_rows
from orbq.preprocess.pool import Pool, part_labels

_CHUNK = 1 << 15  # structures per step of the fit


class References(NamedTuple):
    """Reference energies. Units eV and e.

    element: [87] float64 eV by atomic number, 0 where unknown. charge: eV per e of total charge.
    fitted: whether any of it was fitted (else all given). known: [87] bool, elements it covers.
    """

    element: np.ndarray
    charge: float
    fitted: bool
    known: np.ndarray

    def of(self, numbers: np.ndarray, total_charge: float = 0.0) -> np.float64:
        """E0 of one structure with atomic numbers [n], eV."""
        return np.float64(self.element[np.asarray(numbers)].sum() + self.charge * total_charge)

    def of_many(
        self, numbers: np.ndarray, n_node: np.ndarray, total_charge: np.ndarray
    ) -> np.ndarray:
        """E0 [S] eV of structures one after another: numbers [A], atoms of each n_node [S]."""
        structure = np.repeat(np.arange(len(n_node)), n_node)
        atoms = np.bincount(structure, weights=self.element[numbers], minlength=len(n_node))
        return atoms + self.charge * np.asarray(total_charge, np.float64)

    def require(self, numbers: np.ndarray, where: str) -> None:
        """Raise InputError when ``numbers`` has an element without a reference energy.

        where: what the numbers belong to, for the message, as "the validation structures".
        """
        present = np.unique(np.asarray(numbers))
        missing = [SYMBOLS[z] for z in present[~self.known[present]].tolist()]
        if missing:
            raise InputError(
                f"{', '.join(missing)}: in {where} but not in the training structures, so that no"
                " reference energy can be fitted; give isolated-atom energies for"
                f" {'it' if len(missing) == 1 else 'them'}, or move structures with"
                f" {'it' if len(missing) == 1 else 'them'} into training"
            )

    def to_json(self) -> str:
        """A JSON object: element energies by symbol, charge, fitted. Exact to the last bit."""
        energies = {SYMBOLS[z]: float(self.element[z]) for z in np.flatnonzero(self.known)}
        data = {"element": energies, "charge": float(self.charge), "fitted": bool(self.fitted)}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> References:
        """The inverse of ``to_json``. Raises InputError for anything else."""
        try:
            data = json.loads(text)
            element, known = _table(data["element"])
            return cls(element, float(data["charge"]), bool(data["fitted"]), known)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"reference energies cannot be read: {error}") from error

    @classmethod
    def zero(cls) -> References:
        """No reference at all: E0 = 0 for every structure."""
        return cls(np.zeros(MAX_Z + 1), 0.0, False, np.arange(MAX_Z + 1) > 0)


class Fit(NamedTuple):
    """A fit of reference energies and what it leaves on the structures it was made on.

    references: the energies. n: structures used. std: standard deviation of E - E0, eV.
    std_per_atom: root mean square of (E - E0)/n_atoms, eV/atom. mean: mean of E - E0, eV.
    """

    references: References
    n: int
    std: float
    std_per_atom: float
    mean: float


class EnergyChunk(NamedTuple):
    """Structures with energies: numbers [A], n_node [S] atoms, energy [S] eV, total_charge [S].

    guide: [S, 0 or 1] eV, another energy less its own reference energies.
    """

    numbers: np.ndarray
    n_node: np.ndarray
    energy: np.ndarray
    total_charge: np.ndarray
    guide: np.ndarray


def fit_references(
    numbers: Sequence[np.ndarray],
    energies: np.ndarray,
    total_charge: np.ndarray | None = None,
    given: Mapping[Any, float] | None = None,
    fit_charge: bool = True,
) -> Fit:
    """Fit reference energies on structures in memory.

    numbers: per structure its atomic numbers. energies: [S] eV. total_charge: [S] e, 0 if None.
    given: isolated-atom energies by symbol or atomic number, eV; these elements are not fitted.
    fit_charge: whether the slope in the total charge is fitted (where an element is); else it is 0.

    Raises InputError without structures, for an unknown symbol or an energy that is not finite.
    """
    n_node = np.array([len(n) for n in numbers], np.int64)
    charge = np.zeros(len(n_node)) if total_charge is None else np.asarray(total_charge)
    flat = np.concatenate([np.asarray(n, np.int64) for n in numbers] or [np.zeros(0, np.int64)])
    energy = np.asarray(energies, np.float64)
    chunk = EnergyChunk(flat, n_node, energy, charge, np.zeros((len(energy), 0)))
    return _fit(lambda: iter([chunk]), given, fit_charge)


def fit_pool_references(
    pool: Pool,
    field: str = "energy",
    given: Mapping[Any, float] | None = None,
    fit_charge: bool = True,
    guide: tuple[str, References] | None = None,
) -> Fit:
    """Fit reference energies on the labelled structures of a (training) pool, in constant memory.

    field: "energy" or "xtb_energy". given, fit_charge: as in ``fit_references``. guide: the field
    of an energy that goes with it, and its reference energies; structures without it count as 0.
    Raises InputError when no structure of the pool carries ``field``.
    """
    return _fit(lambda: pool_chunks(pool, field, guide), given, fit_charge, field)


def pool_elements(pool: Pool, field: str | None = None) -> np.ndarray:
    """Ascending atomic numbers in a pool; of the structures that carry ``field`` if given."""
    found = np.zeros(MAX_Z + 1, bool)
    for chunk in pool_chunks(pool, field):
        found[np.unique(chunk.numbers)] = True
    return np.flatnonzero(found)


def fit_of(pool: Pool, references: References, field: str = "energy") -> Fit:
    """What given reference energies leave of the labelled structures of a pool."""
    return _residual(lambda: pool_chunks(pool, field), references)


def pool_chunks(
    pool: Pool, field: str | None, guide: tuple[str, References] | None = None
) -> Iterator[EnergyChunk]:
    """The structures of a pool in its order; if ``field`` is given, those that carry it."""
    for part, rows in zip(pool.parts, pool.rows, strict=True):
        arrays = part.dataset.arrays
        for start in range(0, len(rows), _CHUNK):
            some = rows[start : start + _CHUNK]
            if field is not None:
                some = some[part_labels(part, some, field)]
            if len(some) == 0:
                continue
            n_node = (arrays["offsets"][some + 1] - arrays["offsets"][some]).astype(np.int64)
            atoms = ragged_rows(arrays["offsets"][some], n_node)
            energy = np.zeros(len(some)) if field is None else np.asarray(arrays[field][some])
            charge = np.asarray(arrays["total_charge"][some])
            numbers = np.asarray(arrays["numbers"][atoms])
            beside = np.zeros((len(some), 0))
            if guide is not None:
                name, references = guide
                rest = np.asarray(arrays[name][some]) - references.of_many(numbers, n_node, charge)
                beside = np.where(part_labels(part, some, name), rest, 0.0)[:, None]
            yield EnergyChunk(numbers, n_node, energy, charge, beside)


# --------------------------------------------------------------------------- the fit


def _fit(
    chunks: Callable[[], Iterator[EnergyChunk]],
    given: Mapping[Any, float] | None,
    fit_charge: bool,
    field: str = "energy",
) -> Fit:
    element, known = _table(given or {})
    present = np.zeros(MAX_Z + 1, bool)
    for chunk in chunks():
        present[np.unique(chunk.numbers)] = True
        bad = np.flatnonzero(~np.isfinite(chunk.energy))
        if len(bad):
            raise InputError(f"structure {bad[0]}: {field} {chunk.energy[bad[0]]} is not finite")
    if not present.any():
        raise InputError(
            f"no training structure carries {field}: reference energies cannot be fitted; add"
            f" labelled structures, or leave {field} out of the loss"
        )
    free = np.flatnonzero(present & ~known)
    charge = 0.0
    if len(free):
        element[free], slope, found = _fit_elements(chunks, element, free, fit_charge)
        if fit_charge:
            charge = _fit_charge(chunks, element, slope) if found is None else found
    references = References(element, charge, bool(len(free)), known | present)
    return _residual(chunks, references)


def _fit_elements(
    chunks: Callable[[], Iterator[EnergyChunk]],
    element: np.ndarray,
    free: np.ndarray,
    fit_charge: bool,
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Energies of the ``free`` elements, the multiple of the guide if there is one, and the slope
    in the charge, None if it cannot be told from these; by a QR decomposition built up chunk by
    chunk."""
    triangle: np.ndarray | None = None
    for chunk in chunks():
        structure = np.repeat(np.arange(len(chunk.n_node)), chunk.n_node)
        rest = chunk.energy - np.bincount(
            structure, weights=element[chunk.numbers], minlength=len(chunk.n_node)
        )
        charge = np.asarray(chunk.total_charge, np.float64)
        rows = np.column_stack([composition(chunk, free), chunk.guide, charge, rest])
        above = rows[:0] if triangle is None else triangle
        triangle = np.asarray(np.linalg.qr(np.concatenate([above, rows]), mode="r"))
    assert triangle is not None, "the caller found elements, so there are structures"
    others, target = triangle[:, :-2], triangle[:, -1]
    warn_if_undetermined(others[:, : len(free)], free)
    along = triangle[:, -2]
    beside = others @ np.linalg.lstsq(others, along, rcond=_RANK_TOLERANCE)[0]
    size, left = np.linalg.norm(along), np.linalg.norm(along - beside)
    told = fit_charge and left > _INDEPENDENT * size
    matrix = triangle[:, :-1] if told else others
    solution = np.linalg.lstsq(matrix, target, rcond=_RANK_TOLERANCE)[0]
    n = others.shape[1]
    return solution[: len(free)], solution[len(free) : n], float(solution[n]) if told else None


def composition(chunk: EnergyChunk, elements: np.ndarray) -> np.ndarray:
    """[S, F] atoms of each of these elements (atomic numbers [F]) in every structure."""
    column = np.full(MAX_Z + 1, -1)
    column[elements] = np.arange(len(elements))
    structure = np.repeat(np.arange(len(chunk.n_node)), chunk.n_node)
    wanted = column[chunk.numbers] >= 0
    cell = structure[wanted] * len(elements) + column[chunk.numbers[wanted]]
    counts = np.bincount(cell, minlength=len(chunk.n_node) * len(elements))
    return counts.reshape(-1, len(elements))


_INDEPENDENT = 1e-6  # share of the charges that the composition must leave
_RANK_TOLERANCE = 1e-10  # singular values of integer counts are zero to rounding or well above


def warn_if_undetermined(matrix: np.ndarray, free: np.ndarray) -> None:
    """Name the elements that take part in a null direction of the composition matrix."""
    _, singular, right = np.linalg.svd(matrix, full_matrices=True)
    rank = int((singular > _RANK_TOLERANCE * singular[0]).sum())
    if rank == len(free):
        return
    involved = np.abs(right[rank:]).max(0) > 1e-8
    names = ", ".join(SYMBOLS[z] for z in free[involved].tolist())
    warnings.warn(
        f"the training structures hold {names} only in fixed ratios (rank {rank} for"
        f" {len(free)} elements): their reference energies are the solution of least norm, right"
        " for these compositions and meaningless for others; give isolated-atom energies to fix"
        " them",
        stacklevel=5,
    )


def _fit_charge(
    chunks: Callable[[], Iterator[EnergyChunk]], element: np.ndarray, slope: np.ndarray
) -> float:
    """Slope of the rest in the total charge, least squares through zero; 0 if all are neutral.

    slope: [0 or 1] the multiple of the guide.
    """
    along, norm = 0.0, 0.0
    atoms = References(element, 0.0, True, element != 0)
    for chunk in chunks():
        charge = np.asarray(chunk.total_charge, np.float64)
        rest = chunk.energy - atoms.of_many(chunk.numbers, chunk.n_node, charge)
        rest -= chunk.guide @ slope
        along, norm = along + float(charge @ rest), norm + float(charge @ charge)
    return along / norm if norm > 0 else 0.0


def _residual(chunks: Callable[[], Iterator[EnergyChunk]], references: References) -> Fit:
    n, first, second, per_atom = 0, 0.0, 0.0, 0.0
    for chunk in chunks():
        e0 = references.of_many(chunk.numbers, chunk.n_node, chunk.total_charge)
        rest = chunk.energy - e0
        n, first = n + len(rest), first + float(rest.sum())
        second += float(rest @ rest)
        per_atom += float(((rest / chunk.n_node) ** 2).sum())
    mean = first / n
    std = float(np.sqrt(max(second / n - mean**2, 0.0)))
    return Fit(references, n, std, float(np.sqrt(per_atom / n)), mean)


def _table(energies: Mapping[Any, float]) -> tuple[np.ndarray, np.ndarray]:
    """[87] energies and [87] bool of the elements given by symbol or atomic number."""
    element, known = np.zeros(MAX_Z + 1), np.zeros(MAX_Z + 1, bool)
    for key, value in energies.items():
        z = SYMBOLS.index(key) if key in SYMBOLS else int(key) if str(key).isdigit() else 0
        if not 1 <= z <= MAX_Z:
            raise InputError(f"reference energy of {key!r}: give a symbol H..Rn or a number 1..86")
        if not np.isfinite(float(value)):
            raise InputError(f"reference energy of {key!r}: {value} is not finite; give eV")
        element[z], known[z] = float(value), True
    return element, known


def load_references(path: Path) -> References:
    """Read what ``References.to_json`` wrote. Raises InputError naming the file."""
    try:
        return References.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"{path}: {error}") from error
