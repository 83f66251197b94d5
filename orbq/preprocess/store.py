"""The data set on disk: flat ``.npy`` arrays, opened memory-mapped, and a manifest.

A data set is finished when its manifest is there: the manifest is written last and atomically, and
holds the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orbq.errors import InputError
from orbq.orbitals import MAX_Z, SUMS
from orbq.preprocess.form import read_json, wrong
from orbq.schema import FAILURES, FIELDS, MANIFEST, SCHEMA_VERSION, Structure

JOB = ".job"  # what an unfinished job keeps inside the data set's directory
OFFSETS = "offsets"
MAX_POSITION = 1e9  # Å; as check.py demands
_EMPTY_FILE = 1 << 12  # bytes of an array without elements, at most

_FILE = {"sha256": str}
FORM = {  # of manifest.json; see form.py
    "schema_version": int,
    "method": SUMS,
    "settings": dict,
    "tblite_version": str,
    "blas": [str],
    "sources": [{"name": str, **_FILE}],
    "keys": {str: {str: int}},
    "counts": {
        **dict.fromkeys(("structures", "atoms", "rejected", "without_xtb"), int),
        "rescued": {str: int},
        "labels": {str: int},
    },
    "arrays": {str: {"shape": [int], "dtype": str, **_FILE}},
    "failures": _FILE,
    "job": dict,
}
_FAILURE_FORM = {"file": str, "frame": int, "kind": str, "reason": str}


def array_names() -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Every array of a data set: {name: (per structure, atom or offset; trailing shape; dtype)}."""
    arrays: dict[str, tuple[str, tuple[int, ...], str]] = {OFFSETS: ("offset", (), "int64")}
    for name, field in FIELDS.items():
        arrays[name] = (field.per, field.shape, field.dtype)
        if field.maskable:
            arrays[f"{name}_mask"] = ("structure", (), "bool")
    return arrays


def array_file(directory: Path, name: str) -> Path:
    """Where the array ``name`` of a data set lies."""
    return directory / f"{name}.npy"


