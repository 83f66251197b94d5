"""The data-equivalence factor on learning curves whose factor is known."""

from __future__ import annotations

import numpy as np
import pytest

from orbq.equivalence import (
    Arm,
    data_equivalence,
    decreasing,
    factor,
    factor_text,
    needed,
    reduction,
)

SIZES = (50, 100, 200, 400, 800)


def arm(mean: float, noise: float = 0.0, seed: int = 0, n: int = 6) -> Arm:
    """One option whose validation and test errors scatter around ``mean``."""
    errors = mean * np.exp(noise * np.random.default_rng(seed).normal(size=(1, n)))
    return Arm(errors, errors)


def power(n: float) -> float:
    return 30.0 * n**-0.6


def test_factor_of_power_laws_is_exact() -> None:
    """e(N) = a (3 N)^-b is the baseline's curve at 3 N: log-log interpolation is exact on it."""
    baseline, other = [arm(power(n)) for n in SIZES], [arm(power(3 * n)) for n in SIZES]
    found = data_equivalence(SIZES, baseline, other)
    assert [f.value for f in found[:3]] == pytest.approx([3.0] * 3)
    assert [f.value for f in found[3:]] == [np.inf, np.inf]
    assert [factor_text(f) for f in found[3:]] == ["> 2", "> 1"]
    gain = reduction(baseline[0], other[0])
    assert gain.value == pytest.approx(1 - 3**-0.6)


def test_an_arm_against_itself_needs_as_much_data() -> None:
    arms = [arm(power(n)) for n in SIZES]
    assert [f.value for f in data_equivalence(SIZES, arms, arms)] == pytest.approx([1.0] * 5)
    worse = [arm(2 * power(n)) for n in SIZES]
    first = data_equivalence(SIZES, arms, worse)[0]
    assert (first.value, factor_text(first)) == (0.0, "< 1")


def test_interval_holds_the_true_factor_and_widens_with_the_noise() -> None:
    widths = []
    for noise in (0.02, 0.2):
        baseline = [arm(power(n), noise, seed=n) for n in SIZES]
        other = [arm(power(2 * n), noise, seed=n + 1) for n in SIZES]
        found = data_equivalence(SIZES, baseline, other)[1]
        assert found.low < 2.0 < found.high
        widths.append(np.log(found.high / found.low))
    assert widths[1] > 1.2 * widths[0]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_miss_what_is_true_as_often_as_they_say(n: int) -> None:
    """Replicates share a part of their scatter between arms and between sizes: 5 % of intervals of
    the reduction exclude the true one, and of the factor; within four standard deviations."""
    rng, trials, missed = np.random.default_rng(n), 600, np.zeros(2)
    for _ in range(trials):
        shared = 0.1 * rng.normal(size=n)

        def drawn(mean: float, shared: np.ndarray = shared) -> Arm:
            errors = mean * np.exp(shared + 0.05 * rng.normal(size=n))[None]
            return Arm(errors, errors)

        baseline, other = [drawn(power(k)) for k in SIZES], [drawn(power(2 * k)) for k in SIZES]
        gain, factor = reduction(baseline[1], other[1]), data_equivalence(SIZES, baseline, other)[1]
        missed += [not gain.low < 1 - 2**-0.6 < gain.high, not factor.low < 2.0 < factor.high]
    deviation = (0.05 * 0.95 / trials) ** 0.5
    assert (np.abs(missed / trials - 0.05) < 4 * deviation).all(), missed / trials


def test_replicates_that_are_no_pairs_across_sizes_are_taken_apart() -> None:
    """A size that has other replicates: the spread of both counts."""
    rng = np.random.default_rng(0)
    sizes, curve = np.array([100.0, 200.0]), [10 + rng.normal(size=3), 5 + rng.normal(size=4)]
    errors = 7 + 0.1 * rng.normal(size=2)
    found = factor(sizes, curve, errors, 100.0)
    alone = factor(sizes, [np.full(3, c.mean()) for c in curve], errors, 100.0)
    assert found.value == alone.value and found.low < alone.low < alone.high < found.high


def test_the_option_is_chosen_by_validation_and_judged_by_test() -> None:
    baseline = arm(10.0)
    tempting = Arm(np.array([[5.0] * 3, [4.0] * 3]), np.array([[1.0] * 3, [8.0] * 3]))
    assert reduction(Arm(*(x[:, :3] for x in baseline)), tempting).value == pytest.approx(0.2)


def test_a_curve_that_rises_is_pooled() -> None:
    np.testing.assert_allclose(decreasing(np.array([3.0, 1.0, 2.0, 0.0])), [3.0, 1.5, 1.5, 0.0])
    curve = np.exp([3.0, 1.0, 2.0, 0.0])
    assert needed(np.array(SIZES[:4]), curve, np.exp(1.5)) == pytest.approx(100)  # the fewest
    assert np.isnan(needed(np.array(SIZES[:4]), np.array([1.0, np.inf, 1, 1]), 0.5))


def test_one_replicate_has_no_interval() -> None:
    found = data_equivalence(SIZES, [arm(power(n), n=1) for n in SIZES], [arm(1.0, n=1)] * 5)
    assert all(np.isnan(f.low) and np.isnan(f.high) for f in found)
