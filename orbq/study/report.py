"""From the records of an ablation to numbers: a table of runs and what the charges brought."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbq.config import Config, config_from_json
from orbq.equivalence import Arm, Estimate, choose, data_equivalence, factor_text, reduction
from orbq.errors import InputError
from orbq.preprocess.links import refuse_links
from orbq.preprocess.store import write_atomically
from orbq.study.plan import BASELINE
from orbq.study.program import CRITERION
from orbq.targets import MAIN_TERMS

DESCRIPTION = "ablation.json"
CSV, SUMMARY_CSV, PAGE = "results.csv", "summary.csv", "report.html"
_COLUMNS = (
    "arm weight learning_rate seed subset_seed n_train best_step steps diverged program "
    "program_seconds program_cpu_seconds program_runs"
).split()


class Row(NamedTuple):
    """One arm at one train size. weight, learning_rate: of the lowest mean validation error.
    errors: test energy MAE of its replicates, meV. reduction: None where the baseline is
    lacking; factor: also where its curve has a single size."""

    arm: str
    n_train: int
    weight: float
    learning_rate: float
    errors: np.ndarray
    reduction: Estimate | None
    factor: Estimate | None


class Option(NamedTuple):
    """The finished runs of one arm, train size, weight and learning rate.

    validation, test: energy MAE in meV by replicate (seed, subset_seed), of those that did not
    diverge. n_diverged: the others.
    """

    arm: str
    n_train: int
    weight: float
    learning_rate: float
    validation: dict[tuple[int, int], float]
    test: dict[tuple[int, int], float]
    n_diverged: int


class Sharpness(NamedTuple):
    """How much the choice of a weight matters, by validation errors.

    weight: the best. low, high: the weights next to it, and next to those, whose mean error is less
    than one standard error (of the difference, over replicates) above the best; NaN of a single
    replicate. rise: relative error, beyond the best, of the worse neighbour of the best weight; NaN
    without one. at_edge: which end of the weights the best one is at: "lowest", "highest" or "".
    """

    weight: float
    low: float
    high: float
    rise: float
    at_edge: str


class Result(NamedTuple):
    """What a report is made of. config: None where it is not known."""

    name: str
    rows: Sequence[Row]
    options: Sequence[Option]
    records: Sequence[dict[str, Any]]
    config: Config | None


def recorded_config(directory: Path) -> Config | None:
    """The configuration of the ablation in a directory; None where it is not there or too old to be
    understood."""
    try:
        text = (directory / DESCRIPTION).read_text(encoding="utf-8")
        return config_from_json(json.dumps(json.loads(text)["config"]), str(directory))
    except (OSError, ValueError, KeyError, InputError):
        return None


def rows_of(records: Sequence[dict[str, Any]]) -> list[Row]:
    """What each arm reached at each size, beside the energy-only runs of the same seeds."""
    sizes = sorted({record["n_train"] for record in records})
    arms = dict.fromkeys(record["arm"] for record in records)
    found = {(a, n): _table(records, a, n) for a in arms for n in sizes}
    tables = {place: table for place, table in found.items() if table.replicates}
    rows = []
    for arm in arms:
        compared: dict[int, tuple[Arm, Arm]] = {}  # by size, the baseline beside the arm
        for n in sizes if arm != BASELINE else ():
            base, own = tables.get((BASELINE, n)), tables.get((arm, n))
            if base and own and _comparable(base, own):
                compared[n] = base.errors, own.errors
        sides = list(zip(*compared.values(), strict=True))
        factors = data_equivalence(list(compared), *sides) if len(compared) > 1 else []
        factor_at = dict(zip(compared, factors, strict=False))
        for n in (n for n in sizes if (arm, n) in tables):
            table = tables[arm, n]
            best = choose(table.errors)
            gain = reduction(*compared[n]) if n in compared else None
            rows.append(
                Row(arm, n, *table.options[best], table.errors.test[best], gain, factor_at.get(n))
            )
    return rows


class _Table(NamedTuple):
    """Options (weight, learning rate) of an arm, its replicates (seed, subset seed), and their
    errors."""

    options: list[tuple[float, float]]
    replicates: list[tuple[int, int]]
    errors: Arm


def _comparable(first: _Table, second: _Table) -> bool:
    """Whether both are of the same replicates, and the options chosen did not diverge."""
    if first.replicates != second.replicates:
        return False
    return all(np.isfinite(t.errors.test[choose(t.errors)]).all() for t in (first, second))


def _table(records: Sequence[dict[str, Any]], arm: str, n_train: int) -> _Table:
    """The errors of an arm at a size. A run that diverged, or has no record yet, counts as
    infinite."""
    own = [r for r in records if r["arm"] == arm and r["n_train"] == n_train]
    options = sorted({(r["weight"], r["learning_rate"]) for r in own})
    replicates = sorted({_replicate(r) for r in own})
    shape = (len(options), len(replicates))
    errors = Arm(np.full(shape, np.inf), np.full(shape, np.inf))
    for record in own:
        place = (
            options.index((record["weight"], record["learning_rate"])),
            replicates.index(_replicate(record)),
        )
        if not record["diverged"]:
            errors.validation[place] = record["validation"][CRITERION]
            errors.test[place] = record["test"][CRITERION]
    return _Table(options, replicates, errors)


def _replicate(record: dict[str, Any]) -> tuple[int, int]:
    return int(record["seed"]), int(record["subset_seed"])


def options_of(records: Sequence[dict[str, Any]]) -> list[Option]:
    """The finished runs, gathered over replicates; by arm, size, weight and learning rate."""
    found: dict[tuple[Any, ...], Option] = {}
    arms = list(dict.fromkeys(record["arm"] for record in records))
    for r in records:
        key = (r["arm"], r["n_train"], r["weight"], r["learning_rate"])
        option = found.setdefault(key, Option(*key, {}, {}, 0))
        if r["diverged"]:
            found[key] = option._replace(n_diverged=option.n_diverged + 1)
        else:
            option.validation[_replicate(r)] = r["validation"][CRITERION]
            option.test[_replicate(r)] = r["test"][CRITERION]
    return [found[k] for k in sorted(found, key=lambda k: (arms.index(k[0]), *k[1:]))]


def by_weight(options: Iterable[Option], arm: str, n_train: int) -> list[Option]:
    """One option per weight of an arm at a size, ascending: the learning rate whose mean validation
    error is the lowest; weights at which every run diverged are left out."""
    best: dict[float, Option] = {}
    for o in options:
        if (o.arm, o.n_train) == (arm, n_train) and o.validation:
            other = best.get(o.weight)
            if other is None or _rank(o) < _rank(other):
                best[o.weight] = o
    return [best[weight] for weight in sorted(best)]


def _rank(option: Option) -> tuple[int, float]:
    """Runs that diverged count as infinite, as in ``equivalence.choose``."""
    return option.n_diverged, float(np.mean(list(option.validation.values())))


def sharpness(weights: Sequence[Option]) -> Sharpness | None:
    """How sharp the best of the weights of ``by_weight`` is; None of fewer than two weights."""
    if len(weights) < 2:
        return None
    best = min(range(len(weights)), key=lambda i: _rank(weights[i]))

    def beyond(i: int) -> tuple[float, float]:
        """Mean difference to the best, and its standard error."""
        a, b = weights[best].validation, weights[i].validation
        both = [b[key] - a[key] for key in a if key in b]
        if len(both) < 2 or weights[i].n_diverged > weights[best].n_diverged:
            return (np.inf if weights[i].n_diverged else float(np.mean(both or np.inf))), np.nan
        return float(np.mean(both)), float(np.std(both, ddof=1) / np.sqrt(len(both)))

    found = [beyond(i) for i in range(len(weights))]
    low = high = best
    while low > 0 and found[low - 1][0] < found[low - 1][1]:
        low -= 1
    while high < len(weights) - 1 and found[high + 1][0] < found[high + 1][1]:
        high += 1
    bounds = (weights[low].weight, weights[high].weight)
    if len(weights[best].validation) < 2:
        bounds = (np.nan, np.nan)
    neighbours = [found[i][0] for i in (best - 1, best + 1) if 0 <= i < len(weights)]
    rise = max(neighbours) / float(np.mean(list(weights[best].validation.values())))
    edge = {0: "lowest", len(weights) - 1: "highest"}.get(best, "")
    return Sharpness(weights[best].weight, *bounds, rise, edge)


def write_report(
    directory: Path, records: Sequence[dict[str, Any]], config: Config | None = None
) -> str:
    """Write ``results.csv``, ``summary.csv``, pictures and ``report.html``; the summary as text.

    config: the ablation's, for what the page says of the plan; None to leave that out.
    Raises InputError without records, or when the directory has a link out of it.
    """
    from orbq.study.page import page
    from orbq.study.pictures import pictures

    if not records:
        raise InputError(f"{directory} has no finished program yet: there is nothing to report")
    refuse_links(directory, "run.directory")
    rows, options = rows_of(records), options_of(records)
    write_atomically(directory / CSV, table_of_runs(records))
    write_atomically(directory / SUMMARY_CSV, table_of_rows(rows))
    drawn = pictures(rows, options, records)
    for picture in drawn:
        (directory / f"{picture.name}.png").write_bytes(picture.png)
    result = Result(directory.name, rows, options, records, config)
    write_atomically(directory / PAGE, page(result, drawn))
    return summary(rows, records) + f"\nwrote {directory / PAGE}, {CSV}, {SUMMARY_CSV}"


def summary(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> str:
    """A table of arms and sizes as text, and what it cost."""
    lines = [
        f"{'arm':<24} {'N':>6} {'weight':>7}  {'test energy MAE, meV':<22} "
        f"{'error reduction':<26} data factor"
    ]
    for row in rows:
        gain = gain_text(row.reduction) if row.reduction else "-"
        factor = factor_text(row.factor) if row.factor else "-"
        lines.append(
            f"{row.arm:<24} {row.n_train:>6} {row.weight:>7g}  {error_text(row.errors):<22} "
            f"{gain:<26} {factor}"
        )
    diverged = sum(r["diverged"] for r in records)
    failed = f", {diverged} of them diverged" if diverged else ""
    seconds, cpu, steps = spent(records)
    lines.append(f"{len(records)} runs{failed}, {steps:,} steps: {seconds:.0f} s, {cpu:.0f} CPU s")
    return "\n".join(lines)


def error_text(errors: np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation of the runs that did not diverge, and how many did."""
    fine = errors[np.isfinite(errors)]
    lost = (
        f" ({len(errors) - len(fine)} of {len(errors)} diverged)" if len(fine) < len(errors) else ""
    )
    if not len(fine):
        return "diverged"
    deviation = f" ± {fine.std(ddof=1):.{digits}f}" if len(fine) > 1 else ""
    return f"{fine.mean():.{digits}f}{deviation}{lost}"


