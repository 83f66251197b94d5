"""How full and how fast the packer's batches are, and what a data set larger than memory costs.

    python benchmarks/bench_pack.py fill                     # fill and structures/s, seconds
    python benchmarks/bench_pack.py large --out SCRATCH      # 1,000,000 structures, 8 GB, minutes

``fill`` packs QM7, tmc, tmQMg and all three together at 5 Å for a range of batch sizes. ``large``
writes a synthetic data set of QM7 molecules with jittered positions (the embedded tmc where QM7 is
not at hand) under SCRATCH, then measures, each in a process of its own with its peak resident
memory: opening it, its neighbour list, the plan of an epoch, one epoch of batches with energies,
forces and the whole on-site block through ``prefetch``, a training step of a one-layer network,
which is what the batches must outrun, and `orbq inspect` (with edges and plots) and `orbq verify`
of all of it; the files are removed at the end. ``--stages`` leaves out the others. Every run
appends its records, with machine, versions and commit, to benchmarks/results/pack.jsonl.
For comparable figures use one thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase.io
import numpy as np

from orbq import __version__
from orbq.preprocess.flat import FlatWriter
from orbq.preprocess.job import Workspace
from orbq.preprocess.manifest import write_manifest
from orbq.preprocess.pack import Packer, Part, Pool, measure_budget, prefetch
from orbq.preprocess.references import References
from orbq.preprocess.stage import Staged
from orbq.preprocess.store import Dataset, array_names
from orbq.schema import FIELDS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "pack.jsonl"
CUTOFF = 5.0
BATCH_SIZES = (5, 8, 16, 32, 64, 128)
TARGETS = ("energy", "forces", "onsite")
ZERO = {"energy": References.zero()}


def record(**facts: Any) -> dict[str, Any]:
    """Append one result to the file, with where and on what it was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    where = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "orbq": __version__,
        "commit": commit,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**facts, **where}) + "\n")
    return facts


# --------------------------------------------------------------------------- fill


class Memory:
    """A data set in memory with random labels, as much of one as the packer reads."""

    path = None

    def __init__(self, frames: list[ase.Atoms]) -> None:
        n_atoms = np.array([len(atoms) for atoms in frames])
        rng = np.random.default_rng(0)
        self.arrays = {
            "offsets": np.concatenate([[0], np.cumsum(n_atoms)]),
            "numbers": np.concatenate([a.numbers for a in frames]).astype(np.int32),
            "positions": np.concatenate([a.positions for a in frames]),
            "total_charge": np.zeros(len(frames), np.int32),
            "spin_multiplicity": np.ones(len(frames), np.int32),
            "energy": rng.normal(size=len(frames)),
            "forces": rng.normal(size=(n_atoms.sum(), 3)),
            "onsite": rng.normal(size=(n_atoms.sum(), 47)),
        }
        self.arrays["onsite"][:, :4] = 0.0  # the charges, which would have to sum to the total

    def __len__(self) -> int:
        return len(self.arrays["offsets"]) - 1


def frames_of(name: str) -> list[ase.Atoms]:
    """The structures of a file of the shared data, or of the embedded one."""
    for folder in (SHARED, ROOT / "orbq" / "data"):
        path = folder / f"{name}.extxyz.gz"
        if path.exists():
            # unpacked first: ASE seeks to and fro, which is slow in a compressed file
            text = io.StringIO(gzip.decompress(path.read_bytes()).decode())
            return list(ase.io.read(text, format="extxyz", index=":"))
    print(f"{name}.extxyz.gz is not there: left out")
    return []


