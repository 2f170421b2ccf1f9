"""The chunked evaluator equals the reference, for random rule sets, texts and chunkings."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.rules.chunked import State, advance
from interventions.rules.reading import parse_ruleset, parse_when
from interventions.rules.reference import evaluate
from interventions.rules.ruleset import Ruleset
from tests.rules.random_rulesets import DECLARED, READS, Text, rulesets, texts


def rows(ruleset: Ruleset, text: Text) -> list[tuple[frozenset, frozenset, frozenset]]:
    """What the chunked evaluator says, token by token, its state going through JSON between chunks."""
    readings, prompt_len, _, chunks = text
    state, found = State(), []
    for size in chunks:
        part = {read: a[state.position : state.position + size] for read, a in readings.items()}
        out, state = advance(ruleset, state, part, prompt_len, size)
        state = State.from_json(json.loads(json.dumps(state.as_json())))
        for i in range(size):
            found.append(
                (
                    frozenset(name for name, where in out.propositions.items() if where[i]),
                    frozenset(name for name, where in out.conclusions.items() if where[i]),
                    frozenset(k for k, where in enumerate(out.active) if where[i]),
                )
            )
    return found


@settings(max_examples=90, deadline=None)
@given(rulesets(), texts())
def test_every_chunking_gives_what_token_by_token_evaluation_gives(ruleset: Ruleset, text: Text) -> None:
    readings, prompt_len, n, _ = text
    steps = evaluate(ruleset, readings, prompt_len, n)
    assert rows(ruleset, text) == [(step.propositions, step.conclusions, step.active) for step in steps]


@settings(max_examples=40, deadline=None)
@given(rulesets(), texts(), st.data())
def test_what_is_concluded_never_depends_on_later_tokens(ruleset, text, data) -> None:
    readings, prompt_len, n, _ = text
    stop = data.draw(st.integers(0, n))
    changed = {read: np.concatenate([a[:stop], 1.5 - a[stop:]]).astype(np.float32) for read, a in readings.items()}
    assert evaluate(ruleset, readings, prompt_len, n)[:stop] == evaluate(ruleset, changed, prompt_len, n)[:stop]


@settings(max_examples=40, deadline=None)
@given(rulesets(), texts())
def test_position_0_is_never_evidence(ruleset, text) -> None:
    readings, prompt_len, n, _ = text
    changed = {read: np.concatenate([1.5 - a[:1], a[1:]]).astype(np.float32) for read, a in readings.items()}
    assert evaluate(ruleset, readings, prompt_len, n) == evaluate(ruleset, changed, prompt_len, n)


@settings(max_examples=40, deadline=None)
@given(rulesets(), texts())
def test_latching_conclusions_stay_and_proofs_rest_on_what_held(ruleset, text) -> None:
    readings, prompt_len, n, _ = text
    kept: frozenset[str] = frozenset()
    for step in evaluate(ruleset, readings, prompt_len, n):
        assert kept <= step.conclusions
        kept = step.conclusions & ruleset.latching
        assert {proof.conclusion for proof in step.proofs} == step.conclusions
        for proof in step.proofs:
            assert 1 <= proof.position <= step.position
            for reason in proof.because:
                assert all(1 <= p <= proof.position for p in reason.positions)
                if reason.premise is not None:
                    assert reason.premise.position <= proof.position


@settings(max_examples=60, deadline=None)
@given(rulesets())
def test_the_normal_form_reads_back_as_itself_in_both_forms(ruleset) -> None:
    for again in (parse_ruleset(ruleset.text), parse_ruleset(ruleset.as_json())):
        assert again == ruleset
        assert (again.text, again.digest) == (ruleset.text, ruleset.digest)
        assert (again.closed, again.strata) == (ruleset.closed, ruleset.strata)


# by hand -------------------------------------------------------------------------------------------------------------


def concluded(rules: str, a: list[int], b: list[int] | None = None, prompt_len: int = 4) -> list[list[str]]:
    """What holds at each token, for the 0/1 features 0 (``a``) and 1 (``b``)."""
    readings = {read: np.zeros(len(a), np.float32) for read in READS}
    readings["s", 0] = np.array(a, np.float32)
    readings["s", 1] = np.array(b or [0] * len(a), np.float32)
    ruleset = parse_ruleset(DECLARED + rules)
    return [sorted(step.conclusions) for step in evaluate(ruleset, readings, prompt_len, len(a))]


def marks(rules: str, a: list[int], b: list[int] | None = None, prompt_len: int = 4) -> list[int]:
    return [int("c" in found) for found in concluded(rules, a, b, prompt_len)]


def test_seen_holds_from_the_token_on_and_token_at_the_token() -> None:
    assert marks("rule r: seen(a) -> c", [1, 0, 1, 0, 0]) == [0, 0, 1, 1, 1]
    assert marks("rule r: a -> c", [1, 0, 1, 0, 1]) == [0, 0, 1, 0, 1]


def test_prompt_evidence_is_decided_at_the_last_prompt_token() -> None:
    assert marks("rule r: prompt(a) -> c", [0, 1, 0, 0, 0, 0]) == [0, 0, 0, 1, 1, 1]
    assert marks("rule r: prompt(a) -> c", [0, 0, 0, 0, 1, 0]) == [0, 0, 0, 0, 0, 0]
    assert marks("rule r: not prompt(a) -> c", [1, 0, 0, 0, 1, 0]) == [0, 0, 0, 1, 1, 1]


def test_weapon_and_not_police_waits_for_the_whole_prompt() -> None:
    rule = "rule r: seen(a) and not prompt(b) -> latch c"
    assert marks(rule, [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]) == [0, 0, 0, 0, 0]
    assert marks(rule, [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]) == [0, 0, 0, 1, 1]


def test_not_is_not_so_far() -> None:
    assert marks("rule r: seen(a) and not seen(b) -> c", [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]) == [0, 1, 1, 0, 0]


def test_order_needs_the_order() -> None:
    rule = "rule r: a before b before a -> c"
    assert marks(rule, [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]) == [0, 0, 0, 0, 0]
    assert marks(rule, [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]) == [0, 0, 0, 1, 1]
    assert marks("rule r: a before b -> c", [0, 1, 0, 0], [0, 1, 0, 0]) == [0, 0, 0, 0]


def test_counts_shares_and_windows() -> None:
    a = [1, 1, 0, 1, 0, 0, 1, 0]
    assert marks("rule r: at least 2 of seen(a) -> c", a) == [0, 0, 0, 1, 1, 1, 1, 1]
    assert marks("rule r: at least 50 % of seen(a) -> c", a) == [0, 1, 1, 1, 1, 0, 1, 0]
    assert marks("rule r: at least 66.6666 % of prompt tokens (a) -> c", a) == [0, 0, 0, 1, 1, 1, 1, 1]
    assert marks("rule r: at least 66.6667 % of prompt(a) -> c", a) == [0] * 8
    assert marks("rule r: last(2, a) -> c", a) == [0, 1, 1, 1, 1, 0, 1, 1]
    assert marks("rule r: at least 66 % of last(3, a) -> c", a) == [0, 0, 0, 1, 0, 0, 0, 0]


def test_a_prompt_of_one_token_has_no_evidence_and_no_shares() -> None:
    assert marks("rule r: at least 1 % of prompt(a) -> c", [1, 1, 1], prompt_len=1) == [0, 0, 0]
    assert marks("rule r: not prompt(a) -> c", [1, 1, 1], prompt_len=1) == [0, 1, 1]


def test_rules_chain_to_a_fixpoint_in_any_order() -> None:
    rules = "rule r1: y -> z rule r2: x -> y rule r3: a -> x rule r4: a and b -> w rule r5: z -> x"
    assert concluded(rules, [0, 1, 0])[1:] == [["x", "y", "z"], []]


def test_durations_restart_and_include_the_firing_token() -> None:
    rules = 'rule r: a -> c on c: do {"type": "steer", "vector": "v"} for 2 tokens on c: refuse "no" on c: log'
    ruleset = parse_ruleset(DECLARED + rules)
    readings = {read: np.zeros(7, np.float32) for read in READS}
    readings["s", 0] = np.array([1, 1, 1, 0, 0, 1, 0], np.float32)
    active = [sorted(step.active) for step in evaluate(ruleset, readings, 3, 7)]
    assert active == [[], [0, 1, 2], [0, 1, 2], [0, 1], [1], [0, 1, 2], [0, 1]]


def test_a_proof_names_its_rules_tokens_and_scores() -> None:
    ruleset = parse_ruleset(DECLARED + "rule one: seen(a) -> x rule two: x and not b -> y")
    readings = {read: np.zeros(4, np.float32) for read in READS}
    readings["s", 0] = np.array([0, 1.5, 0, 0], np.float32)
    proof = next(p for p in evaluate(ruleset, readings, 2, 4)[3].proofs if p.conclusion == "y")
    texts = {reason.text: reason for reason in proof.because}
    assert (proof.rule, proof.position, set(texts)) == ("two", 3, {"x", "not b"})
    premise = texts["x"].premise
    assert premise is not None
    assert (premise.rule, premise.because[0].text, premise.because[0].positions) == ("one", "seen(a)", (1,))
    assert premise.because[0].scores == (("a", (1.5,)),)


def test_when_may_name_what_other_rule_sets_conclude() -> None:
    condition = parse_when("dangerous and not feature(s, 0) >= 1", conclusions=["dangerous"])
    readings = {("s", 0): np.array([0, 0, 1, 0], np.float32)}
    dangerous = np.array([True, True, True, False])
    steps = evaluate(condition, readings, 2, 4, {"dangerous": dangerous.tolist()})
    out, _ = advance(condition, State(), readings, 2, 4, {"dangerous": dangerous})
    assert [bool(step.conclusions) for step in steps] == [False, True, False, False]
    assert out.conclusions["when"].tolist() == [False, True, False, False]
