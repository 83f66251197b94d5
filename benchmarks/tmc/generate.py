"""The run: for every species find geometries, label them with DFT, append them to the archive.

The first pass makes ``relaxed`` and ``corrected`` of all species, the second ``stretched`` and
``md``, so that a run stopped early has many complexes rather than many structures of a few.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms

from orbq.errors import InputError

from .archive import WHOLE_SPECIES, Archive
from .build import Ideal, idealise
from .dft import DFTLabels, label, level_of_theory, require_pyscf
from .sampling import Geometry, RejectedError, correct, perturb, rattled, relax, xtb
from .species import METALS, RESERVED_SEEDS, Species, reserved_compositions, species_list

PASSES = (("relaxed", "corrected"), ("stretched", "md"))
LABELLED_STREAM, UNLABELLED_STREAM = 7, 9  # random streams of the structures, beside the group name
RATTLE = 0.05  # Å, of the second geometry of --structures-only


class Options(NamedTuple):
    """What a run makes; the fields are the command line's options."""

    out: Path
    seed: int
    per_metal: int
    metals: tuple[str, ...]
    passes: int
    hours: float
    limit: int
    force: bool
    known: frozenset[str] = frozenset()


def planned_species(options: Options) -> list[Species]:
    """The species of a run: those of the seed, without any that the reserved seeds draw and
    without the ``known`` groups, which other runs have made.

    Raises InputError for an unknown metal, and for a reserved seed unless ``force``, which also
    keeps reserved species.
    """
    unknown = [m for m in options.metals if m not in METALS]
    if unknown or not options.metals:
        raise InputError(f"--metals: {', '.join(unknown)!r} not among {', '.join(METALS)}")
    if options.seed in RESERVED_SEEDS and not options.force:
        raise InputError(
            f"--seed {options.seed} is spoken for: the embedded sets and a blind test are drawn "
            f"from seeds {', '.join(map(str, RESERVED_SEEDS))}. Use 3000 or above "
            "(--force overrides, to reproduce the embedded sets)"
        )
    exclude = frozenset() if options.force else reserved_compositions()
    drawn = species_list(options.per_metal, options.metals, options.seed, exclude)
    return [species for species in drawn if species.group not in options.known][: options.limit]


def generate(options: Options) -> None:
    """Make and label the structures of a run, continuing one that was stopped."""
    require_pyscf()
    species = planned_species(options)
    tasks = [(s, names) for names in PASSES[: options.passes] for s in species]
    with Archive(options.out) as archive:
        progress = Progress(archive, sum(_open(archive, s, names) for s, names in tasks))
        for s, names in tasks:
            if progress.hours() > options.hours:
                print(f"stopped after --hours {options.hours:g}; the same command continues")
                return
            for line in _label_species(archive, s, names):
                progress.step(line)
        progress.summary()


def generate_geometries(options: Options) -> None:
    """Geometries of complexes without DFT: the GFN2-xTB minimum, and the same rattled."""
    species = [s for s in planned_species(options) if s.geometry]
    with Archive(options.out) as archive:
        species = [s for s in species if not _geometry_settled(archive, s)]
        progress = Progress(archive, len(species))
        for s in species:
            if progress.hours() > options.hours:
                print(f"stopped after --hours {options.hours:g}; the same command continues")
                return
            try:
                frames = _unlabelled(s)
            except Exception as error:  # any fault of one species is logged and the rest goes on
                _reraise_if_fatal(error)
                archive.reject(s.group, "unlabelled", _reason(error))
                progress.step(f"{s.group}: {_reason(error)}")
                continue
            archive.keep_geometries(s.group, frames)
            progress.step(f"{s.group}: kept")
        progress.summary()


class Progress:
    """One line per attempt: how many of how many, what became of it, and the time left."""

    def __init__(self, archive: Archive, total: int) -> None:
        self.total, self.done, self.kept = total, 0, 0
        self.start = time.monotonic()
        for line in archive.repaired:
            print(f"repaired {line}")
        before = len(archive.points) + len(archive.geometry_groups)
        print(f"{total} to do; {before} kept before in {archive.raw.parent}", flush=True)

    def hours(self) -> float:
        """Wall-clock hours since the start."""
        return (time.monotonic() - self.start) / 3600

    def step(self, line: str) -> None:
        """Count one attempt and print ``line`` with the estimated time left."""
        self.done += 1
        self.kept += ": kept" in line
        left = self.hours() / self.done * max(self.total - self.done, 0)
        rejected = self.done - self.kept
        width = len(str(self.total))
        print(
            f"[{self.done:{width}d}/{self.total}] {line} | {self.kept} kept, {rejected} rejected, "
            f"{_duration(left)} left",
            flush=True,
        )

    def summary(self) -> None:
        """Print the counts and the time."""
        rejected = self.done - self.kept
        print(f"done: {self.kept} kept, {rejected} rejected, in {_duration(self.hours())}")


def _duration(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _rng(stream: int, species: Species) -> np.random.Generator:
    return np.random.default_rng([stream, zlib.crc32(species.group.encode())])


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RejectedError) else f"{type(error).__name__} {error}"