def bench_fill() -> None:
    """Fill, batch size and speed for every data set and batch size."""
    sets = {name: frames_of(name) for name in ("qm7", "tmc", "tmqmg_479")}
    sets["mixed"] = [atoms for frames in sets.values() for atoms in frames]
    print("| data | asked | mean | edge fill | node fill | N | E | M | plan us | structures/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, frames in sets.items():
        if not frames:
            continue
        pool = Pool([Part(Memory(frames))], CUTOFF)
        for batch_size in BATCH_SIZES:
            facts = record(what="fill", data=name, **fill_of(pool, batch_size))
            values = [facts[key] for key in list(facts)[2:]]
            print("| " + " | ".join([name, *(f"{v:.4g}" for v in values)]) + " |", flush=True)


def fill_of(pool: Pool, batch_size: int) -> dict[str, Any]:
    """Mean over five epochs of one pool and batch size."""
    budget = measure_budget(pool, batch_size)
    packer = Packer(pool, budget, TARGETS, ZERO)
    begin = time.process_time()
    rates = [packer.fill(epoch) for epoch in range(5)]
    plan_seconds = (time.process_time() - begin) / 5
    begin = time.process_time()
    batches = list(map(packer.batch, packer.plan(0)))
    batch_seconds = time.process_time() - begin - plan_seconds
    return {
        "asked": batch_size,
        "mean": len(pool) / len(batches),
        "edge_fill": float(np.mean([rate.edge for rate in rates])),
        "node_fill": float(np.mean([rate.node for rate in rates])),
        **budget._asdict(),
        "plan_us_per_structure": 1e6 * plan_seconds / len(pool),
        "structures_per_s": len(pool) / max(batch_seconds, 1e-9),
    }


# --------------------------------------------------------------------------- larger than memory


def build(place: Path, n: int) -> None:
    """Write a data set of ``n`` structures: QM7 over and over, positions jittered by 0.05 Å."""
    frames = frames_of("qm7") or frames_of("tmc")
    tile = Memory(frames).arrays
    n_atoms, rng = np.diff(tile["offsets"]), np.random.default_rng(1)
    place.mkdir(parents=True)
    names = array_names()
    writers = {name: FlatWriter(place / f"{name}.npy", d, s) for name, (_, s, d) in names.items()}
    writers["offsets"].append(np.zeros(1, np.int64))
    done = atoms = 0
    while done < n:
        some = min(len(frames), n - done)
        rows = int(n_atoms[:some].sum())
        for name, (per, shape, dtype) in names.items():
            if per == "offset":
                continue
            length = rows if per == "atom" else some
            values = tile[name][:length] if name in tile else filling(name, length, shape, dtype)
            if name == "positions":
                values = values + rng.normal(scale=0.05, size=values.shape)
            if name == "content_hash":  # all different
                values = np.array([f"{i:032x}" for i in range(done, done + length)], dtype)
            if name == "group":
                values = np.array([f"molecule-{i}" for i in range(length)], dtype)
            writers[name].append(values)
        writers["offsets"].append(atoms + np.cumsum(n_atoms[:some]))
        done, atoms = done + some, atoms + rows
    for writer in writers.values():
        writer.close()
    finish(place, n, atoms)


def filling(name: str, length: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Values of the arrays that the tile lacks: masks True, the rest 0."""
    is_mask = name.endswith("_mask") and name.removesuffix("_mask") in FIELDS
    return (
        np.full((length, *shape), is_mask, np.bool_)
        if is_mask
        else np.zeros((length, *shape), dtype)
    )


def finish(place: Path, n_structures: int, n_atoms: int) -> None:
    """The manifest and the empty list of failures, as the labelling job ends with."""
    work = Workspace(place)
    work.state.mkdir()
    work.rejected.write_text("")
    identity = {"method": "GFN1-xTB", "settings": {}, "tblite version": "none, synthetic"}
    ledger = SimpleNamespace(failures={}, notes={}, blas=set())
    write_manifest(work, [], identity, Staged(n_structures, n_atoms, 0, {}), ledger)
    work.finish()


def stage_open(place: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    dataset = Dataset.open(place)
    seconds = time.perf_counter() - begin
    size = sum(array.nbytes for array in dataset.arrays.values())
    return {"n": len(dataset), "gigabytes": size / 1e9, "seconds": seconds}


def stage_neighbors(place: Path) -> dict[str, Any]:
    dataset = Dataset.open(place)
    begin = now()
    pool = Pool([Part(dataset)], CUTOFF)
    return rate(len(pool), begin)


def stage_plan(place: Path) -> dict[str, Any]:
    pool, packer, begin = opened(place)
    rates = packer.fill(0)
    return {**rate(len(pool), begin), "edge_fill": rates.edge, "node_fill": rates.node}


def stage_epoch(place: Path) -> dict[str, Any]:
    pool, packer, begin = opened(place)
    seen = 0
    for batch in prefetch(packer.epoch(0)):
        seen += int(batch.mask.sum())
    assert seen == len(pool)
    return rate(seen, begin)


def opened(place: Path) -> tuple[Pool, Packer, tuple[float, float]]:
    pool = Pool([Part(Dataset.open(place))], CUTOFF)
    packer = Packer(pool, measure_budget(pool, 32), TARGETS, ZERO)
    return pool, packer, now()


def now() -> tuple[float, float]:
    """Wall and CPU seconds; the CPU's are what can be compared on a shared machine."""
    return time.perf_counter(), time.process_time()


def rate(n: int, begin: tuple[float, float]) -> dict[str, Any]:
    wall, cpu = (end - start for end, start in zip(now(), begin, strict=True))
    return {"seconds": wall, "cpu_seconds": cpu, "structures_per_cpu_s": n / cpu}


def peak_gigabytes() -> float:
    """Largest resident memory of this process, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def stage_train(place: Path) -> dict[str, Any]:
    """Steps of the smallest network that is of use: one layer, 16 channels, energies and forces."""
    import jax
    import jax.numpy as jnp

    from orbq.data import to_batch
    from orbq.losses import LossSpec
    from orbq.models.potential import Architecture, Constants, make_potential
    from orbq.train import Hyper, make_init, make_train_step

    pool = Pool([Part(Dataset.open(place), np.arange(3200))], CUTOFF)
    packer = Packer(pool, measure_budget(pool, 32), ("energy", "forces"), ZERO)
    batches = [to_batch(packer.batch(items)) for items in packer.plan(0)]
    numbers = np.unique(np.asarray(pool.parts[0].dataset.arrays["numbers"][:40_000]))
    constants = Constants(tuple(numbers.tolist()), 1.0, 13.0, {})
    architecture = Architecture(n_layers=1, n_channels=16, lmax=1, radial_hidden=(16,))
    potential = make_potential(architecture, constants)
    scales = {"energy": 1.0, "forces": 1.0}
    spec = LossSpec(("energy", "forces"), "huber", 1.0, "structure", scales, {})
    one = jnp.asarray(1.0)
    hyper = Hyper(
        {"energy": one, "forces": one}, one * 1e-3, one, one * 1e4, one, one, one * 0.99, one * 0
    )
    state = make_init(potential)(jax.random.key(0), batches[0])
    step = jax.jit(make_train_step(potential, spec))
    state, _ = step(state, batches[0], hyper)
    jax.block_until_ready(state)
    begin = now()
    for batch in batches:
        state, _ = step(state, batch, hyper)
    jax.block_until_ready(state)
    return rate(len(pool), begin)


def stage_inspect(place: Path) -> dict[str, Any]:
    from orbq.commands.inspect import inspect

    begin = now()
    inspect(place, cutoff=CUTOFF, batch_size=32, plot=place.with_name("orbq-large.png"))
    place.with_name("orbq-large.png").unlink()
    return rate(len(Dataset.open(place)), begin)


def stage_verify(place: Path) -> dict[str, Any]:
    from orbq.preprocess.verify import verify

    begin = now()
    assert verify(place) == []
    return rate(len(Dataset.open(place)), begin)


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "open": stage_open,
    "neighbors": stage_neighbors,
    "plan": stage_plan,
    "epoch": stage_epoch,
    "train": stage_train,
    "inspect": stage_inspect,
    "verify": stage_verify,
}


def bench_large(out: Path, n: int, stages: list[str]) -> None:
    """Build, measure every stage in a process of its own, remove."""
    place = out / "orbq-large"
    try:
        begin = time.perf_counter()
        build(place, n)
        print(f"built {n} structures in {time.perf_counter() - begin:.0f} s", flush=True)
        for facts in run_stages(place, stages):
            values = ", ".join(
                f"{k} {v:.4g}" for k, v in facts.items() if k not in ("what", "stage")
            )
            print(f"{facts['stage']}: {values}", flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def run_stages(place: Path, stages: list[str]) -> Iterator[dict[str, Any]]:
    for stage in stages:
        command = [sys.executable, __file__, "stage", stage, "--out", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"stage {stage} failed:\n{done.stderr}")
        yield record(what="large", stage=stage, **json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("fill", "large", "stage"))
    parser.add_argument("stage", nargs="?", choices=tuple(STAGES))
    parser.add_argument("--out", type=Path, help="scratch directory for the large data set")
    parser.add_argument("--n", type=int, default=1_000_000, help="structures of the large data set")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    options = parser.parse_args()
    if options.what == "fill":
        bench_fill()
        return
    if options.out is None:
        parser.error("--out is needed: a directory with 8 GB of room")
    if options.what == "large":
        bench_large(options.out, options.n, options.stages)
        return
    facts = STAGES[options.stage](options.out)
    facts["peak_gigabytes"] = peak_gigabytes()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
