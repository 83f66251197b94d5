"""Acetylacetone from 446 configurations as configs/acac.toml and acac_gfn1.toml train, by seed.

    python benchmarks/study_acac_full.py --work DIRECTORY [--seeds 1 2] [--arms ARM ...]
    python benchmarks/study_acac_full.py --report

DIRECTORY holds the data sets `train`, `test` and `xtb` as these files say how to make them. A seed
is that of the initial parameters, of the order, and of the 54 configurations of the 500 that choose
the best step:

    energy-only     configs/acac.toml, 60,000 steps
    onsite          the same with on-site charges of the same configurations, weight 1
    gfn1-first      the first run of configs/acac_gfn1.toml: 6,000 steps on GFN1 labels of 2,400
                    further configurations, then 18,000
    gfn1-longer     its second run: 36,000 more

RMSE on the 650 test configurations. Writes results/acac_full.jsonl; training goes on where it was
stopped, and what is recorded is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from study import record, trained
from study_acac import errors

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "acac_full.jsonl"
CONFIGS = HERE.parent / "configs"
GFN1 = ("acac_gfn1.toml", ("data.unlabelled=['@xtb']",))
LONGER = ("training.pretrain_steps=0", "training.n_steps=36000", "training.initial='@gfn1-first'")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "energy-only": ("acac.toml", ()),
    "onsite": ("acac.toml", ("loss.weights.onsite=1",)),
    "gfn1-first": GFN1,
    "gfn1-longer": (GFN1[0], (*GFN1[1], *LONGER)),
}


def recorded() -> list[dict[str, Any]]:
    """What has been measured."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def report() -> None:
    """Each seed's errors, and their means."""
    for arm in ARMS:
        found = {r["seed"]: r["test"] for r in recorded() if r["arm"] == arm}
        for label, unit in (("energy_rmse_meV", "meV"), ("forces_rmse_meV_per_A", "meV/Å")):
            each = {seed: test[label] for seed, test in sorted(found.items())}
            if each:
                told = ", ".join(f"{e:.2f} (seed {seed})" for seed, e in each.items())
                print(f"{arm}: {told}; mean {np.mean(list(each.values())):.2f} {unit}")


def main() -> None:
    """Train what is not recorded yet; record each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="directory of data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", action="store_true", help="tell what is recorded")
    given = parser.parse_args()
    if given.report:
        return report()
    if given.work is None:
        parser.error("--work: the directory of data and runs is needed to train")
    for seed in given.seeds:
        for arm in given.arms:
            if any((r["arm"], r["seed"]) == (arm, seed) for r in recorded()):
                continue
            config, changes = ARMS[arm]
            run = trained(
                CONFIGS / config,
                (
                    f"data.dataset='{given.work / 'train'}'",
                    f"data.split_seed={seed}",
                    f"training.seed={seed}",
                    *changes,
                ),
                {
                    "@xtb": str(given.work / "xtb"),
                    "@gfn1-first": str(given.work / "full" / f"gfn1-first-{seed}"),
                },
                given.work / "full" / f"{arm}-{seed}",
            )
            record(RESULTS, {"arm": arm, "seed": seed}, {"test": errors(run, given.work)})


if __name__ == "__main__":
    main()
