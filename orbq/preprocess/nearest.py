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
from orbq.preprocess.frames import find_sources
from orbq.preprocess.label import Progress, Recipe, preprocess
from orbq.preprocess.read import FIRST_FOUND, Failure, Keys, Reader
from orbq.preprocess.references import fit_references
from orbq.preprocess.schedule import Resources
from orbq.preprocess.xtb import DEFAULTS, Settings
from orbq.schema import Structure

FEWEST = 10  # structures beyond the number of elements
HARDLY = 0.03  # of the error: less than another sample of some hundred structures changes
HERE = Resources()


class Nearness(NamedTuple):
    """method: as ``orbq preprocess --method`` takes it; "" for none, composition and charge alone.
    error: mean absolute error that it leaves of the reference energies, eV."""

    method: str
    error: float


class Found(NamedTuple):
    """nearness: of every method and mean, the best first. n: structures compared. left_out: those
    with an energy that a method could not label."""

    nearness: list[Nearness]
    n: int
    left_out: int

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

    Raises InputError for input in which fewer than FEWEST structures beyond the number of their
    elements have an energy and every method's labels.
    """
    if limit <= FEWEST:
        raise InputError(f"--limit {limit}: more than {FEWEST} structures are needed")
    inputs = [inputs] if isinstance(inputs, str | Path) else inputs
    structures = _with_energy(Reader(find_sources(inputs), keys), limit)
    labels, known = _labels(structures, settings, resources, on_progress)
    compared = [s for s, has in zip(structures, known, strict=True) if has]
    elements = {z for s in compared for z in s.numbers.tolist()}
    if (n := len(compared)) < (needed := len(elements) + FEWEST):
        raise InputError(
            f"{n} structures with a reference energy and labels of every method, of "
            f"{len(elements)} elements: at least {needed} are needed (--limit is {limit})"
        )
    energy = np.array([s.energy for s in compared], np.float64)
    found = [Nearness("", _left(compared, energy))]
    for methods in (some for k in (1, 2, 3) for some in combinations(METHODS, k)):
        mean = np.mean([labels[method][known] for method in methods], axis=0)
        found.append(Nearness("+".join(methods), _left(compared, energy - mean)))
    return Found(sorted(found, key=lambda one: one.error), n, len(structures) - n)


def _with_energy(reader: Reader, limit: int) -> list[Structure]:
    """At most ``limit`` structures with an energy, at random; in the order of the input."""
    rng, kept, seen = np.random.default_rng(0), dict[int, Structure](), 0
    for item in reader:
        if isinstance(item, Failure) or item.energy is None:
            continue
        place = seen if seen < limit else int(rng.integers(seen + 1))  # reservoir sampling
        if place < limit:
            kept[place] = item
        seen += 1
    if not kept:
        names = ", ".join(source.name for source in reader.sources[:3])
        raise InputError(
            f"{names}: no structure has a reference energy; name it by --energy-key if it has "
            "another name"
        )
    return sorted(kept.values(), key=lambda s: s.source)


def _labels(
    structures: Sequence[Structure],
    settings: Settings,
    resources: Resources,
    on_progress: Callable[[str, Progress], None],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Energies [S] of every method, eV, and [S] whether a structure has all of them."""
    frames = [_atoms(structure) for structure in structures]
    known = np.ones(len(frames), bool)
    labels = {}
    with TemporaryDirectory(prefix="orbq-") as place:
        for method in METHODS:
            dataset = preprocess(
                frames,
                Path(place) / method,
                Recipe(method, settings=settings),
                resources,
                partial(on_progress, method),
            )
            found = np.where(dataset["xtb_energy_mask"], dataset["xtb_energy"], np.nan)
            labels[method] = np.full(len(frames), np.nan)
            # what xTB cannot take is left out of the set
            labels[method][dataset["source"][:, 1]] = found
            known &= np.isfinite(labels[method])
    return labels, known


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
