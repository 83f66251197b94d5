"""What a training run writes beside its checkpoints, and whose directory it is.

``run.json`` and ``statistics.npz`` before the first step; one line per validation in
``metrics.jsonl`` and per bad batch in ``nonfinite.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from orbq import __version__
from orbq.aside import put_aside
from orbq.config import Config
from orbq.config_text import differences
from orbq.data import TrainingData
from orbq.errors import InputError
from orbq.lock import alone_in
from orbq.models.heads import n_parameters
from orbq.models.potential import Constants, Potential, smallest_graph
from orbq.orbitals import GFN1
from orbq.preprocess.links import make_directory, refuse_brackets, refuse_links
from orbq.preprocess.pack import Packer
from orbq.preprocess.pool import Pool
from orbq.preprocess.store import Dataset, write_atomically
from orbq.probe import Probe
from orbq.run_files import (
    METRICS,
    PROBE_FILE,
    RUN_FILE,
    STATISTICS_FILE,
    read_description,
    save_description,
    stored_config,
    stored_constants,
)
from orbq.run_form import write_statistics
from orbq.schema import FIELDS
from orbq.stages import Stage

NONFINITE = "nonfinite.jsonl"
# all there is of a run stopped before its run.json
_BEGUN = {STATISTICS_FILE, PROBE_FILE, f"{PROBE_FILE}.tmp", f"{RUN_FILE}.tmp"}
_FOREIGN = ("wandb",)  # where Weights & Biases makes links of its own, some to its cache
_RECOMPUTED = {"onsite", "xtb_energy", "xtb_forces"}  # their last bits depend on the machine
_SAME_LABELS = 1e-4  # e, and relative: machines differ by less, methods and their settings by more


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
        write_atomically(path, "".join(kept))


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


def check_same_data(directory: Path, data: TrainingData) -> None:
    """Refuse to go on with other structures or labels than the run was begun with."""
    stored = read_description(directory)
    remedy = "bring the data set back, or start anew with --overwrite"
    for dataset, entry in zip(data.datasets, stored["data"], strict=True):
        if name := changed_array(dataset, entry["arrays"]):
            raise InputError(
                f"{dataset.path} has changed since {directory} was begun ({name} is another): "
                + remedy
            )
    method = stored["constants"].get("method", GFN1)
    if data.constants.method != method:
        raise InputError(
            f"{data.datasets[0].path} is labelled with {data.constants.method}, {directory} was "
            f"begun with {method}: {remedy}"
        )


def changed_array(dataset: Dataset, before: Mapping[str, Any]) -> str:
    """The first of a data set's arrays that is another than ``before``, the arrays of a manifest;
    "" if none is. Labels that another machine computes anew are not looked at."""
    arrays = dataset.manifest["arrays"].items()
    changed = (n for n, now in arrays if n not in _RECOMPUTED and now != before.get(n))
    return next(changed, "")


def keep_statistics(directory: Path, constants: Constants) -> bool:
    """Write the statistics of a run again where they were lost; whether they were.

    Raises InputError when they are others than those of the labels, which then have changed.
    """
    try:
        stored = stored_constants(directory, read_description(directory)).statistics
    except ValueError:
        write_statistics(directory / STATISTICS_FILE, constants.statistics)
        return True
    for name, now in constants.statistics.items():
        close = name in stored and all(map(_close, now, stored[name]))
        if not close:
            raise InputError(
                f"{directory / STATISTICS_FILE} is not of the labels {name!r} that are there now: "
                "bring back the data sets that the run was begun with, or start anew with "
                "--overwrite"
            )
    return False


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to what labels of two machines differ by."""
    return bool(np.allclose(a, b, rtol=_SAME_LABELS, atol=_SAME_LABELS))


# --------------------------------------------------------------------------- the run directory


