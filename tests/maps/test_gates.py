"""Gates equal a plain loop over tokens, however the tokens are split, and tell padding from silence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.errors import InterventionError
from interventions.maps.dilution import dilute, padding_to_evade
from interventions.maps.gates import (
    START,
    STEP,
    CusumGate,
    Gate,
    GateState,
    ShareGate,
    WindowGate,
    statistic,
    update,
)
from tests.maps.published import SELECTED, TinySAE, published_draws


def by_token(gate: Gate, hits: Sequence[bool], prompt_len: int) -> list[bool]:
    """The docstring's loop in exact arithmetic: one token after the other, the whole past in lists."""
    seen: list[bool] = []
    level, latched, answers = Fraction(0), False, []
    decided = False
    for position, bit in enumerate(hits):
        evidence = position > 0 or gate.include_bos
        if isinstance(gate, ShareGate) and gate.over == "prompt":
            if evidence and position < prompt_len:
                seen.append(bit)
            if position == prompt_len - 1:
                decided = bool(seen) and sum(seen) / len(seen) > gate.threshold
            answers.append(decided)
            continue
        if evidence:
            seen.append(bit)
        if isinstance(gate, CusumGate):
            if evidence:
                k = Fraction(round(gate.k / STEP)) * Fraction(STEP)
                level = max(Fraction(0), level + bit - k)
            alarm = level > Fraction(gate.threshold)
            level = Fraction(0) if alarm and gate.reset else level
        else:
            recent = seen[-gate.window :] if isinstance(gate, WindowGate) else seen
            alarm = len(seen) >= gate.least and sum(recent) / len(recent) > gate.threshold
        latched = latched or alarm
        answers.append(latched if gate.latch else alarm)
    return answers


def in_chunks(gate: Gate, hits: Sequence[bool], sizes: Sequence[int], prompt_len: int) -> tuple[list[bool], GateState]:
    """The same gate, chunk by chunk, its state through bytes in between as a preempted request's would go."""
    answers: list[bool] = []
    state, at = START, 0
    for size in sizes:
        opened, state = update(gate, GateState.from_bytes(state.to_bytes()), hits[at : at + size], prompt_len)
        answers += opened.tolist()
        at += size
    assert at == len(hits)
    return answers, state


FLAGS = {"latch": st.booleans(), "include_bos": st.booleans()}
THRESHOLD = st.one_of(st.floats(0, 1), st.fractions(0, 1, max_denominator=12).map(float))
GATES = st.one_of(
    st.builds(ShareGate, THRESHOLD, over=st.sampled_from(["prompt", "seen"]), least=st.integers(1, 10), **FLAGS),
    st.integers(1, 20).flatmap(
        lambda w: st.builds(WindowGate, THRESHOLD, window=st.just(w), least=st.integers(1, w), **FLAGS)
    ),
    st.builds(CusumGate, st.floats(0, 6), k=st.floats(0, 0.99), reset=st.booleans(), **FLAGS),
)


@settings(max_examples=400, deadline=None)
@given(gate=GATES, hits=st.lists(st.booleans(), min_size=1, max_size=60), data=st.data())
def test_every_gate_is_its_loop_in_chunks_of_any_size(gate: Gate, hits: list[bool], data: st.DataObject) -> None:
    prompt_len = data.draw(st.integers(1, len(hits)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(hits)), max_size=8)))
    sizes = np.diff([0, *cuts, len(hits)]).tolist()  # empty chunks included
    expected = by_token(gate, hits, prompt_len)
    answers, state = in_chunks(gate, hits, sizes, prompt_len)
    assert answers == expected
    assert (answers, state) == in_chunks(gate, hits, [len(hits)], prompt_len)
    assert (answers, state) == in_chunks(gate, hits, [1] * len(hits), prompt_len)


@settings(max_examples=200, deadline=None)
@given(gate=GATES, hits=st.lists(st.booleans(), min_size=1, max_size=60), data=st.data())
def test_an_answer_depends_on_no_later_token(gate: Gate, hits: list[bool], data: st.DataObject) -> None:
    prompt_len = data.draw(st.integers(1, len(hits)))
    cut = data.draw(st.integers(0, len(hits)))
    whole, _ = update(gate, START, hits, prompt_len)
    other, _ = update(gate, START, hits[:cut] + [True] * (len(hits) - cut), prompt_len)
    assert whole[:cut].tolist() == other[:cut].tolist()


