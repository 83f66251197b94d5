"""How many times more data one arm needs to reach the error of another, with intervals.

An arm at one train size is errors of options (weights, learning rates) x replicates (seeds). The
option is chosen by the mean validation error, its test errors are what is compared. The baseline's
learning curve, made monotone, is interpolated on log-log axes: if it reaches the error e(N) of the
other arm at N' structures, the data-equivalence factor at N is N'/N.

Intervals are Student's, of replicates in pairs (a replicate has the same subset and initial
parameters in both arms): of the logarithm of the ratio of the mean errors, by what each replicate
departs from it. That of a factor is where the baseline's curve has the ends of the interval of
e(N) / baseline's error at N'. The replicates of an option are taken as they are: that it was chosen
among several is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


class Arm(NamedTuple):
    """Errors [options, replicates] at one train size; infinite where a run diverged."""

    validation: np.ndarray
    test: np.ndarray


class Estimate(NamedTuple):
    """A value with its interval (NaN of a single replicate). Of a factor, 0 and infinity mean
    below and above what the baseline's curve covers: ``limit`` is where that range ends."""

    value: float
    low: float
    high: float
    limit: tuple[float, float] = (0.0, np.inf)


def choose(arm: Arm) -> int:
    """The option of the lowest mean validation error."""
    return int(np.argmin(arm.validation.mean(1)))


def decreasing(log_errors: np.ndarray) -> np.ndarray:
    """The closest curve that never rises (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in log_errors:
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            b, n = blocks.pop()
            a, m = blocks.pop()
            blocks.append([(a * m + b * n) / (m + n), m + n])
    return np.concatenate([np.full(int(n), value) for value, n in blocks])


def needed(sizes: np.ndarray, errors: np.ndarray, error: float) -> float:
    """Structures at which a learning curve reaches ``error``; 0 or infinite outside of the curve.

    sizes [K] ascending, errors [K] > 0. Where the curve is flat, the fewest.
    """
    if not (np.isfinite(errors).all() and np.isfinite(error)):
        return np.nan
    x, y, wanted = np.log(sizes), decreasing(np.log(errors)), np.log(error)
    if wanted > y[0]:
        return 0.0
    if wanted < y[-1]:
        return np.inf
    right = int(np.argmax(y <= wanted))
    if right == 0 or y[right] == wanted:
        return float(sizes[right])
    share = (y[right - 1] - wanted) / (y[right - 1] - y[right])
    return float(np.exp(x[right - 1] + share * (x[right] - x[right - 1])))


def reduction(baseline: Arm, arm: Arm) -> Estimate:
    """Relative error reduction: 1 - error of the arm / error of the baseline."""
    first, second = _errors(baseline), _errors(arm)
    ratio = float(second.mean() / first.mean())
    width = _half_width(_departures(second) - _departures(first))
    return Estimate(1 - ratio, 1 - ratio * np.exp(width), 1 - ratio * np.exp(-width))


def data_equivalence(
    sizes: Sequence[int], baseline: Sequence[Arm], arm: Sequence[Arm]
) -> list[Estimate]:
    """The data-equivalence factor at each of the ascending ``sizes``; the replicates of the two
    are pairs, also across sizes where there are equally many."""
    n = np.asarray(sizes, float)
    curve = [_errors(a) for a in baseline]
    return [factor(n, curve, _errors(b), size) for b, size in zip(arm, n, strict=True)]


def factor(
    sizes: np.ndarray, curve: Sequence[np.ndarray], errors: np.ndarray, size: float
) -> Estimate:
    """The data-equivalence factor of replicates' ``errors`` at ``size``. sizes [K], curve: the
    baseline's errors, [replicates] at each of them."""
    means, error = np.array([c.mean() for c in curve]), float(errors.mean())
    place = needed(sizes, means, error)
    width = _width_beside(sizes, curve, errors, place)
    low, high = (needed(sizes, means, error * np.exp(w)) for w in (width, -width))
    return Estimate(place / size, low / size, high / size, (sizes[0] / size, sizes[-1] / size))


def _width_beside(
    sizes: np.ndarray, curve: Sequence[np.ndarray], errors: np.ndarray, place: float
) -> float:
    """Half width of the interval of log(error / baseline's error) where the curve is at ``place``,
    or at its nearer end; NaN where a curve is incomplete."""
    if np.isnan(place):
        return np.nan
    x = np.log(np.clip(place, sizes[0], sizes[-1]))
    shares = [np.interp(x, np.log(sizes), row) for row in np.eye(len(sizes))]
    beside = [(w, _departures(c)) for w, c in zip(shares, curve, strict=True) if w > 0]
    own = _departures(errors)
    if all(len(other) == len(own) for _, other in beside):
        return _half_width(own - sum(w * other for w, other in beside))
    return math.hypot(_half_width(own), *(w * _half_width(other) for w, other in beside))


def _errors(arm: Arm) -> np.ndarray:
    """[replicates] test errors of the option that validation chooses."""
    return arm.test[choose(arm)]


def _departures(errors: np.ndarray) -> np.ndarray:
    """Of each replicate from the mean, relative to it."""
    return errors / errors.mean() - 1


def _half_width(departures: np.ndarray) -> float:
    """Of Student's interval of their mean; NaN of a single one."""
    n = len(departures)
    if n < 2:
        return np.nan
    return float(student.ppf((1 + LEVEL) / 2, n - 1) * departures.std(ddof=1) / np.sqrt(n))


def factor_text(estimate: Estimate) -> str:
    """As ``1.9 (1.4 to > 2.5)``; "> x" where the baseline's curve ends before the error is met."""

    def one(value: float) -> str:
        if value == 0.0:
            return f"< {estimate.limit[0]:.2g}"
        return f"> {estimate.limit[1]:.2g}" if np.isinf(value) else f"{value:#.2g}".rstrip(".")

    outside = estimate.low == estimate.value == estimate.high and estimate.value in (0.0, np.inf)
    if np.isnan(estimate.low) or outside:
        return one(estimate.value)
    return f"{one(estimate.value)} ({one(estimate.low)} to {one(estimate.high)})"
