"""Structure files in, the same structures with a run's predictions out; one after another.

A structure that cannot be predicted is handed on as ``Refused`` and stops no other. Output is
written beside its final name and moved there when it is complete.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from orbq.ensemble import SPREAD, Ensemble, combined
from orbq.errors import InputError
from orbq.inference import (
    BatchPredictor,
    Predicted,
    atomic_charges,
    orbital_charges,
    predict_members,
    shell_charges,
    voigt,
)
from orbq.preprocess import comment
from orbq.preprocess.frames import Frame, Source, read_frames
from orbq.preprocess.read import DEFAULT_NAMES, Reader, as_written, results_of
from orbq.run import Run, require_energy
from orbq.schema import Structure
from orbq.targets import CHARGE_TARGETS

PARTIAL = ".partial"
RESULTS = ("energy", "forces", "stress", "charges")  # what ASE has a name for
OF_THE_ENERGY = ("energy", "free_energy", "energies", "forces", "stress", "stresses")
# per-atom arrays that every format of KEEPING has a place for
ARRAYS = ("numbers", "positions", "tags", "momenta", "masses", "initial_magmoms", "initial_charges")
KEEPING = ("extxyz", "traj", "db", "json")  # formats that hold what is predicted
GROUPS = DEFAULT_NAMES["group"]  # names that are kept as they are written: 007 is no number
RESOLVED_CHARGES = {"orbital_charges": orbital_charges, "shell_charges": shell_charges}
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


class Refused(NamedTuple):
    """A structure that was not predicted. file, frame: where it was read."""

    file: str
    frame: int
    reason: str


# --------------------------------------------------------------------------- predictions


def annotate(
    run: Run | Ensemble,
    reader: Reader,
    charges: bool = False,
    batch_size: int = 16,
    stress: bool = False,
) -> Iterator[Atoms | Refused]:
    """Every structure of a reader's files with its predictions, in order, in constant memory.

    Energy and forces are set as the calculator's results, in place of all that came with the
    structure and follows from another energy; with ``stress`` also the stress of
    crystals (eV/Å^3, Voigt's order xx, yy, zz, yz, xz, xy); with ``charges`` also the atomic
    charges, and the arrays ``orbital_charges`` [n, 10] and ``shell_charges`` [n, 4] if the run has
    them. An ensemble's predictions are means; the spread is in ``info["energy_std"]``,
    ``info["stress_std"]`` and the arrays ``forces_std``, ``charges_std``, ... Of a run that was
    taught neither energies nor forces only the charges are given.

    Raises InputError for charges of a run without a charge target, for a run of which nothing is
    left to give or that was not taught what the stress follows from, and when a whole file is at
    fault, or has no structure with a charge or spin under the name that the reader wants.
    """
    target = charge_target(run) if charges else None
    if target is None or stress:
        require_energy(run)
    runs = run.runs if isinstance(run, Ensemble) else (run,)
    targets = (*((target,) if target else ()), *(("stress",) if stress else ()))
    predictors = [BatchPredictor(member, targets) for member in runs]
    waiting: deque[Atoms] = deque()
    refused: deque[Refused] = deque()

    def usable() -> Iterator[Structure]:
        for source in reader.sources:
            for frame in read_frames(source):
                found = _structure(run, reader, source, frame)
                if isinstance(found, Refused):
                    refused.append(found)
                else:
                    frame.atoms.info = dict(as_written(frame.atoms.info, GROUPS, frame))
                    waiting.append(frame.atoms)
                    yield found
        reader.check_demanded()

    for members in predict_members(predictors, usable(), batch_size):
        while refused:
            yield refused.popleft()
        atoms = waiting.popleft()
        results = [_results(one, target, run.taught_energy, atoms.pbc.all()) for one in members]
        yield _annotated(atoms, results[0] if len(runs) == 1 else combined(results))
    yield from refused


def charge_target(run: Run | Ensemble) -> str:
    """The target that charges are taken from. Raises InputError when the run has none."""
    for name in CHARGE_TARGETS:
        if name in run.targets:
            return name
    raise InputError(
        "the run predicts no charges: it was trained with a weight on none of "
        f"loss.weights.{{{', '.join(CHARGE_TARGETS)}}}; leave --charges out, or train with one"
    )


def _structure(
    run: Run | Ensemble, reader: Reader, source: Source, frame: Frame
) -> Structure | Refused:
    if frame.atoms is None:
        return Refused(source.name, frame.number, frame.reason)
    try:
        structure = run.structure(frame.atoms, reader)
        run.reference_energy(structure)
    except InputError as error:
        return Refused(source.name, frame.number, str(error))
    return structure


def _results(
    predicted: Predicted, target: str | None, energies: bool, crystal: bool
) -> dict[str, Any]:
    """Everything that is written of one structure, by name."""
    out: dict[str, Any] = {}
    if energies:
        out = {"energy": predicted.energy, "forces": np.asarray(predicted.forces, np.float64)}
    if crystal and "stress" in predicted.targets:
        out["stress"] = voigt(predicted.targets["stress"])
    if target is not None:
        values = predicted.targets[target]
        out["charges"] = atomic_charges(target, values)
        for name, derive in RESOLVED_CHARGES.items():
            if (found := derive(target, values)) is not None:
                out[name] = found
    return out


def _annotated(atoms: Atoms, results: dict[str, Any]) -> Atoms:
    for name in results:  # a spread that came with the file is that of other predictions
        atoms.info.pop(name + SPREAD, None)
        atoms.arrays.pop(name + SPREAD, None)
    known = {name: results[name] for name in RESULTS if name in results}
    replaced = OF_THE_ENERGY if "energy" in known else ()
    kept = {name: value for name, value in results_of(atoms).items() if name not in replaced}
    for name in {*kept, *known, *replaced}:  # of the same name beside it, ASE writes neither
        atoms.info.pop(name, None)
        atoms.arrays.pop(name, None)
    atoms.calc = SinglePointCalculator(atoms, **{**kept, **known})
    for name, value in results.items():
        if name in ("energy" + SPREAD, "stress" + SPREAD):
            atoms.info[name] = value
        elif name not in known:
            atoms.arrays[name] = value
    return atoms


# --------------------------------------------------------------------------- output


class Writer:
    """Writes structures one by one to ``path``; complete only after ``finish``.

    The format follows from the name, as in ASE. extxyz (also .gz, .xz, .bz2), traj and db files
    are written as the structures come; any other format at the end. keeps: whether the format holds
    energies, forces and charges.

    Raises InputError for a name that ASE knows no format for, or one it cannot write.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        self.format, self._single = _format(path)
        self.keeps = self.format in KEEPING
        self.count = 0
        self._collected: list[Atoms] = []
        self._stream: Any = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.partial.unlink(missing_ok=True)
            self._open()
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error

    def _open(self) -> None:
        if self.format == "extxyz":
            opener = _COMPRESSED.get(self.path.suffix, open)
            self._stream = opener(self.partial, "wt", encoding="utf-8")
        elif self.format == "traj":
            from ase.io.trajectory import TrajectoryWriter

            self._stream = TrajectoryWriter(str(self.partial))
        else:
            self.partial.touch()

    def write(self, atoms: Atoms) -> None:
        """Add one structure. Raises InputError when the format holds only one."""
        if self.count and self._single:
            self.partial.unlink(missing_ok=True)
            raise InputError(
                f"{self.path}: the format {self.format!r} holds one structure: name a file that "
                "ends in .extxyz, .traj or .db"
            )
        self.count += 1
        if self.format == "extxyz":
            from ase.io.extxyz import write_xyz

            texts = {name: text for name, text in atoms.info.items() if isinstance(text, str)}
            written = atoms.copy()
            written.calc = atoms.calc
            written.info |= {name: comment.as_value(text) for name, text in texts.items()}
            write_xyz(self._stream, [written])
        elif self.format == "traj":
            self._stream.write(_with_arrays_in_info(atoms))
        elif self.format == "db":
            from ase.db import connect

            with connect(str(self.partial), type="db") as database:
                _add_row(database, atoms)
        else:
            self._collected.append(atoms)

    def close(self) -> None:
        """Close the file under its partial name."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def finish(self) -> None:
        """Close the file and give it its name; without any structure, remove it."""
        self.close()
        if not self.count:
            self.partial.unlink(missing_ok=True)
            return
        if self._collected:
            try:
                self._write_collected()
            except OSError:  # a full disk
                raise
            except Exception as error:  # ASE's writers raise many types
                self.partial.unlink(missing_ok=True)
                raise InputError(
                    f"{self.path}: the format {self.format!r} cannot hold these structures "
                    f"({type(error).__name__}: {error}): name a file that ends in .extxyz, .traj "
                    "or .db"
                ) from error
        self.partial.replace(self.path)

    def _write_collected(self) -> None:
        import ase.io

        if self.format != "json":
            ase.io.write(self.partial, self._collected, format=self.format)
            return
        from ase.db import connect  # ase.io knows a JSON database by its final name alone

        self.partial.unlink(missing_ok=True)
        with connect(str(self.partial), type="json", use_lock_file=False) as database:
            for atoms in self._collected:
                _add_row(database, atoms)


def _with_arrays_in_info(atoms: Atoms) -> Atoms:
    """For formats that keep ``info`` but no arrays of other names than ASE's own."""
    out = atoms.copy()
    for name, values in atoms.arrays.items():
        if name in RESOLVED_CHARGES or name.endswith(SPREAD):
            out.info[name] = values  # in place of an earlier prediction
        elif name not in ARRAYS:
            out.info.setdefault(name, values)
    out.calc = atoms.calc
    return out


def _add_row(database: Any, atoms: Atoms) -> None:
    """Write to a database of ASE; key-value pairs and data of a row stay what they were."""
    info = _with_arrays_in_info(atoms).info
    pairs, data = (info.get(name, {}) for name in ("key_value_pairs", "data"))
    if not (isinstance(pairs, Mapping) and isinstance(data, Mapping)):
        pairs, data = {}, {}
    database.write(atoms, key_value_pairs=dict(pairs), data={**data, **_plain(info)})


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    """What of ``info`` a database takes; of NumPy's numbers, as extxyz is read, Python's."""
    values = {k: v.item() if isinstance(v, np.generic) else v for k, v in info.items()}
    return {k: v for k, v in values.items() if _storable(v)}


def _storable(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_storable, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _storable(v) for k, v in value.items())
    return isinstance(value, str | int | float | bool | np.generic | np.ndarray)


def _format(path: Path) -> tuple[str, bool]:
    """ASE's name of the format of ``path``, and whether it holds one structure only."""
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    try:
        name = filetype(path.name, read=False)
        known = ioformats[name]
    except (KeyError, UnknownFileTypeError):
        known = None
    if known is None or not known.can_write:
        raise InputError(
            f"{path}: ASE writes no format of that name: end it in .extxyz, .traj or .db"
        )
    if path.suffix in _COMPRESSED and name != "extxyz":
        raise InputError(f"{path}: only extxyz is written compressed: leave {path.suffix} out")
    return name, known.single
