"""One molecule from 50 and 100 configurations with forces: what GFN1-xTB labels bring.

    python benchmarks/study_acac.py --work DIRECTORY [--n 50 100] [--seeds 0 1 2] [--arms ARM ...]
    python benchmarks/study_acac.py --report [--steps 24000]

Acetylacetone, or with --molecule 3bpa another one, with the settings found for the former.
DIRECTORY holds the data sets `train`, `test` and `xtb` as configs/acac.toml and acac_gfn1.toml say
how to make them, or benchmarks/make_3bpa.py. One network for all arms (MACE-like, 2 layers, 32
channels), as many steps, the same configurations, the best step by others, the same for all; RMSE
on the test configurations:

    energy-only     energies and forces
    onsite          and on-site charges of the same configurations
    forces-first    after GFN1 energies and forces of 2,400 further configurations
    gfn1-first      after GFN1 energies, forces and on-site charges of these
    mean-first      the same with the means of GFN1's and GFN2's energies and forces, from the data
                    sets `train-mean` and `xtb-mean`: the same files by orbq preprocess --method
                    GFN1-xTB+GFN2-xTB

Writes results/MOLECULE_sizes.jsonl; training goes on where it was stopped, and what is recorded is
not trained again. The report holds each arm, at each learning rate, against energies and forces
alone: paired by subset and seed, Student's 95 %.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from curves import Errors, change_text, mean
from plot_tmc import change
from study import record, trained

import orbq

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CONFIG = HERE.parent / "configs" / "acac.toml"
NETWORK = ("model.n_channels=32",)
ENERGY = 0.01  # loss.weights.energy of the configuration; records before it was added had 1
FORCES = ("loss.weights.xtb_energy=0.01", "loss.weights.xtb_forces=10")
CHARGES = ("loss.weights.onsite=1",)
TARGETS = {
    "energy-only": (),
    "onsite": CHARGES,
    "forces-first": FORCES,
    "gfn1-first": (*FORCES, *CHARGES),
    "mean-first": (*FORCES, *CHARGES),
}
STEPS = 6000
RATE = 5e-3  # better than 2e-3 for energy-only at N = 100


def run_of(directory: Path, *overrides: str) -> orbq.Run:
    """A run of the common network."""
    energy = f"loss.weights.energy={ENERGY}"
    own = ("training.validate_every=500", *NETWORK, energy, *overrides)
    return trained(CONFIG, own, {}, directory)


def labelled(work: Path, name: str, arm: str) -> Path:
    """A data set with the labels of an arm."""
    return work / (f"{name}-mean" if arm.startswith("mean") else name)


def taught(work: Path, arm: str) -> tuple[str, ...]:
    """Where an arm begins: a network that has learnt the labels of further configurations."""
    if not arm.endswith("-first"):
        return ()
    directory = work / f"taught-{arm}"
    run_of(
        directory,
        f"data.dataset='{labelled(work, 'xtb', arm)}'",
        "loss.weights.energy=0",
        "loss.weights.forces=0",
        "data.validation_fraction=0.05",
        "training.n_steps=15000",
        *TARGETS[arm],
    )
    return (f"training.initial='{directory}'",)


def errors(run: orbq.Run, work: Path) -> dict[str, float]:
    """RMSE and MAE of energies (meV) and forces (meV/Å) on the test configurations."""
    found = run.evaluate(work / "test", "all").errors()
    return {k: v for k, v in found.items() if k.startswith(("energy_", "forces_"))}


def report(results: Path, steps: int) -> None:
    """Means and changes of what is recorded of so many steps, by configurations, arm and rate."""
    for label, unit in (("energy_rmse_meV", "meV"), ("forces_rmse_meV_per_A", "meV/Å")):
        found: dict[tuple[int, str, float], Errors] = defaultdict(dict)
        for line in results.read_text(encoding="utf-8").splitlines():
            r = json.loads(line)
            if (r.get("energy_weight"), r["steps"]) == (ENERGY, steps):
                found[r["n"], r["arm"], r["rate"]][r["seed"], 0] = r["test"][label]
        for (n, arm, rate), errors in sorted(found.items()):
            base = {k: e for k, e in found[n, "energy-only", RATE].items() if k in errors}
            told = f"{n}, {arm}, rate {rate:g}, {len(errors)} runs: {mean(errors):.2f} {unit}"
            if arm != "energy-only" and base:
                told += f" against {mean(base):.2f}, {change_text(change(errors, base)[0])}"
            if arm == "mean-first":
                other = change(errors, found[n, "gfn1-first", rate])[0]
                told += f"; to gfn1-first {change_text(other)}"
            print(told)


def main() -> None:
    """Train what is not recorded yet; record each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="directory of data and runs")
    parser.add_argument("--n", type=int, nargs="+", default=[50, 100], help="configurations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE], help="learning rates")
    parser.add_argument("--report", action="store_true", help="tell what is recorded")
    parser.add_argument("--molecule", choices=("acac", "3bpa"), default="acac")
    given = parser.parse_args()
    results = RESULTS / f"{given.molecule}_sizes.jsonl"
    if given.report:
        return report(results, given.steps)
    if given.work is None:
        parser.error("--work: the directory of data and runs is needed to train")
    lines = results.read_text().splitlines() if results.exists() else []
    known = [json.loads(line) for line in lines]
    for seed, n, arm in ((s, n, a) for s in given.seeds for n in given.n for a in given.arms):
        for rate in given.rates:
            what: dict[str, Any] = {"arm": arm, "n": n, "seed": seed, "rate": rate}
            what |= {"steps": given.steps, "energy_weight": ENERGY}
            if any(what.items() <= facts.items() for facts in known):
                continue
            run = run_of(
                given.work / "sizes" / f"{arm}-{n}-{seed}-{rate:g}-{given.steps}",
                f"data.dataset='{labelled(given.work, 'train', arm)}'",
                f"data.n_train={n}",
                f"data.subset_seed={seed}",
                f"training.seed={seed}",
                f"training.n_steps={given.steps}",
                f"training.learning_rate={rate}",
                *TARGETS[arm],
                *taught(given.work, arm),
            )
            record(results, what, {"test": errors(run, given.work)})


if __name__ == "__main__":
    main()
