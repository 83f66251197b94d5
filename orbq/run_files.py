"""What a trained run is on disk, beside its checkpoints: names of its files, run.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from orbq.config import Config, config_from_json
from orbq.errors import InputError
from orbq.models.fused import unavailable
from orbq.models.potential import Architecture, Constants
from orbq.orbitals import GFN1
from orbq.preprocess.form import read_json
from orbq.preprocess.references import References
from orbq.preprocess.store import write_atomically
from orbq.run_form import read_statistics, write_statistics

RUN_VERSION = 1
RUN_FILE = "run.json"
STATISTICS_FILE = "statistics.npz"
PROBE_FILE = "probe.json"  # of a run with data.references = "taught"
CHECKPOINTS = "checkpoints"
EMBEDDED = ("gfn1-metals",)  # trained runs that are part of the package; orbq/data/README.md
METRICS = "metrics.jsonl"


def save_description(
    directory: Path,
    config: Config,
    architecture: Architecture,
    constants: Constants,
    references: Mapping[str, References],
    extra: Mapping[str, Any],
) -> None:
    """Write what is fixed before training: run.json and the targets' statistics."""
    directory.mkdir(parents=True, exist_ok=True)
    write_statistics(directory / STATISTICS_FILE, constants.statistics)
    info = {
        "run_version": RUN_VERSION,
        "config": json.loads(config.model_dump_json()),
        "architecture": architecture._asdict(),
        "constants": {
            "elements": constants.elements,
            "energy_scale": constants.energy_scale,
            "avg_num_neighbors": constants.avg_num_neighbors,
            "method": constants.method,
        },
        "references": {n: json.loads(r.to_json()) for n, r in references.items()},
        **extra,
    }
    write_atomically(directory / RUN_FILE, json.dumps(info, indent=1))  # last: it says all is there


def read_description(directory: Path) -> dict[str, Any]:
    """run.json of a run. Raises InputError when it is not one, or of another version."""
    path = directory / RUN_FILE
    try:
        info = read_json(path, {"run_version": int})
        version = info["run_version"]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{directory} is not a run directory ({path.name}: {error}); make one with `orbq "
            f"train`, or name an embedded one ({', '.join(EMBEDDED)})"
        ) from error
    if version != RUN_VERSION:
        raise InputError(
            f"{directory} was written by run format {version} (orbq "
            f"{info.get('orbq_version', 'unknown')}), this orbq reads {RUN_VERSION}: use that "
            "version of orbq, or train again"
        )
    return dict(info)


def run_directory(path: str | Path) -> Path:
    """``path``, or where an embedded run lies if it is the name of one and no run's directory."""
    if str(path) in EMBEDDED and not (Path(path) / RUN_FILE).exists():
        return Path(str(files("orbq"))) / "data" / "networks" / str(path)
    return Path(os.path.expanduser(path))


def names_of(directories: Sequence[str | Path]) -> list[str]:
    """A short name for every run: the fewest last parts of its path that tell it from the others.

    Raises InputError for a run that is named twice.
    """
    parts = [Path(d).resolve().parts for d in directories]
    if twice := [str(d) for d, p in zip(directories, parts, strict=True) if parts.count(p) > 1]:
        raise InputError(f"{twice[0]} is named twice: name every run once")
    n = 1
    while len({p[-n:] for p in parts}) < len(parts):
        n += 1
    return ["/".join(p[-n:]) for p in parts]


def stored_config(directory: Path, info: Mapping[str, Any] | None = None) -> Config:
    """The configuration a run was trained with. Raises InputError when it cannot be understood."""
    info = info or read_description(directory)
    return config_from_json(json.dumps(info.get("config")), str(directory / RUN_FILE))


def stored_constants(directory: Path, info: Mapping[str, Any]) -> Constants:
    """The constants of a run; info: its run.json. Raises KeyError, TypeError or ValueError when it
    is damaged."""
    stored = info["constants"]
    return Constants(
        elements=tuple(stored["elements"]),
        energy_scale=stored["energy_scale"],
        avg_num_neighbors=stored["avg_num_neighbors"],
        statistics=read_statistics(directory / STATISTICS_FILE, info["architecture"]["heads"]),
        method=str(stored.get("method", GFN1)),
    )


def stored_architecture(stored: Mapping[str, Any]) -> Architecture:
    fields = dict(stored)
    fields["radial_hidden"] = tuple(fields["radial_hidden"])
    fields["heads"] = tuple((name, kind) for name, kind in fields["heads"])
    if unavailable():
        fields["kernels"] = "xla"  # computes the same
    return Architecture(**fields)
