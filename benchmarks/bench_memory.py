"""What `orbq preprocess` holds in memory, by the number of structures.

    python benchmarks/bench_memory.py --out SCRATCH                 # 200,000 structures, minutes
    python benchmarks/bench_memory.py --out SCRATCH --n 1000000     # 7 GB, about half an hour
    python benchmarks/bench_memory.py --out SCRATCH --n 5000 --labels xtb

Writes a file of QM7 molecules (the embedded tmc where QM7 is not at hand) over and over, positions
jittered by 0.05 Å, makes a data set of it in a process of its own, and samples the resident memory
of that process as it reads, labels and stores. The labelling processes answer with zeros unless
--labels xtb: what the job holds does not depend on what the labels are, and a real label takes
milliseconds. Prints, for each phase, the resident memory at its beginning and its end, the largest,
and the slope over the second half of the phase, in bytes a structure. A second process measures
what grows with the number of structures, the plan and the ledger, on a million made-up ones: bytes
kept for each, and at the peak. From both follows what labelling a million needs. Appended to
benchmarks/results/memory.jsonl; the files are removed.
Expected: under 0.5 GB for a million structures, and tens of bytes kept for each.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from orbq.preprocess import supervise
from orbq.preprocess.flat import release
from orbq.preprocess.frames import find_sources, read_frames
from orbq.preprocess.job import Ledger, Workspace
from orbq.preprocess.label import Progress, Resources, preprocess
from orbq.preprocess.schedule import costs, plan

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "memory.jsonl"
MILLION = 1_000_000
# A labelling process whose labels are zeros.
ZEROS = """
import numpy as np
from orbq.orbitals import N_ONSITE
from orbq.preprocess import worker, xtb
from orbq.schema import Labels
def zeros(structures, method, settings, begin):
    begin(0)
    sizes = [len(structure.numbers) for structure in structures]
    return [Labels(np.zeros((n, N_ONSITE)), 0.0, np.zeros((n, 3))) for n in sizes]
xtb.label_many = zeros
worker.serve()
"""


def write_structures(path: Path, n: int) -> None:
    """A file of ``n`` molecules with jittered positions."""
    qm7 = SHARED / "qm7.extxyz.gz"
    source = find_sources([qm7 if qm7.exists() else "tmc"])[0]
    frames = [frame.atoms for frame in read_frames(source)]
    symbols = [frame.get_chemical_symbols() for frame in frames]
    rng = np.random.default_rng(1)
    with path.open("w") as out:
        for i in range(n):
            atoms = frames[i % len(frames)]
            moved = atoms.positions + rng.normal(scale=0.05, size=(len(atoms), 3))
            out.write(f"{len(atoms)}\nProperties=species:S:1:pos:R:3 energy={-i % 97}\n")
            for symbol, (x, y, z) in zip(symbols[i % len(frames)], moved.tolist(), strict=True):
                out.write(f"{symbol} {x:.6f} {y:.6f} {z:.6f}\n")


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def peak() -> int:
    """The largest that ``resident`` has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(source: Path, out: Path, labels: str) -> dict[str, Any]:
    """Make the data set, sampling the memory: {phase: figures}."""
    if labels == "zeros":
        supervise.WORKER = (sys.executable, "-c", ZEROS)
    samples: dict[str, list[tuple[int, int]]] = {}

    def sample(progress: Progress) -> None:
        samples.setdefault(progress.phase, []).append((progress.done, resident()))

    begin = time.process_time()
    dataset = preprocess([source], out, resources=Resources(), on_progress=sample)
    samples["store"] += samples["done"]
    samples["store"].append((len(dataset), resident()))
    return {
        "n": len(dataset),
        "labelled": dataset.manifest["counts"]["labels"]["onsite"],
        "empty_mb": samples["read"][0][1] / 1e6,
        "peak_mb": peak() / 1e6,
        "cpu_s": time.process_time() - begin,
        **{phase: figures(np.array(samples[phase])) for phase in ("read", "label", "store")},
    }


def measure_plan(place: Path, n: int) -> dict[str, Any]:
    """Memory of the plan and the ledger of ``n`` structures, all of which are then finished."""
    sizes = np.random.default_rng(0).integers(8, 23, n)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    np.save(place / "numbers.npy", np.resize(np.array([1, 6, 1, 8], np.int32), offsets[-1]))
    work = Workspace(place)
    work.state.mkdir()
    before = resident()
    numbers = np.load(place / "numbers.npy", mmap_mode="r")
    chunks = plan(costs(numbers, offsets, "GFN1-xTB"))
    release(numbers)
    ledger = Ledger(work, offsets, chunks)
    for chunk in range(len(chunks.cost)):
        energies = np.zeros(len(chunks.members(chunk)))
        reply = {"chunk": chunk, "energy": energies, "failures": [], "notes": [], "blas": []}
        ledger._note(reply)
    ledger.finish()
    return {
        "plan_n": n,
        "plan_chunks": len(chunks.cost),
        "kept_bytes_per_structure": (resident() - before) / n,
        "peak_bytes_per_structure": (peak() - before) / n,
    }


def figures(samples: np.ndarray) -> dict[str, float]:
    """Of (structures done, resident bytes) [k, 2]."""
    done, memory = samples[:, 0], samples[:, 1]
    late = done >= 0.5 * done[-1]
    spread = float(np.ptp(done[late]))
    slope = float(np.polyfit(done[late], memory[late], 1)[0]) if spread else 0.0
    return {
        "begin_mb": memory[0] / 1e6,
        "end_mb": memory[-1] / 1e6,
        "peak_mb": memory.max() / 1e6,
        "bytes_per_structure": slope,
    }


def show(found: dict[str, Any]) -> None:
    """Print one run and what it says of a million structures."""
    print(
        f"{found['n']:,} structures, {found['labelled']:,} labelled, peak {found['peak_mb']:.0f} MB"
    )
    for phase in ("read", "label", "store"):
        f = found[phase]
        print(
            f"  {phase}: {f['begin_mb']:.0f} to {f['end_mb']:.0f} MB, at most {f['peak_mb']:.0f}; "
            f"{f['bytes_per_structure']:+.0f} bytes a structure"
        )
    print(
        f"  plan and ledger of {found['plan_n']:,}: {found['kept_bytes_per_structure']:.0f} bytes "
        f"a structure, {found['peak_bytes_per_structure']:.0f} at the peak; so a million needs "
        f"{found['million_mb']:.0f} MB"
    )


def main() -> None:
    """Measure, print, and append to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="scratch directory")
    parser.add_argument("--n", type=int, default=200_000, help="structures")
    parser.add_argument("--labels", choices=("zeros", "xtb"), default="zeros")
    parser.add_argument("--measure", choices=("job", "plan"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    place = given.out / "orbq-memory"
    source = place / "structures.extxyz"
    if given.measure == "job":
        print(json.dumps(measure(source, place / "set", given.labels)))
        return
    if given.measure == "plan":
        (place / "plan").mkdir()
        print(json.dumps(measure_plan(place / "plan", MILLION)))
        return
    place.mkdir(parents=True)
    found: dict[str, Any] = {}
    try:
        write_structures(source, given.n)
        for what in ("job", "plan"):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found |= json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(place, ignore_errors=True)
    more = found["peak_bytes_per_structure"] * max(MILLION - found["n"], 0)
    found["million_mb"] = found["peak_mb"] + more / 1e6
    show(found)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    where = {"python": platform.python_version(), "numpy": np.__version__, "commit": commit}
    with RESULTS.open("a") as results:
        results.write(json.dumps({"labels": given.labels, **found, **where}) + "\n")


if __name__ == "__main__":
    main()