@settings(max_examples=300, deadline=None)
@given(gate=GATES, hits=st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_gate_opens_somewhere_exactly_if_the_statistic_is_above_its_threshold(gate: Gate, hits: list[bool]) -> None:
    opened, _ = update(gate, START, hits, len(hits))
    assert opened.any() == (statistic(gate, hits) > gate.threshold)


@pytest.mark.parametrize("sizes", [[40], [7, 13, 20], [1] * 40])
@pytest.mark.parametrize("over", ["prompt", "seen"])
def test_the_published_count_is_the_same_in_any_chunks(sizes: list[int], over) -> None:
    """31 hits in 40 tokens; the share leaves position 0 out of both, where the published one divides by 40."""
    hits = (TinySAE(32, 128, 1).encode(published_draws().h)[:, SELECTED] > 0).any(axis=1)
    answers, state = in_chunks(ShareGate(31 / 39 - 1e-12, over), hits.tolist(), sizes, 40)
    assert (state.hits, state.seen, state.position) == (31, 39, 40)
    assert answers[-1]
    assert not in_chunks(ShareGate(31 / 39, over), hits.tolist(), sizes, 40)[0][-1]
    if over == "prompt":
        assert answers == [False] * 39 + [True]


def test_a_gate_without_state_would_be_off_while_generating() -> None:
    """The upstream hook zeroes index 0 of every forward pass: fed token by token its share is 0 (published: max ρ = 0)."""
    hits = (TinySAE(32, 128, 1).encode(published_draws().h)[:, SELECTED] > 0).any(axis=1).tolist()
    gate = ShareGate(0.0, "seen")
    stateless = [update(gate, START, [bit])[0][0] for bit in hits]
    assert not any(stateless)
    assert in_chunks(gate, hits, [1] * 40, 40)[0][-1]


def test_generated_tokens_change_nothing_after_a_decision_over_the_prompt() -> None:
    gate = ShareGate(0.5)
    for prompt, decision in (([False, True, True, False], True), ([False, True, False, False], False)):
        for tail in ([True] * 9, [False] * 9):
            for sizes in ([13], [4, 9], [3, 1, 9], [2, 5, 6]):
                answers, state = in_chunks(gate, prompt + tail, sizes, 4)
                assert answers == [False] * 3 + [decision] * 10
                assert (state.seen, state.hits) == (3, sum(prompt))


def test_position_0_is_no_evidence_unless_asked_for() -> None:
    for gate in (ShareGate(0.9, "seen"), WindowGate(0.9, 4), CusumGate(0.5, 0.1)):
        assert not update(gate, START, [True])[0].any()
    for gate in (
        ShareGate(0.9, "seen", include_bos=True),
        WindowGate(0.9, 4, include_bos=True),
        CusumGate(0.5, 0.1, include_bos=True),
    ):
        assert update(gate, START, [True])[0].all()
    assert not update(ShareGate(0.0), START, [True], prompt_len=1)[0].any()  # a prompt of position 0 alone: no evidence


HITS, SEEN, TAU = 12, 100, 0.08
QUESTION = [False] + [i % 8 == 7 for i in range(96)] + [False] * 4  # position 0, then 12 hits in 100 tokens


def test_dilution_evades_a_share_after_exactly_50_tokens() -> None:
    assert (sum(QUESTION), len(QUESTION) - 1) == (HITS, SEEN)
    assert padding_to_evade(HITS, SEEN, TAU) == 50 == math.ceil(HITS / TAU - SEEN)
    for place in ("before", "after", "between"):
        assert statistic(ShareGate(TAU), dilute(QUESTION, 49, place)) > TAU
        assert statistic(ShareGate(TAU), dilute(QUESTION, 50, place)) <= TAU


@pytest.mark.parametrize("padding", [0, 50, 1600])
@pytest.mark.parametrize("place", ["before", "after"])
def test_dilution_around_the_question_evades_neither_cusum_nor_a_window(padding: int, place) -> None:
    """S climbs by 12 − 89·0.02 over the question wherever it stands; padding can only bring it back to 0 first."""
    padded = dilute(QUESTION, padding, place)
    assert statistic(CusumGate(1.0, k=0.02), padded) >= statistic(CusumGate(1.0, k=0.02), QUESTION) - STEP
    assert statistic(CusumGate(1.0, k=0.02), padded) > 9.0
    assert statistic(WindowGate(TAU, 100, least=100), padded) >= 0.11


def test_spreading_the_padding_within_the_question_lowers_cusum_too() -> None:
    """What CUSUM cannot see: hits rarer than k on average. The threshold's false-positive rate prices this in."""
    gate = CusumGate(1.0, k=0.1)
    assert statistic(gate, QUESTION) > statistic(gate, dilute(QUESTION, 300, "between"))


@settings(max_examples=200, deadline=None)
@given(hits=st.integers(0, 50), more=st.integers(0, 100), threshold=st.floats(0.01, 1.0))
def test_padding_to_evade_is_the_least_that_does(hits: int, more: int, threshold: float) -> None:
    seen = max(1, hits + more)
    padding = padding_to_evade(hits, seen, threshold)
    assert hits / (seen + padding) <= threshold
    assert padding == 0 or hits / (seen + padding - 1) > threshold


@settings(max_examples=100, deadline=None)
@given(
    hits=st.lists(st.booleans(), min_size=1, max_size=30),
    padding=st.integers(0, 40),
    place=st.sampled_from(["before", "after", "between"]),
)
def test_dilution_adds_benign_tokens_and_keeps_the_rest_in_order(hits: list[bool], padding: int, place) -> None:
    padded = dilute(hits, padding, place)
    assert len(padded) == len(hits) + padding
    assert padded[0] == hits[0]
    assert padded.sum() == sum(hits)


def test_cusum_resets_after_an_alarm_and_otherwise_stays_up() -> None:
    hits = [False, True, True, True, False, False, True, True, True]
    up, _ = update(CusumGate(1.25, k=0.5), START, hits)  # S = 0 .5 1 1.5 1 .5 1 1.5 2
    assert up.tolist() == [False, False, False, True, False, False, False, True, True]
    again, state = update(CusumGate(1.25, k=0.5, reset=True), START, hits)  # S = 0 .5 1 1.5 0 0 .5 1 1.5
    assert again.tolist() == [False, False, False, True, False, False, False, False, True]
    assert state.level == 0
    latched, _ = update(CusumGate(1.25, k=0.5, reset=True, latch=True), START, hits)
    assert latched.tolist() == [False] * 3 + [True] * 6


def test_a_long_sequence_costs_milliseconds_not_a_python_loop() -> None:
    hits = np.random.default_rng(5).random(200_000) < 0.05
    for gate in (ShareGate(0.9, "seen"), WindowGate(0.9, 256), CusumGate(1e9, k=0.04)):
        opened, state = update(gate, START, hits)
        assert not opened[1000:].any()
        assert state.position == 200_000


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[1,2]", b'[0,0,0,"0",0,1]', b"[0,0,0,0,0,false]", b'[-1,0,0,"0",0,false]', b'[0, 0,0,"0",0,false]'],
)
def test_anything_but_a_state_is_not_read_as_one(data: bytes) -> None:
    with pytest.raises(ValueError):
        GateState.from_bytes(data)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: ShareGate(-0.1), "threshold"),
        (lambda: WindowGate(math.nan, 4), "threshold"),
        (lambda: ShareGate(0.1, "everything"), "over"),
        (lambda: ShareGate(0.1, "seen", least=0), "least"),
        (lambda: WindowGate(0.1, 0), "window"),
        (lambda: WindowGate(0.1, 4, least=5), "least"),
        (lambda: CusumGate(1.0, 1.0), "k"),
        (lambda: CusumGate(1.0, math.nan), "k"),
    ],
)
def test_a_gate_that_means_nothing_names_its_field(make, param: str) -> None:
    with pytest.raises(InterventionError) as error:
        make()
    assert (error.value.code, error.value.param) == ("invalid_artifact", param)


def test_a_share_over_the_prompt_needs_its_length() -> None:
    with pytest.raises(ValueError, match="prompt"):
        update(ShareGate(0.5), START, [True])
