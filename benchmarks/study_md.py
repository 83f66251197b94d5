"""Dynamics at 300 K of ten complexes that training has never seen.

    python benchmarks/study_md.py --work DIRECTORY [--ps 2]

Networks of the same form on the complexes of tmc_data.py, split by complex: energies and forces
alone, after GFN1-xTB labels of complexes without DFT, after such labels of distorted complexes
too, which stay in each batch, from the embedded network, which was taught these for longer, and
from one like it with the DFT of about twice as many complexes ("more", three times the steps); and
GFN1-xTB itself (tblite), which tells what is not the networks' fault. Of the test split the first
structures of ten complexes (six atoms or more) run in a thermostat (Langevin, 0.5 fs, float32) from
where the data have them. Told for each: the mean temperature of the second half, the shortest
distance in units of the sum of covalent radii, and the largest stretch of a bond it began with.
"stable": no distance below 0.6, no bond beyond 1.6 times its first length. Writes results/md.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.data import covalent_radii
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from study import record, trained
from tblite.ase import TBLite
from tmc_data import CONFIG, FROM_METALS, MORE, make_grown, make_hot, taught

import orbq
from orbq.data import split_of
from orbq.datasets import open_dataset

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "md.jsonl"
STEP, FRICTION, EVERY = 0.5, 0.01, 10  # fs, 1/fs, steps between looks
TOO_CLOSE, TOO_FAR, BONDED = 0.6, 1.6, 1.25
ITSELF = "gfn1-xtb"
COMMON = ("data.unlabelled=[]", "training.pretrain_steps=0", "data.dataset='@data'")
ARMS = {
    "energy-only": ("loss.weights.onsite=0", "loss.weights.xtb_energy=0"),
    "gfn1-first": ("training.initial='@all'", "loss.weights.xtb_forces=1"),
    "gfn1-hot": (
        "training.initial='@taught'",
        "loss.weights.xtb_forces=1",
        "data.unlabelled=['@hot']",
        "training.unlabelled_share=0.5",
        "training.batch_size=16",
    ),
    "gfn1-metals": (*FROM_METALS, "loss.weights.xtb_forces=1"),
    "more": (
        *FROM_METALS,
        "loss.weights.xtb_forces=1",
        "training.initial='@anew'",
        "training.n_steps=12000",
        "training.weight_decay=0.05",
    ),
}


def held_out(dataset: str, n: int) -> list[tuple[str, Atoms]]:
    """The first structures of ``n`` complexes of the test split, with their names."""
    data = open_dataset(dataset)
    found: dict[str, Atoms] = {}
    for row in split_of(orbq.load_config(CONFIG), data)["test"]:
        name = bytes(data["group"][row]).decode()
        atoms = slice(*data["offsets"][row : row + 2])
        numbers = np.array(data["numbers"][atoms])
        if name in found or len(numbers) < 6 or "_" not in name:
            continue
        found[name] = Atoms(numbers, np.array(data["positions"][atoms]))
        charge, spin = int(data["total_charge"][row]), int(data["spin_multiplicity"][row])
        found[name].info |= {"charge": charge, "spin_multiplicity": spin}
    rng = np.random.default_rng(0)
    names = sorted(found)
    return [(names[i], found[names[i]]) for i in rng.permutation(len(names))[:n]]


def _gfn1(atoms: Atoms) -> Calculator:
    charge, multiplicity = atoms.info["charge"], atoms.info["spin_multiplicity"]
    return TBLite(method="GFN1-xTB", charge=charge, multiplicity=multiplicity, verbosity=0)


def dynamics(atoms: Atoms, calculator: Calculator, picoseconds: float) -> dict[str, Any]:
    """What a trajectory at 300 K does to the distances of a molecule."""
    pairs = np.triu_indices(len(atoms), 1)
    radii = covalent_radii[atoms.numbers]
    reach = (radii[:, None] + radii)[pairs]
    first = atoms.get_all_distances()[pairs]
    bonds = first < BONDED * reach
    closest, stretch, temperatures = [], [], []
    atoms.calc = calculator
    rng = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=rng)
    Stationary(atoms)
    friction = FRICTION / units.fs
    step = STEP * units.fs
    # fixcm would pass a heavy atom's random momentum on to hydrogen, and heat it far above 300 K
    langevin = Langevin(atoms, step, temperature_K=300, friction=friction, rng=rng, fixcm=False)

    def look() -> None:
        distances = atoms.get_all_distances()[pairs]
        closest.append((distances / reach).min())
        stretch.append((distances / first)[bonds].max())
        temperatures.append(atoms.get_temperature())

    langevin.attach(look, interval=EVERY)
    langevin.run(round(picoseconds * 1000 / STEP))
    return {
        "temperature_K": float(np.mean(temperatures[len(temperatures) // 2 :])),
        "closest": float(min(closest)),
        "stretch": float(max(stretch)),
        "stable": bool(min(closest) > TOO_CLOSE and max(stretch) < TOO_FAR),
    }


def _with_more(place: Path) -> dict[str, str]:
    """Twice as many complexes with DFT, and a network taught the labels of the others; the split,
    by names, holds out the same of those that both sets have."""
    words = make_grown(place, MORE)
    words["@hot"] = make_hot(place, MORE)
    return words | {"@anew": taught(place, words["@hot"], "anew", 0)}


def main() -> None:
    """Train, run, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="directory of data and runs")
    parser.add_argument("--ps", type=float, default=2.0, help="length of each trajectory")
    parser.add_argument("--n", type=int, default=10, help="complexes")
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, ITSELF), default=[*ARMS, ITSELF])
    given = parser.parse_args()
    words = make_grown(given.work / "data")
    words["@hot"] = make_hot(given.work / "data")
    teaches = {"gfn1-first": ("@all", "@rest", "all"), "gfn1-hot": ("@taught", "@hot", "hot")}
    for word, rest, kind in (teaches[arm] for arm in given.arms if arm in teaches):
        words[word] = taught(given.work / "data", words[rest], kind, 0)
    twice = _with_more(given.work / "data-more") if "more" in given.arms else {}
    place = given.work / "md"
    for arm in given.arms:
        own = twice if arm == "more" else words
        run = None if arm == ITSELF else trained(CONFIG, [*COMMON, *ARMS[arm]], own, place / arm)
        for name, atoms in held_out(words["@data"], given.n):
            calculator = _gfn1(atoms) if run is None else orbq.Calculator(run)
            what = {"arm": arm, "complex": name, "ps": given.ps}
            record(RESULTS, what, dynamics(atoms, calculator, given.ps))


if __name__ == "__main__":
    main()
