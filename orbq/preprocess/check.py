"""What must hold before a structure is handed to tblite, which accepts most nonsense silently.

Observed with tblite 0.8: Z <= 0, coincident atoms, non-integer charges, impossible multiplicities
and partial periodicity are computed without a word; a charge above the number of valence electrons
aborts the process.
"""

from __future__ import annotations

import numpy as np

from orbq import orbitals
from orbq.errors import InputError
from orbq.schema import Structure

# The shortest equilibrium bond is that of H2, 0.741 Å (Huber and Herzberg, Constants of Diatomic
# Molecules, 1979). At 0.4 Å its energy lies above that of two free atoms, so that neither thermal
# nor rattled structures come near; atoms closer than this are copies or errors of unit.
MIN_DISTANCE = 0.4  # Å
MIN_HEIGHT = 0.4  # Å between opposite faces of a cell: below, it is flat, or not reduced
# a cube of 1000 Å, more than any calculation of a million atoms fills; neighbours are looked for in
# boxes as wide as the cutoff, whose number this bounds
MAX_VOLUME = 1e9  # Å^3
# ten times all electrons of the heaviest atoms, and a thousand times what atoms at MIN_DISTANCE
# feel: beyond are placeholders of calculations that failed, and one would outweigh all others
MAX_ENERGY = 1e7  # eV, for each atom
MAX_FORCE = 1e6  # eV/Å


def check(structure: Structure, method: str = "GFN1-xTB") -> str | None:
    """The reason why ``structure`` cannot be used, with the value and the limit; None if it can."""
    for test in (_lengths, _elements, _finite, _labels, _cell, _extent, _overlap):
        if reason := test(structure):
            return reason
    found = (_electrons(structure, part) for part in orbitals.parts(method))
    return next((reason for reason in found if reason), None)


def check_predicted(structure: Structure) -> str | None:
    """As ``check``, for a structure that is not labelled: its labels are not looked at, a slab or a
    wire is as good as a crystal, and a periodic structure may have any multiplicity, as there are
    no electrons to count in one cell. Raises InputError as ``enclosing_box`` does."""
    bare = structure._replace(energy=None, forces=None, stress=None, dft_charges=None)
    if bare.pbc.any() and bare.spin_multiplicity >= 1:
        n_electrons = int(bare.numbers.sum()) - bare.total_charge
        bare = bare._replace(spin_multiplicity=1 + n_electrons % 2)
    if bare.pbc.any() and not bare.pbc.all():
        if reason := _lengths(bare) or _finite(bare):
            return reason
        box, _ = enclosing_box(bare.positions, bare.cell, bare.pbc)
        bare = bare._replace(cell=box, pbc=np.ones(3, bool))
    return check(bare)


def _lengths(s: Structure) -> str | None:
    n = len(s.numbers)
    if n == 0:
        return "no atoms"
    wanted = {
        "positions": (s.positions, (n, 3)),
        "forces": (s.forces, (n, 3)),
        "dft_charges": (s.dft_charges, (n,)),
        "cell": (s.cell, (3, 3)),
        "pbc": (s.pbc, (3,)),
        "stress": (s.stress, (3, 3)),
    }
    for name, (value, shape) in wanted.items():
        if value is not None and np.shape(value) != shape:
            return f"{name} has shape {np.shape(value)}: {shape} needed for {n} atoms"
    return None


def _elements(s: Structure) -> str | None:
    bad = (s.numbers < 1) | (s.numbers > orbitals.MAX_Z)
    if bad.any():
        atom = int(np.argmax(bad))
        return f"atom {atom} has atomic number {s.numbers[atom]}: 1 to {orbitals.MAX_Z} allowed"
    return None


def _finite(s: Structure) -> str | None:
    for name in ("positions", "forces", "dft_charges"):
        value = getattr(s, name)
        if value is not None and not np.isfinite(value).all():
            atom = int(np.argwhere(~np.isfinite(value))[0][0])
            return f"{name} of atom {atom} are not finite: {value[atom]}"
    for name in ("energy", "stress", "cell"):
        value = getattr(s, name)
        if value is not None and not np.isfinite(value).all():
            return f"{name} is not finite"
    return None


def _labels(s: Structure) -> str | None:
    """Energies and forces that no calculation gives."""
    if s.energy is not None and abs(s.energy) > MAX_ENERGY * len(s.numbers):
        return f"energy is {s.energy:.3g} eV: at most {MAX_ENERGY:g} eV for each atom"
    if s.forces is not None and np.abs(s.forces).max() > MAX_FORCE:
        atom = int(np.argmax(np.abs(s.forces).max(axis=1)))
        force = np.abs(s.forces[atom]).max()
        return f"forces of atom {atom} reach {force:.3g} eV/Å: at most {MAX_FORCE:g} eV/Å"
    return None


def _cell(s: Structure) -> str | None:
    if not s.pbc.any():
        return None
    if not s.pbc.all():
        flags = " ".join("T" if p else "F" for p in s.pbc)
        return f"partial periodicity (pbc {flags}): all three directions or none"
    longest = float(np.abs(s.cell).max())
    if longest > MAX_VOLUME:
        return f"the cell has a vector of {longest:.3g} Å"
    volume = abs(float(np.linalg.det(s.cell)))
    if volume < 1e-3:
        return f"periodic, but the cell has volume {volume:.3g} Å^3"
    if volume > MAX_VOLUME:
        return f"the cell has volume {volume:.3g} Å^3: at most {MAX_VOLUME:g} Å^3"
    if (height := float(heights(s.cell).min())) < MIN_HEIGHT:
        return (
            f"the cell is {height:.3g} Å thin, at least {MIN_HEIGHT} Å needed: if its vectors are "
            "only badly chosen, reduce it (ase.build.niggli_reduce)"
        )
    return None


