"""Neighbour lists of a whole data set: computed once in constant memory and kept beside it.

``neighbors(dataset, cutoff)`` memory-maps ``<dataset>/neighbors-<cutoff>/``: flat arrays of edges
with offsets, as neighbors.py defines an edge, and a ``meta.json`` that ties them to the data set's
manifest. The directory is put in place in one step, so that several processes may ask at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from orbq.errors import OrbqError
from orbq.preprocess.flat import FlatWriter, release
from orbq.preprocess.neighbors import cell_list, check_cutoff, molecule_edges
from orbq.preprocess.store import check_atoms, sha256_of
from orbq.schema import MANIFEST

CACHE_VERSION = 2
_CHUNK_ATOMS = 1 << 16  # atoms read at once from a data set


class DatasetLike(Protocol):
    """What packing needs of a data set: flat arrays by name (schema.FIELDS), the xTB method of its
    labels, and where it lies."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]: ...

    @property
    def path(self) -> Path | None: ...

    @property
    def method(self) -> str: ...

    def __len__(self) -> int: ...


class Neighbors(NamedTuple):
    """Edges of every structure of a data set at one cutoff (Å).

    offsets: [S + 1] int64, edges of structure i are rows ``offsets[i]:offsets[i + 1]``.
    senders, receivers: [E] unsigned, atoms counted from 0 inside each structure.
    images: [E, 3] int16 lattice translations (shift = image @ cell), None if nothing is periodic.
    """

    cutoff: float
    offsets: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    images: np.ndarray | None


def neighbors(
    dataset: DatasetLike, cutoff: float, progress: Callable[[int, int], None] | None = None
) -> Neighbors:
    """Edges of a whole data set, memory-mapped from ``<dataset>/neighbors-<cutoff>/``.

    Computed once in constant memory when the cache is absent or belongs to another version of the
    data set, and put in place in one step, so that several processes may ask at once. A data set
    that lies only in memory or on a read-only file system is computed in memory.
    progress: called with (structures done, all structures).

    Raises InputError for a bad cutoff, OrbqError when the disk is full.
    """
    check_cutoff(cutoff)
    if dataset.path is None:
        return _in_memory(dataset, cutoff, progress)
    place = dataset.path / f"neighbors-{cutoff:g}"
    stamp = _stamp(dataset, cutoff)
    if (cached := _open(place, stamp)) is not None:
        return cached
    try:
        _make(dataset, cutoff, place, stamp, progress)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            text = f"{dataset.path} cannot be written: its neighbour list is held in memory"
            warnings.warn(text, stacklevel=2)
            return _in_memory(dataset, cutoff, progress)
        raise OrbqError(
            f"{place}: the neighbour list could not be stored ({error.strerror}): make room, or"
            " copy the data set to a larger disk"
        ) from error
    result = _open(place, stamp)
    if result is None:
        raise OrbqError(f"{place}: changed while it was being written; run the command again")
    return result