def _reraise_if_fatal(error: Exception) -> None:
    """A full disk, no memory, or bad input concerns the whole run, not one structure."""
    if isinstance(error, OSError | MemoryError | InputError | ImportError):
        raise error


def _open(archive: Archive, species: Species, names: tuple[str, ...]) -> int:
    """How many of the geometries ``names`` of a species are still to be tried."""
    if (species.group, WHOLE_SPECIES) in archive.settled:
        return 0
    return sum((species.group, name) not in archive.settled for name in names)


def _geometry_settled(archive: Archive, species: Species) -> bool:
    tried = (species.group, "unlabelled") in archive.settled
    return tried or species.group in archive.geometry_groups


def _label_species(archive: Archive, species: Species, names: tuple[str, ...]) -> Iterator[str]:
    """Label the geometries ``names`` of one species; yields a line about each."""
    group, density = species.group, None
    if not _open(archive, species, names):
        return
    rng = _rng(LABELLED_STREAM, species)
    ideal = idealise(species, rng)
    for name in names:
        if (group, name) in archive.settled:
            continue
        if (group, WHOLE_SPECIES) in archive.settled or _lacks_minimum(archive, group, name):
            yield f"{group} {name}: skipped, as its minimum failed"
            continue
        wall, cpu = time.monotonic(), time.process_time()
        try:
            geometry = _geometry(archive, species, ideal, name, rng)
            found = time.monotonic() - wall
            frame, labels = _label(species, ideal, geometry, name, density)
        except Exception as error:  # any fault of one structure is logged and the rest goes on
            _reraise_if_fatal(error)
            archive.reject(group, name, _reason(error), t=round(time.monotonic() - wall, 1))
            if name == "relaxed":
                archive.reject(group, WHOLE_SPECIES, "species skipped")
            yield f"{group} {name}: {_reason(error)}"
            continue
        density = labels.density
        seconds = round(time.monotonic() - wall, 1)
        cost = {"t": seconds, "cpu": round(time.process_time() - cpu, 1), "t_geo": round(found, 1)}
        archive.keep(group, name, frame, **cost, n=len(frame), gap=round(labels.gap, 2))
        yield f"{group} {name}: kept, {len(frame)} atoms, {seconds:.1f} s"


def _lacks_minimum(archive: Archive, group: str, name: str) -> bool:
    return name in PASSES[1] and (group, "corrected") not in archive.points


def _geometry(
    archive: Archive, species: Species, ideal: Ideal, name: str, rng: np.random.Generator
) -> Geometry:
    """The geometry ``name`` of a species, from the archive or made now.

    Raises RejectedError when it is not the intended species.
    """
    group, charge = species.group, species.charge
    known = archive.load_geometries(group)
    if name not in known:
        if name == "relaxed":
            known[name] = relax(ideal, charge, rng)
        elif name == "corrected":
            known[name] = correct(ideal, charge, archive.points[group, "relaxed"])
        else:
            minima = archive.points[group, "relaxed"], archive.points[group, "corrected"]
            known |= perturb(ideal, charge, *minima, rng)
        archive.save_geometries(group, known)
    if known[name].fault:
        raise RejectedError(known[name].fault)
    return known[name]


def _label(
    species: Species, ideal: Ideal, geometry: Geometry, name: str, density: np.ndarray | None
) -> tuple[Atoms, DFTLabels]:
    """The frame of a structure with its labels (eV, Å, e)."""
    frame = Atoms(ideal.atoms.numbers, geometry.positions)
    twin = frame.copy()
    twin.calc = xtb(species.charge, "GFN1-xTB")
    gfn1_energy = float(twin.get_potential_energy())
    labels = label(frame, species.charge, density)
    frame.arrays["forces"] = labels.forces
    frame.arrays["dft_mulliken"] = labels.mulliken
    frame.arrays["dft_lowdin"] = labels.lowdin
    frame.info.update(_identity(species, name))
    frame.info.update(
        energy=labels.energy,
        temperature_K=round(geometry.temperature, 1),
        homo_lumo_gap=labels.gap,
        dipole=labels.dipole,
        gfn1_energy=gfn1_energy,
        level=level_of_theory(),
    )
    if species.oxidation_state is not None:
        frame.info["oxidation_state"] = species.oxidation_state
    return frame, labels


def _identity(species: Species, geometry: str) -> dict[str, str | int]:
    return {
        "charge": species.charge,
        "spin_multiplicity": 1,
        "group": species.group,
        "metal": species.metal,
        "geometry": geometry,
    }


def _unlabelled(species: Species) -> list[Atoms]:
    """Two frames without DFT: the GFN2-xTB minimum, and the same rattled by RATTLE.

    Raises RejectedError when the complex falls apart.
    """
    rng = _rng(UNLABELLED_STREAM, species)
    ideal = idealise(species, rng)
    minimum = relax(ideal, species.charge, rng).positions
    frames = []
    for name, sigma in (("relaxed", 0.0), ("rattled", RATTLE)):
        frame = Atoms(ideal.atoms.numbers, rattled(minimum, sigma, rng))
        frame.info.update(_identity(species, name))
        frames.append(frame)
    return frames
