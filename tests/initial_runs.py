"""Runs that begin from a trained run, for the tests of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import Listener, config_of

from orbq.config import Config
from orbq.fit import fit

CHARGES = {"energy": 0.0, "forces": 0.0, "atomic": 2.0, "xtb_energy": 1.0}
TUNED = {"energy": 1.0, "forces": 1.0, "atomic": 1.0, "shell": 1.0}
ALONE = {"pretrain_steps": 0, "unlabelled_share": 0.0}


def charges_config(sets: Path, directory: Path, **data: Any) -> Config:
    """Training on structures that have no energies."""
    chosen = {"dataset": str(sets / "unlabelled"), "unlabelled": [], "split": "within", **data}
    settings = {**ALONE, "n_steps": 8, "learning_rate": 1e-2}
    return config_of(sets, directory, data=chosen, loss={"weights": CHARGES}, training=settings)


def tuned_config(sets: Path, directory: Path, initial: Path, **training: Any) -> Config:
    """Training on energies and forces, with one head that the initial run has and one it lacks."""
    settings = {**ALONE, "initial": str(initial), **training}
    return config_of(
        sets, directory, data={"unlabelled": []}, loss={"weights": TUNED}, training=settings
    )


def edited(config: Config, section: str, **values: Any) -> Config:
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


class Tuned:
    """A run that began from a copy of ``charges`` with a frozen backbone; the copy is gone."""

    def __init__(self, sets: Path, charges: Path) -> None:
        self.sets, self.initial = sets, sets / "start"
        shutil.copytree(charges, self.initial)
        self.directory, self.stopped = sets / "tuned", sets / "stopped"
        self.summary = fit(self.config(self.directory))
        with pytest.raises(KeyboardInterrupt):  # before it would write a checkpoint by itself
            fit(self.config(self.stopped), reporter=Listener(stop_at=1))
        shutil.rmtree(self.initial)

    def config(self, directory: Path) -> Config:
        settings = {"frozen": ["backbone"], "batches_per_update": 2, "checkpoint_every": 100}
        config = tuned_config(self.sets, directory, self.initial, **settings)
        return edited(config, "data", references="taught")
