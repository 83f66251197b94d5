"""The pictures of an ablation's report, each with what it says."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from orbq.equivalence import Estimate
from orbq.plots import COLOURS, DPI, MARKERS, new_figure, plain_log
from orbq.study.plan import BASELINE
from orbq.study.report import Option, Row, by_weight

MAE = "test energy MAE (meV)"


class Picture(NamedTuple):
    """name: of its file. title, caption: for the page. png: the image. width: on a page, pixels."""

    name: str
    title: str
    caption: str
    png: bytes
    width: int


class Style(NamedTuple):
    """How an arm is drawn everywhere. shift: factor on the x axis, so that bars do not hide."""

    colour: str
    marker: str
    shift: float


def pictures(
    rows: Sequence[Row], options: Sequence[Option], records: Sequence[dict[str, Any]]
) -> list[Picture]:
    """Every picture for which there are runs enough."""
    styles = _styles([row.arm for row in rows])
    drawn = []
    if any(o.weight > 0 and o.test for o in options):
        caption = (
            "Points: single seeds; lines and bars: their mean and standard deviation; dashed line "
            "and band: energy-only. Ring: the weight of the lowest validation error."
        )
        drawn.append(_picture("weights", "Error against weight", caption, weight_figure, options))
    sizes = {row.n_train for row in rows}
    if len(sizes) > 1:
        caption = (
            "Both axes logarithmic. Mean and standard deviation over seeds, at the weight that "
            "validation chooses."
        )
        drawn.append(_picture("sizes", "Error against train size", caption, size_figure, rows))
    if any(row.reduction for row in rows):
        caption = (
            "By how much the error is lower than that of energy-only training, and how many times "
            "more structures energy-only training needs for the same error (of several train "
            "sizes). Bars: Student's 95 % intervals, of seeds in pairs; open arrows: beyond what "
            "the energy-only curve covers."
        )
        drawn.append(_picture("gains", "What the charges bring", caption, gain_figure, rows))
    caption = (
        "Mean over seeds, at the weight that validation chooses. A curve that still falls at its "
        "end is of a run that was stopped too early for a fair comparison."
    )

    def draw_training(what: Sequence[Row], styles: dict[str, Style]) -> Figure:
        return training_figure(what, records, styles)

    title = "Validation during training"
    drawn.append(_picture("training", title, caption, draw_training, rows))
    return [picture(styles) for picture in drawn]


def _picture(
    name: str, title: str, caption: str, draw: Callable[[Any, Any], Figure], what: Any
) -> Callable[[dict[str, Style]], Picture]:
    def drawn(styles: dict[str, Style]) -> Picture:
        out = io.BytesIO()
        figure = draw(what, styles)
        figure.savefig(out, format="png", dpi=DPI)
        return Picture(name, title, caption, out.getvalue(), round(96 * figure.get_figwidth()))

    return drawn


def _styles(arms: Sequence[str]) -> dict[str, Style]:
    others = [arm for arm in dict.fromkeys(arms) if arm != BASELINE]
    centre = (len(others) - 1) / 2
    found = {BASELINE: Style("#333333", "o", 1.0)}
    for i, arm in enumerate(others):
        shift = 1.04 ** (i - centre)
        found[arm] = Style(COLOURS[i % (len(COLOURS) - 1)], MARKERS[(i + 1) % len(MARKERS)], shift)
    return found


# --------------------------------------------------------------------------- weights


def weight_figure(options: Sequence[Option], styles: dict[str, Style]) -> Figure:
    """Test energy MAE against the weight, a panel per train size."""
    sizes = sorted({o.n_train for o in options})
    figure, axes = new_figure(len(sizes), (4.6, 3.8), 3)
    for axis, n in zip(axes, sizes, strict=True):
        base = by_weight(options, BASELINE, n)
        if base:
            _band(axis, np.array(list(base[0].test.values())), styles[BASELINE].colour)
        for arm in (arm for arm in styles if arm != BASELINE):
            _weights(axis, by_weight(options, arm, n), arm, styles[arm])
        lost = sum(o.n_diverged for o in options if o.n_train == n)
        said = f", {lost} {'run' if lost == 1 else 'runs'} diverged" if lost else ""
        axis.set_title(f"{n:,} training structures{said}", fontsize=10)
        axis.set(xlabel="weight of the charge loss", ylabel=MAE, xscale="log")
        found = sorted({o.weight for o in options if o.weight > 0})
        axis.set_xticks(found, [f"{w:g}" for w in found])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(found[0] / 1.8, found[-1] * 1.8)
        axis.grid(True, axis="y", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend under all panels, of what any of them holds."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    columns = max(1, int(figure.get_figwidth() / 1.6))
    figure.legend(
        [*found.values()], [*found], loc="outside lower center", ncols=columns, frameon=False
    )


def _band(axis: Axes, errors: np.ndarray, colour: str) -> None:
    """The energy-only runs: mean, and standard deviation if there are several."""
    mean = errors.mean()
    axis.axhline(mean, color=colour, linestyle="--", linewidth=1.2, label=BASELINE)
    if len(errors) > 1:
        half = errors.std(ddof=1)
        axis.axhspan(mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)


def _weights(axis: Axes, options: Sequence[Option], arm: str, style: Style) -> None:
    if not options:
        return
    x = np.array([o.weight for o in options]) * style.shift
    errors = [np.array(list(o.test.values())) for o in options]
    means = np.array([e.mean() for e in errors])
    spread = [e.std(ddof=1) if len(e) > 1 else 0.0 for e in errors]
    axis.errorbar(
        x, means, yerr=spread, color=style.colour, marker=style.marker, markersize=5,
        linewidth=1.4, elinewidth=1.0, capsize=3, label=arm,
    )  # fmt: skip
    for place, found in zip(x, errors, strict=True):
        if len(found) > 1:
            axis.scatter(np.full(len(found), place), found, s=9, color=style.colour, alpha=0.45)
    fine = [i for i, o in enumerate(options) if not o.n_diverged] or range(len(options))
    best = min(fine, key=lambda i: np.mean(list(options[i].validation.values())))
    axis.plot(x[best], means[best], "o", ms=13, mfc="none", mec=style.colour, mew=1.4)


# --------------------------------------------------------------------------- sizes


def size_figure(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Test energy MAE against the number of training structures, one line per arm."""
    figure, (axis,) = new_figure(1, (5.6, 4.4), 1)
    for arm, style in styles.items():
        own = [(row.n_train, row.errors[np.isfinite(row.errors)]) for row in rows if row.arm == arm]
        own = [(n, errors) for n, errors in own if len(errors)]
        if not own:
            continue
        n = np.array([size for size, _ in own]) * style.shift**0.5
        spread = [e.std(ddof=1) if len(e) > 1 else 0.0 for _, e in own]
        axis.errorbar(
            n, [e.mean() for _, e in own], yerr=spread, color=style.colour, marker=style.marker,
            linestyle="--" if arm == BASELINE else "-", markersize=5, linewidth=1.5, capsize=3,
            label=arm,
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="training structures", ylabel=MAE)
    _size_axis(axis, rows)
    plain_log(axis)
    axis.grid(True, which="both", color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(frameon=False)
    return figure


def _size_axis(axis: Axes, rows: Sequence[Row]) -> None:
    sizes = sorted({row.n_train for row in rows})
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)