def _make(
    dataset: DatasetLike,
    cutoff: float,
    place: Path,
    stamp: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the cache beside its place and put it there; what fails leaves nothing behind."""
    own = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = place.with_name(f"{place.name}.tmp-{own}")
    _remove_abandoned(place)
    try:
        temporary.mkdir()
        _write(dataset, cutoff, temporary, stamp, progress)
        _put(temporary, place, stamp)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _stamp(dataset: DatasetLike, cutoff: float) -> dict[str, Any]:
    """What a cache must agree with to belong to this data set and cutoff."""
    manifest = None if dataset.path is None else dataset.path / MANIFEST
    digest = None
    if manifest is not None and manifest.exists():
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    n_atoms = len(dataset.arrays["numbers"])
    return {
        "version": CACHE_VERSION,
        "cutoff": float(cutoff),
        "n_structures": len(dataset),
        "n_atoms": n_atoms,
        "manifest_sha256": digest,
    }


def _open(place: Path, stamp: dict[str, Any]) -> Neighbors | None:
    """The cache, or None when it is absent, of other data, or damaged."""
    try:
        meta = json.loads((place / "meta.json").read_text())
        names = ["offsets", "senders", "receivers"] + (["images"] if meta["periodic"] else [])
        arrays = {name: _load(place / f"{name}.npy") for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    same = all(meta.get(key) == value for key, value in stamp.items())
    n_edges = meta.get("n_edges")
    if not same or any(len(arrays[name]) != n_edges for name in names[1:]):
        return None
    return Neighbors(stamp["cutoff"], *(arrays.get(name) for name in Neighbors._fields[1:]))  # type: ignore[arg-type]


def damaged(directory: Path) -> Iterator[Path]:
    """Files of a data set's cached neighbour lists whose bytes are not those that were written.

    Opening a list compares lengths alone; this reads all of them.
    """
    for place in sorted(directory.glob("neighbors-*")):
        if ".tmp-" in place.name:  # unfinished
            continue
        try:
            meta = json.loads((place / "meta.json").read_text())
            digests = dict(meta["sha256"]) if meta["version"] == CACHE_VERSION else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # is made anew when it is asked for
        for name in Neighbors._fields[1:]:
            path = place / f"{name}.npy"
            if name in digests and path.is_file() and sha256_of(path) != digests[name]:
                yield path


def _load(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)


class _Chunk(NamedTuple):
    counts: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    images: np.ndarray | None


def _chunks(dataset: DatasetLike, cutoff: float) -> Iterator[_Chunk]:
    """Edges of consecutive structures, about ``_CHUNK_ATOMS`` atoms at a time."""
    arrays = dataset.arrays
    offsets = np.asarray(arrays["offsets"])
    images = _is_periodic(dataset)
    pbc = np.zeros(len(dataset), bool)
    if images:
        pbc |= np.asarray(arrays["pbc"]).any(1)
    begin = 0
    while begin < len(dataset):
        end = int(np.searchsorted(offsets, offsets[begin] + _CHUNK_ATOMS, side="right")) - 1
        end = min(max(end, begin + 1), len(dataset))
        atoms = slice(offsets[begin], offsets[end])
        positions = np.asarray(arrays["positions"][atoms], np.float64)
        check_atoms(dataset.path, np.asarray(arrays["numbers"][atoms]), positions)
        n_atoms = np.diff(offsets[begin : end + 1])
        if pbc[begin:end].any():
            yield _mixed_chunk(positions, n_atoms, cutoff, arrays, slice(begin, end))
        else:
            edges = molecule_edges(positions, n_atoms, cutoff)
            zeros = np.zeros((len(edges[1]), 3), np.int16) if images else None
            yield _Chunk(*edges, zeros)
        release(arrays["positions"])
        begin = end


def _mixed_chunk(
    positions: np.ndarray,
    n_atoms: np.ndarray,
    cutoff: float,
    arrays: Mapping[str, np.ndarray],
    rows: slice,
) -> _Chunk:
    """Edges of a chunk in which some structures are periodic, one structure at a time."""
    cell, pbc = np.asarray(arrays["cell"][rows]), np.asarray(arrays["pbc"][rows])
    starts = np.cumsum(n_atoms) - n_atoms
    found = []
    for i, (start, n) in enumerate(zip(starts, n_atoms, strict=True)):
        x = positions[start : start + n]
        if pbc[i].any():
            found.append(cell_list(x, cutoff, cell[i], pbc[i]))
        else:
            _, senders, receivers = molecule_edges(x, n_atoms[i : i + 1], cutoff)
            found.append((senders, receivers, np.zeros((len(senders), 3), np.int16)))
    senders, receivers, images = (np.concatenate(part) for part in zip(*found, strict=True))
    return _Chunk(np.array([len(f[0]) for f in found]), senders, receivers, images.astype(np.int16))


def _index_dtype(dataset: DatasetLike) -> str:
    """The smallest unsigned type that counts the atoms of the largest structure."""
    sizes = np.diff(np.asarray(dataset.arrays["offsets"]))
    return str(np.min_scalar_type(max(int(sizes.max(initial=1)) - 1, 0)))


def _is_periodic(dataset: DatasetLike) -> bool:
    return "pbc" in dataset.arrays and bool(np.asarray(dataset.arrays["pbc"]).any())


def _write(
    dataset: DatasetLike,
    cutoff: float,
    place: Path,
    stamp: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Stream the edges of a data set into the directory ``place``."""
    writers = {
        "senders": FlatWriter(place / "senders.npy", _index_dtype(dataset)),
        "receivers": FlatWriter(place / "receivers.npy", _index_dtype(dataset)),
    }
    periodic = _is_periodic(dataset)
    if periodic:
        writers["images"] = FlatWriter(place / "images.npy", "int16", (3,))
    counts, done = [np.zeros(1, np.int64)], 0
    try:
        for chunk in _chunks(dataset, cutoff):
            for name, writer in writers.items():
                writer.append(getattr(chunk, name))
            counts.append(chunk.counts)
            done += len(chunk.counts)
            if progress is not None:
                progress(done, len(dataset))
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    for writer in writers.values():
        writer.close()
    offsets = np.cumsum(np.concatenate(counts), dtype=np.int64)
    np.save(place / "offsets.npy", offsets)
    digests = {name: sha256_of(place / f"{name}.npy") for name in ("offsets", *writers)}
    meta = {**stamp, "periodic": periodic, "n_edges": int(offsets[-1]), "sha256": digests}
    (place / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _in_memory(
    dataset: DatasetLike, cutoff: float, progress: Callable[[int, int], None] | None
) -> Neighbors:
    index = np.dtype(_index_dtype(dataset))
    chunks, done = [], 0
    for chunk in _chunks(dataset, cutoff):
        small = chunk.senders.astype(index), chunk.receivers.astype(index)
        chunks.append(_Chunk(chunk.counts, *small, chunk.images))
        done += len(chunk.counts)
        if progress is not None:
            progress(done, len(dataset))
    counts = np.concatenate([np.zeros(1, np.int64), *(c.counts for c in chunks)])
    senders = np.concatenate([np.zeros(0, index), *(c.senders for c in chunks)])
    receivers = np.concatenate([np.zeros(0, index), *(c.receivers for c in chunks)])
    parts = [c.images for c in chunks if c.images is not None]
    images = np.concatenate(parts) if parts else None
    return Neighbors(float(cutoff), np.cumsum(counts), senders, receivers, images)


def _put(temporary: Path, place: Path, stamp: dict[str, Any]) -> None:
    """Move a finished cache into place; a valid one that another process put first is kept."""
    for _ in range(3):
        if _open(place, stamp) is not None:
            break
        if place.exists():  # of another version of the data set
            stale = temporary.with_name(temporary.name + "-stale")
            os.replace(place, stale)
            shutil.rmtree(stale, ignore_errors=True)
        try:
            os.rename(temporary, place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(place: Path) -> None:
    """Delete what a killed process of this machine left of an unfinished cache."""
    prefix = f"{place.name}.tmp-{socket.gethostname()}-"
    for left in place.parent.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
