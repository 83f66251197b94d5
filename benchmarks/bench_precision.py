"""What lower precision costs in errors: bfloat16 activations, and matrix products in fewer bits.

    python benchmarks/bench_precision.py                # 4 arms x 2 seeds, minutes on two cores
    python benchmarks/bench_precision.py --show         # the table of what is recorded

Energies, forces and on-site charges of the embedded complexes (400 in training, split "within"),
1,500 steps of a network of 16 channels; the arms share seeds, batches and initial parameters.

    float32         the default
    bfloat16        training.activations = "bfloat16"
    tf32-products   float32 with what training.matmul_precision = "default" or "high" does on an
                    NVIDIA GPU: factors of matrix products rounded to 10 bits
    bf16-products   the same with what "default" does on a TPU: 7 bits

A CPU computes float32 products in float32 whatever matmul_precision says; the last two arms round
the factors of every product, forward and backward, where the program is lowered, as the
accelerators do before they multiply. "validation": errors while training so. "rounding": change of
the predictions of the float32 network when it is evaluated so, root mean square over the test
structures. Appends to results/precision.jsonl; a run that is finished in --scratch is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from orbq import checkpoint
from orbq.compiled import configure_jax
from orbq.config import Config, parse_config
from orbq.data import make_packer, prepare, to_batch
from orbq.fit import fit
from orbq.models.potential import make_potential, predict
from orbq.run_files import CHECKPOINTS, METRICS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "precision.jsonl"
ARMS = {"float32": None, "bfloat16": None, "tf32-products": 10, "bf16-products": 7}  # bits kept
N_STEPS, N_TRAIN = 1500, 400
SHOWN = ("energy_mae_meV", "forces_mae_meV_per_A", "onsite_mae_e")


def config_of(arm: str, seed: int, scratch: Path) -> Config:
    """The configuration of an arm."""
    return parse_config(
        {
            "data": {"dataset": "tmc", "split": "within", "n_train": N_TRAIN},
            "model": {"n_channels": 16},
            "loss": {"weights": {"onsite": 1.0}},
            "training": {
                "seed": seed,
                "n_steps": N_STEPS,
                "learning_rate": 5e-3,
                "validate_every": N_STEPS // 5,
                "checkpoint_every": N_STEPS,
                "activations": "bfloat16" if arm == "bfloat16" else "full",
                "matmul_precision": "default" if ARMS[arm] else "highest",
                "compilation_cache": ARMS[arm] is None,
            },
            "run": {"directory": str(scratch / f"{arm}-{seed}")},
        }
    )


def round_factors(bits: int) -> None:
    """Round both factors of every matrix product of this process that asks for no precision."""
    product = jax.lax.dot_general_p
    # there is no public way to the lowering that is there
    from jax._src.interpreters.mlir import _platform_specific_lowerings

    lower = _platform_specific_lowerings["cpu"][product].rule

    def rounded(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        asked = params["precision"]
        if asked is not None and jax.lax.Precision.HIGHEST in asked:
            return lower(ctx, lhs, rhs, **params)
        i32 = ir.IntegerType.get_signless(32)
        exponent, mantissa = (ir.IntegerAttr.get(i32, n) for n in (8, bits))
        factors = (stablehlo.reduce_precision(x, exponent, mantissa) for x in (lhs, rhs))
        return lower(ctx, *factors, **params)

    mlir.register_lowering(product, rounded, platform="cpu")


def measure(arm: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Errors of a network trained in an arm, and what the arm does to the float32 one."""
    if bits := ARMS[arm]:
        round_factors(bits)
    config = config_of(arm, seed, scratch)
    configure_jax(config)
    data = prepare(config)
    potential = make_potential(data.architecture, data.constants)
    packer = make_packer(data, data.pools["test"], config)
    template = jax.eval_shape(potential.init, jax.random.key(0), *to_batch(packer.batch([0]))[:2])

    def best(of: str) -> Any:
        where = Path(config_of(of, seed, scratch).run.directory) / CHECKPOINTS / checkpoint.BEST
        return checkpoint.restore(where, {"params": template})[0]["params"]

    start = time.process_time()
    fit(config)
    trained = time.process_time() - start

    @jax.jit
    def predicted(params: Any, positions: Any, graph: Any) -> Any:
        out = predict(potential, params, positions, graph)
        return out.energy, out.forces

    kept = scratch / f"float32-{seed}.npz"
    found: dict[str, list[np.ndarray]] = {"energy": [], "forces": []}
    for items in packer.plan(0):
        packed = packer.batch(items)
        energy, forces = predicted(best("float32"), *to_batch(packed)[:2])
        found["energy"].append(np.asarray(energy)[packed.mask])
        found["forces"].append(np.asarray(forces)[packed.numbers > 0].ravel())
    now = {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}
    if arm == "float32":
        np.savez(kept, **now)
    with np.load(kept) as before:
        change = {n: float(np.sqrt(np.mean((now[n] - before[n]) ** 2))) for n in now}
    return {
        "arm": arm,
        "seed": seed,
        "n_validation": len(data.pools["validation"]),
        "validation": curve(Path(config.run.directory)),
        "rounding": {
            "energy_meV": round(1e3 * change["energy"], 4),
            "forces_meV_per_A": round(1e3 * change["forces"], 4),
        },
        "cpu_seconds": round(trained, 1),
    }


def curve(run: Path) -> list[dict[str, float]]:
    """Errors at each validation of a run."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    names = {"step": "step", **{name: f"validation/{name}" for name in SHOWN}}
    return [{k: round(row[n], 5) for k, n in names.items()} for row in map(json.loads, lines)]


def show() -> None:
    """One line per arm: errors at the end, means over seeds; ratio to float32 of the same seeds."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    latest = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({seed for _, seed in latest})
    print(f"{'arm':<15}" + "".join(f"{name:>30}" for name in SHOWN) + "   rounding meV, meV/Å")
    for arm in ARMS:
        own = [latest[arm, seed] for seed in seeds if (arm, seed) in latest]
        if not own:
            continue
        cells = []
        for name in SHOWN:
            values = np.array([row["validation"][-1][name] for row in own])
            base = [latest["float32", row["seed"]]["validation"][-1][name] for row in own]
            ratio, n = values / base, len(own)
            error = ratio.std(ddof=n > 1) / n**0.5
            cells.append(f"{values.mean():.4g} ({ratio.mean():.3f} ± {error:.3f})")
        changes = [list(row["rounding"].values()) for row in own if row["rounding"]]
        rounding = ", ".join(f"{x:.3g}" for x in np.mean(changes, 0)) if changes else "-"
        print(f"{arm:<15}" + "".join(f"{cell:>30}" for cell in cells) + f"   {rounding}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, default=Path("runs/precision"), help="for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--show", action="store_true", help="only show what is recorded")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # in a process of its own
    given = parser.parse_args()
    if given.measure:
        arm, seed = given.measure
        print(json.dumps(measure(arm, int(seed), given.scratch)))
        return
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    where = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": version("jax"),
        "commit": commit,
    }
    for seed in given.seeds if not given.show else []:
        for arm in given.arms:
            command = [sys.executable, __file__, "--scratch", str(given.scratch)]
            done = subprocess.run(
                [*command, "--measure", arm, str(seed)], check=True, capture_output=True, text=True
            )
            with RESULTS.open("a") as results:
                results.write(json.dumps({**json.loads(done.stdout), **where}) + "\n")
    show()


if __name__ == "__main__":
    main()
