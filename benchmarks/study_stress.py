"""What a weight on stresses brings and costs: alloys with EMT in place of DFT.

    python benchmarks/study_stress.py --work DIRECTORY [--seeds 0 1 2]
    python benchmarks/study_stress.py --report

400 cubic cells of four atoms of Ni, Cu, Pd, Ag, Pt and Au at random, strained by up to 5 % and
rattled by 0.08 Å, with the energies, forces and stresses of ASE's effective-medium potential. The
same network for each weight of the stress beside 1 and 1 of energies and forces; with
``embed_spin`` it sees the spin multiplicity, 1 or 2 as a cell's electrons are even or odd. A seed
is that of the split, of the parameters and of the order. Test MAE and CPU milliseconds a step,
which include what is compiled; writes results/stress.jsonl, and what is recorded is not trained
again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from curves import Errors, change_text, mean
from plot_tmc import change
from study import record, trained

from orbq.evaluate import evaluate
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.store import Dataset

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "stress.jsonl"
BASE = HERE.parent / "configs" / "base.toml"
ELEMENTS = ("Ni", "Cu", "Pd", "Ag", "Pt", "Au")
ARMS = tuple((weight, spin) for spin in (False, True) for weight in (0.0, 0.1, 1.0, 10.0))
N_CELLS, STRAIN, RATTLE, N_STEPS = 400, 0.05, 0.08, 3000


def cells(n: int = N_CELLS) -> list[Atoms]:
    """The strained and rattled cells with their labels."""
    rng, out = np.random.default_rng(0), []
    for _ in range(n):
        atoms = bulk("Cu", cubic=True, a=rng.uniform(3.7, 4.0))
        atoms.symbols = rng.choice(ELEMENTS, size=4)
        strain = rng.uniform(-STRAIN, STRAIN, size=(3, 3))
        deform = np.eye(3) + (strain + strain.T) / 2
        atoms.set_cell(atoms.cell.array @ deform, scale_atoms=True)
        atoms.rattle(RATTLE, rng=rng)
        atoms.calc = EMT()
        atoms.get_stress()
        out.append(atoms)
    return out


def measure(work: Path, weight: float, spin: bool, seed: int) -> None:
    """Train one run, and record its errors."""
    overrides = (
        f"data.dataset='{work / 'alloys'}'",
        "data.split='within'",
        f"data.split_seed={seed}",
        f"training.seed={seed}",
        f"training.n_steps={N_STEPS}",
        "training.learning_rate=5e-3",
        "model.n_channels=16",
        "model.cutoff=4.5",
        f"model.embed_spin={str(spin).lower()}",
        f"loss.weights.stress={weight}",
    )
    started = time.process_time()
    run = trained(BASE, overrides, {}, work / f"stress-{weight:g}-{spin}-{seed}")
    seconds = time.process_time() - started
    dataset = Dataset.open(work / "alloys")
    found = evaluate(run, dataset, targets=["energy", "forces", "stress"], split="test")
    errors = {k: round(v, 4) for k, v in found.errors().items() if "_mae_" in k}
    told = {"weight": weight, "embed_spin": spin, "seed": seed}
    record(RESULTS, told, {"test": errors, "cpu_ms_per_step": round(1e3 * seconds / N_STEPS, 2)})


def recorded() -> list[dict]:
    """What has been measured."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def report() -> None:
    """Means over the seeds, and changes paired by seed: against weight 0, and by seeing spins."""
    errors: dict[tuple[float, bool], dict[str, Errors]] = {arm: {} for arm in ARMS}
    for r in recorded():
        for name, error in r["test"].items():
            errors[r["weight"], r["embed_spin"]].setdefault(name, {})[r["seed"], 0] = error
    for weight, spin in ARMS:
        for name, own in errors[weight, spin].items():
            told = f"weight {weight:g}, spin {spin}: {name} {mean(own):.2f} of {len(own)} runs"
            for base, said in (((0.0, spin), "to weight 0"), ((weight, False), "by spin")):
                if base != (weight, spin) and name in errors[base]:
                    told += f"; {change_text(change(own, errors[base][name])[0])} {said}"
            print(told)


def main() -> None:
    """Train what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="directory of data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="tell what is recorded")
    given = parser.parse_args()
    if given.report:
        return report()
    if given.work is None:
        parser.error("--work: a directory for data and runs is needed to train")
    preprocess(cells(), given.work / "alloys", resources=Resources(workers=1))
    done = {(r["weight"], r["embed_spin"], r["seed"]) for r in recorded()}
    for seed in given.seeds:
        for weight, spin in ARMS:
            if (weight, spin, seed) not in done:
                measure(given.work, weight, spin, seed)
    return None


if __name__ == "__main__":
    main()