# --------------------------------------------------------------------------- gains


def gain_figure(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Relative error reduction and data-equivalence factor against the train size."""
    with_factors = any(row.factor for row in rows)
    figure, axes = new_figure(1 + with_factors, (4.8, 4.0), 2)
    for arm in (arm for arm in styles if arm != BASELINE):
        own = [row for row in rows if row.arm == arm]
        for axis, which in zip(axes, ("reduction", "factor"), strict=False):
            found = [(row.n_train, getattr(row, which)) for row in own if getattr(row, which)]
            n = [size * styles[arm].shift for size, _ in found]
            _intervals(axis, n, [e for _, e in found], arm, styles[arm])
    axes[0].axhline(0, color="0.3", linewidth=0.8)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_ylabel("reduction of the test energy MAE")
    if with_factors:
        axes[1].axhline(1, color="0.3", linewidth=0.8)
        axes[1].set(yscale="log", ylabel="data-equivalence factor")
        low, high = axes[1].get_ylim()
        axes[1].set_ylim(min(low, 0.8), max(high, 1.3))
        plain_log(axes[1])
    for axis in axes:
        axis.set(xscale="log", xlabel="training structures")
        _size_axis(axis, rows)
        axis.grid(True, axis="y", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
    _legend(figure, axes)
    return figure


def _intervals(
    axis: Axes, n: Sequence[float], estimates: Sequence[Estimate], arm: str, style: Style
) -> None:
    """Values with their intervals; what lies beyond an estimate's limits is an arrow there."""
    if estimates:  # for the legend, whatever the first value is drawn as
        axis.plot([], [], style.marker, color=style.colour, ms=6, label=arm)
    for x, e in zip(n, estimates, strict=True):
        value, low, high = (_inside(v, e) for v in (e.value, e.low, e.high))
        if np.isfinite(low):
            axis.plot([x, x], [low, high], color=style.colour, linewidth=1.4)
        beyond = 1 if np.isinf(e.value) else -1 if e.limit[0] and e.value == 0.0 else 0
        marker = {1: "^", -1: "v", 0: style.marker}[beyond]
        fill = "none" if beyond else style.colour
        axis.plot(x, value, marker, color=style.colour, mfc=fill, ms=8 if beyond else 6)
        for end, bound in (("^", e.high), ("v", e.low)):
            if not beyond and bound in (0.0, np.inf) and e.limit[0]:
                axis.plot(x, _inside(bound, e), end, color=style.colour, ms=6, mfc="none")


def _inside(value: float, e: Estimate) -> float:
    """Of a factor (which has a limit above 0), the limit in the place of 0 and infinity."""
    if not e.limit[0]:
        return value
    return e.limit[1] if np.isinf(value) else value or e.limit[0]


# --------------------------------------------------------------------------- training


def training_figure(
    rows: Sequence[Row], records: Sequence[dict[str, Any]], styles: dict[str, Style]
) -> Figure:
    """Validation energy MAE against steps at the chosen weights, a panel per train size."""
    sizes = sorted({row.n_train for row in rows})
    figure, axes = new_figure(len(sizes), (4.6, 3.6), 3)
    for axis, n in zip(axes, sizes, strict=True):
        for row in (row for row in rows if row.n_train == n):
            own = (row.arm, n, row.weight, row.learning_rate)
            curves = [
                r["curve"]
                for r in records
                if (r["arm"], r["n_train"], r["weight"], r["learning_rate"]) == own
                and not r["diverged"]
            ]
            _mean_curve(axis, curves, row.arm, styles[row.arm])
        axis.set_title(f"{n:,} training structures", fontsize=10)
        axis.set(xlabel="training step", ylabel="validation energy MAE (meV)", yscale="log")
        axis.set_xlim(left=0)
        plain_log(axis)
        axis.grid(True, which="both", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
    _legend(figure, axes)
    return figure


def _mean_curve(axis: Axes, curves: Sequence[dict[str, Any]], arm: str, style: Style) -> None:
    """The mean over the runs that were validated at a step; of two programs steps may differ."""
    found: dict[int, list[float]] = {}
    for curve in curves:
        for step, error in zip(curve["step"], curve["validation"], strict=True):
            found.setdefault(step, []).append(error)
    if found:
        steps = sorted(found)
        means = [float(np.mean(found[step])) for step in steps]
        line = "--" if arm == BASELINE else "-"
        axis.plot(steps, means, line, color=style.colour, linewidth=1.5, label=arm)
        axis.plot(steps[-1], means[-1], style.marker, color=style.colour, ms=5)
