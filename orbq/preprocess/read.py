"""Structures from anything ASE reads: energies, forces, charge, spin under the field's names.

Values are taken to be in eV, Å, eV/Å, e. ASE moves ``energy``, ``forces``, ``stress`` and some
others of an extxyz file into a calculator; they are looked up under their names all the same.
A lattice with ``pbc="F F F"`` is a box around a molecule, not a crystal: it is dropped.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbq.errors import InputError
from orbq.preprocess import comment, tmqm
from orbq.preprocess.frames import Frame, Source, find_sources, read_frames
from orbq.schema import Structure

VIRIALS = ("REF_virial", "REF_virials", "dft_virial", "dft_virials", "virial", "virials")
DEFAULT_NAMES: dict[str, tuple[str, ...]] = {
    "energy": (
        *("REF_energy", "ref_energy", "dft_energy", "DFT_energy", "energy_dft", "TotEnergy"),
        *("total_energy", "energy", "Energy", *tmqm.ENERGIES),
    ),
    "forces": (
        *("REF_forces", "ref_forces", "dft_forces", "DFT_forces", "forces_dft", "force", "forces"),
        *("Forces",),
    ),
    "stress": ("REF_stress", "ref_stress", "dft_stress", "stress", *VIRIALS),
    "charge": ("total_charge", "charge", "Charge", "net_charge", "molecular_charge"),
    "spin": ("spin_multiplicity", "multiplicity", "Multiplicity", "spin"),
    "dft_charges": (
        *("dft_charges", "REF_charges", "dft_mulliken", "mulliken_charges", "mulliken"),
        *("hirshfeld_charges", tmqm.CHARGES, "charges"),
    ),
    "group": ("group", "group_id", "csd_code", "CSD_code"),
}


class Keys(NamedTuple):
    """Names under which the input keeps its values; None: the first of DEFAULT_NAMES found.

    spin is the multiplicity 2S + 1. A name given here must be there in at least one structure.
    """

    energy: str | None = None
    forces: str | None = None
    charge: str | None = None
    spin: str | None = None
    dft_charges: str | None = None
    group: str | None = None
    stress: str | None = None


FIRST_FOUND = Keys()
ONE_NUMBER = ("energy", "charge", "spin")  # of a structure; arrays of these names say other things
STATE = ("charge", "spin")  # what a prediction depends on beside the geometry
MAX_INTEGER = 1_000_000  # of a charge or a multiplicity
REJECTED, UNLABELLED = "rejected", "labels missing"
HARTREE_NOTE = " (Hartree, converted)"
VIRIAL_NOTE = " (divided by minus the volume)"
TRUTH_NOTE = " (true or false, left out)"  # of a group in a database or a trajectory


class Failure(NamedTuple):
    """One structure that was left out, or kept without some labels, and why.

    file, frame: where it was read. kind: REJECTED or UNLABELLED.
    """

    file: str
    frame: int
    reason: str
    kind: str = REJECTED


class Reader:
    """Iterates over ``Structure | Failure``; ``names_used`` tells afterwards what was found where.

    sources: files, or one Source without path for structures that are already in memory. labels:
    False for structures that are to be predicted: what they bring of labels is not looked at.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        keys: Keys = FIRST_FOUND,
        atoms: Sequence[Any] | None = None,
        labels: bool = True,
    ) -> None:
        self._labels = labels
        self.sources, self.keys, self._atoms = list(sources), keys, atoms
        self.names_used: dict[str, Counter[str]] = {field: Counter() for field in DEFAULT_NAMES}
        self._names_seen: set[str] = set()
        self._refused: dict[str, str] = {}  # why a demanded field was not taken

    def __iter__(self) -> Iterator[Structure | Failure]:
        if self._atoms is not None:
            for index, atoms in enumerate(self._atoms):
                yield self.structure(Frame(index, atoms), 0)
        else:
            for number, source in enumerate(self.sources):
                with tmqm.open_tables([table.path for table in source.tables]) as tables:
                    for frame in read_frames(source):
                        if frame.atoms is None:
                            yield Failure(source.name, frame.number, frame.reason)
                        else:
                            yield self.structure(frame, number, tables)
        self.check_demanded()

    def structure(
        self, frame: Frame, number: int, tables: tmqm.Tables = tmqm.NO_TABLES
    ) -> Structure | Failure:
        """One readable frame of the source with that number."""
        atoms = frame.atoms
        try:
            values, converted = tmqm.translated(named_values(atoms), tables, results_of(atoms))
            self._names_seen |= values.keys()
            if not self._labels:
                state = {f: self._find(f, values, converted, atoms.arrays) for f in STATE}
                return _build(atoms, dict.fromkeys(DEFAULT_NAMES) | state, (number, frame.number))
            values = _without_virials(values, atoms)
            if self.keys.stress in VIRIALS and self.keys.stress not in values:
                self._refused["stress"] = "is a virial: it needs a lattice, and six or nine values"
            fields = [field for field in DEFAULT_NAMES if field != "group"]
            found = {f: self._find(f, values, converted, atoms.arrays) for f in fields}
            found["group"] = self._group(values, frame)
            return _build(atoms, found, (number, frame.number))
        except InputError:
            raise
        except ValueError as error:
            return Failure(self.sources[number].name, frame.number, str(error))

    def _find(
        self,
        field: str,
        values: Mapping[str, Any],
        converted: Container[str],
        per_atom: Container[str] = (),
    ) -> Any:
        wanted = getattr(self.keys, field)
        for name in (wanted,) if wanted else DEFAULT_NAMES[field]:
            value = values.get(name)
            if value is None:
                continue
            known = PER_ATOM if field in ONE_NUMBER and name in per_atom else ""
            if reason := known or _no_value(field, value):
                if wanted:
                    self._refused[field] = reason
                    raise ValueError(f"the {field} key {name!r} {reason}")
                continue
            note = VIRIAL_NOTE if name in VIRIALS else HARTREE_NOTE if name in converted else ""
            self.names_used[field][name + note] += 1
            return value
        return None

    def _group(self, values: Mapping[str, Any], frame: Frame) -> Any:
        """As it is written in a comment line; a truth of another format is left out, and noted."""
        names = (self.keys.group,) if self.keys.group else DEFAULT_NAMES["group"]
        found = self._find("group", as_written(values, names, frame), ())
        if found is None and not frame.comment:
            truths = [name for name in names if isinstance(values.get(name), bool | np.bool_)]
            self.names_used["group"].update(name + TRUTH_NOTE for name in truths)
        return found

    def check_demanded(self) -> None:
        """Raises InputError for a key that was given and that no structure so far has had."""
        for field, name in self.keys._asdict().items():
            if name and not self.names_used[field]:
                option = f"--{field.replace('_', '-')}-key"
                present = ", ".join(sorted(self._names_seen)) or "none"
                files = ", ".join(s.name for s in self.sources[:5])
                if field in self._refused and name in self._names_seen:
                    reason = f"{self._refused[field]}, in every structure: name another as {option}"
                    raise InputError(f"{files}: the {field} key {name!r} {reason}")
                raise InputError(
                    f"{files}: no structure has the {field} key {name!r}; keys present: {present}; "
                    f"give one of them as {option}, or leave the option out"
                )