def _extent(s: Structure) -> str | None:
    with np.errstate(over="ignore"):
        reach = np.abs(s.positions).max()
        volume = float(np.prod(np.ptp(s.positions, axis=0) + 1.0))
    if reach > MAX_VOLUME or (volume > MAX_VOLUME and not s.pbc.any()):
        return (
            f"the atoms lie in a box of {volume:.3g} Å^3, up to {reach:.3g} Å from the origin: at "
            f"most {MAX_VOLUME:g} Å^3; are the positions in Å?"
        )
    return None


def _overlap(s: Structure) -> str | None:
    pair = closest_pair(s.positions, s.cell if s.pbc.any() else None, MIN_DISTANCE)
    if pair is None:
        return None
    i, j, distance = pair
    return f"atoms {i} and {j} are {distance:.3f} Å apart: at least {MIN_DISTANCE} Å needed"


def _electrons(s: Structure, method: str) -> str | None:
    table = orbitals.shells(method)
    if s.total_charge != int(s.total_charge):
        return f"charge is {s.total_charge}: it must be a whole number"
    n_valence = float(table.valence[s.numbers].sum()) - s.total_charge
    n_all = int(s.numbers.sum()) - int(s.total_charge)
    if n_valence < -1e-9:
        valence = n_valence + s.total_charge
        return f"charge {s.total_charge:+d} is above the {valence:g} valence electrons"
    multiplicity = s.spin_multiplicity
    if multiplicity < 1 or multiplicity != int(multiplicity):
        return f"spin multiplicity is {multiplicity}: 2S + 1 is a whole number, at least 1"
    if (n_all - (multiplicity - 1)) % 2:
        kind = "odd" if n_all % 2 else "even"
        return (
            f"spin multiplicity {multiplicity} does not fit {n_all} electrons "
            f"(charge {s.total_charge:+d}): an {kind} number needs an "
            f"{'even' if n_all % 2 else 'odd'} multiplicity"
        )
    n_unpaired, n_orbitals = unpaired(s, method), int(table.slot_mask[s.numbers].sum())
    if n_unpaired > n_valence + 1e-9 or (n_valence + n_unpaired) / 2 > n_orbitals + 1e-9:
        return (
            f"spin multiplicity {multiplicity} and charge {s.total_charge:+d} do not fit "
            f"{n_valence:g} valence electrons in {n_orbitals} orbitals"
        )
    return None


def unpaired(s: Structure, method: str = "GFN1-xTB") -> int:
    """Unpaired valence electrons for xTB.

    The f electrons of Ce-Lu are in xTB's core, so their spin cannot be counted: with any of these
    elements present the lowest number that fits the valence electrons is taken.
    """
    if s.numbers.max() >= 58 and ((s.numbers >= 58) & (s.numbers <= 71)).any():
        n_valence = orbitals.shells(method).valence[s.numbers].sum() - s.total_charge
        return round(n_valence) % 2
    return int(s.spin_multiplicity) - 1


def closest_pair(
    positions: np.ndarray, cell: np.ndarray | None, limit: float
) -> tuple[int, int, float] | None:
    """The closest two atoms (i, j, distance in Å) if nearer than ``limit``, else None.

    positions: [n, 3] Å. cell: lattice vectors in rows, whose images count too, or None.
    Sweeps along the first axis, so that memory and time stay linear for ordinary structures.
    """
    atom = np.arange(len(positions))
    if cell is not None:
        positions, atom = _with_images(positions, cell, limit)
    order = np.argsort(positions[:, 0], kind="stable")
    points, atom = positions[order], atom[order]
    best: tuple[int, int, float] | None = None
    for step in range(1, len(points)):
        delta = points[step:] - points[:-step]
        near = np.flatnonzero(delta[:, 0] < limit)
        if len(near) == 0:
            break
        distance = np.sqrt((delta[near] ** 2).sum(1))
        k = int(np.argmin(distance))
        if distance[k] < (best[2] if best else limit):
            i, j = sorted((int(atom[near[k]]), int(atom[near[k] + step])))
            best = (i, j, float(distance[k]))
    return best


def heights(cell: np.ndarray) -> np.ndarray:
    """Distances [3] (Å) between opposite faces of the cell."""
    return 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)


def enclosing_box(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The cell [3, 3] Å, in open directions as wide as the atoms and 1 Å more, and its origin [3].

    Raises InputError for periodic directions whose lattice vectors span no volume.
    """
    from ase.geometry import complete_cell

    if np.linalg.matrix_rank(cell[pbc]) < pbc.sum():
        raise InputError(
            f"periodic in {pbc.tolist()} but the lattice vectors {cell.tolist()} Å span no volume:"
            " give a cell, or switch periodicity off"
        )
    full = complete_cell(np.where(pbc[:, None], cell, 0.0))
    fractional = positions @ np.linalg.inv(full)
    low, high = fractional.min(0), fractional.max(0)
    # open directions: a box that holds every atom, so that no atom lies outside the cell list
    box = np.where(pbc, 1.0, high - low + 1.0)[:, None] * full
    return box, np.where(pbc, 0.0, low) @ full


def _with_images(
    positions: np.ndarray, cell: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Atoms wrapped into the cell, and their images within ``limit`` of its faces."""
    fraction = positions @ np.linalg.inv(cell)
    fraction -= np.floor(fraction)
    margin = limit / heights(cell)
    reach = np.maximum(1, np.ceil(margin)).astype(int)
    grids = np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij")
    shifts = np.stack([g.ravel() for g in grids], axis=1)
    images = fraction[None] + shifts[:, None]
    keep = ((images > -margin) & (images < 1 + margin)).all(-1)
    return images[keep] @ cell, np.nonzero(keep)[1]
