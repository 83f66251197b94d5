"""What residuals are divided by: one scale per label, one per element and shell of a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from orbq.orbitals import MAX_Z
from orbq.preprocess.flat import ragged_rows
from orbq.preprocess.pool import Part, Pool, part_labels
from orbq.preprocess.references import Fit
from orbq.schema import FIELDS
from orbq.targets import TARGETS, Moments, Statistics, moments, statistics

_CHUNK = 4096  # structures at a time when the training labels are scanned
# a scale is not smaller
_ENERGY_FLOORS = {"structure": 1e-3, "atom": 1e-4}  # eV, eV/atom
_FLOORS = {"forces": 1e-3, "xtb_forces": 1e-3, "stress": 1e-5}  # eV/Å, eV/Å^3


def energy_scales(fits: Mapping[str, Fit], energy_per: str = "structure") -> dict[str, float]:
    """Scale of every energy, eV: the deviation of what the references leave of it; with "atom" the
    root mean square of what they leave of energies per atom, eV/atom."""
    floor = _ENERGY_FLOORS[energy_per]
    left = {n: f.std_per_atom if energy_per == "atom" else f.std for n, f in fits.items()}
    return {name: max(scale, floor) for name, scale in left.items()}


def component_scales(terms: tuple[str, ...], teaching: Pool) -> dict[str, float]:
    """Scale of forces and stress, eV/Å and eV/Å^3: the root mean square of a component."""
    return {name: _root_mean_square(teaching, name) for name in _FLOORS if name in terms}


def _root_mean_square(pool: Pool, field: str) -> float:
    """Of a component of a label over a pool, at least its floor."""
    square, count = 0.0, 0
    for rows, part in _chunks(pool):
        arrays = part.dataset.arrays
        labelled = rows[part_labels(part, rows, field)]
        if FIELDS[field].per == "atom":
            labelled = _atom_rows(arrays["offsets"], labelled)
        values = np.asarray(arrays[field][labelled])
        square, count = square + float((values**2).sum()), count + values.size
    return max(float(np.sqrt(square / max(count, 1))), _FLOORS[field])


def energy_scale(scales: Mapping[str, float], n_atoms: float) -> float:
    """What the energy readouts are multiplied with, eV: the scale of a force, else that of an
    energy per root of the mean number of atoms; those of xTB where only its labels teach."""
    per_root = float(np.sqrt(n_atoms))
    for name in ("forces", "energy", "xtb_forces", "xtb_energy"):
        if name in scales:
            return float(scales[name] if "forces" in name else scales[name] / per_root)
    return 1.0 / per_root


def label_statistics(name: str, pool: Pool) -> Statistics:
    """Normalisation of a per-atom target over a pool, in constant memory."""
    target = TARGETS[name]
    shape = (MAX_Z + 1, target.k)
    total = Moments(*(np.zeros(shape) for _ in range(3)))
    for rows, part in _chunks(pool):
        arrays = part.dataset.arrays
        labelled = np.all([part_labels(part, rows, f) for f in target.fields], axis=0)
        atoms = _atom_rows(arrays["offsets"], rows[labelled])
        numbers = np.asarray(arrays["numbers"][atoms])
        values = target.extract(arrays, atoms)
        sums = moments(target, numbers, values, target.mask(numbers, True, part.dataset.method))
        total = Moments(*(a + b for a, b in zip(total, sums, strict=True)))
    return statistics(target, total)


def _chunks(pool: Pool) -> Iterator[tuple[np.ndarray, Part]]:
    for part, rows in zip(pool.parts, pool.rows, strict=True):
        for start in range(0, len(rows), _CHUNK):
            yield rows[start : start + _CHUNK], part


def _atom_rows(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of the per-atom arrays that belong to these structures."""
    return ragged_rows(offsets[rows], offsets[rows + 1] - offsets[rows])
