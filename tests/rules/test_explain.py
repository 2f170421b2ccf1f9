"""What a server says about a request's rules is what the reference evaluator would say."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings

from interventions.rules.chunked import State, advance
from interventions.rules.explain import Explanation, proof_json, runs
from interventions.rules.proof import MAX_NESTING, SHOWN, Proof
from interventions.rules.reading import Guard, parse_ruleset, parse_when
from interventions.rules.reference import evaluate
from interventions.rules.ruleset import Ruleset
from tests.rules.random_rulesets import Text, rulesets, texts

DECLARED = "proposition a = feature(s, 0) > 0\nproposition b = feature(s, 1) > 0\n"


def explained(ruleset: Ruleset, text: Text) -> Explanation:
    readings, prompt_len, n, _ = text
    held = {name: found.holds(readings) for name, found in ruleset.propositions.items()}
    scores = {name: found.scores(readings) for name, found in ruleset.propositions.items()}
    return Explanation(ruleset, held, prompt_len, n, scores)


def of(rules: str, held: dict[str, list[int]], prompt_len: int, scores: dict[str, list[float]] | None = None):
    ruleset = parse_ruleset(DECLARED + rules)
    n = len(held["a"])
    where = {name: np.array(held.get(name, [0] * n), bool) for name in ruleset.propositions}
    known = {name: np.array(values, np.float32) for name, values in (scores or {}).items()}
    return Explanation(ruleset, where, prompt_len, n, known)


@settings(max_examples=90, deadline=None)
@given(rulesets(), texts())
def test_conclusions_actions_and_proofs_are_those_of_the_reference(ruleset: Ruleset, text: Text) -> None:
    readings, prompt_len, n, _ = text
    found = explained(ruleset, text)
    before: frozenset[str] = frozenset()
    edges = []
    for step in evaluate(ruleset, readings, prompt_len, n):
        assert {name for name, where in found.conclusions.items() if where[step.position]} == step.conclusions
        assert set(np.flatnonzero(found.active[step.position])) == step.active
        assert tuple(found.proof(name, step.position) for name in sorted(step.conclusions)) == step.proofs
        edges += [(step.position, name) for name in sorted(step.conclusions - before)]
        before = step.conclusions
    assert found.edges() == edges
    assert [(proof.position, proof.conclusion) for proof in explained(ruleset, text).fired(3)] == edges[:3]
    for proof in found.fired():
        json.dumps(proof_json(proof), allow_nan=False)


def test_a_proof_in_json_nests_its_premises() -> None:
    rules = "rule one: seen(a) -> x rule two: x and not b and prompt_ended -> y"
    found = of(rules, {"a": [1, 1, 0, 1]}, 3, {"a": [9, 1.5, 0, 2.5]})
    assert proof_json(found.proof("y", 3)) == {
        "rule": "two",
        "conclusion": "y",
        "position": 3,
        "because": [
            {"evidence": "not b"},
            {"evidence": "prompt_ended"},
            {
                "rule": "one",
                "conclusion": "x",
                "position": 3,
                "because": [{"evidence": "seen(a)", "count": 2, "positions": [1, 3], "scores": {"a": [1.5, 2.5]}}],
            },
        ],
    }


def test_scores_that_are_not_known_are_null() -> None:
    (proof,) = of("rule r: seen(a) -> c", {"a": [0, 1, 1]}, 2, {"a": [np.nan, np.nan, 2]}).fired()
    assert proof_json(proof)["because"][0]["scores"] == {"a": [None]}
    (proof,) = of("rule r: a -> c", {"a": [0, 1, 1]}, 2).fired()
    assert proof_json(proof)["because"][0]["scores"] == {"a": [None]}


def test_a_conclusion_that_does_not_hold_has_no_proof() -> None:
    with pytest.raises(KeyError):
        of("rule r: a -> c", {"a": [1, 1, 0]}, 2).proof("c", 2)


def test_a_long_text_is_explained_in_milliseconds_and_a_proof_shows_the_first_tokens() -> None:
    n, chance = 16_384, np.random.default_rng(0)
    rules = "".join(f"rule r{i}: at least {i + 1} of seen(a) and last(64, b) -> c{i}\n" for i in range(32))
    held = {"a": chance.random(n) < 0.5, "b": chance.random(n) < 0.5}
    ruleset = parse_ruleset(f"{DECLARED}{rules}rule order: a before b before a -> d\nrule both: c31 and d -> latch e")
    started = time.perf_counter()
    found = Explanation(ruleset, held, 100, n)
    built, start = time.perf_counter() - started, time.perf_counter()
    last = [found.proof(name, n - 1) for name in ("c0", "c31", "d", "e")]
    asked = time.perf_counter() - start
    assert built < 2
    assert asked < 1  # token by token it takes minutes
    a = next(reason for reason in last[0].because if reason.text == "seen(a)")
    places = np.flatnonzero(held["a"][1:]) + 1
    assert a.count == len(places)
    assert list(a.positions) == places[:SHOWN].tolist()
    assert last[-1].position < 200


def test_shared_and_deep_premises_are_written_once() -> None:
    """Without, 60 conclusions of which each rests on the two before it make a proof of 10¹² lines."""
    rules = "".join(f"rule r{i}: x{i - 1} and x{i - 2} -> x{i}\n" for i in range(3, 60))
    found = of(f"rule r1: a -> x1\nrule r2: seen(a) -> x2\n{rules}", {"a": [0, 1, 0]}, 2)
    text = json.dumps(proof_json(found.proof("x59", 1)))
    assert len(text) < 10_000

    def depth(proof: dict) -> int:
        return 1 + max((depth(part) for part in proof.get("because", []) if "rule" in part), default=0)

    assert depth(json.loads(text)) == MAX_NESTING + 1


def test_what_other_rule_sets_concluded_comes_with_its_proof() -> None:
    other = of("rule r: a -> dangerous", {"a": [0, 0, 1]}, 2, {"a": [0, 0, 3]})
    condition = parse_when("dangerous and not feature(s, 1) > 0", conclusions=["dangerous"])
    quiet = {"feature(s, 1) > 0": np.zeros(3, bool)}
    given = {"dangerous": other.conclusions["dangerous"]}
    alone = Explanation(condition, quiet, 2, 3, given=given)
    assert proof_json(alone.proof("when", 2))["because"] == [
        {"conclusion": "dangerous"},
        {"evidence": "not feature(s, 1) > 0"},
    ]
    together = Explanation(condition, quiet, 2, 3, given=given, premises={"dangerous": (other, "dangerous")})
    (premise, _) = together.proof("when", 2).because
    assert isinstance(premise.premise, Proof)
    assert premise.premise.rule == "r"


def test_rule_sets_that_rest_on_each_other_explain_one_another_once() -> None:
    def conditioned(rules: str, on: str) -> Ruleset:
        return parse_ruleset(DECLARED + rules, guard=Guard(on, conclusions={on: False}))

    one, other = conditioned("rule r: a -> x", "y"), conditioned("rule r: a -> y", "x")
    held = {"a": np.array([0, 1], bool), "b": np.zeros(2, bool)}
    always = np.array([False, True])
    premises: dict[str, tuple[Explanation, str]] = {}
    first = Explanation(one, held, 2, 2, given={"y": always}, premises=premises)
    premises["y"] = (Explanation(other, held, 2, 2, given={"x": always}, premises={"x": (first, "x")}), "y")
    proof = proof_json(first.proof("x", 1))
    inner = next(part for part in proof["because"] if part.get("conclusion") == "y")
    assert {"conclusion": "x"} in inner["because"]


def test_runs_begin_where_a_value_becomes_true() -> None:
    assert runs(np.array([1, 1, 0, 1, 0, 1, 1], bool)) == [0, 3, 5]
    assert runs(np.zeros(0, bool)) == []


# conditions on whole rule sets ------------------------------------------------------------------------------------------


def test_a_condition_stands_in_every_rule_and_under_every_check() -> None:
    rules = "rule r: a -> c rule s: seen(b) -> latch d"
    ruleset = parse_ruleset(DECLARED + rules, guard=Guard("prompt(b) or dangerous", conclusions={"dangerous": False}))
    assert [rule.text for rule in ruleset.rules] == [
        "rule r: a and dangerous or a and prompt(b) -> c",
        "rule s: dangerous and seen(b) or prompt(b) and seen(b) -> latch d",
    ]
    assert ruleset.given == {"dangerous": False}
    with pytest.raises(ValueError, match="may change"):
        parse_ruleset(DECLARED + rules, guard=Guard("not last(3, a)"))
    with pytest.raises(ValueError, match=r"^interventions\[1\]\.when, line 1, column 5: no proposition"):
        parse_ruleset(DECLARED + rules, guard=Guard("not nobody", "interventions[1].when"))


def test_a_conclusion_of_another_rule_set_over_the_closed_prompt_is_undecided_before() -> None:
    rules = "rule r: a -> latch c"
    with pytest.raises(ValueError, match="may change"):
        parse_ruleset(DECLARED + rules, guard=Guard("not safe", conclusions={"safe": False}))
    ruleset = parse_ruleset(DECLARED + rules, guard=Guard("not safe", conclusions={"safe": True}))
    readings = {("s", 0): np.ones(5, np.float32), ("s", 1): np.zeros(5, np.float32)}
    nowhere = np.zeros(5, bool)
    out, _ = advance(ruleset, State(), readings, 4, 5, {"safe": nowhere})
    assert out.conclusions["c"].tolist() == [False, False, False, True, True]
    steps = evaluate(ruleset, readings, 4, 5, {"safe": nowhere.tolist()})
    assert [bool(step.conclusions) for step in steps] == out.conclusions["c"].tolist()
    assert Explanation(ruleset, out.propositions, 4, 5, given={"safe": nowhere}).edges() == [(3, "c")]
