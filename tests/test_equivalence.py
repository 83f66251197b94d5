"""The data-equivalence factor on learning curves whose factor is known."""

from __future__ import annotations

import numpy as np
import pytest

from orbq.equivalence import Arm, data_equivalence, decreasing, factor_text, needed, reduction

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
    found = data_equivalence(SIZES, baseline, other, n_samples=20)
    assert [f.value for f in found[:3]] == pytest.approx([3.0] * 3)
    assert [f.value for f in found[3:]] == [np.inf, np.inf]
    assert [factor_text(f) for f in found[3:]] == ["> 2", "> 1"]
    gain = reduction(baseline[0], other[0], n_samples=20)
    assert gain.value == pytest.approx(1 - 3**-0.6)


def test_an_arm_against_itself_needs_as_much_data() -> None:
    arms = [arm(power(n)) for n in SIZES]
    assert [f.value for f in data_equivalence(SIZES, arms, arms, 10)] == pytest.approx([1.0] * 5)
    worse = [arm(2 * power(n)) for n in SIZES]
    first = data_equivalence(SIZES, arms, worse, 10)[0]
    assert (first.value, factor_text(first)) == (0.0, "< 1")


def test_interval_holds_the_true_factor_and_widens_with_the_noise() -> None:
    widths = []
    for noise in (0.02, 0.2):
        baseline = [arm(power(n), noise, seed=n) for n in SIZES]
        other = [arm(power(2 * n), noise, seed=n + 1) for n in SIZES]
        found = data_equivalence(SIZES, baseline, other, n_samples=400)[1]
        assert found.low < 2.0 < found.high
        widths.append(np.log(found.high / found.low))
    assert widths[1] > 1.2 * widths[0]


def test_the_option_is_chosen_by_validation_and_judged_by_test() -> None:
    baseline = arm(10.0)
    tempting = Arm(np.array([[5.0] * 3, [4.0] * 3]), np.array([[1.0] * 3, [8.0] * 3]))
    assert reduction(Arm(*(x[:, :3] for x in baseline)), tempting, 5).value == pytest.approx(0.2)


def test_a_curve_that_rises_is_pooled() -> None:
    np.testing.assert_allclose(decreasing(np.array([3.0, 1.0, 2.0, 0.0])), [3.0, 1.5, 1.5, 0.0])
    curve = np.exp([3.0, 1.0, 2.0, 0.0])
    assert needed(np.array(SIZES[:4]), curve, np.exp(1.5)) == pytest.approx(100)  # the fewest
    assert np.isnan(needed(np.array(SIZES[:4]), np.array([1.0, np.inf, 1, 1]), 0.5))


def test_one_replicate_has_no_interval() -> None:
    found = data_equivalence(SIZES, [arm(power(n), n=1) for n in SIZES], [arm(1.0, n=1)] * 5, 5)
    assert all(np.isnan(f.low) and np.isnan(f.high) for f in found)
