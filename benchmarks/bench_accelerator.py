"""Training and inference on a GPU (or TPU) against the batch size; the cost of many runs at once.

    python benchmarks/bench_accelerator.py                  # three settings, some 10 minutes
    python benchmarks/bench_accelerator.py --libraries xla cuequivariance mlip    # beside others
    python benchmarks/bench_accelerator.py --tiny           # on a CPU, to see that it works

For each of bench_step.py's settings (MACE-like, NequIP-like l = 1 and l = 2, 64 channels) and
batches of 16, 64 and 256 embedded transition-metal complexes, tiled: real atoms per second in
training (energies and forces, random labels, Adam) and in inference of energies and forces, the
device's peak memory, the training step's operations and bytes as XLA counts them, and how far
energies and forces of the smallest batch are from those computed on the CPU. "xla" and
"cuequivariance" are what training.kernels names; "mlip" is the peer, where it is installed. Then
eight runs of an ablation as one vmapped step beside eight steps of one run. A batch that does not
fit is recorded as such.

Each measurement is a process of its own. As many as there are processors compile at once (what the
seconds of the first call tell), then they take turns. Wall-clock times, medians of several steps
after a warm-up. Appends to results/accelerator.jsonl with device, its measured limits, versions and
commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from bench_step import SETTINGS, WIDTH, circumstances
from jax.sharding import Mesh

from orbq.ablate import grid, over_runs
from orbq.losses import Batch, LossSpec
from orbq.models.potential import Architecture, Constants, make_potential, predict
from orbq.orbitals import MAX_Z
from orbq.preprocess.frames import find_sources, read_frames
from orbq.preprocess.neighbors import neighbor_list
from orbq.targets import TARGETS, Statistics
from orbq.train import Hyper, make_init, make_train_step

RESULTS = Path(__file__).parent / "results" / "accelerator.jsonl"
CUTOFF, TARGET, LIBRARIES = 5.0, "onsite", ("xla", "cuequivariance", "mlip")
TINY = {"n_channels": 4, "radial_hidden": (8,), "n_radial": 4}
PATIENCE = 900.0  # seconds within which all must have compiled


class Plan(NamedTuple):
    """sizes: structures of a batch. n_runs: of the ablation. n_steps: timed. changes: of WIDTH."""

    sizes: tuple[int, ...]
    n_runs: int
    n_steps: int
    changes: dict[str, Any]


FULL = Plan((16, 64, 256), 8, 10, {})
SMALL = Plan((2, 4), 2, 2, TINY)


def complexes(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(numbers, positions) of the first complexes of the embedded set, tiled to ``n``."""
    found = []
    for frame in read_frames(find_sources(["tmc"])[0]):
        found.append((frame.atoms.numbers, frame.atoms.positions))
        if len(found) == min(n, 256):
            break
    return [found[i % len(found)] for i in range(n)]


def make_batch(structures: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Batch, float]:
    """The structures with random labels, without padding; mean neighbours."""
    n = len(structures)
    lists = [neighbor_list(positions, CUTOFF) for _, positions in structures]
    n_node = np.array([len(numbers) for numbers, _ in structures])
    n_edge = np.array([len(near.senders) for near in lists])
    starts = np.cumsum([0, *n_node])[:-1]
    numbers = np.concatenate([z for z, _ in structures])
    rng = np.random.default_rng(0)
    atoms, mask = int(n_node.sum()), TARGETS[TARGET].mask(numbers, True)
    graph = jraph.GraphsTuple(
        nodes={"numbers": numbers.astype(np.int32)},
        edges={"shifts": np.zeros((int(n_edge.sum()), 3), np.float32)},
        senders=np.concatenate([x.senders + s for x, s in zip(lists, starts, strict=True)]),
        receivers=np.concatenate([x.receivers + s for x, s in zip(lists, starts, strict=True)]),
        n_node=n_node.astype(np.int32),
        n_edge=n_edge.astype(np.int32),
        globals={
            "total_charge": np.zeros(n, np.float32),
            "spin_multiplicity": np.ones(n, np.float32),
            "mask": np.ones(n, bool),
        },
    )
    targets = {
        "energy": rng.normal(size=n).astype(np.float32),
        "energy/mask": np.ones(n, bool),
        "forces": rng.normal(size=(atoms, 3)).astype(np.float32),
        "forces/mask": np.ones(atoms, bool),
        TARGET: (rng.normal(size=mask.shape) * mask).astype(np.float32),
        f"{TARGET}/mask": mask,
    }
    positions = np.concatenate([x for _, x in structures]).astype(np.float32)
    return jax.device_put(Batch(positions, graph, targets)), float(n_edge.sum() / atoms)


