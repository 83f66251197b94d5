"""What the plots of learning curves share: one arm held against another at the same train size.

Changes are of the geometric mean over replicates, which both arms share, with Student's 95 %
interval of the paired log ratios. Data factors are read from the baseline's curve on log-log axes,
with the intervals of ``orbq.equivalence``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from scipy.stats import t as student

from orbq.equivalence import LEVEL, Estimate, factor
from orbq.plots import COLOURS, MARKERS, plain_log

Errors = dict[tuple[int, int], float]  # of the replicates


def compare(baseline: Mapping[int, Errors], arm: Errors, n: int) -> tuple[np.ndarray, Estimate]:
    """Relative change of the error at ``n``, value, low and high, and data factor there; the change
    of one replicate has no interval."""
    sizes = sorted(baseline)
    curve = [np.array([baseline[k][r] for r in sorted(baseline[k])]) for k in sizes]
    shared = [r for r in sorted(baseline[n]) if r in arm]
    ratios = np.log([arm[r] / baseline[n][r] for r in shared])
    width = np.inf
    if len(ratios) > 1:
        width = (
            student.ppf((1 + LEVEL) / 2, len(ratios) - 1) * ratios.std(ddof=1) / len(ratios) ** 0.5
        )
    found = factor(np.array(sizes, float), curve, np.array([arm[r] for r in sorted(arm)]), n)
    return np.exp(ratios.mean() + np.array([0.0, -width, width])) - 1, found


def mean(errors: Errors) -> float:
    """Over replicates."""
    return float(np.mean(list(errors.values())))


def change_text(change: np.ndarray) -> str:
    """-22 % (-36 to -6)"""
    return "{:+.0f} % ({:+.0f} to {:+.0f})".format(*(100 * change))


def draw_curves(axis: Axes, curves: Mapping[str, Mapping[int, Errors]]) -> None:
    """Mean errors by arm and train size, with standard deviations over the replicates."""
    ticks: set[int] = set()
    for i, (name, arm) in enumerate(curves.items()):
        sizes = sorted(arm)
        found = [np.array(list(arm[n].values())) for n in sizes]
        axis.errorbar(
            sizes,
            [e.mean() for e in found],
            [e.std(ddof=1) for e in found],
            color=COLOURS[i],
            marker=MARKERS[i],
            capsize=2,
            label=name,
        )
        ticks |= set(sizes)
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(sorted(ticks), [str(n) for n in sorted(ticks)])
    axis.xaxis.set_minor_locator(NullLocator())
    plain_log(axis)
