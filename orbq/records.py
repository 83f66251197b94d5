"""What a training run writes beside its checkpoints: one line per validation or bad batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orbq.errors import InputError
from orbq.preprocess.pool import Pool
from orbq.preprocess.store import Dataset
from orbq.run import METRICS, read_description

NONFINITE = "nonfinite.jsonl"
_RECOMPUTED = {"onsite", "xtb_energy", "xtb_forces"}  # their last bits depend on the machine


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")


def truncate(directory: Path, stages: Sequence[str], stage: int, step: int) -> None:
    """Drop records of steps that will be made again, and lines cut off by a power failure."""
    for path in (directory / METRICS, directory / NONFINITE):
        if not path.is_file():
            continue
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                place = (stages.index(record["stage"]), record["step"])
            except (ValueError, KeyError, TypeError):
                continue
            if place <= (stage, step):
                kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")


def structures_of(pool: Pool, items: np.ndarray) -> list[dict[str, Any]]:
    """Data set, place in it, and place in the input files of some structures of a pool."""
    found = []
    for part, _, rows in pool.split(np.sort(items)):
        dataset: Any = pool.parts[part].dataset
        inputs = dataset.manifest["sources"]
        for row in rows:
            file, frame = (int(x) for x in dataset["source"][row])
            name = inputs[file]["name"] if file < len(inputs) else ""
            found.append(
                {"dataset": str(dataset.path), "index": int(row), "file": name, "frame": frame}
            )
    return found


def check_same_data(directory: Path, datasets: Sequence[Dataset]) -> None:
    """Refuse to go on with other structures or labels than the run was begun with."""
    before = read_description(directory)["data"]
    for dataset, stored in zip(datasets, before, strict=True):
        for name, now in dataset.manifest["arrays"].items():
            if name not in _RECOMPUTED and now != stored["arrays"].get(name):
                raise InputError(
                    f"{dataset.path} has changed since {directory} was begun ({name} is another): "
                    "bring the data set back, or start anew with --overwrite"
                )
