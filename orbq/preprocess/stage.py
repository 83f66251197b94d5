"""Reading: every usable structure goes to the data set's arrays, every other to a list with reason.

Runs in constant memory. Atoms and reference values are final afterwards; labels are added later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbq.errors import InputError
from orbq.preprocess import store
from orbq.preprocess.check import check
from orbq.preprocess.flat import FlatWriter, folded
from orbq.preprocess.job import LABELS, Workspace, lost_array
from orbq.preprocess.read import Failure, Reader
from orbq.schema import FIELDS, Structure

BLOCK = 512  # structures written at a time
GROUP_BYTES = np.dtype(FIELDS["group"].dtype).itemsize


class Staged(NamedTuple):
    """What reading found: structures and atoms kept, structures rejected, names used per field."""

    structures: int
    atoms: int
    rejected: int
    names_used: dict[str, dict[str, int]]


def stage(
    reader: Reader, work: Workspace, method: str, on_read: Callable[[int, int], None]
) -> Staged:
    """Read all structures into the arrays of ``work.out``; on_read(kept, rejected) as it goes.

    Raises InputError when a whole file is at fault or no structure is usable.
    """
    base = _base_arrays()
    layout = store.array_names()
    writers = {
        name: FlatWriter(store.array_file(work.out, name), layout[name][2], layout[name][1])
        for name in base
    }
    kept, atoms, reasons = 0, 0, Counter[str]()
    writers[store.OFFSETS].append(np.zeros(1, np.int64))
    block: list[Structure] = []
    with work.rejected.open("w", encoding="utf-8") as rejected:
        for item in reader:
            failure = item if isinstance(item, Failure) else _faulty(item, reader, method)
            if failure is not None:
                reasons[failure.reason] += 1
                rejected.write(json.dumps({"before": kept, **failure._asdict()}) + "\n")
            else:
                assert isinstance(item, Structure)
                near = folded(item.positions, item.cell, item.pbc)
                block.append(item._replace(positions=near))
                kept += 1
            if len(block) == BLOCK:
                atoms, block = _write_block(writers, block, atoms), []
                on_read(kept, sum(reasons.values()))
        atoms = _write_block(writers, block, atoms)
        rejected.flush()
        os.fsync(rejected.fileno())
    for name, writer in writers.items():
        writer.close()
        _synchronise(store.array_file(work.out, name))
    on_read(kept, sum(reasons.values()))
    if not kept:
        told = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
        raise InputError(f"{_files(reader)}: no usable structure: {told or 'no structure at all'}")
    used = {field: dict(sorted(names.items())) for field, names in reader.names_used.items()}
    return Staged(kept, atoms, sum(reasons.values()), used)


def lost_input(work: Workspace, staged: Staged) -> str | None:
    """What of an interrupted job's input is not there any more, if anything is."""
    if not work.rejected.is_file():
        return f"{work.rejected} is missing"
    return lost_array(work.out, _base_arrays(), staged.structures, staged.atoms)


def _base_arrays() -> list[str]:
    return [name for name in store.array_names() if name.removesuffix("_mask") not in LABELS]


def _files(reader: Reader) -> str:
    names = [source.name for source in reader.sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _faulty(structure: Structure, reader: Reader, method: str) -> Failure | None:
    reason = check(structure, method)
    if reason is None:
        return None
    number, frame = structure.source
    return Failure(reader.sources[number].name, frame, reason)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_block(writers: dict[str, FlatWriter], block: list[Structure], atoms: int) -> int:
    """Append structures to the arrays; returns the number of atoms written so far."""
    if not block:
        return atoms
    counts = [len(s.numbers) for s in block]
    offsets = atoms + np.cumsum(counts)
    writers[store.OFFSETS].append(offsets)
    for name, field in FIELDS.items():
        if name in LABELS:
            continue
        values = [_value(name, s) for s in block]
        dtype = np.dtype(field.dtype)
        if field.maskable:
            mask = np.array([v is not None for v in values])
            writers[f"{name}_mask"].append(mask)
            values = [
                np.zeros((n, *field.shape) if field.per == "atom" else field.shape)
                if v is None
                else v
                for v, n in zip(values, counts, strict=True)
            ]
        join: Callable[[Iterable[Any]], np.ndarray] = (
            np.concatenate if field.per == "atom" else np.array  # type: ignore[assignment]
        )
        writers[name].append(np.asarray(join(values), dtype))
    return int(offsets[-1])


def _value(name: str, structure: Structure) -> Any:
    if name == "content_hash":
        return store.content_hash(structure)
    if name == "group":
        return group_bytes(structure.group)
    return getattr(structure, name)


def group_bytes(group: str) -> bytes:
    """The group's name in at most 64 bytes; of a longer one the beginning and a digest."""
    name = group.encode()
    if len(name) <= GROUP_BYTES:
        return name
    digest = hashlib.sha256(name).hexdigest()[:16].encode()
    return name[: GROUP_BYTES - 17].decode(errors="ignore").encode() + b"~" + digest
