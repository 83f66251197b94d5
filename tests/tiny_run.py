"""Very small runs for tests of what is done with a trained run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase
import jax
import numpy as np

from orbq import checkpoint
from orbq.config import parse_config
from orbq.data import architecture_of
from orbq.models.potential import Constants, make_potential, smallest_graph
from orbq.orbitals import MAX_Z
from orbq.preprocess.frames import find_sources, read_frames
from orbq.preprocess.references import References
from orbq.run import Run
from orbq.run_files import CHECKPOINTS, save_description
from orbq.targets import TARGETS, Statistics

MODEL: dict[str, Any] = {
    "n_channels": 4,
    "n_layers": 2,
    "lmax": 2,
    "n_radial": 4,
    "radial_hidden": [8],
    "readout_hidden": 8,
    "cutoff": 4.0,
}
ELEMENTS = (1, 6, 7, 8, 22)


def random_run(
    targets: Sequence[str] = ("onsite",), elements: Sequence[int] = ELEMENTS, **model: Any
) -> Run:
    """A run with random float32 parameters."""
    weights = dict.fromkeys(targets, 1.0)
    config = parse_config({"model": {**MODEL, **model}, "loss": {"weights": weights}})
    rng = np.random.default_rng(0)
    statistics = {
        name: Statistics(
            rng.normal(size=(MAX_Z + 1, TARGETS[name].k)) * TARGETS[name].has_mean,
            np.full((MAX_Z + 1, TARGETS[name].k), 0.2),
        )
        for name in targets
        if not name.startswith("xtb_")
    }
    constants = Constants(tuple(elements), 0.1, 8.0, statistics)
    potential = make_potential(architecture_of(config), constants)
    shapes = jax.eval_shape(potential.init, jax.random.key(0), *smallest_graph(np.float32))
    params = jax.tree.map(lambda leaf: _random(rng, leaf), shapes)
    element = np.zeros(MAX_Z + 1)
    element[list(elements)] = -10.0 * np.array(elements)
    energies = References(element, 1.5, True, element != 0)
    return Run(potential, params, config, {"energy": energies}, {"data": []})


def _random(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Numbers that keep features of order one, without compiling any initialiser."""
    scale = leaf.shape[0] ** -0.5 if len(leaf.shape) > 1 else 0.1
    return (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype)


def save_run(run: Run, directory: Path, **info: Any) -> Path:
    """The run as training would have left it in ``directory``."""
    potential = run.potential
    save_description(
        directory,
        run.config,
        potential.architecture,
        potential.constants,
        run.references,
        {"data": [], **info},
    )
    checkpoint.save(directory / CHECKPOINTS / checkpoint.BEST, {"params": run.params}, {})
    return directory


def complexes(n: int, elements: set[int] | None = None) -> list[ase.Atoms]:
    """``n`` structures of the embedded set, those of these ``elements`` if given."""
    found: list[ase.Atoms] = []
    for frame in read_frames(find_sources(["tmc"])[0]):
        if elements is None or set(frame.atoms.numbers) <= elements:
            found.append(frame.atoms)
        if len(found) == n:
            break
    return found


def train_tiny(directory: Path, **changes: Any) -> Path:
    """Label a few structures, train 20 steps on them, and return the run's directory."""
    from orbq.fit import fit
    from orbq.preprocess.label import Resources, preprocess

    structures = complexes(40, {1, 6, 7, 8, 22})
    preprocess(structures, directory / "data", resources=Resources(workers=1))
    config = parse_config(
        {
            "data": {
                "dataset": str(directory / "data"),
                "split": "within",
                "validation_fraction": 0.2,
                "test_fraction": 0.3,
            },
            "model": MODEL,
            "loss": {"weights": {"onsite": 1.0}},
            "training": {"n_steps": 20, "warmup_steps": 2, "validate_every": 10, "batch_size": 4},
            "run": {"directory": str(directory / "run")},
            **changes,
        }
    )
    fit(config)
    return directory / "run"
