"""Configurations of acetylacetone from GFN1-xTB dynamics, without DFT: they only teach.

    python benchmarks/make_acac_xtb.py train_300K.xyz --out acac_xtb.extxyz   # minutes
    orbq preprocess acac_xtb.extxyz --out data/acac_xtb

Langevin dynamics at each of --temperatures from configurations of the training file, one after the
other; a frame every 15 fs after 150 fs. At 600 K and above the proton moves between the oxygens.
No file of test configurations is read. The same seed gives the same frames. These are the frames of
the results; `orbq sample` makes such ones of any structures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from tblite.ase import TBLite
from tqdm import tqdm

STEP, FRICTION = 0.5, 0.02  # fs, 1/fs
BEFORE, EVERY = 300, 30  # steps
GROUP = "acac GFN1"


def trajectory(
    start: Atoms,
    temperature: float,
    n: int,
    seed: int,
    method: str = "GFN1-xTB",
    every: int = EVERY,
) -> list[Atoms]:
    """``n`` frames of one trajectory at ``temperature`` (K), ``every`` so many steps."""
    rng = np.random.default_rng(seed)
    atoms = Atoms(start.numbers, start.positions)
    atoms.calc = TBLite(method=method, verbosity=0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    dynamics = Langevin(
        atoms,
        STEP * units.fs,
        temperature_K=temperature,
        friction=FRICTION / units.fs,
        rng=rng,
        fixcm=False,  # it overheats light atoms
    )
    dynamics.run(BEFORE)
    out = []
    for _ in range(n):
        dynamics.run(every)
        frame = Atoms(atoms.numbers, atoms.positions)
        frame.info |= {"group": GROUP, "temperature": temperature, "seed": seed}
        out.append(frame)
    return out


def main() -> None:
    """Make the frames, one trajectory after the other, and write them together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="configurations to start from")
    parser.add_argument("--out", type=Path, required=True, help="extxyz file to write")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 600.0, 1000.0])
    parser.add_argument("--trajectories", type=int, default=4, help="at each temperature")
    parser.add_argument("--frames", type=int, default=200, help="of each trajectory")
    parser.add_argument("--seed", type=int, default=0, help="others give other trajectories")
    given = parser.parse_args()
    starts = ase.io.read(given.source, ":")
    assert isinstance(starts, list)
    plan = [(t, i) for t in given.temperatures for i in range(given.trajectories)]
    chosen = np.random.default_rng(0).permutation(len(starts))
    found: list[Atoms] = []
    first = given.seed * len(plan)
    for seed, (temperature, _) in enumerate(tqdm(plan, unit="trajectory"), start=first):
        found += trajectory(starts[chosen[seed % len(chosen)]], temperature, given.frames, seed)
    ase.io.write(given.out, found, format="extxyz")


if __name__ == "__main__":
    main()
