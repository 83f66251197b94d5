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

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import tblite.interface as tblite
from tblite.exceptions import TBLiteRuntimeError, TBLiteValueError

from orbq import orbitals, units
from orbq.preprocess.check import heights, unpaired
from orbq.preprocess.sane import Checked, LabelError
from orbq.schema import Labels, Structure

TO_TBLITE = np.array([2, 0, 1])
FROM_TBLITE = np.array([1, 2, 0])
KELVIN = 3.166808578545117e-6  # Boltzmann's constant in Hartree/K, as tblite documents it

TBLITE_MAX_ITER = 250  # tblite's own default
FAILURES = (TBLiteRuntimeError, TBLiteValueError, MemoryError)  # of one calculation


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


def version() -> str:
    """Version of the tblite library in use."""
    from tblite import library

    return ".".join(str(part) for part in library.get_version())


class Raw(NamedTuple):
    """One finished calculation. blocks [n, 10, 10] on-site blocks of PS; energy eV; forces eV/Å."""

    blocks: np.ndarray
    energy: float
    forces: np.ndarray


def label(structure: Structure, method: str = "GFN1-xTB", settings: Settings = DEFAULTS) -> Labels:
    """Orbital-resolved charges (47 on-site components), energy and forces of one structure.

    ``structure`` must have passed ``check``. Of several methods, joined by +, the first gives the
    charges; energy and forces are the mean of all. A calculation that fails, or whose result is not
    sane, is tried again at 1000 K, at 2000 K and with weaker mixing; ``note`` says which one
    worked. Raises LabelError when none did, or when the cell is too small for the Gamma point.
    """
    (found,) = label_many([structure], method, settings)
    if isinstance(found, LabelError):
        raise found
    return found


def label_many(
    structures: Sequence[Structure],
    method: str,
    settings: Settings,
    begin: Callable[[int], None] = lambda i: None,
) -> list[Labels | LabelError]:
    """What ``label`` returns or raises for each structure, with the algebra done for all at once.

    begin(i) is called before the calculations on structure i begin, by each of several methods.
    """
    each = [_label_many(structures, one, settings, begin) for one in orbitals.parts(method)]
    return [_mean(found, orbitals.parts(method)) for found in zip(*each, strict=True)]


def _mean(found: Sequence[Labels | LabelError], methods: Sequence[str]) -> Labels | LabelError:
    """The labels of one structure by several methods as one: the charges of the first."""
    if len(found) == 1:
        return found[0]
    for one, method in zip(found, methods, strict=True):
        if isinstance(one, LabelError):
            return LabelError(f"{method}: {one}")
    labels = [one for one in found if isinstance(one, Labels)]
    notes = [f"{m}: {x.note}" for x, m in zip(labels, methods, strict=True) if x.note]
    return labels[0]._replace(
        energy=float(np.mean([x.energy for x in labels])),
        forces=np.mean([x.forces for x in labels], axis=0),
        note="; ".join(notes),
    )


def _label_many(
    structures: Sequence[Structure],
    method: str,
    settings: Settings,
    begin: Callable[[int], None],
) -> list[Labels | LabelError]:
    raws: dict[int, Raw] = {}
    out: dict[int, Labels | LabelError] = {}
    failed: dict[int, LabelError] = {}
    for i, (structure, given) in enumerate(
        zip(structures, _inputs(structures, method), strict=True)
    ):
        begin(i)
        if reason := _refusal(structure, given, method, settings):
            out[i] = LabelError(reason)
            continue
        try:
            raws[i] = singlepoint(structure, method, settings, settings.temperature, None, given)
        except FAILURES as error:
            failed[i] = LabelError(_told(error))
    accepted = _accept([structures[i] for i in raws], list(raws.values()), method)
    for i, found in zip(raws, accepted, strict=True):
        if isinstance(found, LabelError):
            failed[i] = found
        else:
            out[i] = found
    for i, first in failed.items():
        begin(i)
        out[i] = _climb(structures[i], method, settings, first)
    return [out[i] for i in range(len(structures))]


