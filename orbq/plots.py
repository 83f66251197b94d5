"""Pictures of evaluations, of training, and of compared arms. Each function returns a figure.

Figures are made without pyplot, so that they neither share state nor need a display. Colours are
those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which the colour-blind can tell apart;
densities use the map cividis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from orbq.errors import InputError
from orbq.metrics import display_unit, unit_of
from orbq.run_files import METRICS, run_directory
from orbq.schema import FIELDS
from orbq.scores import ENERGIES, Evaluation
from orbq.targets import TARGETS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DENSE = 3000  # points above which a parity plot shows their density
DPI = 150
TITLES = {
    "energy": "Energy",
    "forces": "Forces",
    "stress": "Stress",
    "xtb_energy": "xTB energy",
    "xtb_forces": "xTB forces",
    "orbital": "Orbital charges",
    "density": "On-site components, same shell",
    "onsite": "On-site components",
    "shell": "Shell charges",
    "atomic": "Atomic charges",
    "dft": "DFT atomic charges",
}


class Arm(Protocol):
    """One arm of a comparison: per quantity (a key of QUANTITIES), one value for every seed."""

    @property
    def arm(self) -> str: ...
    @property
    def values(self) -> Mapping[str, Sequence[float]]: ...


class Quantity(NamedTuple):
    """title: of a panel. unit: of its values."""

    title: str
    unit: str


QUANTITIES = {
    "energy_mae": Quantity("Energy", "meV"),
    "energy_mae_per_atom": Quantity("Energy", "meV/atom"),
    "force_mae": Quantity("Forces", "meV/Å"),
    "charge_mae": Quantity("Orbital charges", "e"),
}


def new_figure(
    n_panels: int, size: tuple[float, float], n_columns: int
) -> tuple[Figure, list[Axes]]:
    """A figure of ``n_panels`` axes in rows of ``n_columns``; size: of one panel, inches."""
    n_columns = min(n_columns, n_panels)
    n_rows = -(-n_panels // n_columns)
    figure = Figure(figsize=(size[0] * n_columns, size[1] * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(n_rows, n_columns, i + 1) for i in range(n_panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain_log(axis: Axes) -> None:
    """Labels as 200, 300, 500 on a logarithmic y axis, however short it is; after drawing."""
    low, high = axis.get_ylim()
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 4 * low else (1, 2, 3, 5)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (or what the file's ending says); makes the directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


# --------------------------------------------------------------------------- parity


def parity_figure(
    evaluation: Evaluation, path: str | Path | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Predicted against true values, one panel per label, with MAE and RMSE.

    Energies are shown relative to the reference energies, so that what was learnt is seen. names:
    labels to show; None for all. path: where to save it.
    """
    shown = [n for n in names or evaluation.values if evaluation.values[n].mask.any()]
    figure, axes = new_figure(len(shown), (4.2, 4.1), 3)
    for axis, name in zip(axes, shown, strict=True):
        parity_panel(axis, evaluation, name)
        title = parity_title(evaluation, name)
        axis.set_title(f"{title}\n{parity_score(evaluation, name)}", fontsize=10)
    if path is not None:
        save(figure, path)
    return figure


def clear_parity(place: Path) -> None:
    """Take away the parity plots, and the tables beside them, of an earlier command."""
    for name in ("parity", *(f"parity-{label}" for label in TITLES)):
        for suffix in (".png", ".csv"):
            (place / f"{name}{suffix}").unlink(missing_ok=True)


