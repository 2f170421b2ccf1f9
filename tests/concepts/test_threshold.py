from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions.concepts.threshold import best_cut, best_share, midpoint


def accuracy(scores: npt.NDArray[Any], positive: npt.NDArray[np.bool_], threshold: float) -> float:
    above = scores.astype(np.float32) >= np.float32(threshold)
    return float((above[positive].mean() + (~above[~positive]).mean()) / 2)


def test_the_boundary_positive_is_kept_and_the_threshold_lies_halfway() -> None:
    """A threshold that is a score of the data, compared with >, finds 3 of these 4."""
    scores = np.array([4, 5, 6, 7, 0, 0, 0, 1], np.float32)
    positive = np.arange(8) < 4
    cut = best_cut(scores, positive)
    assert (cut.threshold, cut.balanced_accuracy) == (2.5, 1.0)
    assert int((scores[positive] >= cut.threshold).sum()) == 4
    roc = 4.0
    assert int((scores[positive] > roc).sum()) == 3


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 3.0, 1e-30, -2.0]), st.booleans()), min_size=2).filter(
        lambda rows: len({yes for _, yes in rows}) == 2 and len({score for score, _ in rows}) > 1
    )
)
def test_no_threshold_does_better(rows: list[tuple[float, bool]]) -> None:
    scores, positive = np.array([s for s, _ in rows], np.float32), np.array([yes for _, yes in rows])
    cut = best_cut(scores, positive)
    assert np.isfinite(cut.threshold)
    assert float(np.float32(cut.threshold)) == cut.threshold
    assert accuracy(scores, positive, cut.threshold) == pytest.approx(cut.balanced_accuracy)
    values = np.unique(scores)
    assert cut.balanced_accuracy == pytest.approx(max(accuracy(scores, positive, float(value)) for value in values[1:]))
    assert values[0] < cut.threshold <= values[-1]


def test_of_equally_good_gaps_the_widest_is_taken() -> None:
    scores = np.array([0, 1, 5, 9], np.float32)
    positive = np.array([False, True, False, True])
    assert best_cut(scores, positive).threshold == 7.0
    assert best_cut(np.array([0, 6, 8, 9], np.float32), positive).threshold == 3.0


def test_between_neighbouring_floats_the_upper_one_is_the_threshold() -> None:
    low = np.float32(1)
    high = np.nextafter(low, np.float32(2))
    assert midpoint(float(low), float(high)) == float(high)


@pytest.mark.parametrize(
    ("scores", "positive", "says"),
    [
        ([1, 2], [True, True], "2 positives and 0 negatives"),
        ([1, 1], [True, False], "all scores are equal"),
        ([1, np.nan], [True, False], "not finite"),
        ([1, 2, 3], [True, False], "one per score"),
    ],
)
def test_what_no_threshold_parts_is_refused(scores: list[float], positive: list[bool], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        best_cut(np.array(scores, np.float32), np.array(positive))


@pytest.mark.parametrize(
    ("low", "high", "ppm"),
    [(0.0, 0.5, 200_000), (0.1, 0.2, 150_000), (0.111, 0.139, 120_000), (1 / 3, 0.3334, 333_370), (0.9, 1.0, 950_000)],
)
def test_shares_are_cut_at_a_round_number_of_the_gap(low: float, high: float, ppm: int) -> None:
    cut = best_share(np.array([low, high]), np.array([False, True]))
    assert cut.threshold == ppm
    assert low * 1e6 < cut.threshold <= high * 1e6
