"""How fast structures are labelled, as ratios within one run.

    python benchmarks/bench_label.py                    # about 12 minutes on 2 idle cores
    python benchmarks/bench_label.py --rounds 3         # on a busy machine
    python benchmarks/bench_label.py --every 5          # a sample, about 3 minutes

For tmQMg's 479 complexes and every second molecule of QM7 (the embedded tmc where these are not at
hand), with tblite's own BLAS and with the one that `orbq preprocess` finds:

    bare    a loop over plain tblite calls with the same settings, energy, gradient, P and S
    orbq    `orbq preprocess` with one process, reading and checksums left out
    two     the same with two processes

Throughput is structures per second of CPU time, summed over all processes, because it does not
depend on what else the machine does; the gain of the second process needs wall-clock time and is
printed with the load average, since it says little on a busy machine. The start of the labelling
process (imports) is measured on a single structure and subtracted from both times.
Expected: orbq/bare at least 0.97; fast/own BLAS at least 1.8 on tmQMg, populations equal to 1e-10;
two processes at least 1.9 times one on an idle machine; every complex labelled or masked, and
the charge-collapsed ABEVAG (La) rescued at 1000 K.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np

from orbq.orbitals import atomic_charges, orbital_charges
from orbq.preprocess.blas import BUNDLED, environment, find_blas
from orbq.preprocess.frames import find_sources, read_frames
from orbq.preprocess.store import Dataset

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "label.jsonl"
SETS = {"tmqmg": ("tmqmg_479.extxyz.gz", 1), "qm7": ("qm7.extxyz.gz", 2)}  # file, every n-th


def cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


# --------------------------------------------------------------------------- what is measured


def bare(source: str) -> dict[str, Any]:
    """A loop over tblite with the settings of the labels."""
    import tblite.interface as tblite
    from tblite.exceptions import TBLiteRuntimeError

    from orbq import units
    from orbq.preprocess.read import read_structures
    from orbq.preprocess.xtb import DEFAULTS, KELVIN
    from orbq.schema import Structure

    structures = [s for s in read_structures([source]) if isinstance(s, Structure)]
    failed, start, begun = 0, cpu_seconds(), time.perf_counter()
    for s in structures:
        calculator = tblite.Calculator(
            "GFN1-xTB",
            s.numbers,
            s.positions / units.BOHR,
            float(s.total_charge),
            s.spin_multiplicity - 1,
            logger=lambda message: None,
        )
        calculator.set("verbosity", 0)
        calculator.set("accuracy", DEFAULTS.accuracy)
        calculator.set("temperature", DEFAULTS.temperature * KELVIN)
        calculator.set("save-integrals", 1)
        try:
            result = calculator.singlepoint()
            for name in ("energy", "gradient", "density-matrix", "overlap-matrix"):
                result.get(name)
        except TBLiteRuntimeError:
            failed += 1
    return {
        "cpu": cpu_seconds() - start,
        "wall": time.perf_counter() - begun,
        "structures": len(structures),
        "failed": failed,
    }


def orbq(source: str, out: str, blas: str, workers: int) -> dict[str, Any]:
    """`orbq preprocess`, from the first chunk to the end of the labelling processes."""
    from orbq.preprocess.label import Progress, Resources, preprocess

    marks: dict[str, tuple[float, float]] = {}

    def mark(progress: Progress) -> None:
        marks.setdefault(progress.phase, (cpu_seconds(), time.perf_counter()))

    resources = Resources(workers=workers, blas=blas)
    dataset = preprocess([source], out, resources=resources, on_progress=mark)
    cpu, wall = (
        after - before for before, after in zip(marks["label"], marks["store"], strict=True)
    )
    return {
        "cpu": cpu,
        "wall": wall,
        "structures": len(dataset),
        "blas": dataset.manifest["blas"][0],
        "counts": dataset.manifest["counts"],
    }


def in_process(blas: str, *arguments: str) -> dict[str, Any]:
    """Run one measurement of this file in a fresh process with one thread."""
    preload = find_blas(blas) if arguments[0] == "bare" else None
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments],
        env=environment(preload),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --------------------------------------------------------------------------- the comparison


def sample(name: str, every: int, directory: Path) -> Path:
    """A file with every n-th structure of a set."""
    file, own_every = SETS[name]
    path = SHARED / file
    source = find_sources([path if path.exists() else "tmc"])[0]
    frames = [frame.atoms for frame in read_frames(source)][:: every * own_every]
    ase.io.write(directory / f"{name}.extxyz", frames)
    ase.io.write(directory / f"{name}-one.extxyz", frames[:1])
    return directory / f"{name}.extxyz"


def compare(name: str, every: int, rounds: int, directory: Path) -> dict[str, Any]:
    """All measurements on one set, in turns; the fastest of each kind counts."""
    source = str(sample(name, every, directory))
    single = source.replace(".extxyz", "-one.extxyz")
    out: dict[str, Any] = {"set": name}
    for blas in ("off", "auto"):
        runs: dict[str, list[dict[str, Any]]] = {"start": [], "bare": [], "1": [], "2": []}
        for turn in range(rounds):
            place = f"{directory}/{name}-{blas}-{turn}"
            runs["start"].append(in_process(blas, "orbq", single, f"{place}-0", blas, "1"))
            runs["bare"].append(in_process(blas, "bare", source))
            for workers in ("1", "2"):
                to = f"{place}-{workers}"
                runs[workers].append(in_process(blas, "orbq", source, to, blas, workers))
        out[blas] = ratios(runs)
    own, fast = (Dataset.open(directory / f"{name}-{blas}-0-1") for blas in ("off", "auto"))
    onsite = [np.asarray(dataset["onsite"]) for dataset in (own, fast)]
    difference = orbital_charges(onsite[0]) - orbital_charges(onsite[1])
    out["fast/own"] = out["auto"]["orbq_per_cpu_s"] / out["off"]["orbq_per_cpu_s"]
    out["largest_population_difference"] = float(np.abs(difference).max())
    out["largest_atomic_charge"] = float(np.abs(atomic_charges(onsite[0])).max())
    return out


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Throughputs and their ratios from repeated runs with one BLAS."""

    def best(kind: str, clock: str) -> float:
        least = min(float(run[clock]) for run in runs[kind])
        start = min(float(run[clock]) for run in runs["start"])
        return least if kind == "bare" else least - start

    one = runs["1"][0]
    n = one["structures"]
    return {
        "blas": one["blas"],
        "start-up_s": min(run["cpu"] for run in runs["start"]),
        "bare_per_cpu_s": n / best("bare", "cpu"),
        "orbq_per_cpu_s": n / best("1", "cpu"),
        "orbq/bare": best("bare", "cpu") / best("1", "cpu"),
        "two/one_wall": best("1", "wall") / best("2", "wall"),
        "bare_failed": runs["bare"][0]["failed"],
        "counts": one["counts"],
        "load": os.getloadavg()[0],
    }


