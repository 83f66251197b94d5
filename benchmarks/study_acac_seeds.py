"""Acetylacetone from 446 configurations with several seeds at once: minutes on a GPU.

    python benchmarks/study_acac_seeds.py --work DIRECTORY --arms energy-only onsite --seconds 240
    python benchmarks/study_acac_seeds.py --work DIRECTORY --arms gfn1-first --steps 60000

DIRECTORY holds the data sets `train` and `test`, and `xtb` for `gfn1-first`, as configs/acac.toml
and acac_gfn1.toml say how to make them. All arms and seeds train as one vmapped program
(orbq.study.program) on the same batches, the best step of each by 54 of the 500 configurations;
RMSE on the 650 test configurations. --seconds takes as many steps as a short rehearsal says will
fit. Appends to results/acac_seeds.jsonl, and leaves the run directory of every run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import orbq
from orbq import checkpoint, records
from orbq.compiled import configure_jax
from orbq.config import Config
from orbq.data import make_packer, prepare
from orbq.datasets import open_dataset
from orbq.models.potential import make_potential
from orbq.preprocess.pool import Part, Pool
from orbq.run_files import CHECKPOINTS
from orbq.study.plan import BASELINE, Program, RunSpec
from orbq.study.program import Training, Unwatched
from orbq.study.run import provenance

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "acac_seeds.jsonl"
REHEARSAL = 150  # steps
CONFIG = HERE.parent / "configs" / "acac.toml"
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "onsite": ("loss.weights.onsite=1",),
    "gfn1-first": (
        "loss.weights.onsite=1",
        "loss.weights.xtb_energy=0.01",
        "loss.weights.xtb_forces=10",
        "training.pretrain_learning_rate=5e-3",
        "training.unlabelled_share=0.3",
    ),
}


class Told(Unwatched):
    """Prints where the program is at every validation."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def stepped(self, program: Program, step: int, n_steps: int) -> None:
        if step in (25, 100) or step % 5000 == 0:
            print(f"{time.monotonic() - self.start:.1f} s: {step} of {n_steps}", flush=True)

    def validated(self, program: Program, step: int, errors: np.ndarray) -> None:
        seconds = time.monotonic() - self.start
        print(
            f"{seconds:.1f} s: step {step}, validation {errors.round(2).tolist()} meV", flush=True
        )


def configuration(given: argparse.Namespace) -> Config:
    """The arm's configuration; the first seed's."""
    work = given.work
    own = [
        f"data.dataset='{work / 'train'}'",
        f"run.directory='{work / '-'.join(given.arms)}'",
        f"training.n_steps={given.steps}",
        f"training.learning_rate={given.rate}",
        f"training.seed={given.seeds[0]}",
        *(change for arm in given.arms for change in ARMS[arm]),
        *given.override,
    ]
    if "gfn1-first" in given.arms:
        own += [f"data.unlabelled=['{work / 'xtb'}']", f"training.pretrain_steps={given.pretrain}"]
    return orbq.load_config(CONFIG, own)


def keep(training: Training, config: Config, place: Path, n: int) -> None:
    """The run directory of the n-th seed, for `orbq.load`."""
    data = training.data
    potential = make_potential(data.architecture, data.constants)
    place.mkdir(parents=True, exist_ok=True)
    facts = records.facts_of(place, data, potential, make_packer(data, data.pools["train"], config))
    records.describe(place, config, data, facts)
    params = jax.tree.map(lambda x: np.asarray(x[n]), training.selection.params)
    step, error = (x[n].item() for x in (training.selection.step, training.selection.error))
    meta = {"step": step, "criterion": error}
    checkpoint.save(place / CHECKPOINTS / checkpoint.BEST, {"params": params}, meta)


def rehearsed(make: Any, seconds: float) -> tuple[int, Training]:
    """How many steps fit, and a program whose functions are compiled. make(n_steps): a program."""
    first, second = make(REHEARSAL), make(4 * REHEARSAL)
    first.run()
    share(first, second)
    start = time.monotonic()
    second.run()
    return int(seconds / (time.monotonic() - start) * 4 * REHEARSAL), second


def share(compiled: Training, other: Training) -> None:
    """Give another number of steps what has been compiled."""
    for name in ("init", "steps", "evaluate", "keep_best"):
        setattr(other, name, getattr(compiled, name))


def main() -> None:
    """Train the arms' seeds; append a record of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="directory of data and runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, required=True, help="gfn1-first: alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=60000)
    parser.add_argument("--seconds", type=float, default=0.0, help="instead of --steps")
    parser.add_argument("--pretrain", type=int, default=20000, help="steps on GFN1 labels alone")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that lines are appended to")
    parser.add_argument("override", nargs="*", help="changes of configs/acac.toml: model.lmax=3")
    given = parser.parse_args()
    if "gfn1-first" in given.arms and (given.seconds or len(given.arms) > 1):
        parser.error("gfn1-first goes alone, and by --steps: its first stage has steps of its own")
    config = configuration(given)
    configure_jax(config)
    data = prepare(config)
    test = open_dataset(str(given.work / "test"))
    data.pools["test"] = Pool([Part(test, None)], config.model.cutoff)
    directory, target = Path(config.run.directory), "" if given.arms == [BASELINE] else "onsite"

    def make(n_steps: int, checkpoints: Path | None = None) -> Training:
        runs = tuple(
            RunSpec(arm, float(arm != BASELINE), given.rate, seed, 0, 0, n_steps)
            for arm in given.arms
            for seed in given.seeds
        )
        training = config.training.model_copy(update={"n_steps": n_steps})
        program = Program("acac", target, config.model_copy(update={"training": training}), runs)
        return Training(program, checkpoints, Told(), data)

    steps, compiled = rehearsed(make, given.seconds) if given.seconds else (given.steps, None)
    training = make(steps, directory / "program")
    if compiled:
        share(compiled, training)
    config = training.program.config
    where = {"overrides": given.override, "pretrain": config.training.pretrain_steps}
    for n, record in enumerate(training.run()):
        keep(training, config, directory / f"{record['arm']}-{record['seed']}", n)
        kept = ("arm", "seed", "steps", "best_step", "validation", "test", "program_seconds")
        line = {"rate": given.rate, "energy_weight": config.loss.weights.energy}
        line |= {**where, **{k: record[k] for k in kept}}
        found = [record["test"][k] for k in ("energy_rmse_meV", "forces_rmse_meV_per_A")]
        print(record["arm"], record["seed"], *found, flush=True)
        with given.out.open("a") as results:
            results.write(json.dumps(line | {"provenance": provenance()}) + "\n")


if __name__ == "__main__":
    main()
