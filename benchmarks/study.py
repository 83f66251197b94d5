"""What the studies share: named ablations over one configuration, run in parts, then reported.

A study is a table: name -> overrides of the configuration. Each name is an ablation of its own in
``WORK/STUDY/NAME``, which goes on where it was stopped; two processes may share a study by --part.
Words in overrides ("@data") stand for paths. Studies of single runs share ``trained`` and
``record``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from orbq.config import Config, load_config
from orbq.fit import fit
from orbq.preprocess.store import Dataset, write_atomically
from orbq.run import Run, load
from orbq.study.report import rows_of, write_report
from orbq.study.run import provenance, read_results, run_ablation

HERE = Path(__file__).parent
Studies = Mapping[str, Mapping[str, tuple[str, ...]]]


def main(
    description: str,
    studies: Studies,
    base: Path,
    prefix: str,
    unit: tuple[str, float],
    prepare: Callable[[Path, str], Mapping[str, str]],
) -> None:
    """Train what is left of a study, or report it.

    base: the configuration. prefix: of the results' file. unit: name and meV of the printed errors.
    prepare: makes the data of a study in a directory and returns what words of the overrides stand
    for, and "@data", the data set.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("study", choices=studies)
    parser.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--work", type=Path, required=True, help="directory of data and runs")
    parser.add_argument("--only", nargs="+", help="names within the study")
    parser.add_argument("--part", default="0/1", help="i/n: the i-th of every n ablations")
    given = parser.parse_args()
    trials = studies[given.study]
    names = given.only or list(trials)
    # a report needs no data: nothing is made for it
    words = {} if given.action == "report" else prepare(given.work / "data", given.study)

    def config_of(name: str) -> Config:
        place = given.work / given.study / name
        overrides = [f"run.directory='{place}'", "data.dataset='@data'", *trials[name]]
        return load_config(base, filled(overrides, words))

    if given.action == "report":
        kept = report({name: config_of(name) for name in names}, unit)
        out = HERE / "results" / f"{prefix}_{given.study}.jsonl"
        kept = _beside(out, trials, kept)
        out.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        return
    part, parts = map(int, given.part.split("/"))
    for name in names[part::parts]:
        config = config_of(name)
        records = run_ablation(config)
        print(name)
        print(write_report(Path(config.run.directory), records), flush=True)


def _beside(path: Path, trials: Iterable[str], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that were found, and of the other ablations of the study those in the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    before, own = [json.loads(line) for line in lines], {r["ablation"] for r in found}
    order = list(trials)
    kept = [r for r in before if r["ablation"] in order and r["ablation"] not in own]
    return sorted([*kept, *found], key=lambda r: order.index(r["ablation"]))


def filled(overrides: Iterable[str], words: Mapping[str, str]) -> list[str]:
    """The overrides with what their words stand for."""
    found = list(overrides)
    for word in sorted(words, key=len, reverse=True):  # "@hot0" before "@hot"
        found = [override.replace(word, words[word]) for override in found]
    return found


def make_delta(source: Path, place: Path) -> None:
    """A data set whose energies and forces are the differences between the reference's and GFN1's,
    made once."""
    if (place / "manifest.json").exists():
        return
    dataset = Dataset.open(source)
    shutil.copytree(source, place)
    for label in ("energy", "forces"):
        if np.asarray(dataset[f"{label}_mask"]).any():
            difference = np.asarray(dataset[label]) - np.asarray(dataset[f"xtb_{label}"])
            np.save(place / f"{label}.npy", difference)


def trained(base: Path, overrides: Iterable[str], words: Mapping[str, str], place: Path) -> Run:
    """The run of a configuration in a directory; goes on where it was stopped."""
    fit(load_config(base, filled([*overrides, f"run.directory='{place}'"], words)))
    return load(place)


def record(path: Path, what: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Print a measurement, and keep it with versions, commit and machine in a file of such lines,
    in place of an earlier one of the same ``what``. Processes take turns."""
    facts = {**what, **found}
    print(json.dumps(facts), flush=True)
    own = json.dumps(facts | {"provenance": provenance()})
    with _turn(path.parent):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if not what.items() <= json.loads(line).items()]
        write_atomically(path, "".join(f"{line}\n" for line in [*kept, own]))


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Alone among the processes that write to a directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def report(configs: Mapping[str, Config], unit: tuple[str, float]) -> list[dict[str, Any]]:
    """Print what each ablation reached; its records, less their curves."""
    kept: list[dict[str, Any]] = []
    name_of_unit, size = unit
    print(
        f"{'ablation':<14} {'arm':<28} {'N':>5} {'weight':>6} {'rate':>6}  test MAE, {name_of_unit}"
    )
    for name, config in configs.items():
        records = read_results(Path(config.run.directory))
        kept += [{"ablation": name} | {k: v for k, v in r.items() if k != "curve"} for r in records]
        for row in rows_of(records):
            errors = row.errors / size
            each = " ".join(f"{e:.2f}" for e in errors)
            gain = f"{-row.reduction.value:+.1%}" if row.reduction else ""
            print(
                f"{name:<14} {row.arm:<28} {row.n_train:>5} {row.weight:>6g} "
                f"{row.learning_rate:>6g}  {errors.mean():.3f} ({each}) {gain}"
            )
    return kept
