"""An ablation's report as one HTML page: images inside, no script, nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from orbq.equivalence import LEVEL, factor_text
from orbq.fit import MAX_NONFINITE
from orbq.study.pictures import Picture
from orbq.study.plan import BASELINE, make_plan
from orbq.study.report import (
    Option,
    Result,
    Row,
    Sharpness,
    by_weight,
    error_text,
    gain_text,
    sharpness,
    spent,
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 84rem; margin: 2rem auto;
  padding: 0 1rem; }
p, li, figcaption { max-width: 62rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.9rem 0.2rem 0; text-align: right; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; }
th { border-bottom: 2px solid #888; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } figure { margin: 0; }
figcaption, .note { color: #555; font-size: 0.9rem; }
.warning { border-left: 4px solid #D55E00; padding: 0.3rem 0 0.3rem 0.8rem; background: #fdf3ec; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
"""


def page(result: Result, drawn: Sequence[Picture]) -> str:
    """The whole page."""
    title = f"Ablation {escape(result.name)}"
    parts = [
        f"<h1>{title}</h1>",
        _findings(result),
        _progress(result),
        "<h2>Results</h2>",
        _results(result.rows, result.records),
        *(_figure(picture) for picture in drawn),
        "<h2>The weight</h2>",
        _choice(result),
        "<h2>Compute spent</h2>",
        _compute(result.records),
        "<h2>Provenance</h2>",
        _provenance(result),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(
        ["<table>", line(header, "th"), *(line(row, "td") for row in rows), "</table>"]
    )


def _figure(picture: Picture) -> str:
    source = "data:image/png;base64," + base64.b64encode(picture.png).decode()
    title = escape(picture.title)
    return (
        f"<h2>{title}</h2>\n<figure>"
        f'<img alt="{title}" width="{picture.width}" src="{source}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


# --------------------------------------------------------------------------- what was found


def _findings(result: Result) -> str:
    """A sentence or two for every arm that was compared."""
    arms = dict.fromkeys(row.arm for row in result.rows if row.reduction)
    told = [finding([row for row in result.rows if row.arm == arm]) for arm in arms]
    if not told:
        return '<p class="note">No arm has runs to hold against energy-only ones yet.</p>'
    items = "".join(f"<li>{escape(text)}</li>" for text in told)
    level = (
        f"Intervals: Student's {LEVEL:.0%}, of seeds in pairs, errors on the test structures. They "
        "tell the spread over these seeds and subsets, not over other data, and do not count that "
        "a weight was chosen among several."
    )
    return f'<ul>{items}</ul>\n<p class="note">{level}</p>'


def finding(rows: Sequence[Row]) -> str:
    """What an arm brought at its largest size, whether that is more than the spread over seeds, and
    its data equivalence at the largest size where the energy-only curve covers it."""
    row, gain = next((r, r.reduction) for r in reversed(rows) if r.reduction)
    change = "lower" if gain.value >= 0 else "higher"
    place = f"{row.arm} (weight {row.weight:g}) at {row.n_train:,} structures:"
    text = f"{place} energy error {abs(gain.value):.0%} {change} than energy-only"
    if np.isnan(gain.low):
        text += "; of a single seed, so without interval: no conclusion"
    else:
        sure = "excludes zero" if gain.low > 0 or gain.high < 0 else "includes zero: no conclusion"
        text += f"; reduction {gain_text(gain)}, an interval that {sure}"
    factors = [(r.n_train, r.factor) for r in rows if r.factor]
    covered = [(n, f) for n, f in factors if 0 < f.value < np.inf]
    for n, factor in covered[-1:] or factors[-1:]:
        text += f"; data-equivalence factor at {n:,} structures {factor_text(factor)}"
    return text + "."


def _progress(result: Result) -> str:
    """How many of the planned runs have a record, and which diverged, said plainly."""
    told = []
    if result.config is not None:
        planned = sum(len(program.runs) for program in make_plan(result.config))
        missing = planned - len(result.records)
        if missing > 0:
            told.append(f"{missing} of {planned} runs have not finished: figures are preliminary.")
    if lost := [r for r in result.records if r["diverged"]]:
        names = "; ".join(
            f"{r['arm']} weight {r['weight']:g} seed {r['seed']} N={r['n_train']}" for r in lost
        )
        told.append(
            f"{len(lost)} of {len(result.records)} runs diverged (no validation error was finite, "
            f"or {MAX_NONFINITE} losses or gradients in a row were not) and count as infinite: "
            f"{names}."
        )
    if not told:
        return f"<p>All {len(result.records)} runs finished; none diverged.</p>"
    return "\n".join(f'<p class="warning">{escape(text)}</p>' for text in told)


def _results(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> str:
    shown = [r for r in records if not r["diverged"]]
    forces = any("forces_mae_meV_per_A" in r["test"] for r in shown)
    header = ["arm", "training structures", "weight", "seeds", "energy MAE, meV", "meV/atom"]
    header += ["forces MAE, meV/Å"] * forces + ["error reduction", "data-equivalence factor"]
    lines = []
    for row in rows:
        own = [
            r["test"]
            for r in shown
            if (r["arm"], r["n_train"], r["weight"], r["learning_rate"]) == row[:4]
        ]
        keys = ["energy_mae_meV_per_atom"] + ["forces_mae_meV_per_A"] * forces
        others = [
            error_text(np.array([test[key] for test in own if key in test]), digits)
            for key, digits in zip(keys, (2, 1), strict=False)
        ]
        gain = gain_text(row.reduction) if row.reduction else "-"
        factor = factor_text(row.factor) if row.factor else "-"
        place = [row.arm, f"{row.n_train:,}", f"{row.weight:g}", len(row.errors)]
        lines.append([*place, error_text(row.errors), *others, gain, factor])
    return _table(header, lines)


# --------------------------------------------------------------------------- weights


def _choice(result: Result) -> str:
    """Every weight's errors, and how sharp the best one is."""
    told, lines = [], []
    arms = [arm for arm in dict.fromkeys(o.arm for o in result.options) if arm != BASELINE]
    for arm in arms:
        for n in sorted({o.n_train for o in result.options if o.arm == arm}):
            found = sharpness(by_weight(result.options, arm, n))
            if found:
                told.append(f"<li>{escape(f'{arm}, {n:,} structures: {choice_text(found)}')}</li>")
    for o in result.options:
        lines.append(
            [o.arm, f"{o.n_train:,}", f"{o.weight:g}", f"{o.learning_rate:g}", *_errors(o)]
        )
    header = ["arm", "training structures", "weight", "learning rate"]
    header += ["validation MAE, meV", "test MAE, meV", "diverged"]
    return f"<ul>{''.join(told)}</ul>\n" + _table(header, lines)


def _errors(option: Option) -> list[str]:
    errors = [np.array(list(part.values())) for part in (option.validation, option.test)]
    runs = len(option.test) + option.n_diverged
    return [*map(error_text, errors), f"{option.n_diverged} of {runs}"]


def choice_text(found: Sharpness) -> str:
    """The best weight and how sharp it is, in words."""
    text = f"best weight {found.weight:g}"
    if np.isnan(found.low):
        text += " (of a single seed)"
    elif found.low == found.high:
        text += ", one standard error better than its neighbours"
    else:
        text += f"; {found.low:g} to {found.high:g} are within one standard error of it"
    if np.isinf(found.rise):
        text += "; at a neighbour of it runs diverged"
    elif found.rise >= 0:
        text += f"; its worse neighbour costs {found.rise:.0%} more validation error"
    if found.at_edge:
        text += f"; it is the {found.at_edge} that was tried: widen ablation.weights"
    return text


# --------------------------------------------------------------------------- cost


def _compute(records: Sequence[dict[str, Any]]) -> str:
    """CPU and wall seconds of every program, and for one run of it."""
    programs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in records:
        programs.setdefault((r["program"], r["program_seconds"]), []).append(r)
    lines = []
    for (name, seconds), own in programs.items():
        runs, cpu = own[0]["program_runs"], own[0]["program_cpu_seconds"]
        each = cpu / runs
        steps = own[0]["steps"]
        per_step = f"{1000 * each / max(steps, 1):,.2f}"
        place = [name, runs, f"{steps:,}", f"{seconds:,.0f}", f"{cpu:,.0f}"]
        lines.append([*place, f"{each:,.1f}", per_step])
    seconds, cpu, steps = spent(records)
    each = cpu / max(len(records), 1)
    per_step = f"{1000 * cpu / max(steps, 1):,.2f}"
    total = ["all", len(records), f"{steps:,} in all", f"{seconds:,.0f}", f"{cpu:,.0f}"]
    header = ["program", "runs", "steps of a run", "seconds", "CPU seconds", "CPU seconds a run"]
    table = _table(
        [*header, "CPU seconds a run and 1,000 steps"], [*lines, [*total, f"{each:,.1f}", per_step]]
    )
    return table + '<p class="note">Data preparation, compilation and validation included.</p>'


def _provenance(result: Result) -> str:
    seen = dict.fromkeys(
        tuple((k, v) for k, v in r.get("provenance", {}).items() if k != "time")
        for r in result.records
    )
    times = sorted(r["provenance"]["time"] for r in result.records if "provenance" in r)
    lines = [", ".join(f"{name} {value}" for name, value in place) for place in seen if place]
    if times:
        lines.append(f"records from {times[0]} to {times[-1]}")
    if result.config is not None and (initial := result.config.training.initial):
        lines.append(f"every run began from the parameters of {initial}")
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    if result.config is not None:
        toml = escape(result.config.model_dump_toml())
        text += f"<details><summary>Configuration</summary><pre>{toml}</pre></details>"
    return text
