"""How fast structures are labelled, as ratios within one run.

    python benchmarks/bench_label.py                          # about 18 minutes on 2 idle cores
    python benchmarks/bench_label.py --sets qm7 --rounds 3    # one or two processes: 6 minutes
    python benchmarks/bench_label.py --every 5                # a sample, about 4 minutes
    python benchmarks/bench_label.py --tail --sets qm7        # idle time at the end of a job
    python benchmarks/bench_label.py --blas off auto libmkl_rt.so.3    # one library by its path

For tmQMg's 479 complexes and every second molecule of QM7 (the embedded tmc where these are not at
hand), with tblite's own BLAS and with the one that `orbq preprocess` finds, or as --blas says:

    bare    a loop over plain tblite calls with the same settings, energy, gradient, P and S
    both    two such loops at once, each over all structures: what the machine itself can do
    orbq    `orbq preprocess` with one process, reading and checksums left out
    two     the same with two processes

Throughput is structures per second of CPU time, summed over all processes, because it does not
depend on what else the machine does. The gain of the second process needs wall-clock time and is
printed with the load average, since it says little on a busy machine, and with the gain of the
second bare loop, the machine's limit. "processors" is CPU time over wall-clock time of the two
processes, 2 when neither core ever waits. The start of the labelling process (imports) is measured
on a single structure, three times a round, and its median subtracted from all times.
Expected: orbq/bare at least 0.97; fast/own BLAS at least 1.8 on tmQMg, populations equal to 1e-10;
two processes at least 1.9 times one on an idle machine; every complex labelled or masked, and
the charge-collapsed ABEVAG (La) rescued at 1000 K.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
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

    marks: dict[str, tuple[float, float, float]] = {}

    def mark(progress: Progress) -> None:
        now = cpu_seconds(), time.perf_counter(), time.process_time()
        marks.setdefault(progress.phase, now)

    resources = Resources(workers=workers, blas=blas)
    dataset = preprocess([source], out, resources=resources, on_progress=mark)
    cpu, wall, own = (
        after - before for before, after in zip(marks["label"], marks["store"], strict=True)
    )
    return {
        "cpu": cpu,
        "wall": wall,
        "own_cpu": own,
        "structures": len(dataset),
        "blas": dataset.manifest["blas"][0],
        "counts": dataset.manifest["counts"],
    }


def in_process(blas: str, *arguments: str) -> dict[str, Any]:
    """Run one measurement of this file in a fresh process with one thread."""
    return answer(started(blas, *arguments))


def started(blas: str, *arguments: str) -> subprocess.Popen[str]:
    """The fresh process at work."""
    preload = find_blas(blas) if arguments[0] == "bare" else None
    return subprocess.Popen(
        [sys.executable, __file__, "--measure", *arguments],
        env=environment(preload),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it measured."""
    out, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    return dict(json.loads(out.splitlines()[-1]))


def two_at_once(blas: str, source: str) -> dict[str, Any]:
    """Two bare loops at the same time; the slower one counts."""
    both = [answer(p) for p in [started(blas, "bare", source) for _ in range(2)]]
    return max(both, key=lambda run: float(run["wall"]))


def tail(source: str) -> dict[str, float]:
    """Speed-up of n processes, {n: times}, that take the chunks in turn and do nothing else.

    From the CPU time of each structure, so that it does not depend on what else the machine does.
    """
    from orbq.preprocess import schedule, xtb
    from orbq.preprocess.read import read_structures
    from orbq.schema import Structure

    structures = [s for s in read_structures([source]) if isinstance(s, Structure)]
    xtb.label(structures[0])  # imports
    seconds = np.empty(len(structures))
    for i, s in enumerate(structures):
        begin = time.process_time()
        xtb.label(s)
        seconds[i] = time.process_time() - begin
    numbers = np.concatenate([s.numbers for s in structures])
    offsets = np.cumsum([0, *(len(s.numbers) for s in structures)])
    chunks = schedule.plan(schedule.costs(numbers, offsets, "GFN1-xTB"))
    speedup = {}
    for workers in (2, 8, 32):
        free = [0.0] * workers  # when each process is
        for chunk in range(len(chunks.cost)):
            heapq.heapreplace(free, free[0] + seconds[chunks.members(chunk)].sum())
        speedup[str(workers)] = float(seconds.sum() / max(free))
    return speedup


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


