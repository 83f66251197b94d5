"""The last step of a job: failures.jsonl, checksums, and the manifest that makes the set valid."""

from __future__ import annotations

import heapq
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orbq.preprocess import store
from orbq.preprocess.job import Ledger, Workspace
from orbq.preprocess.read import UNLABELLED, Failure
from orbq.preprocess.stage import Staged
from orbq.schema import FAILURES, FIELDS, MANIFEST, SCHEMA_VERSION


def write_manifest(
    work: Workspace,
    sources: list[dict[str, str]],
    identity: Mapping[str, Any],
    staged: Staged,
    ledger: Ledger,
) -> None:
    """Write failures.jsonl and manifest.json."""
    _write_failures(work, sources, ledger)
    arrays = {name: _describe(store.array_file(work.out, name)) for name in store.array_names()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "method": identity["method"],
        "settings": identity["settings"],
        "tblite_version": identity["tblite version"],
        "blas": sorted(ledger.blas),
        "units": {name: field.unit for name, field in FIELDS.items() if field.unit},
        "sources": sources,
        "keys": staged.names_used,
        "counts": _counts(work.out, staged, ledger),
        "arrays": arrays,
        "failures": {"sha256": store.sha256_of(work.out / FAILURES)},
        "job": identity,
    }
    store.sync_directory(work.out)
    store.write_atomically(work.out / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _describe(path: Path) -> dict[str, Any]:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "sha256": store.sha256_of(path),
    }


def _counts(out: Path, staged: Staged, ledger: Ledger) -> dict[str, Any]:
    def labelled(name: str) -> int:
        return int(np.count_nonzero(np.load(store.array_file(out, f"{name}_mask"), mmap_mode="r")))

    return {
        "structures": staged.structures,
        "atoms": staged.atoms,
        "rejected": staged.rejected,
        "without_xtb": len(ledger.failures),
        "rescued": dict(sorted(Counter(ledger.notes.values()).items())),
        "labels": {name: labelled(name) for name, field in FIELDS.items() if field.maskable},
    }


def _write_failures(work: Workspace, sources: list[dict[str, str]], ledger: Ledger) -> None:
    """Rejected structures and those without labels, in the order of the input."""
    source = np.load(store.array_file(work.out, "source"), mmap_mode="r")

    def rejected() -> Iterator[tuple[tuple[int, int], Failure]]:
        with work.rejected.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                yield (entry.pop("before"), 0), Failure(**entry)

    def unlabelled() -> Iterator[tuple[tuple[int, int], Failure]]:
        for i, reason in sorted(ledger.failures.items()):
            number, frame = source[i].tolist()
            yield (i, 1), Failure(sources[number]["name"], frame, reason, UNLABELLED)

    partial = work.state / FAILURES
    with partial.open("w", encoding="utf-8") as out:
        for _, failure in heapq.merge(rejected(), unlabelled(), key=lambda item: item[0]):
            out.write(json.dumps(failure._asdict()) + "\n")
        out.flush()
        os.fsync(out.fileno())
    partial.replace(work.out / FAILURES)