def _climb(
    structure: Structure, method: str, settings: Settings, error: LabelError
) -> Labels | LabelError:
    """What the other settings give where the usual ones failed with ``error``."""
    tried = []
    for note, temperature, damping in _ladder(settings):
        tried.append(note)
        try:
            raw = singlepoint(structure, method, settings, temperature, damping)
        except FAILURES:
            continue
        (found,) = _accept([structure], [raw], method)
        if isinstance(found, Labels):
            return found._replace(note=note)
    at = f"{settings.temperature:g} K"
    return LabelError(f"{error} ({at}; {', '.join(tried)} do not help)")


def _told(error: BaseException) -> str:
    return " ".join(str(error).split()) or "out of memory"


def _ladder(settings: Settings) -> Iterator[tuple[str, float, float | None]]:
    """(note, temperature in K, mixer damping or None) of each further attempt."""
    for temperature in (1000.0, 2000.0):
        if temperature > settings.temperature:
            yield f"{temperature:g} K", temperature, None
    yield "mixer damping 0.8", settings.temperature, 0.8


class _Input(NamedTuple):
    """What a calculation is given. positions [n, 3]: Bohr, in tblite's frame. rows [n, 10]: of its
    matrices, per atom and slot. n_valence: electrons of the neutral atoms."""

    positions: np.ndarray
    rows: np.ndarray
    n_valence: float
    n_unpaired: int
    periodic: bool