def as_written(values: Mapping[str, Any], names: Iterable[str], frame: Frame) -> Mapping[str, Any]:
    """The values, those of ``names`` as the comment line has them: ``007`` and not 7."""
    read = [n for n in names if n in values and not isinstance(values[n], str)]
    given = [n for n in read if n not in frame.atoms.arrays]
    texts = comment.texts(frame.comment) if given else {}
    kept = {n: texts[n] for n in given if texts.get(n)}
    return {**values, **{n: t for n, t in kept.items() if not t.startswith(comment.JSON)}}


PER_ATOM = "is a value for each atom, not one for the structure"


def _no_value(field: str, value: Any) -> str:
    """Why a value cannot be that of the field, "" if it can."""
    if isinstance(value, bool | np.bool_):  # ASE reads a bare word of a comment line as True
        return "has no value"
    if field == "group" and isinstance(value, np.ndarray) and not value.size:  # nothing after "="
        return "has no value"
    if field == "group" and (isinstance(value, list | tuple) or np.ndim(value)):
        return PER_ATOM  # as GPUMD writes it
    return ""


def read_structures(
    paths: Iterable[str | Path], keys: Keys = FIRST_FOUND
) -> Iterator[Structure | Failure]:
    """Every structure of the input files in order, or a Failure in place of an unusable one.

    paths: files that ASE reads (also .gz, .xz, .bz2), globs, or names of embedded data sets.
    Raises InputError when a whole file is at fault, or a demanded key is in no structure.
    """
    return iter(Reader(find_sources(paths), keys))