class Dataset:
    """A finished data set: S structures, their atoms one after the other.

    arrays: {name: memory-mapped array} for every field of ``schema.FIELDS``, ``<name>_mask`` and
    ``offsets`` [S + 1]. manifest: the parsed manifest.json. path: the directory.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.path, self.manifest, self.arrays = path, manifest, arrays

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Open a data set; its arrays stay on disk until they are indexed.

        Raises InputError when the directory holds no finished data set, one of another schema
        version, or an array that is missing or does not have the length the manifest states.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        stated: Mapping[str, Any] = manifest["arrays"]
        arrays = {name: _open_array(directory, name, stated) for name in array_names()}
        _check_lengths(directory, arrays)
        return cls(directory, manifest, arrays)

    def __len__(self) -> int:
        return len(self.arrays[OFFSETS]) - 1

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise InputError(f"{name!r} is no array of {self.path}: {', '.join(self.arrays)}")
        return self.arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    __iter__ = None  # it has a length (of structures) and names (of arrays): a loop would guess

    @property
    def offsets(self) -> np.ndarray:
        """[S + 1] int64: the atoms of structure i are rows offsets[i]:offsets[i + 1]."""
        return self.arrays[OFFSETS]

    @property
    def n_atoms(self) -> np.ndarray:
        """[S] number of atoms of each structure."""
        return np.diff(self.offsets)

    @property
    def method(self) -> str:
        """The xTB method of the labels; of several joined by + the first has the charges."""
        return str(self.manifest["method"])

    def structure_slice(self, i: int) -> slice:
        """Rows of structure ``i`` (0 <= i < S) in the per-atom arrays."""
        if not 0 <= i < len(self):
            raise IndexError(f"structure {i} of {len(self)}")
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def mask(self, name: str) -> np.ndarray:
        """[S] bool: the structures that have ``name``; all True for fields every structure has."""
        if FIELDS[name].maskable:
            return self.arrays[f"{name}_mask"]
        return np.ones(len(self), bool)

    def failures(self) -> Iterator[dict[str, Any]]:
        """The entries of failures.jsonl: file, frame, kind, reason.

        Raises InputError when it is damaged.
        """
        path = self.path / FAILURES
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    entry = json.loads(line)
                    if reason := wrong(entry, _FAILURE_FORM):
                        raise ValueError(f"line {number}: {reason}")
                    yield entry
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path} is missing or damaged: {error}; {_remedy(self.path)}"
            ) from error


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished data set.

    Raises InputError when there is none, it cannot be understood, or its schema is another one.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / JOB).is_dir():
            raise InputError(
                f"{directory} is an unfinished data set; run its `orbq preprocess` command again "
                "and it continues"
            )
        raise InputError(
            f"{directory} is not a data set (no {MANIFEST}); make one with "
            f"`orbq preprocess INPUT... --out {directory}`"
        )
    try:
        manifest = read_json(path, {"schema_version": int})
        version = manifest["schema_version"]
        if version == SCHEMA_VERSION and (reason := wrong(manifest, FORM)):
            raise ValueError(reason)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: {error}; delete {directory} and run `orbq preprocess` again"
        ) from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{directory} has schema version {version}, this orbq reads {SCHEMA_VERSION}; convert "
            f"it by labelling again: `{command_of(manifest, 'NEW')}`"
            + ("" if version < SCHEMA_VERSION else ", or install a newer orbq")
        )
    return dict(manifest)


def command_of(manifest: Mapping[str, Any], out: str) -> str:
    """The command that labels a data set again, with all that decides what is in it; of a manifest
    that does not say it, its form."""
    settings = {"spin_polarization": bool, "min_height": float}
    job = {"keys": {str: str}, "settings": settings}
    if wrong(manifest, {"sources": [{"name": str}], "method": str, "job": job}):
        return f"orbq preprocess INPUT... --out {out}"
    job, settings = manifest["job"], manifest["job"]["settings"]
    options = ["--method", manifest["method"]]
    for name, key in job["keys"].items():
        options += [f"--{name.replace('_', '-')}-key", key]
    options += ["--spin-polarized"] * settings["spin_polarization"]
    options += ["--min-height", f"{settings['min_height']:g}"]
    inputs = [source["name"] for source in manifest["sources"]]
    return shlex.join(["orbq", "preprocess", *inputs, "--out", out, *options])


def _remedy(directory: Path) -> str:
    return f"`orbq verify {directory}` tells what else is damaged; label the data again"


def _open_array(directory: Path, name: str, stated: Mapping[str, Any]) -> np.ndarray:
    path = array_file(directory, name)
    try:
        array = _map(path)
        shape, dtype = tuple(stated[name]["shape"]), np.dtype(stated[name]["dtype"])
    except Exception as error:  # NumPy raises many types on a header that makes no sense
        reason = f"{type(error).__name__}: {error}"[:300]
        raise InputError(f"{path} is missing or damaged: {reason}; {_remedy(directory)}") from error
    if array.shape != shape or array.dtype != dtype:
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}, the manifest states {dtype} {shape}; "
            f"{_remedy(directory)}"
        )
    per, trailing, wanted = array_names()[name]
    if array.dtype != np.dtype(wanted) or array.shape[1:] != trailing or array.ndim == 0:
        form = ", ".join(map(str, ("N", *trailing)))
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}: one value per {per} is needed, {wanted} "
            f"({form}); {_remedy(directory)}"
        )
    return array


def _map(path: Path) -> np.ndarray:
    """A ``.npy`` file memory-mapped: never unpickled, and never more of it than there is."""
    with path.open("rb") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if 0 in shape:  # cannot be mapped
        if path.stat().st_size > _EMPTY_FILE:
            raise ValueError("it is too long for an array without elements")
        return np.zeros(shape, dtype)
    array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    return array


def _check_lengths(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse offsets that do not divide the atoms into structures, and arrays of other lengths."""
    offsets, n_atoms = arrays[OFFSETS], len(arrays["numbers"])
    rows = {"offset": len(offsets), "structure": len(offsets) - 1, "atom": n_atoms}
    path = array_file(directory, OFFSETS)
    if (
        len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != n_atoms
        or (np.diff(offsets) < 1).any()
    ):
        raise InputError(
            f"{path} does not divide {n_atoms} atoms into structures; {_remedy(directory)}"
        )
    for name, (per, _, _) in array_names().items():
        if len(arrays[name]) != rows[per]:
            raise InputError(
                f"{array_file(directory, name)}: {len(arrays[name])} rows, {rows[per]} needed; "
                f"{_remedy(directory)}"
            )


def check_atoms(dataset_path: Path | None, numbers: np.ndarray, positions: np.ndarray) -> None:
    """Refuse atoms that no structure can have been stored with: they would index out of tables.

    numbers [n], positions [n, 3] Å: some atoms of a data set. Raises InputError.
    """
    if not len(numbers):
        return
    bad = (numbers < 1) | (numbers > MAX_Z)
    bad |= ~np.isfinite(positions).all(1) | (np.abs(positions) > MAX_POSITION).any(1)
    if bad.any():
        atom = int(np.argmax(bad))
        raise InputError(
            f"{dataset_path or 'a data set in memory'} is damaged: it holds an atom of atomic "
            f"number {numbers[atom]} at {positions[atom]} Å; "
            + (_remedy(dataset_path) if dataset_path else "1 to 86 and finite positions are needed")
        )


# --------------------------------------------------------------------------- writing


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The header of a ``.npy`` file; NumPy pads it so that its size does not depend on shape[0]."""
    stream = io.BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def write_atomically(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` in one step that survives a power cut."""
    partial = path.with_name(path.name + ".tmp")
    partial.unlink(missing_ok=True)  # a link that lies there would be followed
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and deletions in ``directory`` permanent."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(structure: Structure) -> bytes:
    """32 hex digits of SHA-256 of what the labels depend on.

    Atomic numbers, positions and cell rounded to 1e-6 Å, periodicity, charge, multiplicity.
    """
    digest = hashlib.sha256()
    state = (structure.total_charge, structure.spin_multiplicity, *structure.pbc.tolist())
    digest.update(np.array(state, "<i8").tobytes())
    digest.update(np.asarray(structure.numbers, "<i4").tobytes())
    for lengths in (structure.positions, structure.cell):
        digest.update(np.round(np.asarray(lengths) * 1e6).astype("<i8").tobytes())
    return digest.hexdigest()[:32].encode()