def gain_text(estimate: Estimate) -> str:
    """As ``24 % (18 to 29 %)``; negative where the error rose."""
    if np.isnan(estimate.low):
        return f"{estimate.value:.0%}".replace("%", " %")
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.0f} % ({low:.0f} to {high:.0f} %)"


def table_of_rows(rows: Sequence[Row]) -> str:
    """One line per arm and size, as CSV: errors in meV, reduction and factor with their 95 %
    intervals; the factor is 0 or inf outside of what the baseline's curve covers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    estimates = [f"{n}{end}" for n in ("reduction", "factor") for end in ("", "_low", "_high")]
    columns = "arm n_train weight learning_rate replicates energy_mae_meV deviation_meV".split()
    writer.writerow([*columns, *estimates])
    for row in rows:
        fine = row.errors[np.isfinite(row.errors)]
        deviation = fine.std(ddof=1) if len(fine) > 1 else ""
        gains = [x for e in (row.reduction, row.factor) for x in (e[:3] if e else ("",) * 3)]
        mean = fine.mean() if len(fine) else ""
        writer.writerow([*row[:4], len(row.errors), mean, deviation, *gains])
    return out.getvalue()


def table_of_runs(records: Sequence[dict[str, Any]]) -> str:
    """One line per run, with its validation and test errors of all that it was taught, as CSV."""
    errors = {
        f"{part}/{n}": None for r in records for part in ("validation", "test") for n in r[part]
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_COLUMNS, *errors])
    for r in records:
        places = [key.split("/", 1) for key in errors]
        found = [r[part].get(n, "") if _was_taught(r, n) else "" for part, n in places]
        writer.writerow([*(r[name] for name in _COLUMNS), *found])
    return out.getvalue()


def _was_taught(record: dict[str, Any], error: str) -> bool:
    """Whether an error is of something that the run was taught: energy-only runs have heads whose
    weight is 0. error: as ``onsite_mae_e``."""
    return record["target"] is not None or error.split("_mae_")[0].split("_rmse_")[0] in MAIN_TERMS


def spent(records: Sequence[dict[str, Any]]) -> tuple[float, float, int]:
    """Wall and CPU seconds of all programs, compilation included, and steps of all runs."""
    each = [(r["program_seconds"], r["program_cpu_seconds"], r["program_runs"]) for r in records]
    seconds, cpu = (sum(e[i] / e[2] for e in each) for i in (0, 1))
    return seconds, cpu, sum(r["steps"] for r in records)
