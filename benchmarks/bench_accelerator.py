"""Training and inference on a GPU (or TPU) against the batch size; the cost of many runs at once.

    python benchmarks/bench_accelerator.py                  # all three settings, some 10 minutes
    python benchmarks/bench_accelerator.py --tiny           # on a CPU, to see that it works

For each of bench_step.py's settings (MACE-like, NequIP-like l = 1 and l = 2, 64 channels; with an
`onsite` head) and batches of 16 to 1,024 embedded transition-metal complexes, tiled: seconds of the
first call, real atoms per second in training and in inference of energies and forces, and the
device's peak memory; a batch that does not fit ends its series and is recorded as such. Then eight
runs of an ablation as one vmapped step beside eight steps of one run. Wall-clock times, medians of
several steps after a warm-up; random labels. Appends to results/accelerator.jsonl with device,
versions and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from bench_step import SETTINGS, WIDTH, circumstances

from orbq.ablate import grid, over_runs
from orbq.losses import Batch, LossSpec
from orbq.models.potential import Architecture, Constants, make_potential, predict
from orbq.orbitals import MAX_Z
from orbq.preprocess.frames import find_sources, read_frames
from orbq.preprocess.neighbors import neighbor_list
from orbq.targets import TARGETS, Statistics
from orbq.train import Hyper, make_init, make_train_step

RESULTS = Path(__file__).parent / "results" / "accelerator.jsonl"
CUTOFF, TARGET = 5.0, "onsite"
TINY = {"n_channels": 4, "radial_hidden": (8,), "n_radial": 4}


class Plan(NamedTuple):
    """sizes: structures of a batch. n_runs: of the ablation. n_steps: timed. changes: of WIDTH."""

    sizes: tuple[int, ...]
    n_runs: int
    n_steps: int
    changes: dict[str, Any]


FULL = Plan((16, 64, 256, 1024), 8, 10, {})
SMALL = Plan((2, 4), 2, 2, TINY)


def complexes(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(numbers, positions) of the first complexes of the embedded set, tiled to ``n``."""
    found = []
    for frame in read_frames(find_sources(["tmc"])[0]):
        found.append((frame.atoms.numbers, frame.atoms.positions))
        if len(found) == min(n, 256):
            break
    return [found[i % len(found)] for i in range(n)]


def make_batch(n: int) -> tuple[Batch, float]:
    """``n`` complexes with random labels, no padding but one empty structure; mean neighbours."""
    structures = complexes(n)
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


def make_model(setting: str, changes: dict[str, Any], neighbors: float) -> Model:
    """A setting of bench_step with an `onsite` head."""
    shape = (MAX_Z + 1, TARGETS[TARGET].k)
    stats = {TARGET: Statistics(np.zeros(shape), np.ones(shape))}
    options = {**WIDTH, **SETTINGS[setting], **changes, "heads": ((TARGET, "equivariant"),)}
    elements = tuple(range(1, MAX_Z + 1))
    potential = make_potential(Architecture(**options), Constants(elements, 1.0, neighbors, stats))
    terms = ("energy", "forces", TARGET)
    spec = LossSpec(terms, "mse", 1.0, "atom", {"energy": 1.0, "forces": 1.0}, stats)
    weights = {"energy": 1.0, "forces": 10.0, TARGET: 1.0}
    hyper = Hyper(weights, 1e-3, 1.0, 1e6, 1.0, 1e6, 0.99, 0.0)
    hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)

    def infer(params: Any, batch: Batch) -> Any:
        return predict(potential, params, batch.positions, batch.graph)[:2]

    return Model(make_init(potential), make_train_step(potential, spec), infer, hyper)


def of_size(setting: str, n: int, plan: Plan) -> dict[str, Any]:
    """Training and inference on batches of ``n`` structures."""
    batch, neighbors = make_batch(n)
    model, atoms = make_model(setting, plan.changes, neighbors), len(batch.positions)
    state = jax.jit(model.init)(jax.random.key(0), batch)
    step, infer = jax.jit(model.step), jax.jit(model.infer)
    first = seconds(lambda: step(state, batch, model.hyper), 1)
    trained = seconds(lambda: step(state, batch, model.hyper), plan.n_steps)
    infer_first = seconds(lambda: infer(state.params, batch), 1)
    inferred = seconds(lambda: infer(state.params, batch), plan.n_steps)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "structures": n,
        "atoms": atoms,
        "edges": len(batch.graph.senders),
        "train_atoms_per_s": round(atoms / trained, 1),
        "infer_atoms_per_s": round(atoms / inferred, 1),
        "train_first_call_s": round(first, 2),
        "infer_first_call_s": round(infer_first, 2),
        "peak_memory_mb": memory and round(memory / 2**20),
    }


def of_runs(setting: str, plan: Plan) -> dict[str, Any]:
    """An ablation's runs as one vmapped step, beside as many steps of one run."""
    batch, neighbors = make_batch(plan.sizes[0])
    model, n = make_model(setting, plan.changes, neighbors), plan.n_runs
    init, many = over_runs(model.init, model.step)
    hyper = grid([{f"weights.{TARGET}": float(r)} for r in range(n)], model.hyper)
    states = jax.jit(init)(jax.random.split(jax.random.key(0), n), batch)
    state = jax.tree.map(lambda x: x[0], states)
    one, many = jax.jit(model.step), jax.jit(many)
    jax.block_until_ready((one(state, batch, model.hyper), many(states, batch, hyper)))
    single = seconds(lambda: one(state, batch, model.hyper), plan.n_steps)
    together = seconds(lambda: many(states, batch, hyper), plan.n_steps)
    return {
        "runs": n,
        "one_run_ms": round(1e3 * single, 2),
        "vmapped_ms": round(1e3 * together, 2),
        "vmapped_over_separate": round(together / (n * single), 3),
    }


def main() -> None:
    """Measure, print, append line by line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--tiny", action="store_true", help="4 channels, 4 structures: a trial")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that lines are appended to")
    given = parser.parse_args()
    plan = SMALL if given.tiny else FULL
    if jax.default_backend() == "cpu" and not given.tiny:
        raise SystemExit("no accelerator: install orbq[cuda] or orbq[tpu], or try it with --tiny")
    where = {"device": jax.devices()[0].device_kind, "tiny": given.tiny, **circumstances()}
    where |= {"versions": {p: version(p) for p in ("jax", "jaxlib", "flax", "e3nn-jax")}}

    def record(found: dict[str, Any]) -> None:
        print(json.dumps(found), flush=True)
        with given.out.open("a") as results:
            results.write(json.dumps({**found, **where}) + "\n")

    for setting in given.settings:
        for n in plan.sizes:
            try:
                record({"setting": setting, **of_size(setting, n, plan)})
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                record({"setting": setting, "structures": n, "failed": "out of memory"})
                break
        record({"setting": setting, **of_runs(setting, plan)})


if __name__ == "__main__":
    main()
