"""The tmQM data set as it is released, and tmQM_wB97MV after it: energies in Hartree.

A tmQM release is a directory of ``tmQM_X1.xyz.gz``, ``tmQM_X2.xyz.gz``, ... with ``tmQM_y.csv``
(properties, separated by semicolons) and ``tmQM_X.q`` (natural atomic charges). A comment line of
the xyz files reads ``CSD_code = ABEVAG | q = 0 | S = 0 | Stoichiometry = ... | MND = 6``, q the
total charge and S the total spin. tmQM_wB97MV is an ASE trajectory or database with the same names,
its energy as ``energy`` or ``Recomputed_E``. Only structures that carry these names are touched,
and no energy that a calculator holds, as those of extxyz files do.

Balcells and Skjelstad, J. Chem. Inf. Model. 60, 6135 (2020), TPSSh-D3BJ/def2-SVP; Garrison et al.,
J. Chem. Inf. Model. 63, 7642 (2023), wB97M-V/def2-SVPD.
"""

from __future__ import annotations

import csv
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from orbq.errors import InputError
from orbq.preprocess.text import DAMAGED, OPENERS, lines_of, open_text, read_line
from orbq.units import HARTREE

ENERGIES = ("Recomputed_E", "Electronic_E")  # the later calculation first
CHARGES = "natural_charges"
_PROPERTIES, _CHARGES = "tmQM_y.csv", "tmQM_X.q"
MAX_CHARGES = 100_000  # atoms of one complex; the largest has some hundreds
_CODE, _TOTAL = "CSD_code", "Total charge"
# names that only these releases have, each beside CSD_code and q
_MARKS = ("MND", "formula")


class Tables(NamedTuple):
    """Labels that stand in other files than the structures.

    energies: CSD code -> Hartree. charges: the file of natural charges, None if there is none;
    offsets: CSD code -> place in it. name: of that file, for messages.
    """

    energies: Mapping[str, float]
    charges: TextIO | None
    offsets: Mapping[str, int]
    name: str = ""


NO_TABLES = Tables({}, None, {})


def parts(directory: Path) -> list[Path]:
    """The structure files of a tmQM release; empty if ``directory`` is none."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.glob("*tmQM_X*.xyz*") if p.is_file())


def tables_beside(path: Path) -> list[Path]:
    """The tables that belong to a structure file of a release."""
    if "tmQM_X" not in path.name or ".xyz" not in path.name:
        return []
    prefix = path.name.split("tmQM_X")[0]  # old_ of the first release
    tables, packings = (_PROPERTIES, _CHARGES), ("", *OPENERS)
    names = [path.with_name(f"{prefix}{name}{packed}") for name in tables for packed in packings]
    return [name for name in names if name.is_file()]


@contextmanager
def open_tables(paths: Sequence[Path]) -> Iterator[Tables]:
    """Read the energies and find the charges; the charges themselves stay on disk.

    Raises InputError for a table that is not one.
    """
    energies: dict[str, float] = {}
    tables = NO_TABLES
    with ExitStack() as stack:
        for path in paths:
            with _told_when_damaged(path):
                stream = stack.enter_context(open_text(path))
                if _PROPERTIES in path.name:
                    energies = _read_energies(path, stream)
                else:
                    tables = Tables({}, stream, _find_charges(path, stream), str(path))
        yield tables._replace(energies=energies)


@contextmanager
def _told_when_damaged(path: object) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (*DAMAGED, csv.Error) as error:
        raise InputError(
            f"{path}: truncated or corrupt: {error or type(error).__name__}; copy or download the "
            "file again"
        ) from error


def _read_energies(path: Path, stream: TextIO) -> dict[str, float]:
    reader = csv.DictReader(lines_of(stream, path), delimiter=";")
    column = ENERGIES[-1]
    if not {_CODE, column} <= set(reader.fieldnames or ()):
        found = ", ".join(reader.fieldnames or ("nothing",))[:200]
        raise InputError(f"{path}: needs the columns {_CODE};{column}, found {found}")
    energies = {}
    for number, row in enumerate(reader, start=2):
        try:
            energies[row[_CODE].strip()] = float(row[column])
        except (TypeError, ValueError, AttributeError):
            raise InputError(f"{path}, line {number}: {row[column]!r} is no energy") from None
    return energies


def _find_charges(path: Path, stream: TextIO) -> dict[str, int]:
    offsets = {}
    while line := read_line(stream, path):
        if line.startswith(_CODE):
            offsets[_code_of(line)] = stream.tell()
    if not offsets:
        raise InputError(f"{path}: holds no line '{_CODE} = ...': not the charges of tmQM")
    return offsets


def _code_of(line: str) -> str:
    return line.split("=", 1)[-1].split("|", 1)[0].strip()


STATE = (_CODE, "q", "S", *_MARKS)  # what charge and multiplicity of these sets follow from


def translated(
    values: dict[str, Any], tables: Tables, computed: Container[str] = ()
) -> tuple[dict[str, Any], set[str]]:
    """The named values of a structure in eV and with a spin multiplicity, if it is of these sets;
    and the names of those that were in Hartree.

    computed: names of what a calculator holds, which is in eV whatever else the structure carries.

    Raises ValueError for values that are no numbers, InputError for a damaged table.
    """
    if not ({_CODE, "q"} <= values.keys() and any(mark in values for mark in _MARKS)):
        return values, set()
    code, out = str(values[_CODE]), dict(values)
    try:
        converted = _translate(out, code, tables, computed)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"energies, q, S and spin must be numbers: {error}") from error
    if tables.charges is not None and code in tables.offsets:
        with _told_when_damaged(tables.name):
            out[CHARGES] = _charges(tables, tables.charges, tables.offsets[code])
    return out, converted


def _translate(
    out: dict[str, Any], code: str, tables: Tables, computed: Container[str]
) -> set[str]:
    if code in tables.energies:
        out.setdefault(ENERGIES[-1], tables.energies[code])
    if isinstance(out.get(ENERGIES[0]), str):  # not converged; the other method's is no substitute
        for name in ENERGIES:
            out.pop(name, None)
    converted = {n for n in (*ENERGIES, "energy") if n in out and n not in computed}
    for name in converted:
        out[name] = out[name] * HARTREE
    out["total_charge"] = out["q"]
    spin = out.pop("spin", None)
    out["spin_multiplicity"] = (
        max(spin, 1) if "S" not in out and spin is not None else (2 * out.get("S", 0) + 1)
    )
    return converted


def _charges(tables: Tables, stream: TextIO, offset: int) -> np.ndarray:
    """The rows ``symbol charge`` of one complex."""
    stream.seek(offset)
    values: list[str] = []
    while (line := read_line(stream, tables.name)).strip() and not line.startswith(_TOTAL):
        values.append(line.split()[-1])
        if len(values) > MAX_CHARGES:
            raise ValueError(f"{CHARGES}: more than {MAX_CHARGES} of one complex in {tables.name}")
    try:
        return np.array(values, float)
    except ValueError as error:
        raise ValueError(f"{CHARGES} are not numbers: {error}") from error
