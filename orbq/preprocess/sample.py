"""Structures for labels alone: xTB dynamics at several temperatures, from the structures at hand.

What a network learns of them by the labels of xTB spares reference calculations. Every trajectory
is Langevin dynamics of its own (ASE's, of steps of 1 fs: frames are wanted, not exact motion); its
forces come from the supervised processes that label (``supervise``), so that what ends such a
process ends one trajectory at most.

Each frame is kept as it comes, with its momenta, in ``OUT.partial``, and the random numbers after
it depend on the seed, the trajectory and the frame alone: a sample that was stopped goes on, and is
the one it would have been.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.io.extxyz import write_xyz
from ase.md.langevin import Langevin

from orbq.errors import InputError
from orbq.orbitals import METHODS
from orbq.preprocess import store, supervise, wire
from orbq.preprocess.check import check
from orbq.preprocess.frames import find_sources
from orbq.preprocess.links import make_directory, refuse_links
from orbq.preprocess.neighbors import molecule_edges
from orbq.preprocess.read import FIRST_FOUND, Failure, Keys, Reader
from orbq.preprocess.schedule import Resources, check_resources, open_pool
from orbq.preprocess.text import OPENERS
from orbq.schema import Structure

TIMESTEP = 1.0  # fs
ACCURACY = 1.0  # tblite's own default: forces to 1e-4 eV/Å, in a quarter less time than labels take
FRICTION = 0.02  # 1/fs
APART = 5.0  # Å; pieces further from each other than this do not belong together
SETTINGS = "settings.json"
PARTIAL = ".partial"
MAX_TEMPERATURE = 10_000.0  # K


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


DEFAULTS, HERE = Sampling(), Resources()


class Ended(NamedTuple):
    """A trajectory that ended before its last frame. start: where it began. frames: it has."""

    trajectory: int
    start: str
    temperature: float
    frames: int
    reason: str


class Sampled(NamedTuple):
    """frames, trajectories: written. starts: structures that could begin one; left_out: those that
    could not. ended: trajectories that ended early."""

    frames: int
    trajectories: int
    starts: int
    left_out: list[Failure]
    ended: list[Ended]


def sample(
    inputs: Sequence[str | Path],
    out: Path,
    sampling: Sampling = DEFAULTS,
    keys: Keys = FIRST_FOUND,
    resources: Resources = HERE,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sampled:
    """Write the frames of trajectories that begin at structures of the files, in extxyz.

    inputs: files that ASE reads. Their structures are taken at random, none twice before all were
    taken once. out: an extxyz file, also compressed; it holds geometries, total charges, spin
    multiplicities and groups, no labels. on_progress(frames, of how many). What is there of an
    interrupted call is gone on with.

    A trajectory ends before its last frame where xTB has no trustworthy result, or where the
    structure falls into pieces further than 5 Å apart; it keeps the frames before.

    Raises InputError for a setting out of range, for ``out`` that exists or is no extxyz, for input
    without a usable structure, and when no trajectory reaches its first frame.
    """
    _check_settings(sampling)
    check_resources(resources)
    _check_out(out)
    reader = Reader(find_sources(inputs), keys)
    starts, left_out = _starts(reader, sampling.method)
    place = out.with_name(out.name + PARTIAL)
    _workspace(place, _identity(reader, sampling))
    trajectories = _trajectories(starts, reader, sampling, place)
    _run_all(trajectories, sampling, resources, on_progress)
    ended = [found for one in trajectories if (found := one.ended())]
    frames = [one.n_frames() for one in trajectories]
    _write(out, trajectories)
    shutil.rmtree(place)
    return Sampled(sum(frames), sum(map(bool, frames)), len(starts), left_out, ended)


def _check_settings(sampling: Sampling) -> None:
    for name in ("trajectories", "frames"):
        if getattr(sampling, name) < 1:
            raise InputError(f"--{name} {getattr(sampling, name)}: at least 1 is needed")
    if not sampling.temperatures:
        raise InputError("--temperature: at least one is needed")
    for kelvin in sampling.temperatures:
        if not 0 < kelvin <= MAX_TEMPERATURE:
            raise InputError(f"--temperature {kelvin:g}: above 0, at most {MAX_TEMPERATURE:g} K")
    if not TIMESTEP <= sampling.every < math.inf:
        raise InputError(f"--every {sampling.every:g}: at least a step of {TIMESTEP:g} fs")
    if not 0 <= sampling.before < math.inf:
        raise InputError(f"--before {sampling.before:g}: at least 0 fs")
    if sampling.seed < 0:
        raise InputError(f"--seed {sampling.seed}: at least 0")
    if sampling.method not in METHODS:
        raise InputError(f"--method {sampling.method!r}: one of {', '.join(METHODS)}")


def _check_out(out: Path) -> None:
    bare = out.with_suffix("") if out.suffix in OPENERS else out
    if bare.suffix not in (".extxyz", ".xyz"):
        raise InputError(f"--out {out}: name a file that ends in .extxyz (or .extxyz.gz)")
    if out.exists():
        raise InputError(f"--out {out} exists: name another file, or take it away")


def _starts(reader: Reader, method: str) -> tuple[list[Structure], list[Failure]]:
    starts: list[Structure] = []
    left_out: list[Failure] = []
    for item in reader:
        if isinstance(item, Failure):
            left_out.append(item)
            continue
        bare = item._replace(energy=None, forces=None, stress=None, dft_charges=None)
        if reason := check(bare, method):
            number, frame = item.source
            left_out.append(Failure(reader.sources[number].name, frame, reason))
        else:
            starts.append(bare)
    if not starts:
        told = f"; {left_out[0].reason}" if left_out else ""
        names = ", ".join(source.name for source in reader.sources[:3])
        raise InputError(f"{names}: no structure that a trajectory could begin from{told}")
    return starts, left_out


def _identity(reader: Reader, sampling: Sampling) -> dict[str, Any]:
    return {
        "input": [source.sha256 for source in reader.sources],
        "keys": {name: key for name, key in reader.keys._asdict().items() if key},
        **sampling._asdict(),
        "temperatures": list(sampling.temperatures),
    }


def _workspace(place: Path, identity: dict[str, Any]) -> None:
    """The directory of what is finished; that of another sample is refused."""
    refuse_links(place, "--out")
    make_directory(place, "--out")
    settings = place / SETTINGS
    if not settings.exists():
        store.write_atomically(settings, json.dumps(identity, indent=1))
        return
    try:
        there = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{settings} cannot be read ({error}): take {place} away") from error
    if there != identity:
        differ = [k for k in identity if not isinstance(there, dict) or there.get(k) != identity[k]]
        raise InputError(
            f"{place} holds a part of another sample ({', '.join(differ)} differ): give the same "
            "command to go on with it, take it away, or choose another --out"
        )


# --------------------------------------------------------------------------- one trajectory


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


class _Trajectory(NamedTuple):
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


# --------------------------------------------------------------------------- all of them


def _trajectories(
    starts: Sequence[Structure], reader: Reader, sampling: Sampling, place: Path
) -> list[_Trajectory]:
    order = np.random.default_rng(sampling.seed).permutation(len(starts))
    kelvins = sampling.temperatures
    found = []
    for i in range(sampling.trajectories):
        turn, position = divmod(i, len(starts))
        start = starts[order[position]]
        number, frame = start.source
        name = f"{reader.sources[number].name} frame {frame}"
        kelvin = kelvins[(i + turn) % len(kelvins)]  # another one each time a structure comes again
        found.append(_Trajectory(i, kelvin, start, name, place / f"{i:06d}.frames"))
    return found


def _run_all(
    trajectories: Sequence[_Trajectory],
    sampling: Sampling,
    resources: Resources,
    on_progress: Callable[[int, int], None],
) -> None:
    total = sampling.frames * len(trajectories)
    done = 0
    lock = threading.Lock()

    def count(frames: int = 1) -> None:
        nonlocal done
        with lock:
            done += frames
            on_progress(done, total)

    def run(one: _Trajectory) -> None:
        count(one.n_frames())
        if one.ended() is None:
            one.run(sampling, resources, count)
        count(sampling.frames - one.n_frames())  # those that will never come

    with open_pool(resources) as pool:
        for future in as_completed([pool.executor.submit(run, one) for one in trajectories]):
            future.result()


def _write(out: Path, trajectories: Sequence[_Trajectory]) -> None:
    """All frames, complete or not at all."""
    if not any(one.n_frames() for one in trajectories):
        told = "; ".join(found.reason for one in trajectories[:3] if (found := one.ended()))
        raise InputError(f"no trajectory reached its first frame: {told}")
    partial = trajectories[0].path.with_name("joined")
    with OPENERS.get(out.suffix, open)(partial, "wt", encoding="utf-8") as file:
        for atoms in _frames(trajectories):
            write_xyz(file, [atoms])
    partial.replace(out)


def _frames(trajectories: Sequence[_Trajectory]) -> Iterator[Atoms]:
    for one in trajectories:
        for n, (positions, _) in enumerate(one.frames()):
            atoms = one.atoms(positions)
            atoms.info |= {"temperature": one.temperature, "trajectory": one.number, "frame": n}
            yield atoms
