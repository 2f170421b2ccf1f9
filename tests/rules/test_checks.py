"""What a rule set must not do is refused, with the reason and the place."""

from __future__ import annotations

import pytest

from interventions.limits import Limits
from interventions.rules.build import Context, Dictionary
from interventions.rules.checks import check_layer_order, evidence_layers
from interventions.rules.errors import RuleError
from interventions.rules.reading import parse_ruleset, parse_when

DECLARED = "proposition a = feature(early, 1) > 0\nproposition b = feature(late, 2) > 0\n"
STEER = 'do {"type": "steer", "vector": "v"}'
LAYERS = {"early": 10, "late": 20}


def refused(rules: str, context: Context | None = None) -> RuleError:
    with pytest.raises(RuleError) as caught:
        parse_ruleset(DECLARED + rules, context or Context())
    assert caught.value.status == 400
    return caught.value


def test_a_cycle_through_negation_is_named() -> None:
    error = refused("rule r: a and not d -> c\nrule s: e -> d\nrule t: c and b -> e")
    assert "c needs not d needs e needs c" in error.message
    assert (error.code, error.line) == ("rule_syntax", 3)
    assert "c needs not c" in refused("rule r: a and not c -> c").message
    assert "cycle" in refused("rule r: a xor d -> c rule s: b and c -> d").message


def test_a_cycle_without_negation_is_allowed() -> None:
    ruleset = parse_ruleset(DECLARED + "rule r: a or d -> c rule s: c -> d rule t: b and not d -> e")
    assert ruleset.strata == (("c", "d"), ("e",))


@pytest.mark.parametrize("last", ["-> latch c", f"-> c on c: {STEER} from now on", '-> c on c: refuse "no"'])
def test_what_never_ends_negates_the_closed_prompt_only(last: str) -> None:
    for body in ("a and not b", "a and not seen(b)", "a xor b", "a and not prompt_ended", "a and not last(3, b)"):
        assert "may change" in refused(f"rule r: {body} {last}").message
    assert "c needs d" in refused(f"rule s: a and not b -> d rule r: d {last}").message
    for body in ("a and not prompt(b)", "seen(a and not b)", "a and not at least 20 % of prompt(b)"):
        assert parse_ruleset(f"{DECLARED}rule r: {body} {last}").rules


def test_what_never_ends_may_negate_a_conclusion_over_the_prompt() -> None:
    rules = "rule s: prompt(b) and not prompt(a) -> d rule r: a and not d -> latch c"
    assert parse_ruleset(DECLARED + rules).closed == {"d"}
    assert "not d" in refused("rule s: prompt(b) or b -> d rule r: a and not d -> latch c").message


def test_what_ends_may_negate_anything() -> None:
    for last in ("-> c on c: flag", f"-> c on c: {STEER} for 8 tokens", f"-> c on c: {STEER}"):
        assert parse_ruleset(f"{DECLARED}rule r: a and not seen(b) {last}").rules


def test_a_body_without_evidence_is_refused() -> None:
    assert "always" in refused("rule r: a or not a -> c").message
    assert "never" in refused("rule r: seen(a) and not seen(a) -> c").message
    assert "never" in refused("rule r: seen(b and a and not a) -> c").message
    assert "never" in refused("rule r: at least 4 of last(3, a) -> c").message


def test_unknown_names_come_with_the_nearest_and_a_place() -> None:
    error = refused("rule r: seen(a) -> dangerous\nrule s: dangerus -> x")
    assert (error.code, error.line, error.column) == ("unknown_concept", 4, 9)
    assert "Did you mean 'dangerous'?" in error.message
    error = refused("rule r: a -> dangerous on dangerus: flag")
    assert "Did you mean 'dangerous'?" in error.message


def test_saes_and_features_are_checked_where_the_server_is_known() -> None:
    context = Context({"early": Dictionary(10, 4), "late": Dictionary(20, 3)})
    assert parse_ruleset(DECLARED + "rule r: a -> c", context)
    error = refused("rule r: feature(early, 4) > 0 -> c", context)
    assert (error.code, error.line) == ("unknown_feature", 3)
    assert "early has 0..3" in error.message
    error = refused("rule r: feature(earli, 0) > 0 -> c", context)
    assert error.code == "unknown_sae"
    assert "Did you mean 'early'?" in error.message


def test_library_concepts_are_found_by_name_and_written_out() -> None:
    toxicity = parse_when("feature(early, 7) >= 2").propositions["feature(early, 7) >= 2"]
    context = Context(library={"toxicity": toxicity})
    found = parse_when("feature(late, 12) > 3 and seen(toxicity)", context)
    assert found.text == (
        "proposition toxicity = feature(early, 7) >= 2\nrule when: feature(late, 12) > 3 and seen(toxicity) -> when\n"
    )
    assert parse_ruleset(found.text) == found
    assert "library" in refused("rule r: a -> toxicity", context).message


