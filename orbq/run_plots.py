"""Several runs side by side: learning curves and parity plots, as pictures and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from orbq.errors import InputError
from orbq.orbitals import SYMBOLS
from orbq.plots import (
    new_figure,
    parity_panel,
    parity_range,
    parity_score,
    parity_title,
    read_metrics,
    save,
)
from orbq.run import Run
from orbq.run_files import RUN_FILE
from orbq.scores import ENERGIES, PER_STRUCTURE, Evaluation

COLUMNS = 3  # panels in a row


def runs_among(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The runs of ``paths``, as a glob may name them, and what else of it is there.

    What does not exist counts as a run, for its reader to complain about; so do all if none is one.
    """
    others = [p for p in paths if p.exists() and not (p / RUN_FILE).is_file()]
    runs = [p for p in paths if p not in others]
    return (runs, others) if runs else (list(paths), [])


# --------------------------------------------------------------------------- learning curves


def curves_csv(runs: Mapping[str, str | Path], path: str | Path) -> Path:
    """The validation errors of every run's metrics.jsonl: run, stage, step, and a column for each
    error with its unit in the name."""
    records = [(name, r) for name, place in runs.items() for r in read_metrics(place)]
    errors = dict.fromkeys(k for _, r in records for k in r if k.startswith("validation/"))
    rows = ([n, r["stage"], r["step"], *(r.get(k, "") for k in errors)] for n, r in records)
    header = [key.removeprefix("validation/") for key in errors]
    return _write(path, ["run", "stage", "step", *header], rows)


def progress_of(directory: str | Path) -> str:
    """How far a run is that has no summary.json yet, "" for a finished one."""
    from orbq.fit import SUMMARY

    if (Path(directory) / SUMMARY).is_file():
        return ""
    last = read_metrics(directory)[-1]
    return (
        f"{directory} is not finished: last validation at step {last['step']:,} ({last['stage']})"
    )


# --------------------------------------------------------------------------- parity


def own_dataset(run: Run, directory: str | Path) -> str:
    """The data set that a run was trained on. Raises InputError when it is no longer there."""
    data: Sequence[Mapping[str, Any]] = run.info.get("data") or [{}]
    path = str(data[0].get("path", ""))
    if not path or not Path(path).exists():
        raise InputError(
            f"{directory} was trained on {path or 'an unknown data set'}, which is not there: name "
            "one with --dataset, or draw learning curves alone with --no-parity"
        )
    return path


def labels_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """Labels that at least one evaluation has values of, in their order."""
    return list(dict.fromkeys(n for e in evaluations for n, v in e.values.items() if v.mask.any()))


def parity_comparison(
    evaluations: Mapping[str, Evaluation], name: str, path: str | Path | None = None
) -> Figure:
    """Predicted against true values of one label, a panel per run, all with the same axes.

    evaluations: by the runs' names; those without the label are left out. path: where to save it.
    """
    shown = {n: e for n, e in evaluations.items() if name in e.values and e.values[name].mask.any()}
    figure, axes = new_figure(len(shown), (4.2, 4.1), COLUMNS)
    limits = parity_range(list(shown.values()), name)
    for axis, (run, evaluation) in zip(axes, shown.items(), strict=True):
        parity_panel(axis, evaluation, name, limits)
        axis.set_title(f"{run}\n{parity_score(evaluation, name)}", fontsize=10)
    titles = dict.fromkeys(parity_title(evaluation, name) for evaluation in shown.values())
    figure.suptitle("; ".join(titles), fontsize=11)
    if path is not None:
        save(figure, path)
    return figure


def parity_csv(evaluations: Mapping[str, Evaluation], name: str, path: str | Path) -> Path:
    """What ``parity_comparison`` draws: one line per value, total energies in eV with their
    references, forces in eV/Å, stresses in eV/Å^3, charges in e.

    structure: place in the data set. element: of the atom, "" for energies and stresses. component:
    column of the label.
    """

    def rows() -> Iterable[list[Any]]:
        for run, e in evaluations.items():
            if name not in e.values:
                continue
            values = e.values[name]
            if name in ENERGIES:
                references, places = e.references[name], np.flatnonzero(values.mask)
                columns = (values.label, values.predicted, references)
                for i in places:
                    yield [run, e.rows[i], "", "", *(f"{column[i]:.6f}" for column in columns)]
                continue
            per_atom = name not in PER_STRUCTURE
            structure = np.repeat(e.rows, e.n_node) if per_atom else e.rows
            for i, k in np.argwhere(values.mask):
                numbers = (values.label[i, k], values.predicted[i, k])
                place = [run, structure[i], SYMBOLS[e.numbers[i]] if per_atom else "", k]
                yield [*place, *(f"{x:.6f}" for x in numbers), ""]

    header = "run structure element component label predicted reference".split()
    return _write(path, header, rows())


def _write(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