def parity_values(evaluation: Evaluation, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions [n] where there is a label, eV, eV/Å, eV/Å^3 or e; energies without
    their references."""
    values = evaluation.values[name]
    true, predicted = values.label[values.mask], values.predicted[values.mask]
    if name in ENERGIES:
        shift = evaluation.references[name][values.mask]
        true, predicted = true - shift, predicted - shift
    return true, predicted


def parity_range(evaluations: Sequence[Evaluation], name: str) -> tuple[float, float]:
    """Lowest and highest value of a label and its predictions in all of them, with a margin."""
    values = [v for e in evaluations for v in parity_values(e, name)]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    margin = 0.04 * max(high - low, 1e-9)
    return float(low - margin), float(high + margin)


def parity_panel(
    axis: Axes, evaluation: Evaluation, name: str, limits: tuple[float, float] | None = None
) -> None:
    """Predicted against true values of a label; limits: of both axes, None for its own range."""
    true, predicted = parity_values(evaluation, name)
    unit = TARGETS[name].unit if name in TARGETS else FIELDS[name].unit
    what = "relative to references, " if name in ENERGIES else ""
    low, high = limits or parity_range([evaluation], name)
    if len(true) > DENSE:
        extent = (low, high, low, high)
        bins = axis.hexbin(
            true, predicted, gridsize=70, extent=extent, norm=LogNorm(), cmap="cividis",
            mincnt=1, linewidths=0.1,
        )  # fmt: skip
        beside = axis.inset_axes((1.04, 0.0, 0.05, 1.0))
        axis.figure.colorbar(bins, cax=beside, label="values per cell")
    else:
        size = 14 if len(true) < 300 else 7
        axis.scatter(true, predicted, s=size, color=COLOURS[0], alpha=0.5, linewidths=0)
    axis.plot([low, high], [low, high], color="black", linewidth=0.7, alpha=0.6, zorder=3)
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_locator(MaxNLocator(5))
    axis.set_xlabel(f"label ({what}{unit})")
    axis.set_ylabel(f"prediction ({what}{unit})")


def parity_title(evaluation: Evaluation, name: str) -> str:
    """What a label is, and what it was computed from."""
    source = evaluation.values[name].source
    title = TITLES.get(name, name)
    return f"{title} (from {TITLES[source].lower()})" if source else title


def parity_score(evaluation: Evaluation, name: str) -> str:
    """MAE and RMSE in the unit of the tables."""
    shown = "energy_per_atom" if name == "energy" else name
    unit, factor = display_unit(shown)
    digits = 4 if unit == "e" else 1
    mae, rmse = evaluation.mae(shown) * factor, evaluation.rmse(shown) * factor
    return f"MAE {mae:.{digits}f}, RMSE {rmse:.{digits}f} {unit}"


# --------------------------------------------------------------------------- training


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, one per validation; an unfinished last line is skipped.

    Raises InputError when there are none.
    """
    path = run_directory(directory) / METRICS
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): is {directory} a run that has reached its "
            "first validation?"
        ) from error
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    if not records:
        raise InputError(f"{path} holds no validation yet: let `orbq train` reach its first one")
    return records


