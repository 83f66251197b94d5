"""What the ASE calculator and batched prediction cost beside the bare compiled call.

    python benchmarks/bench_calculator.py          # three minutes

Calculator: 1,000 atoms of liquid acetone, all moving by 0.01 Å a step in one direction each (about
300 K at 0.5 fs), so that neighbours are searched anew every 25 steps; energy and forces through
``orbq.Calculator`` take turns with the same program called on arrays without padding that are on
the device already. Asked for: at most 1.3 times.

Batched: distorted ethanol, acetone and benzene molecules (9 to 12 atoms) in random order through
``run.predict(list)``, beside one calculator that gets them one after another; both once before, to
compile.

CPU time of the process. Appends to results/bench_calculator.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ase
import jax
import numpy as np
from ase.build import molecule

import orbq
from orbq.capacity import Capacity, padded

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bench_calculator.jsonl"
MODEL = ROOT / "benchmarks" / "models" / "acac" / "onsite"
MOLECULES = ("CH3CH2OH", "CH3COCH3", "C6H6")
STEP = 0.01  # Å
SIDE = 5.0  # Å of liquid acetone per molecule


def acetone(shape: tuple[int, int, int]) -> ase.Atoms:
    """A periodic box of randomly turned acetone molecules, 10 atoms each."""
    rng = np.random.default_rng(0)
    box = ase.Atoms(cell=SIDE * np.array(shape), pbc=True)
    for place in np.ndindex(shape):
        one = molecule("CH3COCH3")
        one.positions -= one.positions.mean(0)
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate(SIDE * np.array(place))
        box += one
    return box


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call in this process, all threads."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def calculator(run: orbq.Run, n_steps: int) -> dict[str, Any]:
    """Steps of the calculator and of its bare program, in turns."""
    atoms = acetone((5, 5, 4))
    atoms.calc = calc = orbq.Calculator(run)
    atoms.get_forces()
    structure = run.structure(atoms)
    edges = calc.neighbors.of(structure)
    exact = Capacity(len(atoms) + 1, len(edges.senders) + 1)
    inputs = jax.device_put(padded(structure, edges, exact, calc.neighbors.cutoff, calc.dtype))
    program, params = calc.program("forces"), calc.params
    jax.block_until_ready(program(params, *inputs))
    direction = np.random.default_rng(1).normal(size=atoms.positions.shape)
    direction *= STEP / np.linalg.norm(direction, axis=1, keepdims=True)
    bare, whole = [], []
    compiled, searched = calc.compilations, calc.neighbors.n_searches
    for _ in range(n_steps):
        bare.append(cpu_seconds(lambda: jax.block_until_ready(program(params, *inputs))))
        atoms.positions += direction
        whole.append(cpu_seconds(atoms.get_forces))
    return {
        "what": "calculator",
        "n_atoms": len(atoms),
        "n_edges": len(edges.senders),
        "n_steps": n_steps,
        "n_searches": calc.neighbors.n_searches - searched,
        "recompilations": calc.compilations - compiled,
        "bare_ms": 1e3 * statistics.median(bare),
        "calculator_ms": 1e3 * statistics.median(whole),
        "ratio_of_medians": statistics.median(whole) / statistics.median(bare),
        "ratio_of_means": statistics.mean(whole) / statistics.mean(bare),
    }


def batched(run: orbq.Run, n_structures: int) -> dict[str, Any]:
    """Structures per CPU-second, batched and one by one."""
    known = [molecule(name) for name in MOLECULES]
    rng = np.random.default_rng(0)
    structures = [known[k].copy() for k in rng.integers(len(known), size=n_structures)]
    for atoms in structures:
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
    calc = orbq.Calculator(run)

    def one_by_one() -> None:
        for atoms in structures:
            atoms.calc = calc
            atoms.get_forces()

    def streamed() -> None:
        for atoms in structures:
            atoms.calc = None
        assert sum(1 for _ in run.predict(structures)) == n_structures

    one_by_one()
    streamed()
    alone, together = [], []
    for _ in range(3):
        alone.append(cpu_seconds(one_by_one))
        together.append(cpu_seconds(streamed))
    each = {
        "calculator_per_cpu_s": n_structures / statistics.median(alone),
        "batched_per_cpu_s": n_structures / statistics.median(together),
    }
    return {
        "what": "batched",
        "n_structures": n_structures,
        "atoms_mean": float(np.mean([len(m) for m in structures])),
        "calculator_compilations": calc.compilations,
        "batched_compilations": run.batches.compilations,
        **each,
        "gain": each["batched_per_cpu_s"] / each["calculator_per_cpu_s"],
    }


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, default=MODEL, help="a run that knows C, H and O")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--structures", type=int, default=512)
    parser.add_argument("--only", choices=("calculator", "batched"), help="one of the two")
    given = parser.parse_args()
    run = orbq.load(given.run)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    where = {
        "run": str(given.run.resolve().relative_to(ROOT)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "ase")},
        "commit": commit,
    }
    measurements = {
        "calculator": lambda: calculator(run, given.steps),
        "batched": lambda: batched(run, given.structures),
    }
    for name in [given.only] if given.only else measurements:
        found = measurements[name]()
        print(json.dumps(found, indent=1), flush=True)
        with RESULTS.open("a") as results:
            results.write(json.dumps({**where, **found}) + "\n")


if __name__ == "__main__":
    main()
