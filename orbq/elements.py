"""What a network may know of an element before it is trained: its valence shells and its size.

A free embedding learns every element from its own examples; with a few structures per metal that is
little. These numbers let elements share what they have in common: the group through the shell
occupations, the row, the radius.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orbq.orbitals import MAX_Z, shells

# Å, Z = 1..86; Cordero et al., Dalton Transactions 2832 (2008), single-bond covalent radii
# (C sp3, low-spin Mn, Fe, Co), as in ase.data.
_RADII = (
    "0.31 0.28 1.28 0.96 0.84 0.76 0.71 0.66 0.57 0.58 1.66 1.41 1.21 1.11 1.07 1.05 1.02 1.06 "
    "2.03 1.76 1.70 1.60 1.53 1.39 1.39 1.32 1.26 1.24 1.32 1.22 1.22 1.20 1.19 1.20 1.20 1.16 "
    "2.20 1.95 1.90 1.75 1.64 1.54 1.47 1.46 1.42 1.39 1.45 1.44 1.42 1.39 1.39 1.38 1.39 1.40 "
    "2.44 2.15 2.07 2.04 2.03 2.01 1.99 1.98 1.98 1.96 1.94 1.92 1.92 1.89 1.90 1.87 1.87 1.75 "
    "1.70 1.62 1.51 1.44 1.41 1.36 1.36 1.32 1.45 1.46 1.48 1.40 1.50 1.50"
)
COVALENT_RADIUS = np.concatenate([[1.0], np.array(_RADII.split(), float)])  # [87] Å; padding 1
_ROW_ENDS = (2, 10, 18, 36, 54, 86)  # the noble gases
# H He B C N O F Ne Si P S Cl Ar Ge As Se Br Kr Sb Te I Xe Po At Rn: neither metals nor called so
_NONMETALS = {1, 2, *range(5, 11), *range(14, 19), *range(32, 37), *range(51, 55), 84, 85, 86}
METALS = tuple(z for z in range(1, MAX_Z + 1) if z not in _NONMETALS)


def row(z: int) -> int:
    """Row of the periodic table, 1 to 6."""
    return int(np.searchsorted(_ROW_ENDS, z)) + 1


def group(z: int) -> int:
    """Group of the periodic table, 1 to 18; of the lanthanides 3."""
    before = (0, *_ROW_ENDS)[row(z) - 1]
    place, length = z - before, _ROW_ENDS[row(z) - 1] - before
    if place <= 2 and z != 2:
        return place
    return max(3, place + 18 - length)


def descriptors(elements: Sequence[int]) -> np.ndarray:
    """[S, 9] float64 of every element, standardised over Z = 1..86.

    Reference occupations of the s, p and d shells (GFN1-xTB), which of p and d it has, valence
    electrons, row, covalent radius, and the inverse radius.
    """
    table = shells()
    occupation = table.occupation[1:]
    rows = [row(z) - 1 for z in range(1, MAX_Z + 1)]
    radius = COVALENT_RADIUS[1:]
    columns = [
        occupation[:, 0] + occupation[:, 1],
        occupation[:, 2],
        occupation[:, 3],
        *table.shell_mask[1:, 2:].T,
        table.valence[1:],
        rows,
        radius,
        1 / radius,
    ]
    raw = np.stack(columns, axis=1).astype(float)
    return ((raw - raw.mean(0)) / raw.std(0))[np.asarray(elements) - 1]
