"""The demonstration's arms over the number of training structures.

    python benchmarks/study_demo_size.py --out SCRATCH          # about 6 minutes on 2 cores

Everything but ``data.n_train`` is as in ``orbq demo``: network, steps, seeds, test complexes. The
structures are a random part of the training split; much below 300 some elements would be missing.
A finished run is not repeated. Results: benchmarks/results/demo_size.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from orbq import __version__, demo
from orbq.commands.demo import _Bars
from orbq.preprocess.label import preprocess

RESULTS = Path(__file__).parent / "results" / "demo_size.json"


def main() -> None:
    """Train every arm at every size, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for data and runs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 420], help="0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    for name in (demo.DATASET, demo.UNLABELLED):
        preprocess([name], given.out / "data" / name)
    found = {}
    for size in given.sizes:
        place = given.out / f"n{size}"
        place.mkdir(exist_ok=True)
        if not (place / "data").exists():
            (place / "data").symlink_to((given.out / "data").resolve())
        jobs = demo.make_jobs(place, given.seeds, [f"data.n_train={size}"], demo.ARMS)
        with _Bars(Console()) as bars:
            results = demo.run_jobs(jobs, given.workers, bars.stepped, bars.finished)
        n_train = results[0].summary["structures"]["train"]
        found[n_train] = demo.table(results)
        for row in found[n_train]:
            energy = demo.spread(row.values["energy_mae"], 1)
            forces = demo.spread(row.values["force_mae"], 1)
            ratio = demo.spread(row.ratios.get("energy_mae", []), 3)
            print(f"N={n_train} {row.arm:<14} {energy} meV  {forces} meV/Å  ratio {ratio}")
        tables = {n: [r._asdict() for r in t] for n, t in found.items()}
        RESULTS.write_text(json.dumps({**provenance(), "by_n_train": tables}, indent=1))


def provenance() -> dict[str, str]:
    """Commit, versions and machine of a result."""
    describe = ["git", "describe", "--always", "--dirty=+"]
    place = Path(__file__).parent
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=place, check=False)
    return {
        "commit": commit.stdout.strip(),
        "orbq": __version__,
        "jax": version("jax"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


if __name__ == "__main__":
    main()