def values_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """What ``info`` of an ``ase.Atoms`` names, also in the pairs and data of a database's row."""
    values: dict[str, Any] = {}
    for name, value in info.items():
        if name in ("key_value_pairs", "data") and isinstance(value, Mapping):
            values.update(value)
        else:
            values[str(name)] = value
    return values


def named_values(atoms: Any, bare: bool = True) -> dict[str, Any]:
    """Everything named that comes with an ``ase.Atoms``: info, arrays, a calculator's results.

    bare: leave out the atomic numbers and positions.
    """
    values = values_of(atoms.info)
    hidden = ("numbers", "positions") if bare else ()
    values.update({k: v for k, v in atoms.arrays.items() if k not in hidden})
    values.update(results_of(atoms))
    return values


def results_of(atoms: Any) -> dict[str, Any]:
    """What the calculator of an ``ase.Atoms`` holds, in ASE's units."""
    results = getattr(atoms.calc, "results", {})
    return {name: value for name, value in results.items() if value is not None}


def _build(atoms: Any, found: Mapping[str, Any], source: tuple[int, int]) -> Structure:
    """A Structure from ASE's; raises ValueError with the reason when a value has the wrong form."""
    numbers = np.asarray(atoms.numbers, np.int64)
    periodic = bool(atoms.pbc.any())
    charge = _integer("charge", found["charge"], 0)
    lowest = 1 + int(numbers.sum() - charge) % 2
    charges = found["dft_charges"]
    return Structure(
        numbers=numbers,
        positions=np.array(atoms.positions, np.float64),
        cell=np.array(atoms.cell.array, np.float64) if periodic else np.zeros((3, 3)),
        pbc=np.array(atoms.pbc, bool),
        total_charge=charge,
        spin_multiplicity=_integer("spin multiplicity", found["spin"], lowest),
        energy=_energy(found["energy"]),
        forces=None if found["forces"] is None else _array("forces", found["forces"]),
        stress=None if found["stress"] is None else _matrix("stress", found["stress"]),
        dft_charges=None if charges is None else _array("dft_charges", charges),
        group="" if found["group"] is None else _text(found["group"]),
        source=source,
    )


def _integer(name: str, value: Any, default: int) -> int:
    if value is None:
        return default
    number = _float(name, value)
    if not np.isfinite(number) or number != round(number):
        raise ValueError(f"{name} is {number:g}: it must be a whole number")
    if abs(number) > MAX_INTEGER:
        raise ValueError(f"{name} is {number:g}: beyond {MAX_INTEGER} there is no such molecule")
    return round(number)


def _energy(value: Any) -> float | None:
    return None if value is None else _float("energy", value)


def _float(name: str, value: Any) -> float:
    try:
        return float(np.asarray(value, np.float64).reshape(()))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is {reprlib.repr(value)}: it must be one number") from error


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} are not numbers: {reprlib.repr(value)}") from error


def _text(value: Any) -> str:
    """Text that can be written as UTF-8: JSON may hold halves of a surrogate pair."""
    return str(value).encode(errors="replace").decode()


def _without_virials(values: dict[str, Any], atoms: Any) -> dict[str, Any]:
    """The values with stresses, eV/Å^3, in place of the virials of a crystal, eV, which are minus
    the stress times the volume; those of molecules, or of each atom, mean nothing here."""
    given = {name: values[name] for name in VIRIALS if np.size(values.get(name, 0)) in (6, 9)}
    rest = {name: value for name, value in values.items() if name not in VIRIALS}
    volume = abs(float(np.linalg.det(atoms.cell.array)))
    if not atoms.pbc.any() or volume == 0:
        return rest
    return rest | {name: -_matrix("virial", value) / volume for name, value in given.items()}


def _matrix(name: str, value: Any) -> np.ndarray:
    found = _array(name, value)
    if found.shape == (3, 3):
        return found
    if found.shape == (9,):
        return found.reshape(3, 3)
    if found.shape == (6,):  # xx, yy, zz, yz, xz, xy, as ASE keeps it
        return found[np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])]
    raise ValueError(f"{name} has shape {found.shape}: it must be (3, 3), (9,) or (6,)")
