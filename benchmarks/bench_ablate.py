"""What a grid of runs costs as one program, against the same runs one after another.

    python benchmarks/bench_ablate.py                             # 1, 4 and 8 runs, minutes
    python benchmarks/bench_ablate.py --runs 4 16 64 --channels 64   # on an accelerator

Runs differ in the weight of the on-site loss and in the seed; they train on the same batches of the
embedded complexes, energies and forces included. For every number of runs R: CPU and wall seconds
of the compilation, and of a step of the program; beside it R steps of the program of one run, which
is what separate runs cost when all of them share one compilation; and the vmapped program, which is
the same as the first on an accelerator (on one CPU, runs go one after the other within the
program). They take turns, and the median over repeats is told, so that a busy machine disturbs all
alike. Appends to
benchmarks/results/bench_ablate.jsonl. On a GPU the same command works: CPU seconds are the host's
there, and wall seconds are what counts. A program here is on one device.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orbq.ablate import grid, over_runs
from orbq.config import parse_config
from orbq.data import make_packer, prepare, to_batch
from orbq.losses import Batch
from orbq.models.potential import make_potential
from orbq.preprocess.plan import epoch_plan
from orbq.stages import make_stages
from orbq.study.run import provenance
from orbq.train import make_init, make_train_step

RESULTS = Path(__file__).resolve().parent / "results" / "bench_ablate.jsonl"
WEIGHTS = (0.0, 1.0, 3.0, 10.0)


class Seconds(NamedTuple):
    """cpu: of this process, all threads. wall: elapsed."""

    cpu: float
    wall: float


def timed(function: Callable[[], Any]) -> tuple[Any, Seconds]:
    """What a call returns, when it is ready, and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(function())
    return out, Seconds(time.process_time() - cpu, time.perf_counter() - wall)


class Program:
    """R runs as one program, compiled; ``steps`` makes some updates."""

    def __init__(self, setup: Setup, n_runs: int, over: Callable[..., Any] = over_runs) -> None:
        init, step = over(*setup.functions)
        seeds = [r // len(WEIGHTS) for r in range(n_runs)]
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        settings = [{"weights.onsite": WEIGHTS[r % len(WEIGHTS)]} for r in range(n_runs)]
        self.batches = setup.batches
        self.hyper = grid(settings, setup.hyper)
        self.state = jax.jit(init)(keys, self.batches[0])
        lowered = jax.jit(step, donate_argnums=(0,)).lower(self.state, self.batches[0], self.hyper)
        self.step, self.compilation = timed(lowered.compile)
        jax.block_until_ready(self.steps(1))  # the first call of a program is slow

    def steps(self, n: int) -> Any:
        """n updates on the batches in turn."""
        for i in range(n):
            batch = self.batches[i % len(self.batches)]
            self.state, metrics = self.step(self.state, batch, self.hyper)
        return metrics


def vectorised(init: Callable[..., Any], step: Callable[..., Any]) -> Any:
    """What ``over_runs`` is on an accelerator."""
    return jax.vmap(init, in_axes=(0, None)), jax.vmap(step, in_axes=(0, None, 0))


class Setup(NamedTuple):
    """functions: init and step of one run. batches: of the embedded complexes. hyper: of a run."""

    functions: tuple[Any, Any]
    batches: list[Batch]
    hyper: Any
    atoms: int


def make_setup(n_channels: int, n_batches: int = 16) -> Setup:
    """The network of configs/base.toml with another width."""
    document = {
        "model": {"n_channels": n_channels},
        "loss": {"weights": {"energy": 1.0, "forces": 1.0, "onsite": 1.0}},
    }
    config = parse_config(document)
    data = prepare(config)
    potential = make_potential(data.architecture, data.constants)
    stage = make_stages(config, data)[-1]
    packer = make_packer(data, stage.pool, config)
    plan = epoch_plan(stage.pool, stage.n_labelled, stage.share, data.budget, 0, 0)
    batches = [to_batch(packer.batch(items)) for items in plan[:n_batches]]
    functions = make_init(potential), make_train_step(potential, data.spec)
    return Setup(functions, batches, stage.hyper, data.budget.n_node)


def measure(
    setup: Setup, runs: Sequence[int], n_steps: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """One record per number of runs."""
    alone = Program(setup, 1)
    for n_runs in runs:
        together = alone if n_runs == 1 else Program(setup, n_runs)
        mapped = together if n_runs == 1 else Program(setup, n_runs, vectorised)
        triples = []
        for _ in range(repeats):
            one = timed(lambda: alone.steps(n_steps))[1]
            all_of = timed(lambda program=together: program.steps(n_steps))[1]
            vmapped = timed(lambda program=mapped: program.steps(n_steps))[1]
            triples.append((one, all_of, vmapped))
        record: dict[str, Any] = {"runs": n_runs}
        for kind in Seconds._fields:
            first, every, third = (
                [getattr(triple[i], kind) / n_steps for triple in triples] for i in range(3)
            )
            ratios = [b / (n_runs * a) for a, b in zip(first, every, strict=True)]
            record |= {
                f"step_{kind}_seconds": round(median(every), 5),
                f"vmapped_step_{kind}_seconds": round(median(third), 5),
                f"separate_steps_{kind}_seconds": round(n_runs * median(first), 5),
                f"ratio_{kind}": round(median(ratios), 3),
                f"ratios_{kind}": [round(r, 3) for r in ratios],
                f"compile_{kind}_seconds": round(getattr(together.compilation, kind), 2),
                f"compile_alone_{kind}_seconds": round(getattr(alone.compilation, kind), 2),
            }
        yield record


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is what is measured
    setup = make_setup(given.channels)
    facts = {
        "channels": given.channels, "atoms": setup.atoms, "steps": given.steps,
        "repeats": given.repeats, **provenance(),
    }  # fmt: skip
    print(
        "runs  CPU s a step  vmapped  the runs alone  ratio  wall ratio  compilation CPU s (alone)"
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a", encoding="utf-8") as handle:
        for r in measure(setup, given.runs, given.steps, given.repeats):
            print(
                f"{r['runs']:>4}  {r['step_cpu_seconds']:>12.4f}  "
                f"{r['vmapped_step_cpu_seconds']:>7.4f}  "
                f"{r['separate_steps_cpu_seconds']:>14.4f}  {r['ratio_cpu']:>5.2f}  "
                f"{r['ratio_wall']:>10.2f}  {r['compile_cpu_seconds']:>17.1f} "
                f"({r['compile_alone_cpu_seconds']:.1f})"
            )
            handle.write(json.dumps(r | facts) + "\n")
            handle.flush()


if __name__ == "__main__":
    main()