def test_sizes_are_limited() -> None:
    many = "".join(f"rule n{i}: a -> c{i}\n" for i in range(65))
    assert refused(many).code == "limit_exceeded"
    assert parse_ruleset(DECLARED + many.split("rule n64")[0])
    over = " or ".join(f"feature(s, {i}) > 0" for i in range(127))
    assert refused(f"rule r: {over} -> c").code == "limit_exceeded"
    assert refused("rule r: a and b -> c", Context(limits=Limits(propositions=1))).code == "limit_exceeded"
    names = ", ".join(f"x{i}" for i in range(9))
    sugar = f"rule r: for X in {{{names}}}, Y in {{{names}}}: a -> c.X.Y"
    assert refused(sugar).code == "limit_exceeded"
    assert "nested" in refused("rule r: " + "(" * 10 + "not " * 80 + "a" + ")" * 10 + " -> c").message


def test_the_size_of_a_text_is_limited() -> None:
    assert refused("#" * 300_000).code == "limit_exceeded"


def test_an_effect_comes_at_the_layer_of_its_evidence_or_later() -> None:
    rules = f"rule r: a -> c rule s: c and seen(b) -> d on c: {STEER} on d: {STEER} on d: flag"
    ruleset = parse_ruleset(DECLARED + rules)
    assert evidence_layers(ruleset.rules, ruleset.propositions, LAYERS.__getitem__) == {"c": 10, "d": 20}
    check_layer_order(ruleset, LAYERS.__getitem__, lambda action: [10] if action.conclusion == "c" else [20, 25])
    with pytest.raises(RuleError, match=r"writes after layer 15.*read after layer 20") as caught:
        check_layer_order(ruleset, LAYERS.__getitem__, lambda _: [15])
    assert caught.value.code == "rule_layer_order"


def test_names_have_one_meaning() -> None:
    assert "twice" in refused("proposition a = feature(s, 9) > 0").message
    assert "says the same" in refused("proposition x = feature(early, 1) > 0").message
    assert "and a conclusion" in refused("rule r: b -> a").message
    assert "two rules called" in refused("rule r: a -> c rule r: b -> c").message
    assert "with latch and without" in refused("rule r: a -> c rule s: b -> latch c").message
    assert "word of the language" in refused("rule r: a -> seen").message


def test_actions_are_interventions_of_their_own() -> None:
    for deed, word in [
        ('do {"type": "steer", "vectr": "v"}', "intervention.vectr"),
        ('do {"type": "steer", "vector": "v", "id": "x"}', "'id'"),
        ('do {"type": "steer", "vector": "v", "when": "a"}', "'when'"),
        ('do {"type": "rules"}', "no rule set"),
        ('do {"type": "steer", "vector": "v", "strength": 1} strength 2', "a strength already"),
        ('refuse "\\ud800"', "Unicode"),
        ('do {"type": "steer", "vector": ' + "[" * 100 + "]" * 100 + "}", "nested too deep"),
    ]:
        assert word in refused(f"rule r: a -> c on c: {deed}").message


def test_the_normal_form_keeps_the_limits_so_that_it_can_be_read_again() -> None:
    odd = " xor ".join(f"prompt(feature(s, {i}) > 0)" for i in range(7))  # 64 conjunctions of 7 in the normal form
    assert parse_ruleset(f"rule r0: {odd} -> c0").text.count(" and ") == 64 * 6
    refusal = refused("".join(f"rule r{i}: {odd} -> c{i}\n" for i in range(10)))
    assert (refusal.code, "in their normal form" in refusal.message) == ("limit_exceeded", True)
    wide = {"sae": "s", "op": ">", "features": [{"index": i, "weight": 0.1} for i in range(256)]}
    with pytest.raises(RuleError, match="the normal form has") as caught:
        parse_ruleset({"propositions": {f"p{i}": wide | {"threshold": i} for i in range(64)}})
    assert caught.value.code == "limit_exceeded"


def test_evidence_is_limited() -> None:
    many = " or ".join(f"at least {i} of seen(a)" for i in range(2, 259))
    assert "different scopes" in refused(f"rule r: {many} -> c").message
    assert parse_ruleset(f"{DECLARED}rule r: {many.rpartition(' or ')[0]} -> c")


def test_nested_exclusive_ors_take_no_exponential_time() -> None:
    body = "".join(f"(p{i} xor (p{i + 1} and " for i in range(30)) + "p0" + "))" * 30
    declared = "".join(f"proposition p{i} = feature(s, {i}) > 0\n" for i in range(31))
    assert parse_ruleset(f"{declared}rule r: {body} -> c")


def test_a_window_is_limited() -> None:
    assert "from 1 to 4096" in refused("rule r: last(4097, a) -> c").message
