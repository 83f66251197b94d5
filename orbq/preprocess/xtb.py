"""Orbital charges, energy and forces of one structure from tblite.

With P the density matrix and S the overlap, ``M = P S`` restricted to an atom's orbitals and
``B = (M + M^T)/2`` its on-site block, whose diagonal are the Mulliken populations.

tblite orders the orbitals of a shell by m = -l..l with z as polar axis; e3nn's 1o is (x, y, z) and
its 2e has y as polar axis. Handed ``positions[:, [2, 0, 1]]``, tblite's order *is* e3nn's order;
gradients are mapped back with ``[:, [1, 2, 0]]``.

References: GFN1-xTB, J. Chem. Theory Comput. 13, 1989 (2017); GFN2-xTB, J. Chem. Theory Comput. 15,
1652 (2019); IPEA1-xTB, Chem. Sci. 8, 4879 (2017); tblite, github.com/tblite/tblite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tblite.interface as tblite
from tblite.exceptions import TBLiteRuntimeError, TBLiteValueError

from orbq import orbitals, units
from orbq.preprocess.check import heights, unpaired
from orbq.schema import Labels, Structure

TO_TBLITE = np.array([2, 0, 1])
FROM_TBLITE = np.array([1, 2, 0])
KELVIN = 3.166808578545117e-6  # Boltzmann's constant in Hartree/K, as tblite documents it

# Bounds on a sane result. A charge-collapsed state (the La complex ABEVAG of tmQMg: charge -16.6 on
# La) converges without any error and is recognised by these alone.
CHARGE_SUM_TOLERANCE = 1e-6  # e; the sum is exact to 1e-13 in a finished calculation
POPULATION_RANGE = (-0.2, 2.1)  # electrons in one orbital; Mulliken populations may stray from 0..2
MAX_ATOMIC_CHARGE = 4.0  # e


class Settings(NamedTuple):
    """Settings of the xTB calculation.

    accuracy: tblite's numerical accuracy; 0.1 gives orbital charges to 4e-6 e (1.0: 8e-5).
    temperature: electronic temperature, K. max_iter: SCF iterations.
    spin_polarization: add spin-polarised terms to GFN1-xTB or GFN2-xTB.
    min_height: smallest distance (Å) between opposite faces of a periodic cell; tblite samples the
    Gamma point alone, which says little about smaller cells.
    """

    accuracy: float = 0.1
    temperature: float = 300.0
    max_iter: int = 250
    spin_polarization: bool = False
    min_height: float = 10.0


DEFAULTS = Settings()


class LabelError(RuntimeError):
    """xTB has no trustworthy result for this structure; the message says why."""


def version() -> str:
    """Version of the tblite library in use."""
    from tblite import library

    return ".".join(str(part) for part in library.get_version())


def label(structure: Structure, method: str = "GFN1-xTB", settings: Settings = DEFAULTS) -> Labels:
    """Orbital-resolved charges (47 on-site components), energy and forces of one structure.

    ``structure`` must have passed ``check``. A calculation that fails, or whose result is not sane,
    is tried again at 1000 K, at 2000 K and with weaker mixing; ``note`` says which one worked.
    Raises LabelError when none did, or when the cell is too small for the Gamma point.
    """
    _refuse(structure, method, settings)
    reasons = []
    for note, temperature, damping in _ladder(settings):
        try:
            result = _singlepoint(structure, method, settings, temperature, damping)
            return _labels(structure, method, result, note)
        except (TBLiteRuntimeError, TBLiteValueError, LabelError) as error:
            reasons.append(f"{note or f'{temperature:g} K'}: {' '.join(str(error).split())}")
    raise LabelError("; ".join(reasons))


def _ladder(settings: Settings) -> Iterator[tuple[str, float, float | None]]:
    """(note, temperature in K, mixer damping or None) of each attempt."""
    yield "", settings.temperature, None
    for temperature in (1000.0, 2000.0):
        if temperature > settings.temperature:
            yield f"{temperature:g} K", temperature, None
    yield "mixer damping 0.8", settings.temperature, 0.8


def _refuse(structure: Structure, method: str, settings: Settings) -> None:
    n_valence = orbitals.shells(method).valence[structure.numbers].sum()
    if n_valence - structure.total_charge < -1e-9:  # would abort the process
        raise LabelError(f"charge {structure.total_charge:+d} above the valence electrons")
    if settings.spin_polarization and method == "IPEA1-xTB":
        raise LabelError("IPEA1-xTB has no spin-polarised form")
    if structure.pbc.any():
        height = float(heights(structure.cell).min())
        if height < settings.min_height:
            raise LabelError(
                f"cell height {height:.2f} Å below {settings.min_height:g} Å: xTB samples the "
                "Gamma point alone; use a supercell"
            )


def _singlepoint(
    structure: Structure,
    method: str,
    settings: Settings,
    temperature: float,
    damping: float | None,
) -> Any:
    periodic = structure.pbc.any()
    calculator = tblite.Calculator(
        method,
        structure.numbers,
        structure.positions[:, TO_TBLITE] / units.BOHR,
        float(structure.total_charge),
        unpaired(structure, method),
        structure.cell[:, TO_TBLITE] / units.BOHR if periodic else None,
        np.ones(3, bool) if periodic else None,
        logger=_silence,
    )
    if settings.spin_polarization:
        calculator.add("spin-polarization", 1.0)
    calculator.set("verbosity", 0)
    calculator.set("accuracy", settings.accuracy)
    calculator.set("max-iter", settings.max_iter)
    calculator.set("temperature", temperature * KELVIN)
    calculator.set("save-integrals", 1)
    if damping is not None:
        calculator.set("mixer-damping", damping)
    return calculator.singlepoint()


def _silence(message: str) -> None:
    """Take tblite's printout; failures come as exceptions."""


