"""Idealised structures of a species, and whether a relaxed one is still that species.

Ligands stand on the vertices of a regular polyhedron, at a scaled sum of covalent radii from the
metal (Cordero et al., Dalton Trans. 2832 (2008), the radii of ASE). Units: Å.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.data import atomic_numbers, covalent_radii

from .species import GROUP_OF, Species, ligands

_S3 = 3**0.5 / 2
SITES = {  # directions of the coordination sites; "spy": apex first
    "lin": [(0, 0, 1), (0, 0, -1)],
    "tri": [(1, 0, 0), (-0.5, _S3, 0), (-0.5, -_S3, 0)],
    "tet": [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)],
    "sqp": [(1, 0, 0), (0, 1, 0), (-1, 0, 0), (0, -1, 0)],
    "tbp": [(1, 0, 0), (-0.5, _S3, 0), (-0.5, -_S3, 0), (0, 0, 1), (0, 0, -1)],
    "spy": [(0, 0, 1), (1, 0, -0.25), (0, 1, -0.25), (-1, 0, -0.25), (0, -1, -0.25)],
    "oct": [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)],
}
# Metal-donor distance over the sum of covalent radii, by periodic-table group: typical GFN2-xTB
# bond lengths, good to the 0.1 Å that the relaxation takes up.
BOND_SCALE = {3: 0.85, 4: 0.85, 5: 0.86, 6: 0.89, 7: 0.90, 8: 0.92, 9: 0.94, 10: 0.96}
BOND_SCALE |= {11: 0.97, 12: 0.97}
MIN_HEIGHT_SQUARED = 1.7  # Å^2, of a side-on ligand's centre above the metal

BOND, NEW_BOND = 1.25, 1.12  # distances over the sum of covalent radii: bonded, newly bonded,
OVERLAP, DISSOCIATED = 0.6, 1.22  # too close, metal-donor bond broken


class Ideal(NamedTuple):
    """An idealised structure and its intended connectivity.

    atoms: positions in Å, the metal first. ligand: [n] number of the ligand of each atom, -1 for
    the metal. donors: indices of the atoms bound to the metal. bonds: [n, n] bool, upper triangle,
    the bonds inside ligands.
    """

    atoms: Atoms
    ligand: np.ndarray
    donors: np.ndarray
    bonds: np.ndarray


def idealise(species: Species, rng: np.random.Generator) -> Ideal:
    """The idealised structure; ``rng`` chooses the site and the orientation of each ligand."""
    if species.geometry:
        atoms, ligand, donors = _place(species, rng)
    else:
        atoms = _free(species)
        ligand, donors = np.zeros(len(atoms), int), []
    inside = ligand[:, None] == ligand[None]
    return Ideal(atoms, ligand, np.array(donors, int), bonds(atoms, ligand) & inside)


def bonds(atoms: Atoms, ligand: np.ndarray, factor: float = BOND) -> np.ndarray:
    """Bonds among the ligand atoms, [n, n] bool, upper triangle: closer than factor x radii."""
    radii = covalent_radii[atoms.numbers]
    bonded = atoms.get_all_distances() < factor * (radii[:, None] + radii[None])
    bonded[ligand < 0] = False
    bonded[:, ligand < 0] = False
    return np.triu(bonded, 1)


def fault(atoms: Atoms, ideal: Ideal, slack: float) -> str:
    """Why ``atoms`` is no longer the intended species, or "" when it is.

    ``slack`` widens the limits for stretched bonds (0 for a minimum).
    """
    radii = covalent_radii[atoms.numbers]
    distances = atoms.get_all_distances() + 9 * np.eye(len(atoms))
    ratio = distances / (radii[:, None] + radii[None])
    if ratio.min() < OVERLAP:
        return "overlap"
    if np.any(~bonds(atoms, ideal.ligand, BOND + slack) & ideal.bonds):
        return "ligand bond broken"
    first, second = np.nonzero(bonds(atoms, ideal.ligand, NEW_BOND) & ~ideal.bonds)
    both_hydrogen = (atoms.numbers[first] == 1) & (atoms.numbers[second] == 1)
    if np.any((ideal.ligand[first] != ideal.ligand[second]) & ~both_hydrogen):
        return "new bond"
    if len(ideal.donors) and ratio[0, ideal.donors].max() > DISSOCIATED + slack:
        return "ligand dissociated"
    return ""


def _free(species: Species) -> Atoms:
    if species.molecule:
        atoms = molecule(species.molecule)
        return Atoms(atoms.numbers, atoms.positions)
    ligand = ligands()[species.ligands[0]]
    return Atoms(ligand.symbols, ligand.positions)


def _place(species: Species, rng: np.random.Generator) -> tuple[Atoms, np.ndarray, list[int]]:
    """Atoms, the ligand number of each, and the donors."""
    sites = np.array(SITES[species.geometry], float)
    if species.geometry == "spy":
        order = np.r_[0, 1 + rng.permutation(4)]
    else:
        order = rng.permutation(len(sites))
    symbols, rows = [species.metal], [np.zeros((1, 3))]
    tags = [-1]
    donors: list[int] = []
    for n, name in enumerate(species.ligands):
        ligand = ligands()[name]
        axis = sites[order[n]] / np.linalg.norm(sites[order[n]])
        donors += range(len(symbols), len(symbols) + ligand.hapticity)
        symbols += ligand.symbols
        tags += [n] * len(ligand.symbols)
        normal = np.cross(axis, rng.normal(size=3))
        normal /= np.linalg.norm(normal)
        frame = np.array([normal, np.cross(axis, normal), axis])
        height = _height(species.metal, name)
        rows.append(np.array([axis * height + xyz @ frame for xyz in ligand.positions]))
    return Atoms(symbols, np.concatenate(rows)), np.array(tags), donors


def _height(metal: str, name: str) -> float:
    """Distance of a ligand's origin from the metal, Å."""
    ligand = ligands()[name]
    radius, donor_radius = covalent_radii[[atomic_numbers[s] for s in (metal, ligand.symbols[0])]]
    distance = BOND_SCALE[GROUP_OF[metal]] * (radius + donor_radius) + ligand.shift
    aside = ligand.positions[0, 0] ** 2 if ligand.hapticity > 1 else 0.0
    return float(np.sqrt(max(distance * distance - aside, MIN_HEIGHT_SQUARED)))
