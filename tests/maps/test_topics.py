"""Statistics are the same in any order and split; the selections are their published recipes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions.maps.topics import LARGEST, STEP, TopicError, TopicStatistics, crisp, dsg, farrell

N = 60


def activations(seed: int, tokens: int = 2000, rates: Tensor | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    rates = torch.full((N,), 0.05) if rates is None else rates
    return (torch.rand(tokens, N, generator=g) < rates) * torch.rand(tokens, N, generator=g) * 3


def statistics(f: Tensor) -> TopicStatistics:
    return TopicStatistics.empty(N).add(f)


def same(a: TopicStatistics, b: TopicStatistics) -> bool:
    return a.tokens == b.tokens and np.array_equal(a.total, b.total) and np.array_equal(a.fired, b.fired)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, 50), max_size=5), shuffle=st.randoms())
def test_neither_order_nor_split_nor_tree_of_merges_changes_a_bit(seed: int, cuts: list[int], shuffle) -> None:
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(50, N, generator=g) * 10.0 ** torch.randint(-6, 5, (50, N), generator=g)
    bounds = [0, *sorted(cuts), 50]
    order = list(range(50))
    shuffle.shuffle(order)
    parts = [statistics(f[order[a:b]]) for a, b in pairwise(bounds)]
    shuffle.shuffle(parts)
    while len(parts) > 1:
        parts.append(parts.pop(0).merge(parts.pop(0)))
    assert same(parts[0], statistics(f))


def test_means_and_frequencies_are_those_of_the_batch() -> None:
    f = activations(0)
    keep = torch.arange(2000) % 100 != 0  # position 0 of twenty texts
    found = TopicStatistics.empty(N).add(f, keep)
    kept = f[keep].double().numpy()
    assert found.tokens == 1980
    np.testing.assert_allclose(found.mean, kept.mean(axis=0), rtol=0, atol=STEP)
    np.testing.assert_array_equal(found.frequency, (kept != 0).mean(axis=0))
    np.testing.assert_allclose(found.mean_when_active, kept.sum(axis=0) / (kept != 0).sum(axis=0), rtol=1e-5)
    signed = TopicStatistics.empty(2).add(torch.tensor([[-2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    assert (signed.fired.tolist(), signed.mean.tolist()) == ([2, 0], [-1 / 3, 0.0])
    empty = TopicStatistics.empty(3)
    assert (empty.mean.tolist(), empty.frequency.tolist()) == ([0, 0, 0], [0, 0, 0])


RATES = torch.full((N,), 0.02)
TOPIC, DENSE = [4, 9, 33], [0, 1]


@pytest.fixture(scope="module")
def sets() -> tuple[TopicStatistics, TopicStatistics]:
    """Three latents fire on 30 % of the forget tokens and 0.1 % of the retain ones; two are dense in both."""
    forget, retain = RATES.clone(), RATES.clone()
    forget[TOPIC], retain[TOPIC] = 0.3, 0.001
    forget[DENSE] = retain[DENSE] = 0.9
    forget[50] = 0.0
    retain[50] = 0.0
    return statistics(activations(1, 4000, forget)), statistics(activations(2, 4000, retain))


def test_every_selection_finds_the_planted_topic_and_no_dense_latent(sets) -> None:
    for select in (farrell, dsg, crisp):
        found = select(*sets, 3)
        assert sorted(found.latents) == TOPIC, select.__name__
        assert list(found.scores) == sorted(found.scores, reverse=True)


def test_by_the_mean_alone_the_dense_latents_would_win(sets) -> None:
    assert np.argsort(-sets[0].mean)[:2].tolist() in ([0, 1], [1, 0])
    assert not {*DENSE} & {*farrell(*sets, 20, score="mean").latents}


def test_farrell_is_the_published_recipe(sets) -> None:
    forget, retain = sets
    for score in ("frequency", "mean"):
        ours, theirs = getattr(forget, score).copy(), getattr(retain, score)
        ours[theirs >= 0.02] = 0
        expected = [i for i in np.argsort(-ours, kind="stable") if ours[i] > 0][:20]
        assert list(farrell(forget, retain, 20, 0.02, score).latents) == expected


def test_a_retain_score_at_the_threshold_is_too_much() -> None:
    forget = TopicStatistics.empty(2).add(torch.tensor([[1.0, 1.0]]))
    retain = TopicStatistics.empty(2).add(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert farrell(forget, retain, 2, 0.5).latents == (1,)
    assert farrell(forget, retain, 2, 0.5 + 1e-9).latents == (0, 1)


def test_dsg_is_the_published_recipe(sets) -> None:
    forget, retain = sets
    ours, theirs = forget.mean**2, retain.mean**2
    ratio = ours / (theirs + 1e-21)
    keep = (
        (ours >= np.percentile(ours, 5)) & (theirs <= np.percentile(theirs, 90)) & (ratio >= np.percentile(ratio, 60))
    )
    expected = [i for i in np.argsort(-ours, kind="stable") if keep[i]]
    found = dsg(forget, retain, N, ratio_percentile=60, retain_percentile=90)
    assert list(found.latents) == expected
    assert found.passed["all"] == len(expected)
    assert found.scores == tuple(forget.mean[expected] ** 2)
    assert found.passed["ratio in percentile 60"] == 24
    assert 50 not in dsg(forget, retain, N, 0, 0).latents  # silent on both: importance 0, ratio 0


def test_crisp_is_the_published_recipe_on_sets_of_equal_size(sets) -> None:
    forget, retain = sets
    difference = forget.fired - retain.fired
    ratio = forget.total * STEP / (retain.total * STEP + 1)
    candidates = np.argsort(-difference, kind="stable")[:50]
    assert list(crisp(forget, retain, 5).latents) == [i for i in candidates if ratio[i] >= 3][:5]


def test_crisp_does_not_depend_on_how_much_retain_text_there_is() -> None:
    """Latent 0 sums to 9 against 1: (9 / (1 + 1)) ≥ 3. Unscaled, thrice the retain text would make it 9 / (3 + 1)."""
    forget = TopicStatistics.empty(1).add(torch.ones(9, 1))
    retain = TopicStatistics.empty(1).add(torch.eye(9)[:, :1])
    tripled = retain.merge(retain).merge(retain)
    for theirs in (retain, tripled):
        found = crisp(forget, theirs)
        assert (found.latents, found.scores) == ((0,), (8.0,))


def test_what_cannot_be_added_is_refused() -> None:
    s = TopicStatistics.empty(2)
    for bad in (float("nan"), float("inf"), 2 * LARGEST):
        with pytest.raises(TopicError, match="left out"):
            s.add(torch.tensor([[0.0, bad]]))
    with pytest.raises(TopicError, match="shape"):
        s.add(torch.zeros(1, 3))
    with pytest.raises(TopicError, match="do not belong together"):
        s.merge(TopicStatistics.empty(3))
    full = s.add(torch.full((4096, 2), LARGEST))
    full = full.merge(full).merge(full).merge(full)
    assert full.mean.tolist() == [LARGEST, LARGEST]
    full = full.merge(full)
    with pytest.raises(TopicError, match="sums are full"):
        full.merge(full)
    with pytest.raises(TopicError, match="smaller chunks"):
        s.add(torch.tensor([[LARGEST, 0.0]]).expand(1 << 16, 2))
    with pytest.raises(TopicError, match="needs tokens of both"):
        farrell(s, s, 1)
    with pytest.raises(TopicError, match="forget has 2 latents, retain 3"):
        dsg(s, TopicStatistics.empty(3), 1)
