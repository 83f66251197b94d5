"""Geometries of a species: near the DFT minimum and around it, found with GFN2-xTB.

``relaxed`` is the GFN2-xTB minimum. There, the DFT and GFN2-xTB forces differ by a bias
``b = F_DFT - F_xTB``; the minimum of ``E_xTB(x) - b.(x - x0) + k/2 |x - x0|^2`` approximates the
DFT one: ``corrected``. The cubic through the two DFT energies and forces has a minimum on the line
between them; from it a thermal (``md``) and a rattled structure with one stretched metal-ligand
bond (``stretched``) are made. Units: eV, Å, K, fs.

GFN2-xTB: Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

from .build import Ideal, fault

FORCE_LIMIT = 0.10  # eV/Å, of a GFN2-xTB minimum
CORRECTION_STIFFNESS = (6.0, 20.0, 60.0)  # eV/Å^2, stiffer where xTB is too soft for the bias
CORRECTION_REACH = 0.25  # Å, beyond which a correction has run away
MD_STIFFNESS = 2.0  # eV/Å^2
MD_TEMPERATURE = (300.0, 800.0)  # K
SLACK = 0.14  # widens the connectivity limits for structures off the minimum


class RejectedError(Exception):
    """A structure that is not wanted: the complex fell apart, the SCF failed, the gap is small."""


class Point(NamedTuple):
    """A structure with its DFT energy (eV) and forces [n, 3] (eV/Å); positions [n, 3] (Å)."""

    positions: np.ndarray
    energy: float
    forces: np.ndarray


class Geometry(NamedTuple):
    """A structure before DFT: positions [n, 3] (Å), temperature (K), why it is rejected or ""."""

    positions: np.ndarray
    temperature: float
    fault: str


class BiasedXTB(Calculator):
    """GFN2-xTB plus a constant force ``bias`` [n, 3] and a harmonic restraint to ``origin``."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (as ASE declares it)

    def __init__(self, charge: int, bias: np.ndarray, origin: np.ndarray, stiffness: float) -> None:
        super().__init__()
        self.charge, self.bias, self.origin, self.stiffness = charge, bias, origin, stiffness

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        """Energy and forces of the biased potential, without reuse of an earlier density."""
        super().calculate(atoms, properties, system_changes)
        bare = _with_xtb(self.atoms, self.charge)  # type: ignore[arg-type]
        d = bare.positions - self.origin
        harmonic = 0.5 * self.stiffness * float((d * d).sum())
        energy = bare.get_potential_energy() - float((self.bias * d).sum()) + harmonic
        forces = bare.get_forces() + self.bias - self.stiffness * d
        self.results = {"energy": energy, "forces": forces}


def xtb(charge: int, method: str = "GFN2-xTB") -> Calculator:
    """The tblite calculator for a closed-shell species."""
    from tblite.ase import TBLite

    return TBLite(method=method, charge=charge, multiplicity=1, verbosity=0, max_iterations=300)


def relax(ideal: Ideal, charge: int, rng: np.random.Generator) -> Geometry:
    """The GFN2-xTB minimum near an idealised structure.

    Raises RejectedError when the complex falls apart on the way.
    """
    atoms = ideal.atoms.copy()
    atoms.rattle(0.02, rng=rng)
    atoms.calc = xtb(charge)
    FIRE(atoms, logfile=None, maxstep=0.15).run(fmax=FORCE_LIMIT, steps=120)
    why = fault(atoms, ideal, 0.0)
    if why:
        raise RejectedError(why)
    return Geometry(atoms.positions, 0.0, "")


def correct(ideal: Ideal, charge: int, relaxed: Point) -> Geometry:
    """The approximate DFT minimum, from the DFT forces at the GFN2-xTB minimum.

    Raises RejectedError when no restraint keeps the structure near where it began.
    """
    bias = _bias(ideal, charge, relaxed.positions, relaxed.forces)
    for stiffness in CORRECTION_STIFFNESS:
        atoms = ideal.atoms.copy()
        atoms.positions = relaxed.positions
        atoms.calc = BiasedXTB(charge, bias, relaxed.positions, stiffness)
        if _stays_near(atoms, relaxed.positions):
            return Geometry(atoms.positions, 0.0, fault(atoms, ideal, SLACK))
    raise RejectedError("no stable correction")