def claim(directory: Path, config: Config, overwrite: bool, held_by: ExitStack) -> bool:
    """Make sure that ``directory`` is free, or holds this very run; whether it does.

    It is then ours alone until ``held_by`` is closed. With ``overwrite`` a run that is there is put
    aside; it comes back then, unless it was ``replaced``.

    Raises InputError when something else is in it, a link out of it, or another process at work.
    """
    place = directory.resolve()  # it may be a link, which stays
    held = {path.name for path in directory.iterdir()} - _BEGUN if directory.is_dir() else set()
    if held:
        held_by.enter_context(alone_in(place))
    if overwrite and held:
        if RUN_FILE not in held:
            raise InputError(f"{directory} is not a run directory: --overwrite will not delete it")
        put_aside(place, held_by)
        held = set()
    elif held and RUN_FILE not in held:
        raise InputError(f"{directory} is not empty and holds no run: choose another directory")
    refuse_links(directory, "run.directory", foreign=_FOREIGN)
    if held and (
        found := differences(_of_training(stored_config(directory)), _of_training(config))
    ):
        raise InputError(
            f"{directory} holds a run of another configuration ({'; '.join(found)}): "
            "choose another run.directory, or start anew with --overwrite (which deletes it)"
        )
    if not held:
        refuse_brackets(directory, "run.directory")
        make_directory(place, "run.directory")
        held_by.enter_context(alone_in(place))
    return bool(held)


def _of_training(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"run", "ablation"})


def facts_of(
    directory: Path,
    data: TrainingData,
    potential: Potential,
    packer: Packer,
    stages: Sequence[Stage],
) -> dict[str, Any]:
    """What is known of a run before its first step. packer: of what its main stage trains on."""
    template = jax.eval_shape(potential.init, jax.random.key(0), *smallest_graph(np.float32))
    scales = data.spec.scales.items()
    return {
        "orbq_version": __version__,
        "directory": str(directory),
        "stages": {stage.name: stage.n_steps for stage in stages},
        "states": states_of(data.pools.get("teaching", data.pools["train"])),
        "structures": {name: len(pool) for name, pool in data.pools.items()},
        "labels": {name: n for name, n in data.labels.items() if n},
        "n_parameters": n_parameters(template),
        "budget": data.budget._asdict(),
        "fill": {k: round(v, 4) for k, v in packer.fill(0)._asdict().items()},
        "scales": {n: [s, _unit_of_scale(n, data.spec.energy_per)] for n, s in scales},
        "data": [{"path": str(d.path), "arrays": d.manifest["arrays"]} for d in data.datasets],
        **({"initial": dict(data.initial.facts)} if data.initial else {}),
        **({"probe": _of_probe(data.initial.probe)} if data.initial and data.initial.probe else {}),
    }


def _unit_of_scale(name: str, energy_per: str) -> str:
    unit = FIELDS[name].unit
    return f"{unit}/atom" if unit == "eV" and energy_per == "atom" else unit


def states_of(pool: Pool) -> dict[str, list[int]]:
    """The total charges and spin multiplicities that a pool has, ascending."""
    parts = list(zip(pool.parts, pool.rows, strict=True))
    return {
        name: sorted({int(v) for p, rows in parts for v in np.unique(p.dataset.arrays[name][rows])})
        for name in ("total_charge", "spin_multiplicity")
    }


def _of_probe(probe: Probe) -> dict[str, Any]:
    """NaN, which JSON has not, as None."""
    error = None if np.isnan(probe.error) else 1e3 * probe.error
    return {"strength": probe.strength, "leave_one_out_meV": error}


def describe(directory: Path, config: Config, data: TrainingData, facts: dict[str, Any]) -> bool:
    """Write run.json and the statistics of a new run; check those of one that is gone on with.

    Whether its statistics were lost, and are written again.
    """
    if (directory / RUN_FILE).exists():
        check_same_data(directory, data)
        return keep_statistics(directory, data.constants)
    save_description(directory, config, data.architecture, data.constants, data.references, facts)
    return False
