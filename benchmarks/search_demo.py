"""Search the hyper-parameters of the demonstration, the energy-only baseline's first.

    python benchmarks/search_demo.py regularisation     # one stage; a line per run is appended
    python benchmarks/search_demo.py --show              # the table so far

Selection is by the validation energy error alone, on the embedded set split by complex with 30 % of
the complexes in validation (so that the choice is less noisy than with the demonstration's 10 %);
this script never evaluates the test complexes. Runs that are in the results already are skipped, so
that an interrupted search goes on. Results: benchmarks/results/search_demo.jsonl. One core each:

    OMP_NUM_THREADS=1 taskset -c 0 nice python benchmarks/search_demo.py regularisation
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from orbq import __version__
from orbq.config import load_config
from orbq.fit import fit

RESULTS = Path(__file__).parent / "results" / "search_demo.jsonl"
BASE = Path(__file__).parent / "search_demo.toml"

DECAY = "training.weight_decay={}"
ONSITE = "loss.weights.onsite={}"
STEPS = "training.n_steps=6000"
# structures without DFT, taught by their on-site charges and GFN1 energies
FURTHER = [
    "data.unlabelled=['tmc_unlabelled']",
    "training.pretrain_learning_rate=5e-3",
    ONSITE.format(1.0),
    "loss.weights.xtb_energy=1.0",
]
PRETRAIN = "training.pretrain_steps={}"
SHARE = "training.unlabelled_share=0.5"
SLOW = "training.learning_rate=2e-3"

# stage -> settings tried, each a list of overrides on search_demo.toml
STAGES: dict[str, list[list[str]]] = {
    # the energy-only baseline: learning rate, batch size and width around the first defaults
    "start": [
        [SLOW],
        ["training.learning_rate=5e-4"],
        ["training.learning_rate=1e-3"],
        ["training.learning_rate=5e-3"],
        ["training.batch_size=4", SLOW],
        ["training.batch_size=16", SLOW],
        ["model.n_channels=16", SLOW],
    ],
    # the baseline, one change at a time at the learning rate found (elements embedded freely)
    "baseline": [
        [],
        ["training.learning_rate=1e-2"],
        ["model.n_channels=64"],
        ["training.batch_size=4"],
        ["loss.weights.forces=0.3"],
        ["loss.weights.forces=3.0"],
        ["loss.energy_per=atom"],
        ["loss.kind=mae"],
    ],
    # the baseline, with elements described by their shells and radii
    "species": [
        ["model.species=shells"],
        ["model.species=free"],
        ["model.species=shells", DECAY.format(0.1)],
        ["model.species=shells", DECAY.format(1.0)],
        ["model.species=shells", "training.ema_decay=0.999"],
        ["model.species=shells", "model.lmax=1"],
    ],
    # both arms over weight decay, charge weight and length of training
    "regularisation": [
        [DECAY.format(0.05)],
        [DECAY.format(0.2)],
        [DECAY.format(0.4)],
        [DECAY.format(0.1), STEPS],
        [DECAY.format(0.2), STEPS],
        [DECAY.format(0.2), "model.n_channels=64"],
        [DECAY.format(0.1), ONSITE.format(0.3)],
        [DECAY.format(0.1), ONSITE.format(1.0)],
        [DECAY.format(0.1), ONSITE.format(3.0)],
        [DECAY.format(0.2), ONSITE.format(1.0)],
        [DECAY.format(0.4), ONSITE.format(1.0)],
        [DECAY.format(0.2), ONSITE.format(1.0), STEPS],
        [DECAY.format(0.2), "loss.weights.orbital=1.0"],
    ],
    # structures without DFT: first alone, or as half of each batch, or both
    "unlabelled": [
        [*FURTHER, DECAY.format(0.1), PRETRAIN.format(3000)],
        [*FURTHER[:-1], DECAY.format(0.1), PRETRAIN.format(3000)],
        [*FURTHER, DECAY.format(0.1), PRETRAIN.format(10000)],
        [*FURTHER[:1], *FURTHER[2:], DECAY.format(0.1), SHARE],
        [*FURTHER, DECAY.format(0.1), PRETRAIN.format(10000), SHARE],
        [*FURTHER, DECAY.format(0.2), PRETRAIN.format(3000)],
        [*FURTHER, DECAY.format(0.2), PRETRAIN.format(3000), SLOW],
        [*FURTHER, DECAY.format(0.2), PRETRAIN.format(3000), SHARE],
        [*FURTHER, DECAY.format(0.2), PRETRAIN.format(3000), SHARE, STEPS],
    ],
}


def main() -> None:
    """Run one stage of the search, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=sorted(STAGES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    if given.show or not given.stage:
        show()
        return
    for overrides in STAGES[given.stage]:
        for seed in range(given.seeds):
            if (given.stage, tuple(sorted(overrides)), seed) not in {key(r) for r in results()}:
                record(given.stage, overrides, seed)


def record(stage: str, overrides: list[str], seed: int) -> None:
    """Train one setting and append its validation errors."""
    with tempfile.TemporaryDirectory() as place:
        run = f"run.directory={place}/run"
        config = load_config(BASE, [*overrides, f"training.seed={seed}", run])
        start, cpu = time.time(), time.process_time()
        summary = fit(config)
        lines = (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()
    best = min((json.loads(line) for line in lines), key=energy_error)
    result = {
        "stage": stage,
        "overrides": sorted(overrides),
        "seed": seed,
        "best_step": best["step"],
        "validation": {k: v for k, v in best.items() if k.startswith("validation/")},
        "last_energy_mae_meV": energy_error(json.loads(lines[-1])),
        "n_parameters": summary["n_parameters"],
        "seconds": round(time.time() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "orbq": __version__,
        "commit": commit(),
        "machine": platform.machine(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as handle:
        handle.write(json.dumps(result) + "\n")
    print(f"{overrides or ['as it is']} seed {seed}: {energy_error(best):.0f} meV", flush=True)


def energy_error(line: dict) -> float:
    """Validation energy MAE of a line of metrics.jsonl, meV."""
    return line.get("validation/energy_mae_meV", float("inf"))


def commit() -> str:
    """The commit that is checked out, with + if files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    place = Path(__file__).parent
    found = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
    return found.stdout.strip()


def results() -> list[dict]:
    """What has been measured so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def key(result: dict) -> tuple:
    """What makes a run the same run."""
    return result["stage"], tuple(result["overrides"]), result["seed"]


def show() -> None:
    """Mean validation errors per setting, best first."""
    rows: dict[tuple, list[dict]] = {}
    for result in results():
        rows.setdefault((result["stage"], *result["overrides"]), []).append(result)
    means = {
        name: sum(energy_error(r["validation"]) for r in group) / len(group)
        for name, group in rows.items()
    }
    for name in sorted(means, key=means.__getitem__):
        each = [round(energy_error(r["validation"])) for r in rows[name]]
        steps = [r["best_step"] for r in rows[name]]
        print(f"{means[name]:7.0f} meV  {each}  best at {steps}  {' '.join(name)}")


if __name__ == "__main__":
    main()
