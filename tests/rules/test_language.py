"""The two forms say the same, and what is wrong is pointed at."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.rules.errors import RuleError
from interventions.rules.proposition import Proposition
from interventions.rules.reading import parse_ruleset, parse_when

TEXT = """
# weapons, unless the police are in it
proposition weapon = 0.5 * feature(smollm2-135m/l15, 12) + feature(smollm2-135m/l15, 3) >= 2.5
proposition police = tree("my sae", if 3 >= 1 then 0.9 else (if 4 > 2 then .5 else -1)) > 0.5

rule danger: seen(weapon) and not prompt(police) -> latch dangerous
rule: for X in {weapon, police}: at least 2 of last(16, X) xor at least 20 % of prompt tokens (X) -> much.X
rule order: weapon before police -> chase
rule: (weapon -> police) and prompt_ended -> quiet

on dangerous: refuse "I cannot help # with that."
on much.weapon: do {"type": "steer", "vector": "formal"} strength -2 for 8 tokens
on chase: do {"type": "edit_features", "sae": "s", "features": [{"index": 1, "op": "ablate"}]} from now on
on chase: flag
on quiet: log
"""

JSON = {
    "propositions": {
        "weapon": {
            "sae": "smollm2-135m/l15",
            "features": [{"index": 12, "weight": 0.5}, {"index": 3}],
            "op": ">=",
            "threshold": 2.5,
        },
        "police": {
            "sae": "my sae",
            "tree": {
                "feature": 3,
                "op": ">=",
                "threshold": 1,
                "then": 0.9,
                "else": {"feature": 4, "op": ">", "threshold": 2, "then": 0.5, "else": -1},
            },
            "op": ">",
            "threshold": 0.5,
        },
    },
    "rules": [
        {
            "label": "danger",
            "if": {"and": [{"seen": "weapon"}, {"not": {"prompt": "police"}}]},
            "then": "dangerous",
            "latch": True,
        },
        {
            "for": {"X": ["weapon", "police"]},
            "if": {
                "xor": [
                    {"at_least": 2, "of": {"last": "X", "tokens": 16}},
                    {"at_least_percent": 20, "of": {"prompt": "X"}},
                ]
            },
            "then": "much.X",
        },
        {"label": "order", "if": {"before": ["weapon", "police"]}, "then": "chase"},
        {"if": {"and": [{"implies": ["weapon", "police"]}, {"prompt_ended": True}]}, "then": "quiet"},
    ],
    "actions": [
        {"on": "dangerous", "refuse": "I cannot help # with that."},
        {"on": "much.weapon", "do": {"type": "steer", "vector": "formal", "strength": -2.0}, "tokens": 8},
        {
            "on": "chase",
            "do": {"type": "edit_features", "sae": "s", "features": [{"index": 1, "op": "ablate"}]},
            "tokens": "from now on",
        },
        {"on": "chase", "flag": True},
        {"on": "quiet", "log": True},
    ],
}


def test_the_text_and_the_json_form_are_one_rule_set() -> None:
    one, other = parse_ruleset(TEXT), parse_ruleset(JSON)
    assert one == other
    assert one.digest == other.digest
    assert [rule.label for rule in one.rules] == ["r4", "order", "danger", "r2.police", "r2.weapon"]


def test_expressions_in_json_may_be_text() -> None:
    rules = [{"label": "danger", "if": "seen(weapon) and not prompt(police)", "then": "dangerous", "latch": True}]
    ruleset = parse_ruleset({"propositions": JSON["propositions"], "rules": rules})
    assert ruleset.rules == tuple(rule for rule in parse_ruleset(TEXT).rules if rule.label == "danger")


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("rule r: a\n  adn b -> c", 2, 3, "Did you mean 'and'?"),
        ("rule r: a -> b -> c", 1, 16, "in parentheses"),
        ("rule r: a $ b -> c", 1, 11, "got '$'"),
        ("rule r: a & b -> c", 1, 11, "Write and."),
        ("rule r: ¬a -> c", 1, 9, "Write not."),
        ("rule r: a and", 1, 14, "got the end"),
        ("rule r: (a and b -> c", 1, 22, "got the end"),
        ("rule r: at least 0 of seen(a) -> b", 1, 18, "from 1 to"),
        ("rule r: at least 1.5 of seen(a) -> b", 1, 18, "whole number"),
        ("rule r: at least 101 % of seen(a) -> b", 1, 18, "at most 100 %"),
        ("rule r: at least 2 of token(a) -> b", 1, 23, "scope of many tokens"),
        ("proposition x = feature(a, 1) > 1e99", 1, 33, "float32"),
        ("proposition x = feature(a, 1) + feature(b, 2) > 3", 1, 41, "one SAE"),
        ("proposition x = feature(a, 1) - feature(a, 1) > 3", 1, 25, "weights of the sum are 0"),
        ("proposition x = feature(a, 1) < 3", 1, 25, "expected >= or >"),
        ("proposition x = tree(a, if 1 > 0 then 1 else 1) > 0", 1, 22, "same score"),
        ("proposition seen = feature(a, 1) > 3", 1, 13, "seen"),
        ('rule r: feature(a, 1) > 0 -> c on c: refuse "\\q"', 1, 45, "escape"),
        ("rule r: for X in {a, a}: X -> c", 1, 22, "given twice"),
        ("rule r: feature(a, 1) > 0 -> c on c: refuse", 1, 44, "a string"),
        ("rule r: feature(a, -1) > 0 -> c", 1, 20, "a number"),
    ],
)
def test_an_error_in_a_text_has_a_line_and_a_column(text: str, line: int, column: int, words: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_ruleset(text, param="interventions[0].ruleset")
    error = caught.value
    assert (error.line, error.column) == (line, column), error.message
    assert words in error.message
    assert error.param == "interventions[0].ruleset"
    assert error.message.startswith(f"interventions[0].ruleset, line {line}, column {column}: ")


PLAIN = {"sae": "s", "op": ">", "threshold": 1, "features": [{"index": 1}]}


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (3, "rules"),
        ({"rulez": []}, "rules.rulez"),
        ({"rules": [{"then": "c"}]}, "rules.rules[0].if"),
        ({"rules": [{"if": {"und": ["a"]}, "then": "c"}]}, "rules.rules[0].if"),
        ({"rules": [{"if": {"and": ["a"]}, "then": "c"}]}, "rules.rules[0].if.and"),
        ({"rules": [{"if": {"and": ["a or", "b"]}, "then": "c"}]}, "rules.rules[0].if.and[0]"),
        ({"rules": [{"if": {"last": "a"}, "then": "c"}]}, "rules.rules[0].if.tokens"),
        ({"rules": [{"if": {"at_least": 2, "of": "a"}, "then": "c"}]}, "rules.rules[0].if.of"),
        ({"rules": [{"if": "a", "then": "c d"}]}, "rules.rules[0].then"),
        ({"propositions": {"a": PLAIN | {"threshold": True}}}, "rules.propositions.a.threshold"),
        ({"propositions": {"a": PLAIN | {"features": [{"index": -1}]}}}, "rules.propositions.a.features[0].index"),
        ({"propositions": {"a": PLAIN | {"op": "="}}}, "rules.propositions.a.op"),
        ({"propositions": {"a": PLAIN | {"tree": 1}}}, "rules.propositions.a"),
        ({"actions": [{"on": "c", "flag": True, "log": True}]}, "rules.actions[0]"),
        ({"actions": [{"on": "c", "flag": True}]}, "rules.actions[0]"),
        ({"rules": [{"if": {"and": ["feature(s, 1) > 0", "a"]}, "then": "c"}]}, "rules.rules[0].if.and[1]"),
        (
            {
                "rules": [{"if": PLAIN, "then": "c"}],
                "actions": [{"on": "c", "do": {"type": "edit_features", "sae": "s", "features": [{"index": 1}]}}],
            },
            "rules.actions[0].do.features[0].op",
        ),
    ],
)
def test_an_error_in_json_has_a_path(raw: object, param: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_ruleset(raw, param="rules")
    assert caught.value.param == param, caught.value.message


PIECES = re.findall(
    r"\S+", 'rule r: a and not -> c ( ) seen prompt last 2 % of feature > tree if 1 then else on c: do { } "x" : flag'
)
PIECES += re.findall(r"\S+", '(s,1) refuse "\\u12" for X in , latch before -1e99 \x00 \ud800 é # "type" at least')
KEYS = re.findall(
    r"\w+", "if then and or not seen last tokens at_least of sae op tree on features index weight for label latch do"
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(PIECES), st.just("a and b")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*KEYS, "\ud800"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.lists(st.sampled_from(PIECES), max_size=25).map(" ".join),
        st.tuples(st.integers(0, len(TEXT)), st.integers(0, 9), st.sampled_from(PIECES)).map(
            lambda cut: TEXT[: cut[0]] + cut[2] + TEXT[cut[0] + cut[1] :]
        ),
        st.builds(
            lambda key, at, value: mutated(key, at, value), st.sampled_from(list(JSON)), st.integers(0, 4), VALUES
        ),
    )
)
def test_whatever_comes_in_a_rule_set_or_a_rule_error_comes_out(raw: object) -> None:
    try:
        ruleset = parse_ruleset(raw)
    except RuleError as error:
        error.message.encode()
        return
    for again in (parse_ruleset(ruleset.text), parse_ruleset(json.loads(json.dumps(ruleset.as_json())))):
        assert (again, again.digest) == (ruleset, ruleset.digest)


def mutated(key: str, at: int, value: object) -> dict:
    """The JSON above with something else in one of its places."""
    part = JSON[key]
    if isinstance(part, list):
        return JSON | {key: [value if i == at else item for i, item in enumerate(part)]}
    return JSON | {key: dict(part) | {list(part)[at % len(part)]: value}}


def test_deep_json_is_refused() -> None:
    body: object = "a"
    for _ in range(500):
        body = {"not": body}
    with pytest.raises(RuleError, match="deep"):
        parse_ruleset({"rules": [{"if": body, "then": "c"}]})


def only(text: str) -> Proposition:
    (found,) = parse_when(text).propositions.values()
    return found


def test_the_score_of_a_sum_is_float32_in_ascending_order() -> None:
    found = only("0.1 * feature(s, 7) - 3 * feature(s, 2) >= 0")
    assert found.reads() == (("s", 2), ("s", 7))
    a, b = np.float32(1.7), np.float32(0.3)
    readings = {("s", 2): np.array([a]), ("s", 7): np.array([b])}
    assert found.scores(readings)[0] == np.float32(-3) * a + np.float32(0.1) * b
    assert found.scores(readings).dtype == np.float32


def test_a_threshold_is_reached_or_passed() -> None:
    readings = {("s", 0): np.array([2, 3, 4, np.nan], np.float32)}
    assert only("feature(s, 0) >= 3").holds(readings).tolist() == [False, True, True, False]
    assert only("feature(s, 0) > 3").holds(readings).tolist() == [False, False, True, False]


def test_a_tree_is_walked_token_by_token() -> None:
    found = only("tree(s, if 1 >= 2 then if 0 > 1 then 0.75 else 0.5 else 0.25) > 0.5")
    readings = {("s", 0): np.array([1, 2, 2], np.float32), ("s", 1): np.array([2, 2, 1], np.float32)}
    assert found.scores(readings).tolist() == [0.5, 0.75, 0.25]
    assert found.holds(readings).tolist() == [False, True, False]


def test_names_may_have_dots_and_dashes_but_arrows_need_no_spaces() -> None:
    ruleset = parse_ruleset("proposition my-own.a=feature(s,1)>0\nrule r:my-own.a->c-d")
    assert ruleset.rules[0].text == "rule r: my-own.a -> c-d"
