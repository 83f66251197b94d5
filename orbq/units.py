"""Units: everything inside is eV, Å and e; these factors bring other units in at the door.

Multiply a value in the named unit by its factor. They equal ``ase.units`` (CODATA 2014), so that
energies read through ASE and energies converted here agree to the last digit.
"""

from __future__ import annotations

HARTREE = 27.211386024367243  # eV
BOHR = 0.5291772105638411  # Å
HARTREE_PER_BOHR = HARTREE / BOHR  # eV/Å
KCAL_PER_MOL = 0.04336410390059322  # eV
MILLI = 1e-3  # meV in eV, and meV/Å in eV/Å
