"""The data set on disk: flat ``.npy`` arrays, opened memory-mapped, and a manifest.

A data set is finished when its manifest is there: the manifest is written last and atomically, and
holds the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orbq.errors import InputError
from orbq.schema import FAILURES, FIELDS, MANIFEST, SCHEMA_VERSION, Structure

JOB = ".job"  # what an unfinished job keeps inside the data set's directory
OFFSETS = "offsets"


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
        return cls(directory, manifest, arrays)

    def __len__(self) -> int:
        return len(self.arrays[OFFSETS]) - 1

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

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
        """The xTB method of the labels."""
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
        """The entries of failures.jsonl: file, frame, kind, reason."""
        with (self.path / FAILURES).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


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
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged: {error}; delete {directory} and run `orbq preprocess` again"
        ) from error
    if version != SCHEMA_VERSION:
        inputs = " ".join(source["name"] for source in manifest.get("sources", []))
        raise InputError(
            f"{directory} has schema version {version}, this orbq reads {SCHEMA_VERSION}; convert "
            f"it by labelling again: `orbq preprocess {inputs} --out NEW`"
            + ("" if version < SCHEMA_VERSION else ", or install a newer orbq")
        )
    return dict(manifest)


def _open_array(directory: Path, name: str, stated: Mapping[str, Any]) -> np.ndarray:
    path = array_file(directory, name)
    remedy = f"`orbq verify {directory}` tells what else is damaged; label the data again"
    try:
        shape, dtype = tuple(stated[name]["shape"]), np.dtype(stated[name]["dtype"])
        array: np.ndarray = np.load(path, mmap_mode=None if 0 in shape else "r", allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} is missing or damaged: {error}; {remedy}") from error
    if array.shape != shape or array.dtype != dtype:
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}, the manifest states {dtype} {shape}; "
            f"{remedy}"
        )
    return array


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