def show(found: dict[str, Any]) -> None:
    """Print the ratios of one set."""
    print(f"{found['set']}: {found['off']['counts']['structures']} structures")
    for blas in ("off", "auto"):
        r = found[blas]
        print(
            f"  {r['blas']}: bare {r['bare_per_cpu_s']:.1f}/s, orbq {r['orbq_per_cpu_s']:.1f}/s "
            f"per core, ratio {r['orbq/bare']:.3f}; 2 processes {r['two/one_wall']:.2f} x 1 "
            f"(load {r['load']:.1f}); start-up {r['start-up_s']:.2f} s"
        )
        counts = r["counts"]
        print(
            f"    labelled {counts['labels']['onsite']}, masked {counts['without_xtb']}, rescued "
            f"{counts['rescued'] or 'none'}; the bare loop failed on {r['bare_failed']}"
        )
    print(
        f"  fast/own BLAS {found['fast/own']:.2f}; populations differ by at most "
        f"{found['largest_population_difference']:.1e}; largest atomic charge "
        f"{found['largest_atomic_charge']:.2f} e"
    )


def main() -> None:
    """Measure, print, and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1, help="use every n-th structure")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; the fastest counts")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        kind, *rest = given.measure
        source, *options = rest
        if kind == "bare":
            print(json.dumps(bare(source)))
        else:
            print(json.dumps(orbq(source, options[0], options[1], int(options[2]))))
        return
    if find_blas("auto") is None:
        print(f"no fast BLAS found here: both columns are {BUNDLED} (apt install libopenblas0)")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    from importlib.metadata import version

    where = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "tblite": version("tblite"),
        "commit": commit,
        "every": given.every,
        "rounds": given.rounds,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.sets:
            found = compare(name, given.every, given.rounds, Path(scratch))
            show(found)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as results:
                results.write(json.dumps({**where, **found}) + "\n")


if __name__ == "__main__":
    main()
