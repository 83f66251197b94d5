"""From the records of an ablation to numbers: a table of runs and what the charges brought."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbq.equivalence import Arm, Estimate, choose, data_equivalence, factor_text, reduction
from orbq.preprocess.store import write_atomically
from orbq.study.plan import BASELINE
from orbq.study.program import CRITERION

CSV = "results.csv"
_COLUMNS = (
    "arm weight learning_rate seed subset_seed n_train best_step steps diverged program "
    "program_seconds program_cpu_seconds program_runs"
).split()


class Row(NamedTuple):
    """One arm at one train size. weight, learning_rate: of the lowest mean validation error.
    errors: test energy MAE of its replicates, meV. factor: None where the baseline is lacking."""

    arm: str
    n_train: int
    weight: float
    learning_rate: float
    errors: np.ndarray
    reduction: Estimate | None
    factor: Estimate | None


def rows_of(records: Sequence[dict[str, Any]]) -> list[Row]:
    """What each arm reached at each size, beside the energy-only runs of the same seeds."""
    sizes = sorted({record["n_train"] for record in records})
    arms = dict.fromkeys(record["arm"] for record in records)
    tables = {(a, n): _table(records, a, n) for a in arms for n in sizes}
    rows = []
    for arm in arms:
        own = [n for n in sizes if tables[arm, n] and tables.get((BASELINE, n))]
        pairs = [(tables[BASELINE, n][1], tables[arm, n][1]) for n in own]
        same = all(a.test.shape[1] == b.test.shape[1] for a, b in pairs)
        compared = arm != BASELINE and bool(pairs) and same
        base, arms_errors = [a for a, _ in pairs], [b for _, b in pairs]
        factors = data_equivalence(own, base, arms_errors) if compared else []
        for n in (n for n in sizes if tables[arm, n]):
            options, errors = tables[arm, n]
            best = choose(errors)
            gain = reduction(tables[BASELINE, n][1], errors) if compared and n in own else None
            factor = factors[own.index(n)] if compared and n in own else None
            weight, rate = options[best]
            rows.append(Row(arm, n, weight, rate, errors.test[best], gain, factor))
    return rows


def _table(records: Sequence[dict[str, Any]], arm: str, n_train: int) -> Any:
    """Options (weight, learning rate) of an arm, and their errors by option and replicate; None if
    there are none. A run that diverged, or has no record yet, counts as infinite."""
    own = [r for r in records if r["arm"] == arm and r["n_train"] == n_train]
    if not own:
        return None
    options = sorted({(r["weight"], r["learning_rate"]) for r in own})
    replicates = sorted({(r["seed"], r["subset_seed"]) for r in own})
    shape = (len(options), len(replicates))
    errors = Arm(np.full(shape, np.inf), np.full(shape, np.inf))
    for record in own:
        place = (
            options.index((record["weight"], record["learning_rate"])),
            replicates.index((record["seed"], record["subset_seed"])),
        )
        if not record["diverged"]:
            errors.validation[place] = record["validation"][CRITERION]
            errors.test[place] = record["test"][CRITERION]
    return options, errors


def write_report(directory: Path, records: Sequence[dict[str, Any]]) -> str:
    """Write ``results.csv``; the summary as text."""
    write_atomically(directory / CSV, table_of_runs(records))
    seconds, cpu, steps = spent(records)
    lines = [f"{'arm':<24} {'N':>6} {'weight':>7}  test energy MAE, meV   reduction   data factor"]
    for row in rows_of(records):
        deviation = f" ± {row.errors.std(ddof=1):.1f}" if len(row.errors) > 1 else ""
        gain = f"{row.reduction.value:+.0%}" if row.reduction else "-"
        factor = factor_text(row.factor) if row.factor else "-"
        error = f"{row.errors.mean():.1f}{deviation}"
        lines.append(
            f"{row.arm:<24} {row.n_train:>6} {row.weight:>7g}  {error:<22} {gain:<11} {factor}"
        )
    lines.append(f"{len(records)} runs, {steps:,} steps: {seconds:.0f} s, {cpu:.0f} CPU s")
    return "\n".join([*lines, f"wrote {directory / CSV}"])


def table_of_runs(records: Sequence[dict[str, Any]]) -> str:
    """One line per run, with all its validation and test errors, as CSV."""
    errors = {
        f"{part}/{n}": None for r in records for part in ("validation", "test") for n in r[part]
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_COLUMNS, *errors])
    for r in records:
        found = [r[part].get(n, "") for part, n in (key.split("/", 1) for key in errors)]
        writer.writerow([*(r[name] for name in _COLUMNS), *found])
    return out.getvalue()


def spent(records: Sequence[dict[str, Any]]) -> tuple[float, float, int]:
    """Wall and CPU seconds of all programs, compilation included, and steps of all runs."""
    each = [(r["program_seconds"], r["program_cpu_seconds"], r["program_runs"]) for r in records]
    seconds, cpu = (sum(e[i] / e[2] for e in each) for i in (0, 1))
    return seconds, cpu, sum(r["steps"] for r in records)