def learning_curve_figure(
    runs: Mapping[str, str | Path] | Sequence[str | Path], path: str | Path | None = None
) -> Figure:
    """Validation errors against training steps, one panel per label, one line per run; energies
    in meV per structure.

    runs: run directories; in a mapping, under the names for the legend. path: where to save it.
    Steps of a pre-training stage come before those of the main stage, in lighter colour.
    """
    named = dict(runs) if isinstance(runs, Mapping) else {Path(r).name: r for r in runs}
    curves = {name: read_metrics(directory) for name, directory in named.items()}
    keys = [k for records in curves.values() for r in records for k in r if _is_error(k)]
    shown = list(dict.fromkeys(keys))
    figure, axes = new_figure(len(shown), (4.6, 3.4), 3)
    for axis, key in zip(axes, shown, strict=True):
        for number, (name, records) in enumerate(curves.items()):
            _curve(axis, records, key, name, number)
        title, unit = _described(key)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="training step", ylabel=f"validation MAE ({unit})", yscale="log")
        axis.set_xlim(left=0)
        plain_log(axis)
        axis.grid(True, which="both", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
    if len(named) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    if any(len({r["stage"] for r in records}) > 1 for records in curves.values()):
        figure.supxlabel("light: pre-training", fontsize=8, color="0.4")
    if path is not None:
        save(figure, path)
    return figure


def _is_error(key: str) -> bool:
    return key.startswith("validation/") and "_mae_" in key and not key.endswith("_per_atom")


def _described(key: str) -> tuple[str, str]:
    """Title and unit of a key of metrics.jsonl as ``validation/forces_mae_meV_per_A``."""
    name, unit = key.removeprefix("validation/").split("_mae_")
    return TITLES.get(name, name), unit_of(unit)


def _curve(
    axis: Axes, records: Sequence[Mapping[str, Any]], key: str, name: str, number: int
) -> None:
    """One line per stage; the last point of every run is marked."""
    colour, start = COLOURS[number % len(COLOURS)], 0
    stages = list(dict.fromkeys(str(r["stage"]) for r in records))
    for stage in stages:
        found = [(r["step"], r[key]) for r in records if r["stage"] == stage and key in r]
        if found:
            steps, errors = np.array(found).T
            last = stage == stages[-1]
            label = name if last else None
            alpha = 1.0 if last else 0.4
            axis.plot(steps + start, errors, color=colour, alpha=alpha, label=label, linewidth=1.4)
            marker = MARKERS[number % len(MARKERS)]
            axis.plot(steps[-1:] + start, errors[-1:], marker, color=colour, alpha=alpha, ms=5)
        start += max((r["step"] for r in records if r["stage"] == stage), default=0)


# --------------------------------------------------------------------------- arms


def arms_figure(
    rows: Sequence[Arm],
    path: str | Path | None = None,
    quantities: Mapping[str, Quantity] | None = None,
) -> Figure:
    """Errors of several arms: one panel per quantity, a marker per seed, a bar for the mean.

    rows: the arms, the baseline first. quantities: panels by the keys of ``Arm.values``; None for
    those of QUANTITIES that any arm has, energy per atom rather than per structure. Axes start at
    zero; above each arm stands its mean, with its change against the baseline.
    """
    if quantities is None:
        skip = "energy_mae" if any(r.values.get("energy_mae_per_atom") for r in rows) else ""
        quantities = {n: q for n, q in QUANTITIES.items() if n != skip}
    shown = {n: q for n, q in quantities.items() if any(len(r.values.get(n, ())) for r in rows)}
    figure, axes = new_figure(len(shown), (1.6 + 0.9 * len(rows), 3.6), 4)
    for axis, (name, quantity) in zip(axes, shown.items(), strict=True):
        _arms_panel(axis, rows, name, quantity)
    figure.supxlabel("points: single seeds; bars: their mean", fontsize=8, color="0.4")
    if path is not None:
        save(figure, path)
    return figure


def _arms_panel(axis: Axes, rows: Sequence[Arm], name: str, quantity: Quantity) -> None:
    baseline = rows[0].values.get(name, ())
    tops = []
    for place, row in enumerate(rows):
        values = np.asarray(row.values.get(name, ()), float)
        colour = COLOURS[place % len(COLOURS)]
        if not len(values):
            axis.text(place, 0, "not\npredicted", ha="center", va="bottom", color="0.4", fontsize=8)
            continue
        mean = float(values.mean())
        axis.bar(place, mean, 0.62, color=colour, alpha=0.35)
        axis.hlines(mean, place - 0.31, place + 0.31, color=colour, linewidth=2)
        spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        axis.scatter(place + spread, values, s=26, color=colour, edgecolor="white", zorder=3)
        change = ""
        if place and len(baseline):
            change = f"\n{mean / float(np.mean(baseline)) - 1:+.0%}".replace("-", "−")
        digits = 4 if quantity.unit == "e" else 1
        tops.append(float(values.max()))
        axis.annotate(
            f"{mean:.{digits}f}{change}", (place, values.max()), (0, 6), fontsize=9,
            textcoords="offset points", ha="center", va="bottom",
        )  # fmt: skip
    axis.set_ylim(0, 1.25 * max(tops))
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.set_xticks(range(len(rows)), [fill(row.arm, 14) for row in rows], fontsize=9)
    axis.set_ylabel(f"MAE ({quantity.unit})")
    axis.set_title(quantity.title, fontsize=10)
