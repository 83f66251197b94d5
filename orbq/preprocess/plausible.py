"""Whether reference energies and forces are in the units, and of the sign, they are read in.

Nothing in a file says so. But xTB labels of the same structures are in eV and Å, and references of
whatever level of theory are of about their size and correlate with them: force components of the
embedded metal complexes by 0.4 (median size: 0.85 of GFN1's), energies of QM7's isomers by 0.9. In
Hartree, in kcal/mol, or as gradients in the place of forces they are of quite another size or sign.
"""

from __future__ import annotations

import numpy as np

from orbq.preprocess.flat import ragged_rows
from orbq.preprocess.store import Dataset
from orbq.units import BOHR, HARTREE, HARTREE_PER_BOHR, KCAL_PER_MOL, MILLI

SAMPLE = 1000  # structures looked at
FEWEST = 60  # force components, or energies beside one of the same composition
ALIKE = {"energy": 0.5, "forces": 0.25}  # correlation below which nothing is said
RANGE = (0.1, 6.0)  # of sizes that levels of theory may have; no unit that is used lies in it
KJ_PER_MOL = KCAL_PER_MOL / 4.184
# a unit -> how many of it eV or eV/Å are
UNITS = {
    "energy": {
        "Hartree": 1 / HARTREE,
        "Rydberg": 2 / HARTREE,
        "kcal/mol": 1 / KCAL_PER_MOL,
        "kJ/mol": 1 / KJ_PER_MOL,
        "meV": 1 / MILLI,
    },
    "forces": {
        "Hartree/bohr": 1 / HARTREE_PER_BOHR,
        "Rydberg/bohr": 2 / HARTREE_PER_BOHR,
        "Hartree/Å": 1 / HARTREE,
        "kcal/mol/Å": 1 / KCAL_PER_MOL,
        "kcal/mol/bohr": BOHR / KCAL_PER_MOL,
        "kJ/mol/Å": 1 / KJ_PER_MOL,
        "meV/Å": 1 / MILLI,
    },
}
WANTED = {"energy": "eV", "forces": "eV/Å"}


def strange_units(dataset: Dataset) -> list[str]:
    """A sentence for the energies, and one for the forces, that cannot be what they are read as."""
    told = []
    for name, pairs in (("energy", _energies(dataset)), ("forces", _forces(dataset))):
        known, reference = pairs
        if len(known) < FEWEST or not known.any() or not reference.any():
            continue
        alike = known @ reference / np.sqrt((known @ known) * (reference @ reference))
        size = np.median(np.abs(reference)) / max(np.median(np.abs(known)), 1e-12)
        factor = float(np.sign(alike) * size)
        if abs(alike) > ALIKE[name] and not RANGE[0] <= factor <= RANGE[1]:
            told.append(_sentence(name, factor))
    return told


def _sentence(name: str, factor: float) -> str:
    text = f"{name} are {factor:.2g} times those of xTB, where {WANTED[name]} give about 1"
    if RANGE[0] <= -factor <= RANGE[1]:
        wrong = "gradients" if name == "forces" else "of the other sign"
        return f"{text}: are they {wrong}?"
    near = {unit: abs(np.log(abs(factor) / size)) for unit, size in UNITS[name].items()}
    unit = min(near, key=near.__getitem__)
    guess = f"in {unit}" if near[unit] < np.log(1.6) else "in another unit"
    return f"{text}: are they {guess}?"


def _sampled(dataset: Dataset, *names: str) -> np.ndarray:
    """Structures that have all ``names``, SAMPLE at most, over the whole data set."""
    rows = np.flatnonzero(np.logical_and.reduce([dataset.mask(name) for name in names]))
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int))]


def _forces(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """xTB's and reference force components [n], eV/Å."""
    rows = _sampled(dataset, "xtb_forces", "forces")
    atoms = ragged_rows(np.asarray(dataset.offsets)[rows], dataset.n_atoms[rows])
    xtb, reference = (np.asarray(dataset[name][atoms], float) for name in ("xtb_forces", "forces"))
    return xtb.ravel(), reference.ravel()


def _energies(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """xTB's and reference energies [n], eV, less the means of their composition and charge, of
    structures that share these with others."""
    rows = _sampled(dataset, "xtb_energy", "energy")
    start, n_atoms = np.asarray(dataset.offsets)[rows], dataset.n_atoms[rows]
    charge = np.asarray(dataset["total_charge"][rows])
    kinds = [
        (int(q), np.sort(dataset["numbers"][first : first + n]).tobytes())
        for first, n, q in zip(start, n_atoms, charge, strict=True)
    ]
    place = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    of = np.array([place[kind] for kind in kinds], int)
    count = np.bincount(of, minlength=len(place))
    shared = count[of] > 1
    found = []
    for name in ("xtb_energy", "energy"):
        values = np.asarray(dataset[name][rows], float)
        means = np.bincount(of, values, len(place)) / np.maximum(count, 1)
        found.append((values - means[of])[shared])
    return found[0], found[1]
