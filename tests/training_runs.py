"""Tiny data sets and training runs, for tests of the training loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ase.build
import jax
import numpy as np

from orbq import checkpoint
from orbq.config import Config, parse_config
from orbq.preprocess.label import Recipe, Resources, preprocess
from orbq.reporter import Silent
from orbq.splits import fraction_of

MODEL = {
    "n_channels": 4,
    "n_layers": 1,
    "lmax": 1,
    "n_radial": 4,
    "radial_hidden": [8],
    "readout_hidden": 4,
    "cutoff": 3.0,
}
NAMES = ("H2O", "NH3", "CH4", "HCN", "CO2", "CH3OH", "H2CO", "N2O", "C2H2", "HCOOH")
N_STEPS, PRETRAIN = 14, 6


@contextmanager
def settings_put_back() -> Iterator[None]:
    """``fit`` sets the precision and the cache of its process: put them back."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def group_in(part: str, number: int) -> str:
    """The name of a group that the split with shares 0.2 and 0.2 puts into ``part``."""
    low, high = {"test": (0, 0.2), "validation": (0.2, 0.4), "train": (0.4, 1)}[part]
    names = (f"{part} {number} {k}" for k in range(1000))
    return next(n for n in names if low <= fraction_of(n.encode(), "orbq split") < high)


def structures(part: str, n: int, seed: int, labelled: bool = True) -> list[ase.Atoms]:
    """Rattled molecules with made-up energies and forces; every fourth has no energy, every third
    no forces, if ``labelled``."""
    rng, out = np.random.default_rng(seed), []
    for k in range(n):
        atoms = ase.build.molecule(NAMES[k % len(NAMES)])
        atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
        atoms.info["group"] = group_in(part, k)
        if labelled and (k % 4 or part != "train"):
            atoms.info["energy"] = -10.0 * len(atoms) + rng.normal()
        if labelled and k % 3:
            atoms.arrays["forces"] = rng.normal(size=(len(atoms), 3))
        out.append(atoms)
    return out


def label(place: Path, method: str = "GFN1-xTB") -> Path:
    """Makes the data sets "labelled" and "unlabelled" (geometries of other molecules) in it."""
    recipe, resources = Recipe(method), Resources(workers=1)
    labelled = structures("train", 20, 0) + structures("validation", 4, 1)
    labelled += structures("test", 4, 2)
    preprocess(labelled, place / "labelled", recipe, resources)
    preprocess(structures("train", 10, 3, False), place / "unlabelled", recipe, resources)
    return place


def config_of(sets: Path, directory: Path, **changes: dict[str, Any]) -> Config:
    """Both stages, charge-only structures in both, and checkpoints out of step with validation."""
    document: dict[str, dict[str, Any]] = {
        "data": {
            "dataset": str(sets / "labelled"),
            "unlabelled": [str(sets / "unlabelled")],
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
        },
        "model": MODEL,
        "loss": {"weights": {"energy": 1.0, "forces": 1.0, "atomic": 2.0}},
        "training": {
            "n_steps": N_STEPS,
            "pretrain_steps": PRETRAIN,
            "unlabelled_share": 0.3,
            "warmup_steps": 2,
            "validate_every": 4,
            "checkpoint_every": 3,
            "batch_size": 5,
        },
        "run": {"directory": str(directory)},
    }
    for section, values in changes.items():
        document[section] = {**document[section], **values}
    return parse_config(document)


def final_state(directory: Path) -> dict[str, Any]:
    """Every array of the newest checkpoint and of the best parameters."""
    checkpoints = directory / "checkpoints"
    return {
        name: checkpoint.ocp.StandardCheckpointer().restore(path.absolute())
        for name, path in (
            ("last", checkpoint.resumable(checkpoints)[0]),
            ("best", checkpoints / "best"),
        )
    }


def records(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_run(directory: Path, whole: Path) -> None:
    """Bit for bit: parameters, averages, moments, step, and what was recorded on the way."""
    a, b = final_state(directory), final_state(whole)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert records(directory) == records(whole)


class Listener(Silent):
    """Remembers what it is told, and may stop the run there."""

    def __init__(self, stop_at: int = -1) -> None:
        self.facts: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.stop_at = stop_at

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def started(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def validated(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if len(self.records) == self.stop_at:
            raise KeyboardInterrupt


def copy_of(whole: Path, directory: Path) -> Path:
    """The run as if it had been made in ``directory`` and stopped at the very end; what a test then
    takes away is what a stopped run had not written yet."""
    shutil.copytree(whole, directory)
    (directory / "summary.json").unlink()
    info = json.loads((directory / "run.json").read_text())
    info["config"]["run"]["directory"] = str(directory)
    (directory / "run.json").write_text(json.dumps(info))
    return directory
