"""One trajectory of xTB dynamics, each frame kept as it comes.

The random numbers after a frame depend on the seed, the trajectory and the frame alone, and a frame
is kept with its momenta to the last bit: a trajectory that was stopped goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevin import Langevin

from orbq.preprocess import store, supervise, wire
from orbq.preprocess.check import check
from orbq.preprocess.neighbors import molecule_edges
from orbq.preprocess.schedule import Resources
from orbq.schema import Structure

TIMESTEP = 1.0  # fs
ACCURACY = 1.0  # tblite's own default: forces to 1e-4 eV/Å, in a quarter less time than labels take
FRICTION = 0.02  # 1/fs
APART = 5.0  # Å; pieces further from each other than this do not belong together


class Sampling(NamedTuple):
    """temperatures: K; the trajectories take them in turns. frames: of each trajectory, one every
    ``every`` fs after ``before`` fs. seed: others give other structures. method: of xTB."""

    temperatures: tuple[float, ...] = (300.0, 600.0, 1000.0)
    trajectories: int = 12
    frames: int = 200
    every: float = 15.0
    before: float = 150.0
    seed: int = 0
    method: str = "GFN1-xTB"


class Ended(NamedTuple):
    """A trajectory that ended before its last frame. start: where it began. frames: it has."""

    trajectory: int
    start: str
    temperature: float
    frames: int
    reason: str


class _EndError(RuntimeError):
    """A trajectory cannot go on; the message says why."""


class _Forces(Calculator):
    """xTB energies (eV) and forces (eV/Å) of one structure from a supervised process."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's own form)

    def __init__(self, structure: Structure, method: str, resources: Resources) -> None:
        super().__init__()
        self.spec = supervise.Spec(supervise.WORKER, resources.blas)
        settings = {"accuracy": ACCURACY}
        self.note = {"method": method, "settings": settings, "timeout": resources.timeout}
        self.arrays = {
            "offsets": np.array([0, len(structure.numbers)]),
            "numbers": np.asarray(structure.numbers),
            "total_charge": np.array([structure.total_charge]),
            "spin_multiplicity": np.array([structure.spin_multiplicity]),
            "cell": structure.cell[None],
            "pbc": structure.pbc[None],
        }

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        arrays = {**self.arrays, "positions": np.asarray(self.atoms.positions)}
        data = wire.pack(wire.Message(arrays, self.note))
        reply = wire.unpack(supervise.label_chunk(data, self.spec))
        if reply.note["failures"]:
            raise _EndError(reply.note["failures"][0][1])
        self.results = {
            "energy": float(reply.arrays["xtb_energy"][0]),
            "forces": np.array(reply.arrays["xtb_forces"]),
        }


class Trajectory(NamedTuple):
    """number, temperature (K), structure it begins from, its name, and the file of its frames:
    positions (Å) and momenta (ASE's unit) [frames, 2, n, 3], float64."""

    number: int
    temperature: float
    structure: Structure
    start: str
    path: Path

    def frames(self) -> np.ndarray:
        """[frames, 2, n, 3] so far; a half-written one is left out."""
        data = self.path.read_bytes() if self.path.exists() else b""
        shape = (2, len(self.structure.numbers), 3)
        whole = len(data) // (8 * math.prod(shape))
        return np.frombuffer(data, float, whole * math.prod(shape)).reshape(whole, *shape)

    def n_frames(self) -> int:
        """How many there are."""
        return len(self.frames())

    def ended(self) -> Ended | None:
        """Why it ended early, if it did."""
        note = self.path.with_suffix(".end")
        if not note.exists():
            return None
        reason = note.read_text(encoding="utf-8")
        return Ended(self.number, self.start, self.temperature, self.n_frames(), reason)

    def atoms(self, positions: np.ndarray) -> Atoms:
        """The structure with other positions, and what a data set reads of it."""
        s = self.structure
        atoms = Atoms(s.numbers, positions, cell=s.cell, pbc=s.pbc)
        atoms.info |= {"total_charge": s.total_charge, "spin_multiplicity": s.spin_multiplicity}
        if s.group:
            atoms.info["group"] = s.group
        return atoms

    def run(self, sampling: Sampling, resources: Resources, on_frame: Callable[[], None]) -> None:
        """Go on to the last frame, or to where it ends."""
        kept = self.frames()
        atoms = self.atoms(kept[-1, 0] if len(kept) else self.structure.positions)
        if len(kept):
            atoms.set_momenta(kept[-1, 1])
        atoms.calc = _Forces(self.structure, sampling.method, resources)
        pieces = _pieces(self.structure.positions)
        with self.path.open("ab") as file:
            file.truncate(kept.nbytes)
            try:
                for frame in range(len(kept), sampling.frames):
                    rng = np.random.default_rng([sampling.seed, self.number, frame])
                    time = sampling.every
                    if frame == 0:
                        _thermalise(atoms, self.temperature, rng)
                        time += sampling.before
                    _propagate(atoms, self.temperature, time, rng)
                    moved = self.structure._replace(positions=atoms.positions)
                    if reason := check(moved, sampling.method):
                        raise _EndError(reason)
                    if not moved.pbc.any() and _pieces(atoms.positions) > pieces:
                        raise _EndError(f"it fell into pieces more than {APART:g} Å apart")
                    file.write(np.stack([atoms.positions, atoms.get_momenta()]).tobytes())
                    file.flush()
                    on_frame()
            except _EndError as error:
                store.write_atomically(self.path.with_suffix(".end"), str(error))


def _thermalise(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Give momenta of Maxwell and Boltzmann's distribution at ``temperature`` K."""
    spread = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * spread[:, None])


def _propagate(atoms: Atoms, temperature: float, time: float, rng: np.random.Generator) -> None:
    """Move for ``time`` fs at ``temperature`` K."""
    dynamics = Langevin(
        atoms,
        TIMESTEP * units.fs,
        temperature_K=temperature,
        friction=FRICTION / units.fs,
        rng=rng,
        fixcm=False,  # a fixed centre of mass heats light atoms beside heavy ones
    )
    dynamics.run(round(time / TIMESTEP))


def _pieces(positions: np.ndarray) -> int:
    """Into how many pieces further than APART from each other the atoms fall."""
    _, senders, receivers = molecule_edges(positions, np.array([len(positions)]), APART)
    piece, before = np.arange(len(positions)), np.zeros(0, int)
    while not np.array_equal(piece, before):
        before = piece.copy()
        np.minimum.at(piece, receivers, piece[senders])
        piece = piece[piece]
    return len(np.unique(piece))
