"""The data set on disk and in memory: names, shapes, types and units of every array.

A data set is a directory of flat ``.npy`` arrays (opened memory-mapped) with offsets, a
``manifest.json`` and a ``failures.jsonl``. S structures and A atoms in all; the atoms of structure
``i`` are rows ``offsets[i]:offsets[i + 1]`` of every per-atom array. A label that some structures
lack has a mask array beside it, ``<name>_mask`` [S]; where the mask is False the values are 0.
Units: eV, Å, e.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from orbq.orbitals import N_ONSITE

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
FAILURES = "failures.jsonl"


class Field(NamedTuple):
    """One array of a data set.

    per: "structure" or "atom". shape: trailing shape. dtype: NumPy type string. unit: physical unit
    or "". maskable: whether a ``<name>_mask`` [S] bool array stands beside it.
    """

    per: str
    shape: tuple[int, ...]
    dtype: str
    unit: str
    maskable: bool
    doc: str


FIELDS: dict[str, Field] = {
    "numbers": Field("atom", (), "int32", "", False, "atomic numbers"),
    "positions": Field("atom", (3,), "float64", "Å", False, "Cartesian positions"),
    "total_charge": Field("structure", (), "int32", "e", False, "total charge"),
    "spin_multiplicity": Field("structure", (), "int32", "", False, "2S + 1"),
    "cell": Field("structure", (3, 3), "float64", "Å", False, "lattice vectors in rows, 0 if none"),
    "pbc": Field("structure", (3,), "bool", "", False, "periodic directions (all or none)"),
    "energy": Field("structure", (), "float64", "eV", True, "reference (DFT) energy"),
    "forces": Field("atom", (3,), "float64", "eV/Å", True, "reference (DFT) forces"),
    "stress": Field("structure", (3, 3), "float64", "eV/Å^3", True, "reference stress"),
    "dft_charges": Field("atom", (), "float64", "e", True, "atomic charges of the reference"),
    "onsite": Field("atom", (N_ONSITE,), "float64", "e", True, "on-site charge block, 47 irreps"),
    "xtb_energy": Field("structure", (), "float64", "eV", True, "energy of the xTB calculation"),
    "xtb_forces": Field("atom", (3,), "float64", "eV/Å", True, "forces of the xTB calculation"),
    "source": Field("structure", (2,), "int64", "", False, "(index of input file, frame in it)"),
    "content_hash": Field("structure", (), "S32", "", False, "hex digest of what was computed on"),
    "group": Field("structure", (), "S64", "", False, "group name for splits, '' if none"),
}


class Structure(NamedTuple):
    """One molecule or crystal as read, before labelling. Units eV, Å, e.

    numbers [n] int, positions [n, 3], cell [3, 3] (zeros if none), pbc [3] bool; energy, forces
    [n, 3], stress [3, 3], dft_charges [n]: None when the input has none. group: name for splits.
    source: (index of the input file, index of the frame in it).
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    total_charge: int
    spin_multiplicity: int
    energy: float | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    dft_charges: np.ndarray | None = None
    group: str = ""
    source: tuple[int, int] = (0, 0)


class Labels(NamedTuple):
    """What one xTB calculation gives. Units eV, Å, e.

    onsite [n, 47]: components of the on-site charge block (orbitals.py); energy: scalar;
    forces [n, 3]; note: how it converged, e.g. "" or "2000 K".
    """

    onsite: np.ndarray
    energy: float
    forces: np.ndarray
    note: str = ""
