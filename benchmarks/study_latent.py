"""Whether the latent space of a network groups the metals by chemistry, and what teaches it to.

    python benchmarks/study_latent.py --work DIRECTORY [--seeds 0 1 2]

Networks whose elements are free embeddings, so that nothing is told beforehand, taught three ways:

    energy-only   DFT energies and forces of the complexes of tmc_data.py
    onsite        and GFN1-xTB on-site charges of the same complexes
    charges       on-site charges alone, of complexes without DFT

For each: silhouette and nearest-neighbour purity of the 30 metals' mean features on the same atoms,
by group and by row, with the mean and the p-value of random exchanges of the labels, and the same
of the network before training. Writes results/latent.jsonl; pictures: `orbq embed RUN... DATA`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from study import record, trained
from tmc_data import make_grown

import orbq
from orbq import embed
from orbq.datasets import open_dataset
from orbq.elements import METALS

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "base.toml"
RESULTS = HERE / "results" / "latent.jsonl"
COMMON = (
    "model.species=free",
    "training.n_steps=4000",
    "training.learning_rate=5e-3",
    "training.weight_decay=0.2",
    "training.validate_every=400",
)
ARMS: dict[str, tuple[str, ...]] = {
    "energy-only": ("data.dataset='@data'",),
    "onsite": ("data.dataset='@data'", "loss.weights.onsite=1"),
    "charges": (
        "data.dataset='@rest'",
        "loss.weights.energy=0",
        "loss.weights.forces=0",
        "loss.weights.onsite=1",
    ),
}


def clusters(run: orbq.Run, dataset: str) -> Iterator[dict[str, Any]]:
    """How the metals of a data set lie in the latent space of a run, and of its untrained form."""
    data = open_dataset(dataset)
    atoms = embed.choose_atoms(data, np.arange(len(data)), METALS, run.elements)
    elements = embed.elements_of(atoms, data.method)
    for state, params in (("trained", None), ("untrained", embed.untrained(run))):
        features = embed.standardised(embed.features_of(run, data, atoms, params=params))
        means = embed.means_of(features, atoms.numbers)
        for by in embed.LABELS:
            for name, found in embed.clustering(means, elements.labels(by)).items():
                yield {
                    "state": state,
                    "by": by,
                    "statistic": name,
                    "value": found.value,
                    "chance": found.chance,
                    "p": found.p,
                }


def main() -> None:
    """Train, look, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="directory of data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    words = make_grown(given.work / "data")
    for seed in given.seeds:
        for arm in ARMS:
            run = trained(
                CONFIG,
                [*COMMON, *ARMS[arm], f"training.seed={seed}"],
                words,
                given.work / "latent" / f"{arm}-{seed}",
            )
            for found in clusters(run, words["@data"]):
                what = {name: found.pop(name) for name in ("state", "by", "statistic")}
                record(RESULTS, {"arm": arm, "seed": seed} | what, found)


if __name__ == "__main__":
    main()
