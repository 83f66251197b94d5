"""Which xTB energies come nearest to the reference energies of some structures.

Labels teach the better the less the reference adds to them. Each method's energies, and the means
over several methods, are taken from the reference energies; what a composition leaves of these
differences is what they do not tell: the mean absolute residual of a least-squares fit of n
structures by p coefficients (elements, and a slope in the total charge), times sqrt(n / (n - p))
for what the fit has taken along.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from ase import Atoms

from orbq.errors import InputError
from orbq.orbitals import METHODS
from orbq.preprocess.check import check
from orbq.preprocess.frames import find_sources
from orbq.preprocess.label import Progress, Recipe, preprocess
from orbq.preprocess.read import FIRST_FOUND, REJECTED, UNLABELLED, Failure, Keys, Reader
from orbq.preprocess.references import fit_references
from orbq.preprocess.schedule import Resources
from orbq.preprocess.summary import Reasons
from orbq.preprocess.xtb import DEFAULTS, Settings
from orbq.schema import Structure

FEWEST = 10  # structures beyond the number of elements
HARDLY = 0.03  # of the error: less than another sample of some hundred structures changes
ROUNDING = 1e-6  # eV: less is left of energies that the composition tells exactly
HERE = Resources()


class Nearness(NamedTuple):
    """method: as ``orbq preprocess --method`` takes it; "" for none, composition and charge alone.
    error: mean absolute error that it leaves of the reference energies, eV."""

    method: str
    error: float


class Found(NamedTuple):
    """nearness: of every method and mean, the best first. n: structures compared. left_out: those
    that could not be read or used, and those with an energy that a method could not label. why: the
    commonest reason for it, "" if none is left out."""

    nearness: list[Nearness]
    n: int
    left_out: int
    why: str = ""

    def advised(self) -> str:
        """The method to label with: of those hardly behind the nearest the one of the fewest
        calculations; "" where none tells more than the composition."""
        limit = (1 + HARDLY) * self.nearness[0].error
        near = [one for one in self.nearness if one.error <= limit]
        return min(near, key=lambda one: (one.method.count("+"), one.error)).method


def nearest_methods(
    inputs: str | Path | Sequence[str | Path],
    limit: int = 500,
    keys: Keys = FIRST_FOUND,
    settings: Settings = DEFAULTS,
    resources: Resources = HERE,
    on_progress: Callable[[str, Progress], None] = lambda method, progress: None,
) -> Found:
    """Compare xTB energies with reference energies of at most ``limit`` structures of the input,
    taken at random. on_progress(method, how far its labels are).

    Structures that cannot be used are left out and counted. Raises InputError for input in which
    fewer than FEWEST structures beyond the number of their elements have an energy and every
    method's labels, and for energies that the composition tells exactly.
    """
    if limit <= FEWEST:
        raise InputError(f"--limit {limit}: more than {FEWEST} structures are needed")
    inputs = [inputs] if isinstance(inputs, str | Path) else inputs
    reader, reasons = Reader(find_sources(inputs), keys), Reasons()
    structures, n_usable = _with_energy(reader, limit, reasons)
    limited = f" (--limit is {limit})" if n_usable > limit else ""
    _require(structures, reader, reasons, limited)
    labels, unlabelled = _labels(structures, settings, resources, on_progress)
    for i, reason in unlabelled.items():
        reasons.add(_failure(structures[i], reader, reason, UNLABELLED))
    known = np.array([i not in unlabelled for i in range(len(structures))])
    compared = [s for s, has in zip(structures, known, strict=True) if has]
    _require(compared, reader, reasons, limited)
    energy = _energies(compared)
    found = [Nearness("", _left(compared, energy))]
    for methods in (some for k in (1, 2, 3) for some in combinations(METHODS, k)):
        mean = np.mean([labels[method][known] for method in methods], axis=0)
        found.append(Nearness("+".join(methods), _left(compared, energy - mean)))
    found.sort(key=lambda one: one.error)
    return Found(found, len(compared), reasons.total(), reasons.commonest())


def _with_energy(reader: Reader, limit: int, reasons: Reasons) -> tuple[list[Structure], int]:
    """At most ``limit`` usable structures with an energy, at random, in the order of the input; and
    how many there are. Those that cannot be used are added to ``reasons``."""
    rng, kept, seen = np.random.default_rng(0), dict[int, Structure](), 0
    for item in reader:
        if isinstance(item, Failure):
            reasons.add(item)
            continue
        if item.energy is None:
            continue
        if reason := check(item, "+".join(METHODS)):
            reasons.add(_failure(item, reader, reason))
            continue
        place = seen if seen < limit else int(rng.integers(seen + 1))  # reservoir sampling
        if place < limit:
            kept[place] = item
        seen += 1
    if not reader.names_used["energy"]:
        raise InputError(
            f"{_names(reader)}: no structure has a reference energy; name it by --energy-key if it "
            f"has another name{_told(reasons)}"
        )
    return sorted(kept.values(), key=lambda s: s.source), seen


def _require(
    structures: Sequence[Structure], reader: Reader, reasons: Reasons, limited: str
) -> None:
    """Raise InputError for structures too few or too alike to compare anything by.

    limited: that --limit took a part of the structures only, "" if it did not.
    """
    elements = {z for s in structures for z in s.numbers.tolist()}
    if (n := len(structures)) < (needed := len(elements) + FEWEST):
        raise InputError(
            f"{_names(reader)}: {n} structures with a reference energy and labels of every method, "
            f"of {len(elements)} elements: at least {needed} are needed"
            f"{limited if n else ''}{_told(reasons)}"
        )
    if _left(structures, _energies(structures)) < ROUNDING:
        raise InputError(
            f"{_names(reader)}: the composition tells these energies exactly: are they "
            "placeholders, or copies of one structure?"
        )


def _names(reader: Reader) -> str:
    return ", ".join(source.name for source in reader.sources[:3])


def _told(reasons: Reasons) -> str:
    return f"; {reasons.total():,} left out: {reasons.commonest()}" if reasons.total() else ""


def _failure(s: Structure, reader: Reader, reason: str, kind: str = REJECTED) -> Failure:
    number, frame = s.source
    return Failure(reader.sources[number].name, frame, reason, kind)


def _energies(structures: Sequence[Structure]) -> np.ndarray:
    return np.array([s.energy for s in structures], np.float64)


def _labels(
    structures: Sequence[Structure],
    settings: Settings,
    resources: Resources,
    on_progress: Callable[[str, Progress], None],
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Energies [S] of every method, eV; and of structures that lack one, why."""
    frames = [_atoms(structure) for structure in structures]
    labels, unlabelled = {}, dict[int, str]()
    with TemporaryDirectory(prefix="orbq-") as place:
        for method in METHODS:
            dataset = preprocess(
                frames,
                Path(place) / method,
                Recipe(method, settings=settings),
                resources,
                partial(on_progress, method),
            )
            labels[method] = np.full(len(frames), np.nan)
            # what xTB cannot take is left out of the set
            labels[method][dataset["source"][:, 1]] = dataset["xtb_energy"]
            for entry in dataset.failures():
                unlabelled.setdefault(entry["frame"], entry["reason"])
    return labels, unlabelled


def _atoms(s: Structure) -> Atoms:
    atoms = Atoms(s.numbers, s.positions, cell=s.cell, pbc=s.pbc)
    atoms.info |= {"total_charge": s.total_charge, "spin_multiplicity": s.spin_multiplicity}
    return atoms


def _left(structures: Sequence[Structure], energy: np.ndarray) -> float:
    """What composition and charge leave of energies [S], eV."""
    numbers, charges = [s.numbers for s in structures], [s.total_charge for s in structures]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # elements in fixed ratios: the fit is right for these
        references = fit_references(numbers, energy, np.array(charges)).references
    n, p = len(energy), int(references.known.sum()) + bool(references.charge)
    facts = zip(energy, numbers, charges, strict=True)
    left = [e - references.of(z, charge) for e, z, charge in facts]
    return float(np.abs(left).mean() * np.sqrt(n / (n - p)))
