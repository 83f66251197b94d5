"""Training and inference speed beside peer libraries, on one workload and one core.

    taskset -c 1 python benchmarks/bench_step.py                # ours, 4 minutes
    taskset -c 1 python benchmarks/bench_step.py --peers ENVIRONMENTS --rounds 2    # and the peers
    taskset -c 1 python benchmarks/bench_step.py --phases mace       # where a step's time goes
    taskset -c 1 python benchmarks/bench_step.py --head-share        # of a step, 2 minutes

Batches of 16 molecules (8 acetylacetone, 8 3BPA; 336 atoms, about 5,040 edges at 5 Å), float32,
loss of energies and forces, Adam; the workload and the peers' scripts are those of ../shared/peers,
whose README says how to make one environment per peer (ENVIRONMENTS holds mlip, eqx, nequip,
torch). Each measurement is a fresh process; ours and the peers' take turns. Atoms per CPU-second
from the median step. "first call" is the compilation of the training step without any cache,
"cached" a second process that finds it. The share of an `onsite` head in a training step is of the
steps with and without it in turns, in one process. Appends to results/step.jsonl, the shares to
results/head_share.jsonl, the phases of a step (phases.py) to results/phases.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT.parent / "shared" / "peers"
RESULTS = ROOT / "benchmarks" / "results" / "step.jsonl"
PHASES = RESULTS.with_name("phases.jsonl")
HEAD_SHARES = RESULTS.with_name("head_share.jsonl")
N_PAIRS = 100  # of steps with and without a head
N_ATOMS, N_EDGES, N_STRUCTURES = 384, 5248, 17  # padded sizes, as the peers' multiples of 64
SETTINGS: dict[str, dict[str, Any]] = {
    "mace": {"backbone": "mace", "n_layers": 2, "lmax": 2, "lmax_hidden": 1},
    "nequip-1": {"backbone": "nequip", "n_layers": 3, "lmax": 1},
    "nequip-2": {"backbone": "nequip", "n_layers": 3, "lmax": 2},
}
WIDTH = {"n_channels": 64, "radial_hidden": (64, 64), "species": "free"}
PEER_RUNS: dict[str, list[list[str]]] = {  # setting -> environment, script, arguments
    "mace": [
        ["mlip", "bench_mlip.py", "--model", "mace"],
        ["torch", "bench_mace_torch.py", "--model", "mace"],
    ],
    "nequip-1": [
        ["mlip", "bench_mlip.py", "--model", "nequip", "--lmax", "1"],
        ["eqx", "bench_nequip_eqx.py", "--model", "nequip", "--lmax", "1"],
        ["nequip", "bench_nequip.py", "--model", "nequip", "--lmax", "1", "--tag", "type_embed4"],
    ],
    "nequip-2": [
        ["mlip", "bench_mlip.py", "--model", "nequip", "--lmax", "2"],
        ["eqx", "bench_nequip_eqx.py", "--model", "nequip", "--lmax", "2"],
        ["nequip", "bench_nequip.py", "--model", "nequip", "--lmax", "2", "--tag", "type_embed4"],
    ],
}


def load_batches() -> tuple[list[Any], float]:
    """The workload as padded batches, and its mean number of neighbours."""
    import jraph

    from orbq.losses import Batch

    sys.path.insert(0, str(PEERS))
    import bench_common as common

    molecules = common.load_batches(4)
    out = []
    for batch in molecules:
        d = common.collate(batch)
        n, e, m = len(d["z"]), len(d["senders"]), len(batch)
        atoms, edges = N_ATOMS - n, N_EDGES - e
        order = np.argsort(d["receivers"], kind="stable")
        shifts = np.zeros((N_EDGES, 3), np.float32)
        shifts[e:] = 2 * common.CUTOFF

        def padded(x: np.ndarray, count: int, value: int = 0) -> np.ndarray:
            return np.concatenate([x, np.full((count, *x.shape[1:]), value, x.dtype)])

        graph = jraph.GraphsTuple(
            nodes={"numbers": padded(d["z"], atoms)},
            edges={"shifts": shifts},
            senders=padded(d["senders"][order], edges, n),
            receivers=padded(d["receivers"][order], edges, n),
            n_node=np.append(d["n_node"], atoms).astype(np.int32),
            n_edge=np.append(d["n_edge"], edges).astype(np.int32),
            globals={
                "total_charge": np.zeros(m + 1, np.int32),
                "spin_multiplicity": np.ones(m + 1, np.int32),
                "mask": np.append(np.ones(m, bool), False),
            },
        )
        targets = {
            "energy": padded(d["energy"], 1),
            "energy/mask": np.append(np.ones(m, bool), False),
            "forces": padded(d["forces"], atoms),
            "forces/mask": np.append(np.ones(n, bool), np.zeros(atoms, bool)),
            "onsite": np.zeros((N_ATOMS, 47), np.float32),
            "onsite/mask": np.zeros((N_ATOMS, 47), bool),
        }
        targets["onsite/mask"][:n] = True
        out.append(Batch(padded(d["pos"], atoms), graph, targets))
    return out, float(common.stats(molecules)["avg_num_neighbors"])


class Program(NamedTuple):
    """Our model of a setting, its training step, and what that is called with."""

    potential: Any
    step: Any
    state: Any
    batches: list[Any]
    hyper: Any


def make_program(setting: str, head: bool) -> Program:
    """Nothing is compiled yet but the initial parameters."""
    import jax
    import jax.numpy as jnp

    from orbq.losses import LossSpec
    from orbq.models.potential import Architecture, Constants, make_potential
    from orbq.orbitals import MAX_Z
    from orbq.targets import TARGETS, Statistics
    from orbq.train import Hyper, make_init, make_train_step

    batches, neighbors = load_batches()
    targets = ("onsite",) if head else ()
    shape = (MAX_Z + 1, TARGETS["onsite"].k)
    stats = {name: Statistics(np.zeros(shape), np.ones(shape)) for name in targets}
    architecture = Architecture(
        **WIDTH, **SETTINGS[setting], heads=tuple((name, "equivariant") for name in targets)
    )
    potential = make_potential(architecture, Constants((1, 6, 7, 8), 1.0, neighbors, stats))
    scales = {"energy": 1.0, "forces": 1.0}
    spec = LossSpec(("energy", "forces", *targets), "mse", 1.0, "atom", scales, stats)
    weights = {"energy": 1.0, "forces": 10.0} | dict.fromkeys(targets, 1.0)
    hyper = Hyper(weights, 1e-3, 1.0, 1e6, 1.0, 1e6, 0.99, 0.0)
    hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
    data = jax.device_put(batches)
    state = jax.jit(make_init(potential))(jax.random.key(0), data[0])
    return Program(potential, make_train_step(potential, spec), state, data, hyper)


def measure(setting: str, head: bool) -> dict[str, Any]:
    """Our model of a setting in this process, timed as the peers are."""
    import jax

    from orbq.models.heads import n_parameters
    from orbq.models.potential import predict

    program = make_program(setting, head)
    import bench_common as common

    potential, data, state = program.potential, program.batches, program.state
    train = jax.jit(program.step)
    infer = jax.jit(lambda p, r, g: predict(potential, p, r, g)[:2])
    kept = [state]
    losses = []

    def step(batch: Any) -> None:
        kept[0], metrics = train(kept[0], batch, program.hyper)
        losses.append(float(metrics["loss"]))

    timing = argparse.Namespace(min_steps=6, min_seconds=12.0, max_steps=60)
    trained = common.measure(step, data, timing)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    inferred = common.measure(
        lambda b: jax.block_until_ready(infer(kept[0].params, b.positions, b.graph)), data, timing
    )
    assert np.isfinite(losses).all(), "the loss is not finite"
    atoms = 336
    return {
        "peer": "orbq + head" if head else "orbq",
        "n_params": n_parameters(state.params),
        "train_atoms_per_cpu_s": round(atoms / trained["cpu_median_s"], 1),
        "infer_atoms_per_cpu_s": round(atoms / inferred["cpu_median_s"], 1),
        "train_first_call_s": round(trained["first_s"], 2),
        "infer_first_call_s": round(inferred["first_s"], 2),
        "peak_rss_mb": round(max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)),
        "versions": {p: version(p) for p in ("jax", "flax", "e3nn-jax")},
    }


def measure_head(setting: str) -> dict[str, Any]:
    """Share of an `onsite` head in a training step: CPU seconds with and without it, in turns."""
    import jax

    programs = [make_program(setting, head) for head in (False, True)]
    steps = [jax.jit(program.step) for program in programs]
    states = [program.state for program in programs]
    spent: list[list[float]] = [[], []]
    for n in range(N_PAIRS + 2):  # the first two compile, and warm up
        for i, (step, program) in enumerate(zip(steps, programs, strict=True)):
            start = time.process_time()
            states[i], metrics = step(states[i], program.batches[n % 4], program.hyper)
            jax.block_until_ready((states[i], metrics))
            spent[i].append(time.process_time() - start)
    without, having = np.array(spent)[:, 2:]
    low, share, high = np.percentile(1 - without / having, [25, 50, 75])
    return {
        "setting": setting,
        "share": round(share, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "without_ms": round(1e3 * float(np.median(without)), 1),
        "with_ms": round(1e3 * float(np.median(having)), 1),
        "pairs": N_PAIRS,
    }


def measure_phases(setting: str) -> None:
    """The share of each phase of a training step with an `onsite` head: printed, appended."""
    import jax
    from phases import durations, machine_limits, share_of_phases, show

    program = make_program(setting, head=True)
    inputs = program.state, program.batches[0], program.hyper
    start = time.process_time()
    compiled = jax.jit(program.step).lower(*inputs).compile()
    compile_cpu_s = time.process_time() - start
    jax.block_until_ready(compiled(*inputs))
    limits = machine_limits()
    rows = share_of_phases(
        compiled.as_text(), durations(lambda: compiled(*inputs), n_runs=7), limits
    )
    cost = compiled.cost_analysis()
    show(rows, limits)
    total = {"gflop": 1e-9 * cost["flops"], "gbyte": 1e-9 * cost["bytes accessed"]}
    record = {
        "setting": setting,
        "phases": rows,
        "xla": {key: round(value, 2) for key, value in total.items()},
        "limits": {key: float(f"{value:.3g}") for key, value in limits._asdict().items()},
        "compile_cpu_s": round(compile_cpu_s, 1),
        **circumstances(),
    }
    with PHASES.open("a") as results:
        results.write(json.dumps(record) + "\n")


def circumstances() -> dict[str, Any]:
    """Machine, load, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "jax": version("jax"),
        "commit": commit,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def child(command: list[str], **environment: str) -> dict[str, Any]:
    """Run one measurement in a process of its own; its last line is the result."""
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[-6:])} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(setting: str, peers: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Every library on one setting, in turns; medians over the rounds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    own = [sys.executable, __file__, "--measure", setting]
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            cache = {"JAX_COMPILATION_CACHE_DIR": f"{scratch}/{turn}"}
            cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            found = child(own, **cache)
            found["cached_first_call_s"] = child(own, **cache)["train_first_call_s"]
            runs.setdefault("orbq", []).append(found)
            runs.setdefault("orbq + head", []).append(child([*own, "--head"]))
            for place, script, *rest in PEER_RUNS[setting] if peers else []:
                python = str(Path(str(peers)) / place / "bin" / "python")
                command = [python, str(PEERS / script), *rest]
                extra = {
                    "PEER_RESULTS": f"{scratch}/peers",
                    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
                }
                found = child(command, **extra)
                runs.setdefault(str(found["peer"]), []).append(found)
    return [summary(setting, name, found) for name, found in runs.items()]


def summary(setting: str, name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what was measured of one library."""
    keys = [k for k in runs[0] if k.endswith(("_cpu_s", "call_s", "_mb")) and runs[0][k]]
    middle = {k: round(statistics.median(run[k] for run in runs), 2) for k in keys}
    return {"setting": setting, "library": name, "n_params": runs[0]["n_params"], **middle}


def show(rows: list[dict[str, Any]]) -> None:
    """One line a library, with the ratios to ours."""
    ours = rows[0]
    for r in rows:
        train, infer = (r[f"{k}_atoms_per_cpu_s"] for k in ("train", "infer"))
        print(
            f"{r['setting']:9} {r['library']:12} {r['n_params']:8,} parameters  "
            f"train {train:7.0f} (ours {ours['train_atoms_per_cpu_s'] / train:4.2f}x)  "
            f"infer {infer:7.0f} (ours {ours['infer_atoms_per_cpu_s'] / infer:4.2f}x)  "
            f"first call {r['train_first_call_s']:5.1f} s  peak {r['peak_rss_mb']:5.0f} MB"
            + (f"  cached {r['cached_first_call_s']:.1f} s" if "cached_first_call_s" in r else ""),
            flush=True,
        )


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; medians are shown")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--phases", choices=SETTINGS, help="share of each phase of a training step")
    parser.add_argument(
        "--head-share", action="store_true", help="share of a charge head in a training step"
    )
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--measure-head", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--head", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not PEERS.is_dir():
        raise SystemExit("needs the workload of ../shared/peers and ../shared/data")
    if given.measure:
        print(json.dumps(measure(given.measure, given.head)))
        return
    if given.measure_head:
        print(json.dumps(measure_head(given.measure_head)))
        return
    if given.phases:
        measure_phases(given.phases)
        return
    if given.head_share:
        for setting in given.settings:
            found = child([sys.executable, __file__, "--measure-head", setting])
            low, high = found["quartiles"]
            print(f"{setting:9} {found['share']:6.1%}  half of the pairs {low:.1%} to {high:.1%}")
            with HEAD_SHARES.open("a") as results:
                results.write(json.dumps({**found, **circumstances()}) + "\n")
        return
    for setting in given.settings:
        rows = compare(setting, given.peers, given.rounds)
        show(rows)
        where = {"rounds": given.rounds, **circumstances()}
        with RESULTS.open("a") as results:
            results.writelines(json.dumps({**row, **where}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