def compare(
    name: str, every: int, rounds: int, libraries: list[str], directory: Path
) -> dict[str, Any]:
    """All measurements on one set, in turns; the fastest of each kind counts."""
    source = str(sample(name, every, directory))
    single = source.replace(".extxyz", "-one.extxyz")
    out: dict[str, Any] = {"set": name}
    made: list[Dataset] = []
    for number, blas in enumerate(libraries):
        kinds = ("start", "bare", "both", "1", "2")
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for turn in range(rounds):
            place = f"{directory}/{name}-{number}-{turn}"
            for again in range(3):
                begun = in_process(blas, "orbq", single, f"{place}-0-{again}", blas, "1")
                runs["start"].append(begun)
            runs["bare"].append(in_process(blas, "bare", source))
            runs["both"].append(two_at_once(blas, source))
            for workers in ("1", "2"):
                to = f"{place}-{workers}"
                runs[workers].append(in_process(blas, "orbq", source, to, blas, workers))
        made.append(Dataset.open(directory / f"{name}-{number}-0-1"))
        first = out[Path(libraries[0]).name] if made[1:] else None
        out[Path(blas).name] = {**ratios(runs), **beside(first, runs, made)}
    out["largest_atomic_charge"] = float(
        np.abs(atomic_charges(np.asarray(made[0]["onsite"]))).max()
    )
    return out


def beside(
    first: dict[str, Any] | None, runs: dict[str, list[dict[str, Any]]], made: list[Dataset]
) -> dict[str, Any]:
    """Speed and populations of one library beside those of the first."""
    if first is None:
        return {}
    onsite = [np.asarray(dataset["onsite"]) for dataset in (made[0], made[-1])]
    difference = orbital_charges(onsite[0]) - orbital_charges(onsite[1])
    return {
        "over_first": ratios(runs)["orbq_per_cpu_s"] / first["orbq_per_cpu_s"],
        "largest_population_difference": float(np.abs(difference).max()),
    }


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Throughputs and their ratios from repeated runs with one BLAS."""

    def best(kind: str, clock: str) -> float:
        least = min(float(run[clock]) for run in runs[kind])
        start = median(float(run[clock]) for run in runs["start"])
        return least if kind in ("bare", "both") else least - start

    one = runs["1"][0]
    n = one["structures"]
    return {
        "blas": one["blas"],
        "start-up_s": median(run["cpu"] for run in runs["start"]),
        "bare_per_cpu_s": n / best("bare", "cpu"),
        "orbq_per_cpu_s": n / best("1", "cpu"),
        "orbq/bare": best("bare", "cpu") / best("1", "cpu"),
        "two/one_wall": best("1", "wall") / best("2", "wall"),
        "two/one_bare_wall": 2 * best("bare", "wall") / best("both", "wall"),
        "two/one_cpu": best("1", "cpu") / best("2", "cpu"),
        "processors_of_two": max(run["cpu"] / run["wall"] for run in runs["2"]),
        "job_process_cpu_share": min(run["own_cpu"] / run["cpu"] for run in runs["1"]),
        "bare_failed": runs["bare"][0]["failed"],
        "counts": one["counts"],
        "load": os.getloadavg()[0],
    }


def show(found: dict[str, Any]) -> None:
    """Print the ratios of one set."""
    for r in found.values():
        if not isinstance(r, dict):
            continue
        counts = r["counts"]
        print(
            f"{found['set']}, {counts['structures']} structures, {r['blas']}: "
            f"bare {r['bare_per_cpu_s']:.1f}/s, orbq {r['orbq_per_cpu_s']:.1f}/s per core, ratio "
            f"{r['orbq/bare']:.3f}; start-up {r['start-up_s']:.2f} s"
        )
        print(
            f"  2 processes {r['two/one_wall']:.2f} x 1, two bare loops "
            f"{r['two/one_bare_wall']:.2f} x 1 (load {r['load']:.1f}); "
            f"{r['processors_of_two']:.2f} processors; CPU of one over two {r['two/one_cpu']:.3f}; "
            f"job process {r['job_process_cpu_share']:.1%} of the CPU"
        )
        print(
            f"  labelled {counts['labels']['onsite']}, masked {counts['without_xtb']}, rescued "
            f"{counts['rescued'] or 'none'}; the bare loop failed on {r['bare_failed']}"
        )
        if "over_first" in r:
            print(
                f"  {r['over_first']:.2f} x the first library; populations differ by at most "
                f"{r['largest_population_difference']:.1e}"
            )
    print(f"  largest atomic charge {found['largest_atomic_charge']:.2f} e")


def main() -> None:
    """Measure, print, and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1, help="use every n-th structure")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; the fastest counts")
    parser.add_argument(
        "--blas",
        nargs="+",
        default=["off", "auto"],
        help="off, auto or paths; the first is the base",
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--tail", action="store_true", help="only the idle time at the end")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        kind, *rest = given.measure
        source, *options = rest
        if kind in ("bare", "tail"):
            print(json.dumps({"bare": bare, "tail": tail}[kind](source)))
        else:
            print(json.dumps(orbq(source, options[0], options[1], int(options[2]))))
        return
    if "auto" in given.blas and find_blas("auto") is None:
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
            if given.tail:
                source = str(sample(name, given.every, Path(scratch)))
                print(f"{name}: processes and speed-up {in_process('off', 'tail', source)}")
                continue
            found = compare(name, given.every, given.rounds, given.blas, Path(scratch))
            show(found)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as results:
                results.write(json.dumps({**where, **found}) + "\n")


if __name__ == "__main__":
    main()