def seconds(run: Callable[[], Any], n: int) -> float:
    """Median wall-clock seconds of ``n`` calls, each waited for."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Model(NamedTuple):
    """What is timed: init(key, batch), step(state, batch, hyper), infer(params, batch), hyper."""

    init: Any
    step: Any
    infer: Any
    hyper: Hyper


def make_model(
    setting: str, changes: dict[str, Any], neighbors: float, head: bool, mesh: Mesh | None = None
) -> Model:
    """A setting of bench_step, with an `onsite` head or without; mesh: those sharing a step."""
    shape = (MAX_Z + 1, TARGETS[TARGET].k)
    stats = {TARGET: Statistics(np.zeros(shape), np.ones(shape))} if head else {}
    options = {**WIDTH, **SETTINGS[setting], **changes}
    options["heads"] = tuple((name, "equivariant") for name in stats)
    elements = tuple(range(1, MAX_Z + 1))
    potential = make_potential(Architecture(**options), Constants(elements, 1.0, neighbors, stats))
    terms = ("energy", "forces", *stats)
    spec = LossSpec(terms, "mse", 1.0, "atom", {"energy": 1.0, "forces": 1.0}, stats)
    weights = {"energy": 1.0, "forces": 10.0, **dict.fromkeys(stats, 1.0)}
    hyper = Hyper(weights, 1e-3, 1.0, 1e6, 1.0, 1e6, 0.99, 0.0)
    hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)

    def infer(params: Any, batch: Batch) -> Any:
        return predict(potential, params, batch.positions, batch.graph)[:2]

    return Model(make_init(potential), make_train_step(potential, spec, mesh), infer, hyper)


# ---------------------------------------------------------------------- one process


def wait_for_turn() -> None:
    """Say that everything is compiled; return when this process may use the device alone."""
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise SystemExit("no turn")


def of_size(library: str, setting: str, n: int, plan: Plan, keep: str = "") -> dict[str, Any]:
    """Training and inference on batches of ``n`` structures; keep: file for energies and forces."""
    structures = complexes(n)
    batch, neighbors = make_batch(structures)
    atoms, found = len(batch.positions), {"structures": n, "edges": len(batch.graph.senders)}
    if library == "mlip":
        from accelerator_mlip import make_program

        peer = make_program(setting, structures, CUTOFF, neighbors)
        params, infer, example = peer.state[0], jax.jit(peer.infer), peer.graph
        step, arguments = jax.jit(peer.step), (peer.state, peer.graph)
    else:
        model = make_model(setting, {**plan.changes, "kernels": library}, neighbors, head=False)
        state = jax.jit(model.init)(jax.random.key(0), batch)
        params, infer, example = state.params, jax.jit(model.infer), batch
        step, arguments = jax.jit(model.step), (state, batch, model.hyper)
    start = time.perf_counter()
    trained = step.lower(*arguments).compile()
    compiled = time.perf_counter()
    inferred = infer.lower(params, example).compile()
    both = time.perf_counter()
    count = sum(x.size for x in jax.tree.leaves(params))
    wait_for_turn()
    seconds(lambda: trained(*arguments), 2)
    train = seconds(lambda: trained(*arguments), plan.n_steps)
    seconds(lambda: inferred(params, example), 2)
    infer_s = seconds(lambda: inferred(params, example), plan.n_steps)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    cost = trained.cost_analysis() or {}
    if keep:
        energy, forces = jax.device_get(inferred(params, example))
        np.savez(keep, energy=energy, forces=forces)
    return found | {
        "atoms": atoms,
        "parameters": count,
        "train_atoms_per_s": round(atoms / train, 1),
        "infer_atoms_per_s": round(atoms / infer_s, 1),
        "train_first_call_s": round(compiled - start, 2),
        "infer_first_call_s": round(both - compiled, 2),
        "peak_memory_mb": memory and round(memory / 2**20),
        "train_gflop": round(cost.get("flops", 0) / 1e9, 2),
        "train_gbyte": round(cost.get("bytes accessed", 0) / 1e9, 3),
    }


def of_runs(library: str, setting: str, plan: Plan) -> dict[str, Any]:
    """An ablation's runs as one vmapped step, beside as many steps of one run; with a head."""
    batch, neighbors = make_batch(complexes(plan.sizes[0]))
    changes, n = {**plan.changes, "kernels": library}, plan.n_runs
    model = make_model(setting, changes, neighbors, head=True)
    init, many = over_runs(model.init, model.step)
    hyper = grid([{f"weights.{TARGET}": float(r)} for r in range(n)], model.hyper)
    states = jax.jit(init)(jax.random.split(jax.random.key(0), n), batch)
    state = jax.tree.map(lambda x: x[0], states)
    one = jax.jit(model.step).lower(state, batch, model.hyper).compile()
    many = jax.jit(many).lower(states, batch, hyper).compile()
    wait_for_turn()
    jax.block_until_ready((one(state, batch, model.hyper), many(states, batch, hyper)))
    single = seconds(lambda: one(state, batch, model.hyper), plan.n_steps)
    together = seconds(lambda: many(states, batch, hyper), plan.n_steps)
    return {
        "runs": n,
        "structures": plan.sizes[0],
        "one_run_ms": round(1e3 * single, 2),
        "vmapped_ms": round(1e3 * together, 2),
        "vmapped_over_separate": round(together / (n * single), 3),
    }


