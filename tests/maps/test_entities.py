"""Planted known and unknown latents are found again, dense ones left out, lengths matched."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.maps.entities import (
    EntityError,
    auroc_edited,
    auroc_matched,
    find_latents,
    firing,
    known_to_unknown,
    match_lengths,
    mean_activation,
    scores,
)
from tests.maps.published import KNOWN, UNKNOWN, Draws, published_draws


@pytest.fixture(scope="module")
def draws() -> Draws:
    return published_draws()


@pytest.mark.parametrize("method", ["absolute_difference", "relative_difference"])
def test_planted_latents_are_recovered_exactly(draws: Draws, method) -> None:
    found = find_latents({"player": draws.known}, {"player": draws.unknown}, 4, 2, method=method)
    assert (sorted(found.known), sorted(found.unknown)) == (KNOWN, UNKNOWN)
    assert found.all == tuple(KNOWN + UNKNOWN)
    if method == "absolute_difference":
        assert min(found.known_scores + found.unknown_scores) == pytest.approx(0.87, abs=0.005)
    assert found.known_scores == tuple(sorted(found.known_scores, reverse=True))


def test_scores_are_the_published_equations() -> None:
    f_known, f_unknown = firing([[1.0, 0.0, 1e-7], [2.0, 0.0, 0.0]]), firing([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    assert (f_known.tolist(), f_unknown.tolist()) == ([1.0, 0.0, 0.0], [0.5, 0.5, 0.0])
    s_known, s_unknown = scores(f_known, f_unknown)
    assert (s_known.tolist(), s_unknown.tolist()) == ([0.5, -0.5, 0.0], [-0.5, 0.5, 0.0])
    s_known, s_unknown = scores(f_known, f_unknown, "relative_difference")
    assert s_known == pytest.approx([1.0, -1.0, 0.0], abs=1e-5)
    assert s_unknown == pytest.approx([-0.5, 5e5, 0.0], abs=1e-5)


def test_a_latent_of_one_type_only_is_not_taken() -> None:
    """MaxMin: latent 0 tells known players perfectly and known cities not at all; latent 1 tells both, less well."""
    on, half = np.ones((10, 1)), (np.arange(10) % 2)[:, None].astype(float)
    off = np.zeros((10, 1))
    known = {"player": np.hstack([on, half]), "city": np.hstack([off, half])}
    unknown = {"player": np.hstack([off, off]), "city": np.hstack([off, off])}
    found = find_latents(known, unknown, 2, 2)
    assert (found.known, found.unknown, found.known_scores) == ((1,), (), (0.5,))


def test_dense_latents_are_left_out_and_counted(draws: Draws) -> None:
    best = find_latents({"a": draws.known}, {"a": draws.unknown}, 4, 2)
    background = np.full(200, 0.001)
    background[[best.known[0], best.unknown[0]]] = [0.02, 0.5]  # 2 % is dense already
    found = find_latents({"a": draws.known}, {"a": draws.unknown}, 3, 1, background)
    assert (found.known, found.unknown, found.dense) == (best.known[1:], best.unknown[1:], 2)
    background[best.known[0]] = 0.0199
    found = find_latents({"a": draws.known}, {"a": draws.unknown}, 4, 1, background)
    assert (found.known, found.dense) == (best.known, 1)


def test_the_map_sets_every_latent_to_its_mean_over_unknown_entities(draws: Draws) -> None:
    latents = KNOWN + UNKNOWN
    mu = mean_activation(draws.unknown, latents)
    assert mu == pytest.approx(draws.unknown.mean(axis=0)[latents])
    assert mu[:4].max() < 0.2  # known latents hardly fire on unknown entities
    assert mu[4:].min() > 3
    transfers = known_to_unknown(latents, mu)
    assert [(t.latent, t.alpha, t.beta) for t in transfers] == [
        (i, 0.0, pytest.approx(m)) for i, m in zip(latents, mu, strict=True)
    ]


def test_length_alone_separates_invented_names_until_lengths_match() -> None:
    """A probe that only counts tokens: AUROC near 1 before matching, ½ after."""
    g = np.random.default_rng(1)
    known, unknown = g.integers(1, 4, 200), g.integers(3, 9, 300)
    matching = match_lengths(known.tolist(), unknown.tolist())
    result = auroc_matched(known, unknown, matching)
    assert result.before.value < 0.05
    assert result.after.value == pytest.approx(0.5)
    assert set(matching.lengths) == {3}
    assert sum(matching.lengths.values()) == len(matching.pairs)


LENGTHS = st.lists(st.integers(1, 6), max_size=30)


@settings(max_examples=200, deadline=None)
@given(known=LENGTHS, unknown=LENGTHS)
def test_matching_is_exact_one_to_one_and_as_large_as_can_be(known: list[int], unknown: list[int]) -> None:
    matching = match_lengths(known, unknown)
    assert all(known[i] == unknown[j] for i, j in matching.pairs)
    for kept, dropped, everyone in (
        (matching.known, matching.dropped_known, known),
        (matching.unknown, matching.dropped_unknown, unknown),
    ):
        assert sorted([*kept, *dropped]) == list(range(len(everyone)))
    assert len(matching.pairs) == (Counter(known) & Counter(unknown)).total()
    assert Counter(known[i] for i in matching.known) == Counter(matching.lengths)


def test_the_edited_target_is_compared_with_unknown_entities() -> None:
    g = np.random.default_rng(2)
    result = auroc_edited(g.normal(4, 1, 300), g.normal(0, 1, 300), g.normal(0, 1, 300))
    assert result.before.value > 0.99
    assert result.after.low < 0.5 < result.after.high


def test_entities_that_give_nothing_are_refused(draws: Draws) -> None:
    with pytest.raises(EntityError, match="known has the types a, unknown b"):
        find_latents({"a": draws.known}, {"b": draws.unknown}, 1, 1)
    with pytest.raises(EntityError, match="no latent fires more often"):
        find_latents({"a": draws.known}, {"a": draws.known}, 4, 4)
    with pytest.raises(EntityError, match="shape"):
        firing(np.zeros((0, 4)))
    with pytest.raises(EntityError, match="not a finite number"):
        firing([[np.nan]])
    with pytest.raises(EntityError, match="background has shape"):
        find_latents({"a": draws.known}, {"a": draws.unknown}, 1, 1, np.zeros(3))
    with pytest.raises(EntityError, match="different numbers of latents"):
        find_latents({"a": draws.known, "b": np.ones((2, 3))}, {"a": draws.unknown, "b": np.zeros((2, 3))}, 1, 1)
    with pytest.raises(EntityError, match="t_test"):
        scores(np.zeros(2), np.zeros(2), "t_test")  # type: ignore[arg-type]
    with pytest.raises(EntityError, match="no known entity"):
        auroc_matched([1.0], [2.0], match_lengths([1], [2]))
