"""The chunked evaluator equals the reference, for random rule sets, texts and chunkings."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from interventions.rules.chunked import State, advance
from interventions.rules.errors import RuleError
from interventions.rules.reading import parse_ruleset, parse_when
from interventions.rules.reference import evaluate
from interventions.rules.ruleset import Ruleset

DECLARED = """
proposition a = feature(s, 0) >= 1
proposition b = feature(s, 1) > 0
proposition e = feature(s, 2) - 0.5 * feature(s, 3) >= 0.5
proposition t = tree(z, if 0 >= 1 then if 1 > 0 then 0.9 else 0.2 else 0.4) > 0.3
"""
READS = (("s", 0), ("s", 1), ("s", 2), ("s", 3), ("z", 0), ("z", 1))

Text = tuple[dict[tuple[str, int], np.ndarray], int, int, list[int]]

PROPOSITION = st.sampled_from(["a", "b", "e", "t"])
TOKEN = st.one_of(
    PROPOSITION,
    st.tuples(PROPOSITION, st.sampled_from(["and", "or", "xor", "and not"]), PROPOSITION).map(
        lambda x: f"({' '.join(x)})" if x[0] != x[2] else x[0]
    ),
    PROPOSITION.map(lambda name: f"(not {name})"),
)
SCOPED = st.one_of(
    TOKEN.map(lambda x: f"seen({x})"),
    TOKEN.map(lambda x: f"prompt({x})"),
    st.tuples(st.integers(2, 5), TOKEN).map(lambda x: f"last({x[0]}, {x[1]})"),
)
COUNTED = st.tuples(
    st.sampled_from(["2", "3", "20 %", "50 %", "33.3333 %"]), st.sampled_from(["seen(", "prompt(", "last(4, "]), TOKEN
).map(lambda x: f"at least {x[0]} of {x[1]}{x[2]})")
ORDER = st.lists(TOKEN, min_size=2, max_size=3).map(" before ".join)
ATOM = st.one_of(TOKEN, SCOPED, COUNTED, COUNTED, ORDER, ORDER.map(lambda x: f"prompt({x})"), st.just("prompt_ended"))


def expressions(names: list[str]) -> st.SearchStrategy[str]:
    atom = st.one_of(ATOM, st.sampled_from(names)) if names else ATOM

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        joined = st.tuples(inner, st.sampled_from(["and", "or", "xor", "->"]), inner)
        return st.one_of(joined.map(lambda x: f"({' '.join(x)})"), inner.map(lambda x: f"not ({x})"))

    return st.recursive(atom, grow, max_leaves=5)


def written(bodies: list[tuple[str, str]], latch: set[str], deeds: dict[str, str]) -> Ruleset:
    lines = [DECLARED]
    lines += [f"rule n{i}: ({body}) -> {'latch ' * (head in latch)}{head}" for i, (head, body) in enumerate(bodies)]
    return parse_ruleset("\n".join(lines + [f"on {head}: {deed}" for head, deed in deeds.items()]))


STEER = 'do {"type": "steer", "vector": "v"}'


@st.composite
def rulesets(draw: st.DrawFn) -> Ruleset:
    """A rule set; what negates under a latch or in a circle gives way: first the latches, then the draw."""
    bodies: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 5))):
        head = draw(st.sampled_from("pqr"))
        others = sorted({name for name, _ in bodies})
        body = draw(expressions(others))
        if others and draw(st.booleans()):
            body = f"({body}) {draw(st.sampled_from(['and', 'or', 'and not']))} {draw(st.sampled_from(others))}"
        bodies.append((head, body))
    heads = sorted({head for head, _ in bodies})
    deeds = {head: draw(st.sampled_from(["flag", STEER, STEER + " for 3 tokens"])) for head in heads}
    lasting = {head: draw(st.sampled_from([deeds[head], 'refuse "no"', STEER + " from now on"])) for head in heads}
    latch = draw(st.sets(st.sampled_from(heads)))
    for kept, done in ((latch, lasting), (latch, deeds), (set(), lasting), (set(), deeds)):
        try:
            return written(bodies, kept, done)
        except RuleError as error:
            assert any(word in error.message for word in ("may change", "cycle", "whatever the evidence"))
    reject()


@st.composite
def texts(draw: st.DrawFn) -> Text:
    """Activations, prompt length, number of tokens, and a chunking of them."""
    n = draw(st.integers(1, 12))
    values = st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.5]), min_size=n, max_size=n)
    readings = {read: np.array(draw(values), np.float32) for read in READS}
    prompt_len = draw(st.integers(1, n + 2))
    chunks, left = [], n
    while left:
        chunks.append(draw(st.integers(0, left)))
        left -= chunks[-1]
        if len(chunks) > 30:
            chunks.append(left)
            left = 0
    return readings, prompt_len, n, chunks


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


@settings(max_examples=300, deadline=None)
@given(rulesets(), texts())
def test_every_chunking_gives_what_token_by_token_evaluation_gives(ruleset: Ruleset, text: Text) -> None:
    readings, prompt_len, n, _ = text
    steps = evaluate(ruleset, readings, prompt_len, n)
    assert rows(ruleset, text) == [(step.propositions, step.conclusions, step.active) for step in steps]


@settings(max_examples=100, deadline=None)
@given(rulesets(), texts(), st.data())
def test_what_is_concluded_never_depends_on_later_tokens(ruleset, text, data) -> None:
    readings, prompt_len, n, _ = text
    stop = data.draw(st.integers(0, n))
    changed = {read: np.concatenate([a[:stop], 1.5 - a[stop:]]).astype(np.float32) for read, a in readings.items()}
    assert evaluate(ruleset, readings, prompt_len, n)[:stop] == evaluate(ruleset, changed, prompt_len, n)[:stop]


@settings(max_examples=100, deadline=None)
@given(rulesets(), texts())
def test_position_0_is_never_evidence(ruleset, text) -> None:
    readings, prompt_len, n, _ = text
    changed = {read: np.concatenate([1.5 - a[:1], a[1:]]).astype(np.float32) for read, a in readings.items()}
    assert evaluate(ruleset, readings, prompt_len, n) == evaluate(ruleset, changed, prompt_len, n)


@settings(max_examples=100, deadline=None)
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


@settings(max_examples=300, deadline=None)
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
