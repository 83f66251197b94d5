"""Whether a data set is what was written: every byte, every length, the sums of its charges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orbq.errors import InputError
from orbq.orbitals import atomic_charges
from orbq.preprocess import store
from orbq.preprocess.flat import release
from orbq.preprocess.neighbor_cache import damaged
from orbq.preprocess.sane import CHARGE_SUM_TOLERANCE
from orbq.preprocess.store import Dataset
from orbq.schema import FAILURES

BLOCK = 1 << 14  # structures read at a time


def verify(
    directory: str | Path, on_file: Callable[[str, int, int], None] = lambda *args: None
) -> list[str]:
    """Everything that is wrong with a data set, one message per fault; [] when it is whole.

    Reads every file and compares it with the manifest; then checks offsets, masks, and that the
    orbital charges of each structure sum to its total charge. on_file(name, done, all) before each.
    Raises InputError when there is no manifest of this schema version.
    """
    path = Path(directory)
    manifest = store.read_manifest(path)
    problems: list[str] = []
    names = [*store.array_names(), FAILURES]
    for done, name in enumerate(names):
        on_file(name, done, len(names))
        problems += _file_problems(path, name, manifest)
    if problems:
        return problems
    try:
        return list(_value_problems(Dataset.open(path)))
    except InputError as error:
        return [str(error)]


def cache_problems(directory: str | Path) -> list[str]:
    """What is wrong with the neighbour lists kept in a data set's directory, with the remedy."""
    return [
        f"{file}: its bytes have changed since they were written (SHA-256 differs); delete "
        f"{file.parent}, a cached neighbour list: it is made anew when it is needed"
        for file in damaged(Path(directory))
    ]


def remedy(directory: Path, manifest: dict[str, Any]) -> str:
    """What to do about a damaged data set."""
    return (
        f"copy {directory} again from where it is whole, or delete it and label again: "
        + store.command_of(manifest, str(directory))
    )


def _file_problems(directory: Path, name: str, manifest: dict[str, Any]) -> Iterator[str]:
    is_array = name != FAILURES
    path = store.array_file(directory, name) if is_array else directory / name
    try:
        stated = manifest["arrays"][name] if is_array else manifest["failures"]
    except KeyError:
        yield f"{directory / 'manifest.json'}: says nothing of {path.name}"
        return
    if not path.is_file():
        yield f"{path}: missing"
        return
    if is_array:
        try:
            dtype, shape = np.dtype(stated["dtype"]), tuple(stated["shape"])
            header = len(store.npy_header(shape, dtype))
        except (TypeError, ValueError) as error:
            yield f"{directory / 'manifest.json'}: what it states of {path.name} is wrong: {error}"
            return
        wanted = header + dtype.itemsize * math.prod(shape)
        size = path.stat().st_size
        if size != wanted:
            kind = "truncated" if size < wanted else "too long"
            yield f"{path}: {kind}: {size:,} bytes, {wanted:,} stated"
            return
    if store.sha256_of(path) != stated["sha256"]:
        yield f"{path}: its bytes have changed since they were written (SHA-256 differs)"


def _value_problems(dataset: Dataset) -> Iterator[str]:
    offsets = np.asarray(dataset.offsets)
    for start in range(0, len(dataset), BLOCK):
        bounds = offsets[start : start + BLOCK + 1]
        atoms = slice(int(bounds[0]), int(bounds[-1]))
        numbers, positions = dataset["numbers"], dataset["positions"]
        try:
            store.check_atoms(dataset.path, numbers[atoms], positions[atoms])
        except InputError as error:
            yield str(error)
            return
        for read in (numbers, positions):
            release(read)
    yield from _charge_problems(dataset, offsets)


def _charge_problems(dataset: Dataset, offsets: np.ndarray) -> Iterator[str]:
    for start in range(0, len(dataset), BLOCK):
        bounds = offsets[start : start + BLOCK + 1]
        onsite = dataset["onsite"][bounds[0] : bounds[-1]]
        sums = np.add.reduceat(atomic_charges(onsite), bounds[:-1] - bounds[0])
        rows = slice(start, start + len(bounds) - 1)
        labelled = dataset.mask("onsite")[rows]
        surplus = np.where(labelled, sums - dataset["total_charge"][rows], 0.0)
        wrong = np.flatnonzero(~(np.abs(surplus) < CHARGE_SUM_TOLERANCE))
        if len(wrong):
            yield (
                f"{store.array_file(dataset.path, 'onsite')}: the charges of structure "
                f"{start + wrong[0]} sum to {surplus[wrong[0]]:+.2e} e more than its total charge"
            )
            return
        release(dataset["onsite"])
