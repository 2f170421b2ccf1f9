"""AUROC is the share of ordered pairs, its interval DeLong's, and complete separation is not called certain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.fitting.separation import auroc, auroc_columns

FEW = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


def by_pairs(positive: list[float], negative: list[float]) -> float:
    return float(np.mean([(x > y) + 0.5 * (x == y) for x in positive for y in negative]))


def delong_by_pairs(positive: np.ndarray, negative: np.ndarray) -> float:
    """The standard error as the paper writes it: from the kernel of every pair."""
    psi = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    v10, v01 = psi.mean(axis=1), psi.mean(axis=0)
    return math.sqrt(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01))


@settings(max_examples=200, deadline=None)
@given(positive=FEW, negative=FEW)
def test_it_is_the_share_of_pairs_in_the_right_order_ties_half(positive: list[float], negative: list[float]) -> None:
    result = auroc(positive, negative)
    assert result.value == pytest.approx(by_pairs(positive, negative), abs=1e-12)
    assert 0.0 <= result.low <= result.value <= result.high <= 1.0


@settings(max_examples=100, deadline=None)
@given(positive=FEW, negative=FEW)
def test_exchanging_the_sides_mirrors_value_and_interval(positive: list[float], negative: list[float]) -> None:
    one, other = auroc(positive, negative), auroc(negative, positive)
    assert one.value == pytest.approx(1 - other.value, abs=1e-12)
    assert one.low == pytest.approx(1 - other.high, abs=1e-9)


def test_the_interval_is_delongs() -> None:
    rng = np.random.default_rng(0)
    positive, negative = np.round(rng.normal(0.8, 1, 40), 1), np.round(rng.normal(0, 1, 30), 1)
    result = auroc(positive, negative)
    half = 1.959964 * delong_by_pairs(positive, negative)
    assert (result.low, result.high) == pytest.approx((result.value - half, result.value + half), abs=1e-6)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = 2000
    positive, negative = rng.normal(1.0, 1, (40, draws)), rng.normal(0.0, 1, (40, draws))
    truth = 0.5 * (1 + math.erf(0.5))  # P(x > y) for x − y ~ N(1, 2)
    _, low, high = auroc_columns(positive, negative)
    covered = ((low <= truth) & (truth <= high)).mean()
    assert 0.92 < covered < 0.97


def test_complete_separation_of_few_examples_is_not_called_certain() -> None:
    few, many = auroc([2, 3, 4], [0, 1]), auroc(range(100, 200), range(100))
    assert (few.value, few.high) == (1.0, 1.0)
    assert few.low < 0.6  # three against two: nearly nothing is known
    assert many.low > 0.95
    assert auroc([1.0], [0.0]).low < 0.3
    equal = auroc([1.0, 1.0], [1.0, 1.0])
    assert equal.value == 0.5
    assert equal.low < 0.2
    assert equal.high > 0.8


def test_more_confidence_is_a_wider_interval() -> None:
    positive, negative = [1, 2, 3, 0.5], [0, 1.5, 0.2]
    assert auroc(positive, negative, 0.99).low < auroc(positive, negative, 0.8).low


def test_columns_are_judged_each_by_itself() -> None:
    rng = np.random.default_rng(2)
    positive, negative = rng.integers(0, 3, (7, 50)).astype(float), rng.integers(0, 3, (5, 50)).astype(float)
    positive[:, 3], negative[:, 3] = 1.0, 0.0  # one that separates, among others
    value, low, high = auroc_columns(positive, negative)
    for column in range(50):
        alone = auroc(positive[:, column], negative[:, column])
        assert (alone.value, alone.low, alone.high) == pytest.approx((value[column], low[column], high[column]))


@pytest.mark.parametrize(
    ("positive", "negative", "confidence", "message"),
    [
        ([], [1.0], 0.95, "0 positive"),
        ([1.0], [], 0.95, "0 negative"),
        ([math.nan], [1.0], 0.95, "not a number"),
        ([1.0], [1.0], 1.0, "confidence"),
    ],
)
def test_what_cannot_be_judged_is_refused(positive, negative, confidence, message) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(positive, negative, confidence)


def test_columns_must_match() -> None:
    with pytest.raises(ValueError, match="shapes"):
        auroc_columns(np.zeros((2, 3)), np.zeros((2, 4)))
