"""DFT labels with PySCF: PBE/def2-SVP energy, forces, atomic charges, dipole, HOMO-LUMO gap.

Restricted Kohn-Sham singlets; def2 effective core potentials beyond krypton; Coulomb integrals by
density fitting (def2-universal-jfit); no dispersion. A crude calculation on a small grid starts the
accurate one. Units: PySCF's atomic units are converted here to eV, Å, e.

PBE: Perdew, Burke, Ernzerhof, Phys. Rev. Lett. 77, 3865 (1996); def2: Weigend, Ahlrichs,
Phys. Chem. Chem. Phys. 7, 3297 (2005); PySCF: Sun et al., J. Chem. Phys. 153, 024109 (2020).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.data import atomic_numbers

from orbq.errors import OrbqError

from .sampling import RejectedError
from .species import METALS

# Radial x angular grid points per atom (NWChem pruning). Against PySCF's level 5, in complexes of
# Fe, Cu, Pd, Hf with 6 to 10 atoms: energies within 1.7 meV, forces within 0.033 eV/Å. Analytic
# forces leave out the grid's response: within 0.013 eV/Å of finite differences of the energy.
GRID = {
    "H": (30, 110),
    **dict.fromkeys(("C", "N", "O", "F"), (45, 194)),
    **dict.fromkeys(("P", "S", "Cl", "Br"), (50, 302)),
    **dict.fromkeys(METALS, (70, 434)),
}
CONVERGENCE = 1e-7  # Hartree
MIN_GAP = 0.5  # eV; below it a single-reference singlet is not to be trusted
MAX_FORCE = 15.0  # eV/Å


class DFTLabels(NamedTuple):
    """Labels of one structure. Units eV, Å, e.

    energy; forces [n, 3]; mulliken, lowdin: atomic charges [n]; dipole [3] about the centre of
    mass (e Å); gap (eV); density: AO density matrix, to start the next SCF from.
    """

    energy: float
    forces: np.ndarray
    mulliken: np.ndarray
    lowdin: np.ndarray
    dipole: np.ndarray
    gap: float
    density: np.ndarray


def require_pyscf() -> None:
    """Raises OrbqError with the remedy when PySCF is not installed."""
    try:
        import pyscf  # noqa: F401
    except ImportError as error:
        raise OrbqError(
            f"the DFT labels need PySCF, which cannot be imported ({error}). "
            "Install it with: pip install 'orbq[make-data]'. "
            "Geometries alone need no PySCF: --structures-only."
        ) from error


def level_of_theory() -> str:
    """The level that goes into every frame's ``level`` field."""
    import pyscf

    version = ".".join(pyscf.__version__.split(".")[:2])
    basis = "PBE/def2-SVP (def2-ECP for Z>36), RI-J def2-universal-JFIT"
    return f"{basis}, RKS singlet, PySCF {version}"


def label(atoms: Atoms, charge: int, density: np.ndarray | None = None) -> DFTLabels:
    """DFT labels of one structure; ``density`` starts the SCF.

    Raises RejectedError when the SCF does not converge, the gap is below MIN_GAP, or a force
    component is above MAX_FORCE.
    """
    mf = _converge(_molecule(atoms, charge), density)
    if not mf.converged:
        raise RejectedError("SCF not converged")
    occupied = mf.mo_occ > 0
    gap = float(mf.mo_energy[~occupied].min() - mf.mo_energy[occupied].max()) * units.Hartree
    if gap < MIN_GAP:
        raise RejectedError(f"gap {gap:.2f} eV")
    dm = mf.make_rdm1()
    mulliken, lowdin = _charges(mf, dm)
    dipole = _dipole(mf.mol, dm, atoms.get_center_of_mass() / units.Bohr)
    forces = -mf.nuc_grad_method().kernel() * units.Hartree / units.Bohr
    largest = np.abs(forces).max()
    if not largest <= MAX_FORCE:
        raise RejectedError(f"force {largest:.1f} eV/A")
    energy = float(mf.e_tot * units.Hartree)
    return DFTLabels(energy, forces, mulliken, lowdin, dipole, gap, dm)


def _molecule(atoms: Atoms, charge: int) -> Any:
    from pyscf import gto, lib

    lib.num_threads(1)
    symbols = atoms.get_chemical_symbols()
    return gto.M(
        atom=list(zip(symbols, atoms.positions.tolist(), strict=True)),
        charge=charge,
        spin=0,
        basis="def2-svp",
        ecp={s: "def2-svp" for s in set(symbols) if atomic_numbers[s] > 36},
        verbose=0,
        max_memory=3000,
    )


def _converge(mol: Any, density: np.ndarray | None) -> Any:
    """The converged (or not) restricted Kohn-Sham object: crude first, then accurate."""
    from pyscf import dft

    mf = dft.RKS(mol, xc="pbe").density_fit(auxbasis="def2-universal-jfit")
    mf.with_df.build()  # three-centre integrals in memory: much faster Coulomb terms per cycle
    mf.grids.level, mf.conv_tol, mf.max_cycle, mf.conv_check = 0, 1e-3, 60, False
    mf.kernel(dm0=density)
    mf.grids.reset()
    mf.grids.atom_grid, mf.conv_tol, mf.max_cycle = GRID, CONVERGENCE, 40
    mf.kernel(dm0=mf.make_rdm1())
    return mf


def _charges(mf: Any, dm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mulliken and Löwdin atomic charges [n] (e)."""
    overlap = mf.get_ovlp()
    w, u = np.linalg.eigh(overlap)
    root = (u * np.sqrt(w)) @ u.T
    cores = mf.mol.atom_charges()  # effective core charges under a pseudopotential
    slices = [(start, stop) for *_, start, stop in mf.mol.aoslice_by_atom()]

    def charges(populations: np.ndarray) -> np.ndarray:
        return cores - np.array([populations[start:stop].sum() for start, stop in slices])

    mulliken = np.einsum("ij,ji->i", dm, overlap)
    lowdin = np.einsum("ij,jk,ki->i", root, dm, root)
    return charges(mulliken), charges(lowdin)


def _dipole(mol: Any, dm: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Dipole [3] about ``origin`` (Bohr), in e Å."""
    with mol.with_common_orig(origin):
        nuclear = np.einsum("i,ix->x", mol.atom_charges(), mol.atom_coords() - origin)
        electronic = np.einsum("xij,ji->x", mol.intor_symmetric("int1e_r"), dm)
    return (nuclear - electronic) * units.Bohr
