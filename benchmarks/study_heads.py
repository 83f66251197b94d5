"""Orbital charges from an equivariant and from an invariant head, by shell, on metal complexes.

    python benchmarks/study_heads.py --work DIRECTORY [--seeds 0 1]

Both heads train on GFN1-xTB orbital charges alone of the complexes without DFT (tmc_data.py), each
in a random frame, split by complex, with the same network, seed and batches. Told for kinds of
atoms and shells: the error on the complexes of the test split, and R2, the explained share of the
orbital charges' variance around the element's mean in each orbital. An invariant head must miss
what turns with the frame. Writes results/heads.jsonl; training goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from study import record, trained
from tmc_data import make_turned

import orbq
from orbq.elements import METALS
from orbq.orbitals import GFN1, shells

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "base.toml"
RESULTS = HERE / "results" / "heads.jsonl"
SLOTS = {"s": slice(0, 1), "p": slice(2, 5), "d": slice(5, 10)}
ATOMS = {"metals": METALS, "H": (1,), "C": (6,), "N": (7,), "O": (8,), "Cl": (17,)}
TRAINING = (
    "data.dataset='@data'",
    "training.n_steps=6000",
    "training.learning_rate=5e-3",
    "training.validate_every=500",
    "loss.weights.energy=0",
    "loss.weights.forces=0",
    "loss.weights.orbital=1",
)


def by_shell(run: orbq.Run, dataset: str) -> Iterator[dict[str, Any]]:
    """Errors of every kind of atom and shell on the test split."""
    evaluation = run.evaluate(dataset, "test")
    truth, found = evaluation.values["orbital"].label, evaluation.values["orbital"].predicted
    there = shells(GFN1).slot_mask[evaluation.numbers]
    for name, elements in ATOMS.items():
        for shell, slots in SLOTS.items():
            error, deviation = [], []
            for z in elements:
                atoms = (evaluation.numbers == z) & there[:, slots].all(1)
                error.append((found - truth)[atoms, slots].ravel())
                deviation.append((truth[atoms, slots] - truth[atoms, slots].mean(0)).ravel())
            e, d = np.concatenate(error), np.concatenate(deviation)
            if len(e):
                yield {
                    "atoms": name,
                    "shell": shell,
                    "n": len(e),
                    "mae_e": float(np.abs(e).mean()),
                    "rmse_e": float(np.sqrt((e**2).mean())),
                    "r2": float(1 - (e**2).sum() / (d**2).sum()),
                }


def main() -> None:
    """Train, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    dataset = make_turned(given.work / "data")
    for seed in given.seeds:
        for head in ("equivariant", "invariant"):
            run = trained(
                CONFIG,
                [*TRAINING, f"model.head={head}", f"training.seed={seed}"],
                {"@data": dataset},
                given.work / "heads-turned" / f"{head}-{seed}",
            )
            for found in by_shell(run, dataset):
                what = {"atoms": found["atoms"], "shell": found["shell"]}
                record(RESULTS, {"head": head, "seed": seed} | what, found)


if __name__ == "__main__":
    main()
