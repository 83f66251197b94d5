"""Whether the files of a run can be what training wrote: checked before anything is built of them.

A network of a million layers, or statistics of 10^15 numbers, would otherwise be tried.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orbq.config import Config
from orbq.orbitals import GFN1, MAX_Z, SUMS
from orbq.preprocess.form import wrong
from orbq.targets import TARGETS, Statistics

MAX_STATISTICS = 1 << 24  # bytes unpacked; those of every target together are a hundredth
_KINDS = ("equivariant", "invariant", "energy")
FORM = {  # of run.json; see preprocess/form.py
    "architecture": {"heads": [list]},
    "constants": {"elements": [int], "energy_scale": float, "avg_num_neighbors": float},
    "references": {str: {"element": {str: float}, "charge": float, "fitted": bool}},
}


def fault(info: Mapping[str, Any], config: Config) -> str | None:
    """What is wrong with run.json beside its configuration; None if nothing is."""
    if reason := wrong(info, FORM):
        return reason
    stored, constants = info["architecture"], info["constants"]
    for name, value in config.model.model_dump(mode="json").items():
        if name in stored and (stored[name] != value or type(stored[name]) is not type(value)):
            return f"architecture.{name} is {stored[name]!r:.40}, config.model.{name} {value!r}"
    for name in ("activations", "matmul_precision"):
        value = getattr(config.training, name)
        if stored.get(name, value) != value:
            return f"architecture.{name} is {stored[name]!r:.40}, config.training.{name} {value!r}"
    for head in stored["heads"]:
        if len(head) != 2 or head[0] not in tuple(TARGETS) or head[1] not in _KINDS:
            return f"architecture.heads holds {head!r:.80}"
    elements = constants["elements"]
    if not elements or min(elements) < 1 or max(elements) > MAX_Z:
        return f"constants.elements must be atomic numbers, 1 to {MAX_Z}"
    if constants["energy_scale"] <= 0 or constants["avg_num_neighbors"] <= 0:
        return "constants.energy_scale and constants.avg_num_neighbors must be above 0"
    if reason := wrong(info.get("states", {}), {str: [int]}, "states"):
        return reason
    return wrong(constants.get("method", GFN1), SUMS, "constants.method")


def write_statistics(path: Path, statistics: Mapping[str, Statistics]) -> None:
    """Write the normalisation of every head's target."""
    arrays = {
        f"{name}/{part}": values
        for name, stats in statistics.items()
        for part, values in stats._asdict().items()
    }
    np.savez(path, **arrays)


def read_statistics(path: Path, heads: list[list[str]]) -> dict[str, Statistics]:
    """The normalisation of every head's target. Raises ValueError when it is not there whole."""
    try:
        with zipfile.ZipFile(path) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > MAX_STATISTICS:
            raise ValueError(f"it unpacks to {size:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            names = sorted({key.split("/")[0] for key in arrays.files})
            found = {n: Statistics(arrays[f"{n}/mean"], arrays[f"{n}/scale"]) for n in names}
    except Exception as error:  # zipfile and NumPy raise many types
        raise ValueError(f"{path.name}: {type(error).__name__}: {error}") from error
    for name in (name for name, _ in heads if not name.startswith("xtb_")):
        shape = (MAX_Z + 1, TARGETS[name].k)
        for part, values in found[name]._asdict().items() if name in found else [(name, None)]:
            if values is None or values.shape != shape or not np.isfinite(values).all():
                raise ValueError(f"{path.name}: {part} of {name} must be {shape} finite numbers")
    return found
