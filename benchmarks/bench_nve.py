"""Energy conservation of NVE dynamics through the ASE calculator, in float64 and float32.

    python benchmarks/bench_nve.py RUN STRUCTURES            # e.g. a run of `orbq demo`, tmc
    python benchmarks/bench_nve.py benchmarks/models/acac/onsite \
        ../shared/data/acac/test_MD_300K.xyz --index 0

Velocity Verlet with 0.5 fs from velocities of 300 K; the drift is the slope of a line through the
total energy against time. Expected: below 1e-4 eV/atom/ps in float64. Appends to results/nve.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.io import read
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet

import orbq

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "nve.jsonl"
EVERY = 10  # steps between two records


def drift(run: str, atoms: Atoms, dtype: str, picoseconds: float, step_fs: float) -> dict[str, Any]:
    """Dynamics of a copy of ``atoms``: slope and scatter of the total energy, eV/atom."""
    atoms = atoms.copy()
    atoms.calc = orbq.Calculator(run, dtype=dtype)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    Stationary(atoms)
    dynamics = VelocityVerlet(atoms, step_fs * units.fs)
    energies: list[float] = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()), interval=EVERY)
    atoms.get_forces()  # compiles
    begun = time.process_time()
    n_steps = round(1000 * picoseconds / step_fs)
    dynamics.run(n_steps)
    cpu = time.process_time() - begun
    e = np.array(energies) / len(atoms)
    t = np.arange(len(e)) * EVERY * step_fs / 1000
    return {
        "dtype": dtype,
        "drift_eV_per_atom_ps": float(np.polyfit(t, e, 1)[0]),
        "scatter_eV_per_atom": float(e.std()),
        "cpu_ms_per_step": 1e3 * cpu / n_steps,
    }


def main() -> None:
    """Measure both precisions, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("run", help="run directory")
    parser.add_argument("structures", help="a file that ASE reads")
    parser.add_argument("--index", type=int, default=0, help="which structure of the file")
    parser.add_argument("--picoseconds", type=float, default=2.0)
    parser.add_argument("--step", type=float, default=0.5, help="fs")
    given = parser.parse_args()
    atoms = read(given.structures, given.index)
    assert isinstance(atoms, Atoms)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for dtype in ("float64", "float32"):
        found = drift(given.run, atoms, dtype, given.picoseconds, given.step)
        print(
            f"{atoms.get_chemical_formula()} {dtype}: drift {found['drift_eV_per_atom_ps']:+.1e} "
            f"eV/atom/ps, scatter {found['scatter_eV_per_atom']:.1e} eV/atom over "
            f"{given.picoseconds:g} ps at {given.step:g} fs, "
            f"{found['cpu_ms_per_step']:.2f} CPU ms/step"
        )
        where = {
            "run": given.run,
            "formula": atoms.get_chemical_formula(),
            "picoseconds": given.picoseconds,
            "step_fs": given.step,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {p: version(p) for p in ("jax", "ase")},
            "commit": commit,
        }
        with RESULTS.open("a") as results:
            results.write(json.dumps({**where, **found}) + "\n")


if __name__ == "__main__":
    main()