def _joined(structures: Sequence[Structure]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atomic numbers of all atoms, and where each structure's begin and end."""
    numbers = np.concatenate([s.numbers for s in structures])
    ends = np.cumsum([len(s.numbers) for s in structures])
    return numbers, np.concatenate([[0], ends[:-1]]), ends


def _inputs(structures: Sequence[Structure], method: str) -> list[_Input]:
    """The inputs of all structures, computed at once: one call for many small arrays."""
    if not structures:
        return []
    tables = _tables(method)
    numbers, starts, ends = _joined(structures)
    positions = np.concatenate([s.positions for s in structures]).take(TO_TBLITE, axis=1)
    positions /= units.BOHR
    counts = tables.n_orbitals[numbers]
    before = np.cumsum(counts) - counts  # orbitals of the atoms before, in all structures
    before -= np.repeat(before[starts], ends - starts)
    rows = tables.place[numbers] + before[:, None]
    n_valence = np.add.reduceat(tables.valence[numbers], starts).tolist()
    return [
        _Input(
            positions[start:stop],
            rows[start:stop],
            n_valence[i],
            unpaired(structures[i], method),
            bool(structures[i].pbc.any()),
        )
        for i, (start, stop) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    ]


def _refusal(structure: Structure, given: _Input, method: str, settings: Settings) -> str | None:
    """Why tblite must not be asked at all, if so."""
    if given.n_valence - structure.total_charge < -1e-9:  # would abort the process
        return f"charge {structure.total_charge:+d} above the valence electrons"
    if settings.spin_polarization and method == "IPEA1-xTB":
        return "IPEA1-xTB has no spin-polarised form"
    if given.periodic:
        height = float(heights(structure.cell).min())
        if height < settings.min_height:
            return (
                f"cell height {height:.2f} Å below {settings.min_height:g} Å: xTB samples the "
                "Gamma point alone; use a supercell"
            )
    return None


def singlepoint(
    structure: Structure,
    method: str,
    settings: Settings,
    temperature: float,
    damping: float | None = None,
    given: _Input | None = None,
) -> Raw:
    """One tblite calculation, its blocks and forces in the frame of the structure.

    given: of ``structure``, where it is known already.
    """
    given = given or _inputs([structure], method)[0]
    calculator = tblite.Calculator(
        method,
        structure.numbers,
        given.positions,
        float(structure.total_charge),
        given.n_unpaired,
        structure.cell[:, TO_TBLITE] / units.BOHR if given.periodic else None,
        np.ones(3, bool) if given.periodic else None,
        logger=_silence,
    )
    if settings.spin_polarization:
        calculator.add("spin-polarization", 1.0)
    calculator.set("verbosity", 0)
    calculator.set("accuracy", settings.accuracy)
    calculator.set("temperature", temperature * KELVIN)
    calculator.set("save-integrals", 1)
    if settings.max_iter != TBLITE_MAX_ITER:
        calculator.set("max-iter", settings.max_iter)
    if damping is not None:
        calculator.set("mixer-damping", damping)
    result = calculator.singlepoint()
    density = result.get("density-matrix")
    if density.ndim == 3:  # spin-up and spin-down
        density = density.sum(0)
    return Raw(
        onsite_blocks(density, result.get("overlap-matrix"), given.rows),
        float(result.get("energy")) * units.HARTREE,
        result.get("gradient").take(FROM_TBLITE, axis=1) * -units.HARTREE_PER_BOHR,
    )


def _silence(message: str) -> None:
    """Take tblite's printout; failures come as exceptions."""


class _Tables(NamedTuple):
    """Per element: place [87, 10] of a slot among the atom's orbitals, 0 where absent; their number
    n_orbitals [87]; present [87, 10, 10] blocks that exist, 1 or 0; reference [87, 47] components
    of the neutral atom; has [87, 47] components that exist; valence [87] electrons. project:
    [100, 47], from a block to its components.
    """

    place: np.ndarray
    n_orbitals: np.ndarray
    present: np.ndarray
    reference: np.ndarray
    has: np.ndarray
    valence: np.ndarray
    project: np.ndarray


@cache
def _tables(method: str) -> _Tables:
    table = orbitals.shells(method)
    place = np.zeros((orbitals.MAX_Z + 1, orbitals.N_SLOTS), int)
    for z, order in enumerate(table.order):
        place[z, order] = np.arange(len(order))
    everything = np.arange(orbitals.MAX_Z + 1)
    nothing = np.zeros((orbitals.MAX_Z + 1, orbitals.N_SLOTS, orbitals.N_SLOTS))
    mask = table.slot_mask
    return _Tables(
        place=place,
        n_orbitals=mask.sum(1),
        present=(mask[:, :, None] & mask[:, None, :]).astype(float),
        reference=orbitals.onsite_from_blocks(nothing, everything, method),
        has=orbitals.onsite_mask(method).astype(float),
        valence=table.valence,
        project=np.ascontiguousarray(orbitals.onsite_basis().reshape(orbitals.N_ONSITE, -1).T),
    )


def onsite_blocks(density: np.ndarray, overlap: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """On-site blocks of PS, [n, 10, 10], in slot order, not symmetrised; absent slots hold rubbish.

    density, overlap: [n_ao, n_ao] in tblite's orbital order. rows [n, 10]: of ``_Input``.
    """
    return density.take(rows, axis=0) @ overlap.take(rows, axis=0).transpose(0, 2, 1)


def _accept(
    structures: Sequence[Structure], raws: Sequence[Raw], method: str
) -> list[Labels | LabelError]:
    """Labels from finished calculations; an error in place of those that are not sane."""
    if not structures:
        return []
    tables = _tables(method)
    numbers, starts, ends = _joined(structures)
    blocks = np.concatenate([raw.blocks for raw in raws])
    blocks = 0.5 * (blocks + blocks.transpose(0, 2, 1)) * tables.present[numbers]
    # one product per atom: a product of all rounds differently with their number
    rows = blocks.reshape(len(blocks), 1, -1)
    onsite = tables.reference[numbers] - (rows @ tables.project)[:, 0]
    onsite *= tables.has[numbers]
    populations = np.einsum("nkk->nk", blocks)
    charges = tables.valence[numbers] - populations.sum(1)
    found = Checked(
        surplus=np.add.reduceat(charges, starts) - [s.total_charge for s in structures],
        charge=np.maximum.reduceat(np.abs(charges), starts),
        lowest=np.minimum.reduceat(populations.min(1), starts),
        highest=np.maximum.reduceat(populations.max(1), starts),
        finite=np.array([np.isfinite(r.forces).all() and np.isfinite(r.energy) for r in raws]),
    )
    sane = found.sane()
    out: list[Labels | LabelError] = []
    for i, (start, stop) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if sane[i]:
            out.append(Labels(onsite[start:stop], raws[i].energy, raws[i].forces))
        else:
            out.append(found.error(i, charges[start:stop], numbers[start:stop]))
    return out