def _labels(structure: Structure, method: str, result: Any, note: str) -> Labels:
    density = result.get("density-matrix")
    if density.ndim == 3:  # spin-up and spin-down
        density = density.sum(0)
    blocks = onsite_blocks(density, result.get("overlap-matrix"), structure.numbers, method)
    forces = -result.get("gradient")[:, FROM_TBLITE] * units.HARTREE_PER_BOHR
    energy = float(result.get("energy")) * units.HARTREE
    charges = result.get("charges")
    _accept(structure, blocks, charges, energy, forces)
    onsite = orbitals.onsite_from_blocks(blocks, structure.numbers, method)
    return Labels(onsite, energy, forces, note)


def onsite_blocks(
    density: np.ndarray, overlap: np.ndarray, numbers: np.ndarray, method: str
) -> np.ndarray:
    """Symmetrised on-site blocks of PS, [n, 10, 10], in slot order; absent slots are 0.

    density, overlap: [n_ao, n_ao] in tblite's orbital order.
    """
    rows = _orbital_of_slot(numbers, method)  # [n, 10], n_ao where the slot is absent
    zero = np.zeros((1, density.shape[1]))
    p = np.concatenate([density, zero])[rows]  # [n, 10, n_ao]
    s = np.concatenate([overlap, zero])[rows]
    m = p @ s.transpose(0, 2, 1)
    return 0.5 * (m + m.transpose(0, 2, 1))


def _orbital_of_slot(numbers: np.ndarray, method: str) -> np.ndarray:
    order = orbitals.shells(method).order
    slots = [order[z] for z in numbers.tolist()]
    counts = np.array([len(o) for o in slots])
    n_orbitals = int(counts.sum())
    rows = np.full((len(numbers), orbitals.N_SLOTS), n_orbitals)
    atom = np.repeat(np.arange(len(numbers)), counts)
    rows[atom, np.concatenate(slots)] = np.arange(n_orbitals)
    return rows


def _accept(
    structure: Structure,
    blocks: np.ndarray,
    charges: np.ndarray,
    energy: float,
    forces: np.ndarray,
) -> None:
    """Raise LabelError unless the result is finite, conserves charge and is physically possible."""
    if not (np.isfinite(blocks).all() and np.isfinite(energy) and np.isfinite(forces).all()):
        raise LabelError("result is not finite")
    surplus = float(charges.sum()) - structure.total_charge
    if abs(surplus) > CHARGE_SUM_TOLERANCE:
        raise LabelError(f"charges sum to {surplus:+.2e} e more than the total charge")
    largest = int(np.argmax(np.abs(charges)))
    if abs(charges[largest]) > MAX_ATOMIC_CHARGE:
        symbol = orbitals.SYMBOLS[structure.numbers[largest]]
        raise LabelError(
            f"charge collapse: {charges[largest]:+.1f} e on atom {largest} ({symbol}), "
            f"at most {MAX_ATOMIC_CHARGE:g} is sane"
        )
    populations = np.einsum("nkk->nk", blocks)
    low, high = POPULATION_RANGE
    if populations.min() < low or populations.max() > high:
        raise LabelError(
            f"orbital populations from {populations.min():.2f} to {populations.max():.2f}: "
            f"{low:g} to {high:g} is sane"
        )
