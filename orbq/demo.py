"""The main job on the embedded data: label, train three arms, compare on unseen complexes.

Every arm has the same network, the same structures with DFT energies and forces, as many of them in
each step, the same number of steps and the same seeds:

    energy-only    energies and forces
    multitask      the same, and the GFN1-xTB on-site charges of the same structures
    + unlabelled   the same and GFN1-xTB energies and forces, from the embedded network that knows
                   such labels of complexes without DFT (labels that cost milliseconds), with as
                   many of these complexes beside the others in each step
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbq.config import Config, load_config

DATASET, UNLABELLED = "tmc", "tmc_unlabelled"
BASELINE = "energy-only"

ALONE = [
    "loss.weights.xtb_energy=0.0",
    "loss.weights.xtb_forces=0.0",
    "training.initial=''",
    "training.batch_size=8",
    "training.unlabelled_share=0.0",
    "data.unlabelled=[]",
    "data.references=fit",
]
# arm -> overrides on the demonstration's configuration (orbq/data/demo.toml, the third arm)
ARMS: dict[str, list[str]] = {
    BASELINE: [*ALONE, "loss.weights.onsite=0.0"],
    "multitask": ALONE,
    "+ unlabelled": [],
}


class Job(NamedTuple):
    """One run: an arm with a seed, in ``directory``."""

    arm: str
    seed: int
    directory: Path
    overrides: tuple[str, ...]


class Result(NamedTuple):
    """Errors of one run on the held-out complexes. energy_mae: eV; force_mae: eV/Å; charge_mae: e,
    over the ten orbital charges (None without a charge head); summary: of ``fit``."""

    job: Job
    energy_mae: float
    energy_mae_per_atom: float
    force_mae: float
    charge_mae: float | None
    summary: dict[str, Any]


def demo_config() -> Path:
    """The demonstration's configuration, part of the package."""
    return Path(str(files("orbq") / "data" / "demo.toml"))


def make_jobs(out: Path, seeds: int, extra: Sequence[str], arms: Iterable[str]) -> list[Job]:
    """The runs of the demonstration, seeds outermost, so that early results compare arms."""
    data = [f"data.dataset={_toml(out / 'data' / DATASET)}"]
    teaching = [f"data.unlabelled=[{_toml(out / 'data' / UNLABELLED)}]"]
    jobs = []
    for seed in range(seeds):
        for arm in arms:
            name = arm.strip("+ ").replace(" ", "-")
            directory = out / f"{name}-seed{seed}"
            overrides = [*data, *teaching, *extra, *ARMS[arm], f"training.seed={seed}"]
            overrides += [f"run.directory={_toml(directory)}"]
            jobs.append(Job(arm, seed, directory, tuple(overrides)))
    return jobs


def _toml(path: Path) -> str:
    """A path as a TOML literal string."""
    return f"'{path}'" if "'" not in str(path) else f'"{path}"'


def config_of(job: Job) -> Config:
    """The configuration of one run."""
    return load_config(demo_config(), list(job.overrides))


# --------------------------------------------------------------------------- one run


class _Reporter:
    """Sends the steps of a run to the parent process."""

    def started(self, facts: dict[str, Any]) -> None: ...
    def validated(self, record: dict[str, Any]) -> None: ...

    def __init__(self, job: Job, messages: Any) -> None:
        self.job, self.messages = job, messages

    def warned(self, text: str) -> None: ...

    def stepped(self, stage: str, step: int, n_steps: int, loss: float, speed: Any) -> None:
        self.messages.put((self.job.arm, self.job.seed, stage, step, n_steps, loss))


_MESSAGES: Any = None


def _start_worker(cores: Any, messages: Any) -> None:
    """One core per process: on small programs XLA's threads only wait for each other."""
    global _MESSAGES
    _MESSAGES = messages
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})


def run_job(job: Job) -> Result:
    """Train one run, or finish it, and evaluate it on the test complexes."""
    from orbq.evaluate import evaluate
    from orbq.fit import fit
    from orbq.preprocess.store import Dataset
    from orbq.run import load

    config = config_of(job)
    summary = fit(config, reporter=_Reporter(job, _MESSAGES))
    run = load(job.directory)
    found = evaluate(run, Dataset.open(config.data.dataset), split="test")
    return Result(
        job=job,
        energy_mae=found.mae("energy"),
        energy_mae_per_atom=found.mae("energy_per_atom"),
        force_mae=found.mae("forces"),
        charge_mae=found.mae("orbital") if run.targets else None,
        summary=summary,
    )


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    stepped: Callable[..., None],
    finished: Callable[[Result], None],
) -> list[Result]:
    """All runs, ``workers`` at a time, each in a process of its own pinned to one core."""
    context = mp.get_context("spawn")
    manager = context.Manager()
    messages, cores = manager.Queue(), manager.Queue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for n in range(workers):
        cores.put(available[n % len(available)] if available else None)
    stop = threading.Event()
    listener = threading.Thread(target=_listen, args=(messages, stop, stepped), daemon=True)
    listener.start()
    results = []
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (cores, messages)) as pool:
            pending = [pool.submit(run_job, job) for job in jobs]
            try:
                for future in as_completed(pending):
                    results.append(future.result())
                    finished(results[-1])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        stop.set()
        listener.join(timeout=2)
        manager.shutdown()
    return results


def _listen(messages: Any, stop: threading.Event, stepped: Callable[..., None]) -> None:
    while not stop.is_set():
        try:
            stepped(*messages.get(timeout=0.2))
        except queue.Empty:
            continue
        except (EOFError, OSError):  # the manager has ended
            return


# --------------------------------------------------------------------------- what came out


class Row(NamedTuple):
    """One arm: per-seed values of every quantity, and per-seed ratios to the baseline's."""

    arm: str
    values: dict[str, list[float]]
    ratios: dict[str, list[float]]


QUANTITIES = {
    "energy_mae": ("energy", "meV", 1e3),
    "energy_mae_per_atom": ("energy", "meV/atom", 1e3),
    "force_mae": ("forces", "meV/Å", 1e3),
    "charge_mae": ("orbital charges", "e", 1.0),
}


def table(results: Sequence[Result]) -> list[Row]:
    """Arms in the order of ARMS; ratios pair the runs of one seed."""
    by_arm = {arm: sorted((r for r in results if r.job.arm == arm), key=_seed) for arm in ARMS}
    baseline = {r.job.seed: r for r in by_arm[BASELINE]}
    rows = []
    for arm, runs in by_arm.items():
        values, ratios = {}, {}
        for name, (_, _, factor) in QUANTITIES.items():
            found = [(r, getattr(r, name)) for r in runs if getattr(r, name) is not None]
            values[name] = [value * factor for _, value in found]
            if arm != BASELINE and name != "charge_mae":
                ratios[name] = [v / getattr(baseline[r.job.seed], name) for r, v in found]
        if runs:
            rows.append(Row(arm, values, ratios))
    return rows


def _seed(result: Result) -> int:
    return result.job.seed


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds (only the value when there is one seed)."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
