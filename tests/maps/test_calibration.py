"""The threshold keeps its false-positive rate on average over calibration sets, and the interval holds the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.maps.calibration import CalibrationError, beta_quantile, calibrate, rate_above
from tests.maps.published import published_draws


def test_the_published_draw_gives_its_published_rate() -> None:
    """500 benign shares from Beta(2, 40), α = 0.05: the 476th smallest; 0.0566 of 200,000 further ones are above it."""
    draws = published_draws()
    found = calibrate(draws.benign, 0.05)
    assert found.threshold == np.sort(draws.benign)[475]
    assert rate_above(draws.held_out, found.threshold).value == pytest.approx(0.0566, abs=5e-5)
    assert found.expected == 25 / 501
    assert found.low < 0.0566 < found.high
    assert (found.low, found.high) == pytest.approx((0.0326, 0.0707), abs=5e-4)  # ± 0.02 about the rate


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (100, 0.05), (500, 0.05), (60, 0.2), (9, 0.1)])
def test_over_many_draws_the_rate_is_the_expected_one_and_the_interval_covers(n: int, alpha: float) -> None:
    """Uniform statistics: the rate of a threshold t is 1 − t exactly."""
    draws = np.random.default_rng(n).random((2000, n))
    found = [calibrate(row, alpha) for row in draws]
    rates = 1.0 - np.array([c.threshold for c in found])
    error = rates.std() / math.sqrt(len(rates))
    assert rates.mean() == pytest.approx(found[0].expected, abs=4 * error)
    assert found[0].expected <= alpha + 1e-12
    covered = np.mean([c.low <= rate <= c.high for c, rate in zip(found, rates, strict=True)])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_the_rank_is_exact_where_decimals_are_not() -> None:
    """(n + 1)(1 − α) = 1000·0.941 is above 941 in floating point; the rank is 941, not 942."""
    for n, alpha, rank in (
        (19, 0.05, 19),
        (99, 0.01, 99),
        (999, 0.001, 999),
        (9, 0.3, 7),
        (199, 0.1, 180),
        (999, 0.059, 941),
        (249, 0.172, 207),
    ):
        assert calibrate(np.arange(1, n + 1), alpha).threshold == rank


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.integers(0, 5), min_size=20, max_size=80), alpha=st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_with_ties_no_more_than_the_rate_is_above(values: list[int], alpha: float) -> None:
    found = calibrate(values, alpha)
    assert sum(v > found.threshold for v in values) <= alpha * (len(values) + 1)
    if values.count(int(found.threshold)) > 1:
        assert found.low == 0.0
    assert found.low <= found.expected <= found.high


@pytest.mark.parametrize(("n", "needed"), [(18, 19), (0, 19)])
def test_too_few_sequences_say_how_many_are_needed(n: int, needed: int) -> None:
    with pytest.raises(CalibrationError, match=f"at least {needed}"):
        calibrate(np.arange(n), 0.05)


def test_a_rate_or_a_statistic_that_is_none_is_refused() -> None:
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(CalibrationError, match="between 0 and 1"):
            calibrate(np.arange(50), alpha)
    with pytest.raises(CalibrationError, match="not a finite number"):
        calibrate([*range(50), math.nan], 0.1)
    with pytest.raises(CalibrationError, match="no held-out"):
        rate_above([], 0.5)


def test_beta_quantiles_of_known_values() -> None:
    assert beta_quantile(0.5, 1, 1) == pytest.approx(0.5)
    assert beta_quantile(0.3, 1, 4) == pytest.approx(1 - 0.7**0.25)
    assert beta_quantile(0.3, 4, 1) == pytest.approx(0.3**0.25)
    assert beta_quantile(0.5, 7, 7) == pytest.approx(0.5)
    # P(Beta(2, 3) ≤ x) = 6x² − 8x³ + 3x⁴
    x = beta_quantile(0.9, 2, 3)
    assert 6 * x**2 - 8 * x**3 + 3 * x**4 == pytest.approx(0.9)
    draws = np.random.default_rng(0).beta(25, 476, 400_000)
    assert beta_quantile(0.025, 25, 476) == pytest.approx(np.quantile(draws, 0.025), abs=2e-4)
    assert beta_quantile(0.975, 250, 20_000) < beta_quantile(0.975, 250, 10_000)


def test_the_interval_of_a_held_out_rate_is_clopper_pearsons() -> None:
    none = rate_above(np.zeros(20), 0.5)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 20))
    every = rate_above(np.ones(20), 0.5)
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(0.025 ** (1 / 20))
    assert rate_above([0.5, 0.5, 0.6, 0.4], 0.5).value == 0.25  # a gate opens above its threshold, not at it
    some = rate_above([0, 0, 0, 0, 0, 0, 0, 1, 1, 1], 0.5)
    assert (some.value, some.low, some.high) == pytest.approx((0.3, 0.0667, 0.6525), abs=1e-4)  # tables