def perturb(
    ideal: Ideal, charge: int, relaxed: Point, corrected: Point, rng: np.random.Generator
) -> dict[str, Geometry]:
    """Structures around the DFT minimum: ``md`` (300 to 800 K) and ``stretched``."""
    s = line_minimum(relaxed, corrected)
    base = ideal.atoms.copy()
    base.positions = relaxed.positions + s * (corrected.positions - relaxed.positions)
    forces = (1 - s) * relaxed.forces + s * corrected.forces
    bias = _bias(ideal, charge, base.positions, forces)
    temperature = float(rng.uniform(*MD_TEMPERATURE))
    atoms = base.copy()
    atoms.calc = BiasedXTB(charge, bias, base.positions.copy(), MD_STIFFNESS)
    # half of the kinetic energy goes into the potential: start at twice the temperature
    thermalize_momenta(atoms, 2 * temperature, exact_temperature=True, rng=rng)
    Stationary(atoms)
    ZeroRotation(atoms)
    VelocityVerlet(atoms, 1.0 * units.fs).run(int(rng.integers(40, 70)))
    pulled = _pull(base, ideal, rng)
    return {
        "md": Geometry(atoms.positions, temperature, fault(atoms, ideal, SLACK)),
        "stretched": Geometry(pulled.positions, 0.0, fault(pulled, ideal, SLACK)),
    }


def line_minimum(first: Point, second: Point) -> float:
    """Where on the line from ``first`` (0) to ``second`` (1) the cubic through both is lowest.

    The cubic matches the two energies and directional derivatives; searched on [-0.3, 1.5].
    """
    step = second.positions - first.positions
    t = np.linspace(-0.3, 1.5, 181)
    a, b = first.energy, second.energy
    ga, gb = -(first.forces * step).sum(), -(second.forces * step).sum()
    cubic = (2 * (a - b) + ga + gb) * t**3 + (3 * (b - a) - 2 * ga - gb) * t**2 + ga * t + a
    return float(t[np.argmin(cubic)])


def rattled(positions: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """``positions`` with Gaussian noise of ``sigma`` (Å) on every coordinate."""
    return positions + sigma * rng.standard_normal(positions.shape)


def _with_xtb(atoms: Atoms, charge: int) -> Atoms:
    bare = Atoms(atoms.numbers, atoms.positions)
    bare.calc = xtb(charge)
    return bare


def _bias(ideal: Ideal, charge: int, positions: np.ndarray, forces: np.ndarray) -> np.ndarray:
    """DFT minus GFN2-xTB forces [n, 3] without their mean, so that nothing drifts."""
    atoms = Atoms(ideal.atoms.numbers, positions)
    bias = forces - _with_xtb(atoms, charge).get_forces()
    return bias - bias.mean(0)


def _stays_near(atoms: Atoms, origin: np.ndarray) -> bool:
    """Relax ``atoms`` in place; whether no atom went farther than CORRECTION_REACH."""
    try:
        for _ in FIRE(atoms, logfile=None, maxstep=0.1).irun(fmax=FORCE_LIMIT, steps=80):
            moved = np.linalg.norm(atoms.positions - origin, axis=1).max()
            if not moved < CORRECTION_REACH:  # also when it is not a number
                return False
    except (RuntimeError, ValueError, ArithmeticError):  # xTB did not converge on the way
        return False
    return True


def _pull(base: Atoms, ideal: Ideal, rng: np.random.Generator) -> Atoms:
    """Rattled (hydrogen more), and with one ligand moved along its bond by -0.12 to 0.35 Å."""
    pulled, start = base.copy(), base.positions
    sigma = rng.uniform(0.02, 0.06)
    weight = np.where(base.numbers == 1, 1.0, 0.7)[:, None]
    pulled.positions += rng.normal(scale=sigma, size=start.shape) * weight
    if len(ideal.donors):
        moved = ideal.ligand == ideal.ligand[rng.choice(ideal.donors)]
        donors = [i for i in ideal.donors if moved[i]]
        bond = start[donors].mean(0) - start[0]
        pulled.positions[moved] += bond / np.linalg.norm(bond) * rng.uniform(-0.12, 0.35)
    return pulled