def limits() -> dict[str, float]:
    """What the device can do: bytes read and written by a copy, float32 matrix products."""
    tiny = jax.default_backend() == "cpu"
    values = jnp.ones(2**20 if tiny else 2**30, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    matrix = jax.random.normal(jax.random.key(0), (512, 512) if tiny else (8192, 8192))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    wait_for_turn()
    seconds(lambda: (copy(values), product(matrix)), 2)
    moved, multiplied = seconds(lambda: copy(values), 5), seconds(lambda: product(matrix), 5)
    return {
        "copy_gb_per_s": round(2 * values.nbytes / moved / 1e9),
        "matmul_tflop_per_s": round(2 * matrix.shape[0] ** 3 / multiplied / 1e12, 2),
    }


def measure(job: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The measurement that ``job`` names."""
    where = {"device": jax.devices()[0].device_kind}
    if job["what"] == "limits":
        return where | limits()
    if job["what"] == "runs":
        return where | of_runs(job["library"], job["setting"], plan)
    try:
        found = of_size(job["library"], job["setting"], job["n"], plan, job["keep"])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = {"structures": job["n"], "failed": "out of memory"}
    return where | found


# ---------------------------------------------------------------------- all of them


def jobs_of(settings: list[str], libraries: list[str], plan: Plan, scratch: str) -> list[dict]:
    """What is measured, in order; with the smallest batches once on the CPU."""
    jobs: list[dict[str, Any]] = [{"what": "limits"}]
    own = [x for x in libraries if x != "mlip"]
    for setting in settings:
        kinds = [(own[0], plan.sizes[0], True)]
        kinds += [(library, n, False) for library in libraries for n in plan.sizes]
        for library, n, cpu in kinds:
            keep = f"{scratch}/{setting}-{'cpu' if cpu else library}.npz"
            job = {"what": "size", "library": library, "setting": setting, "n": n, "cpu": cpu}
            jobs.append(job | {"keep": keep if n == plan.sizes[0] else ""})
        jobs += [{"what": "runs", "library": x, "setting": setting} for x in own]
    return jobs


def started(job: dict[str, Any], tiny: bool) -> subprocess.Popen[str]:
    """A process that compiles what ``job`` names and waits for its turn."""
    command = [sys.executable, __file__, "--one", json.dumps(job), *(["--tiny"] if tiny else [])]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if job.get("cpu"):
        environment["JAX_PLATFORMS"] = "cpu"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]


def read_until_ready(process: subprocess.Popen[str]) -> None:
    """Return when the process has compiled, or ended."""
    assert process.stdout
    while (line := process.stdout.readline()) and line.strip() != "ready":
        pass


def take_turns(jobs: list[dict[str, Any]], tiny: bool, at_once: int) -> Any:
    """Yield (job, what it found), in order, of processes that compile ``at_once`` at a time."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append((waiting[0], started(waiting.pop(0), tiny)))
        readers = [threading.Thread(target=read_until_ready, args=(p,)) for _, p in running]
        for reader in readers:  # all have compiled, or ended, before the first is timed
            reader.start()
        end = time.monotonic() + PATIENCE
        for reader, (_, process) in zip(readers, running, strict=True):
            reader.join(max(end - time.monotonic(), 0.0))
            if reader.is_alive():
                process.kill()
        for job, process in running:
            answer, _ = process.communicate("go\n")
            try:
                yield job, json.loads(answer.splitlines()[-1])
            except (IndexError, ValueError):
                yield job, {"failed": f"exit status {process.returncode}"}
        running.clear()


def versions() -> dict[str, str]:
    """Of the packages that matter, where they are installed."""
    found = {}
    for name in ("jax", "jaxlib", "flax", "e3nn-jax", "mlip", "cuequivariance-jax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def difference(keep: str, cpu: str) -> dict[str, float]:
    """Largest deviation of energies and forces from the CPU's, over their root mean square."""
    ours, theirs = np.load(keep), np.load(cpu)
    return {
        f"{name}_from_cpu": float(
            f"{np.abs(ours[name] - theirs[name]).max() / np.sqrt((theirs[name] ** 2).mean()):.2g}"
        )
        for name in ("energy", "forces")
    }


def main() -> None:
    """Measure, print, append line by line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=["xla"])
    parser.add_argument("--tiny", action="store_true", help="4 channels, 4 structures: a trial")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that lines are appended to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    plan = SMALL if given.tiny else FULL
    if given.one:
        print(json.dumps(measure(json.loads(given.one), plan)), flush=True)
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes need the memory
    if jax.default_backend() == "cpu" and not given.tiny:
        print("no accelerator: install orbq[cuda] or orbq[tpu], or try it with --tiny")
        return
    where = {"tiny": given.tiny, **circumstances(), "versions": versions()}
    with tempfile.TemporaryDirectory() as scratch:
        jobs = jobs_of(given.settings, given.libraries, plan, scratch)
        for job, found in take_turns(jobs, given.tiny, given.at_once):
            keep = job.pop("keep", "")
            cpu = f"{scratch}/{job.get('setting')}-cpu.npz"
            if keep and keep != cpu and job["library"] != "mlip" and "failed" not in found:
                found |= difference(keep, cpu)
            print(json.dumps(job | found), flush=True)
            with given.out.open("a") as results:
                results.write(json.dumps({**job, **found, **where}) + "\n")


if __name__ == "__main__":
    main()
