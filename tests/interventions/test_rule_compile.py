"""From a request with rules to its program: what is refused and where, what leaves a trace, what gates what."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from interventions.compile import check_selectable
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.program import GateKind, Payload, feature_key
from interventions.rule_cache import RulesetCache
from interventions.rules.build import Context
from interventions.rules.code import OpCode
from interventions.rules.proposition import Proposition, Sum
from interventions.spec import parse_interventions
from tests.interventions.conftest import D, Offered, make_sae

STEER = {"type": "steer", "layer": 2, "values": [1.0] * D}
RULES = {
    "type": "rules",
    "propositions": {"weapon": {"sae": "relu", "features": [{"index": 3}], "op": ">=", "threshold": 0.5}},
    "rules": [{"label": "r1", "if": "seen(weapon)", "then": "danger", "latch": True}],
    "actions": [{"on": "danger", "do": STEER}, {"on": "danger", "refuse": "No."}],
}
TEXT = f"""proposition weapon = feature(relu, 3) >= 0.5
rule r1: seen(weapon) -> latch danger
on danger: do {json.dumps(STEER)}
on danger: refuse "No."
"""
FLAG = {"type": "rules", "text": "rule r: feature(relu, 3) > 1 -> c on c: flag"}


@pytest.fixture
def late(server):
    """A server that has an SAE at layer 2 as well."""
    server.saes["late"] = Offered("late", 2, make_sae("jumprelu", seed=30, layer=2))
    server.propositions["toxic"] = Proposition("late", Sum(((4, 1.0),)), ">=", 0.75)
    server.rulesets = {"safety": TEXT, "json": {key: RULES[key] for key in ("propositions", "rules", "actions")}}
    return server


def gates(program):
    return {
        (layer.layer, op.intervention): [layer.gates[i] for i in op.gates]
        for layer in program.layers
        for channel in layer.channels
        for op in channel.ops
    }


# forms ---------------------------------------------------------------------------------------------------------------


def test_text_json_and_library_are_one_program_and_names_leave_no_trace(compiled, late):
    found = [
        compiled(one)
        for one in (
            RULES,
            {"type": "rules", "text": TEXT},
            {"type": "rules", "ruleset": "safety"},
            {"type": "rules", "ruleset": "json"},
            {"type": "rules", "ruleset": late.rulesets["json"]},
            {"type": "rules", "text": TEXT.replace("danger", "d").replace("weapon", "w").replace("r1", "x"), "id": "z"},
        )
    ]
    assert len({one.payload().digest for one in found}) == 1
    assert Payload.from_bytes(found[0].payload().to_bytes()) == found[0].payload()
    assert len({one.rules.sets[0].digest for one in found}) == 2  # the rule set itself has names
    assert found[0].rules.propositions == ("weapon",)
    assert found[-1].rules.conclusions == ("d",)


def test_a_rules_entry_is_a_program_of_gated_ops_and_its_actions_have_numbers(compiled, saes):
    result = compiled(STEER, RULES)
    rules = result.program.rules
    assert rules.row_keys == (feature_key(saes["relu"].digest, 3),)
    assert [one.layer for one in (*rules.propositions, *rules.conclusions)] == [1, 1]
    (gate,) = gates(result.program)[2, 1]
    do, refuse = result.rules.at(1)
    assert (gate.kind, gate.evidence, gate.action) == (GateKind.RULE, (), do.number)
    assert gates(result.program)[2, 0] == []
    assert (do.kind, do.type, do.layers, do.noop) == ("do", "steer", (2,), False)
    assert (refuse.kind, refuse.message, rules.actions[refuse.number].refuses) == ("refuse", "No.", True)
    assert (result.entries[1].type, result.entries[1].layers, result.entries[1].noop) == ("rules", (2,), False)
    part = result.rules.part(1)
    assert part.actions == (do.number, refuse.number)
    assert (part.propositions, part.conclusions) == ({"weapon": 0}, {"danger": 0})
    assert result.rules.refusal([i == refuse.number for i in range(2)]).message == "No."
    assert result.rules.refusal([False, False]) is None


def test_rules_without_edits_are_a_program_too(compiled):
    result = compiled(FLAG)
    assert result.program.layers == ()
    assert result.program.n_instructions == 0
    assert result.payload().digest
    assert result.payload().row_keys == result.program.rules.propositions[0].features
    assert result.entries[0].layers == ()


def test_what_does_nothing_is_no_program(compiled):
    nothing = {"type": "rules", "propositions": RULES["propositions"], "when": "feature(relu, 9) > 1"}
    result = compiled(nothing, {**STEER, "strength": 0, "when": "weapon"})
    assert result.program is None
    assert [entry.noop for entry in result.entries] == [True, True]
    assert (result.rules, result.entries[1].when, result.payload().digest) == (None, None, None)
    kept = compiled({**RULES, "actions": [{"on": "danger", "do": {**STEER, "strength": 0}}]})
    assert (kept.program.layers, kept.rules.at(0)[0].noop, kept.entries[0].noop) == ((), True, False)


def test_opposed_actions_share_a_row(compiled):
    away = {**STEER, "values": [-1.0] * D}
    actions = [{"on": "danger", "do": STEER}, {"on": "danger", "do": away}]
    (layer,) = compiled({**RULES, "actions": actions}).program.layers
    (channel,) = layer.channels
    assert sum(op.beta for op in channel.ops) == 0


# when ----------------------------------------------------------------------------------------------------------------


def test_when_gates_every_op_of_the_intervention(compiled, late):
    late.vectors["both"] = late.vectors["formal"]
    result = compiled(
        {"type": "steer", "vector": "both", "when": "feature(relu, 3) > 1 and seen(feature(relu, 4) > 0)"}
    )
    number = result.entries[0].when
    assert [gate.action for found in gates(result.program).values() for gate in found] == [number, number]
    (action,) = result.rules.actions
    assert (action.kind, action.number, action.layers, action.conclusion) == ("when", number, (1, 2), "when")
    edit = {"type": "edit_features", "sae": "relu", "features": [{"index": 5, "op": "set", "value": 1}]}
    plain = compiled({**edit, "when": "feature(relu, 3) > 1"}, STEER)
    assert sorted(len(found) for found in gates(plain.program).values()) == [0, 1]


def test_when_names_what_the_library_and_the_rule_sets_of_the_request_have(compiled, late):
    result = compiled({**STEER, "when": "danger and not weapon and toxic"}, RULES)
    numbers = result.rules.part(1).conclusions
    (rule,) = (rule for rule in result.program.rules.rules if rule.head not in numbers.values())
    assert sorted(OpCode(op).name for op, _ in rule.body) == ["AND", "AND", "CONCLUSION", "NOT", *["PROPOSITION"] * 2]
    assert sorted(one.layer for one in result.program.rules.propositions) == [1, 2]


def test_equal_whens_are_one_action(compiled):
    result = compiled(
        {**STEER, "when": "feature(relu, 3) > 1 and feature(relu, 4) > 1"},
        {**STEER, "when": {"and": ["feature(relu, 4) > 1", "feature(relu, 3) > 1"]}, "strength": 2},
    )
    assert result.entries[0].when == result.entries[1].when == 0
    assert len(result.program.rules.actions) == len(result.program.layers[0].gates) == 1


def test_when_on_a_rule_set_is_a_condition_of_every_rule(compiled):
    guarded = compiled({**RULES, "when": "feature(relu, 7) > 1"})
    written = dict(
        RULES, rules=[{"label": "r1", "if": "seen(weapon) and feature(relu, 7) > 1", "then": "danger", "latch": True}]
    )
    assert guarded.program == compiled(written).program
    assert guarded.rules.sets[0].digest == compiled(RULES).rules.sets[0].digest
    assert guarded.entries[0].when is None


def test_a_rule_set_may_wait_for_another_but_not_in_a_circle(compiled, refused):
    other = {"type": "rules", "text": "rule r: feature(relu, 5) > 1 -> latch calm on calm: flag"}
    result = compiled({**RULES, "when": "calm"}, other)
    part = result.rules.part(0)
    assert part.given == {"calm": result.rules.part(1).conclusions["calm"]}
    error = refused({**RULES, "when": "calm"}, {**other, "when": "danger"})
    assert (error.code, error.param) == ("rule_syntax", "interventions[0].when")
    assert "wait for each other" in error.message


def test_what_latches_does_not_wait_for_what_another_rule_set_may_take_back(refused, compiled):
    fickle = {"type": "rules", "text": "rule r: not feature(relu, 5) > 1 -> calm on calm: flag"}
    error = refused({**RULES, "when": "calm"}, fickle)
    assert (error.code, error.param) == ("rule_syntax", "interventions[0].when")
    assert "'calm' of interventions[1]" in error.message
    final = {"type": "rules", "text": "rule r: not prompt(feature(relu, 5) > 1) -> calm on calm: flag"}
    assert compiled({**RULES, "when": "calm"}, final).program


def test_a_when_on_a_conclusion_about_the_whole_prompt_is_undecided_before_its_end(compiled):
    final = {"type": "rules", "text": "rule r: prompt(feature(relu, 5) > 1) -> bad on bad: flag"}
    result = compiled({**STEER, "when": "not bad"}, final)
    same = "rule r: prompt(feature(relu, 5) > 1) -> bad rule s: not bad -> good on bad: flag on good: do "
    same += json.dumps(STEER)
    assert result.program.rules == compiled({"type": "rules", "text": same}).program.rules
    assert result.program.needs_prompt_len


# refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        ({"tokens": "generated"}, "tokens", "intervention of an action"),
        ({"include_bos": True}, "include_bos", "position 0 is never evidence"),
        ({"text": "x"}, "", "exactly one of ruleset, text"),
        ({"ruleset": 3}, "ruleset", "name of a library rule set"),
        ({"when": 3}, "when", "rule expression"),
        ({"when": ""}, "when", "1 to"),
        ({"rule": []}, "rule", "Did you mean 'rules'"),
    ],
)
def test_form_is_refused_by_field(raw, param, says):
    with pytest.raises(InterventionError) as caught:
        parse_interventions([STEER, RULES | raw])
    expected = "interventions[1]" + (f".{param}" if param else "")
    assert (caught.value.code, caught.value.param) == ("invalid_intervention", expected)
    assert says in caught.value.message
    assert parse_interventions([{**RULES, "tokens": "all", "include_bos": False, "when": None}])


def broken(**change):
    return {**RULES, **change}


@pytest.mark.parametrize(
    ("entry", "code", "param", "says"),
    [
        ({"type": "rules", "ruleset": "nope"}, "unknown_ruleset", ".ruleset", "nope"),
        (broken(rules=[{"if": {"and": ["weapon"]}, "then": "x"}]), "rule_syntax", ".rules[0].if.and", "two or more"),
        (broken(rules=[{"if": "weapon and", "then": "danger"}]), "rule_syntax", ".rules[0].if", "line 1, column 11"),
        (
            broken(rules=[{"if": {"at_least": None, "of": {"seen": "weapon"}}, "then": "danger"}]),
            "rule_syntax",
            ".rules[0].if.at_least",
            "is required",
        ),
        ({"type": "rules", "text": "rule r: feature(relu, 3 > 1 -> c"}, "rule_syntax", ".text", "line 1, column 25"),
        ({"type": "rules", "text": "rule r: feature(nope, 3) > 1 -> c"}, "unknown_sae", ".text", "column 17"),
        ({"type": "rules", "text": "rule r: feature(relu, 40) > 1 -> c"}, "unknown_feature", ".text", "0..39"),
        ({"type": "rules", "text": "rule r: weapn -> c"}, "unknown_concept", ".text", "weapn"),
        ({**STEER, "when": "weapn"}, "unknown_concept", ".when", "weapn"),
        ({**STEER, "when": {"not": {"seen": "weapn"}}}, "unknown_concept", ".when.not.seen", "weapn"),
        ({**STEER, "when": "feature(relu, 3) >"}, "rule_syntax", ".when", "column"),
        (
            broken(actions=[{"on": "danger", "do": {"type": "steer", "vector": "nope"}}]),
            "unknown_vector",
            ".actions[0].do.vector",
            "nope",
        ),
        (
            broken(actions=[{"on": "danger", "do": {**STEER, "values": [1.0]}}]),
            "wrong_dimension",
            ".actions[0].do.values",
            "d_model is 16",
        ),
        (
            {
                "type": "rules",
                "text": 'rule r: feature(relu, 3) > 1 -> c\non c: do {"type": "steer", "vector": "nope"}',
            },
            "unknown_vector",
            ".text",
            "line 2, column 4: intervention.vector",
        ),
    ],
)
def test_rules_are_refused_where_they_are_wrong(refused, late, entry, code, param, says):
    error = refused(STEER, entry)
    assert (error.code, error.param) == (code, f"interventions[1]{param}")
    assert says in error.message


def test_an_effect_never_comes_before_its_evidence(refused, compiled, late):
    early = {**STEER, "layer": 1}
    error = refused({**early, "when": "toxic"})
    assert (error.code, error.param) == ("rule_layer_order", "interventions[0].when")
    assert "writes after layer 1, its evidence is read after layer 2" in error.message
    error = refused(dict(RULES, rules=[{"if": "toxic", "then": "danger"}], actions=[{"on": "danger", "do": early}]))
    assert (error.code, error.param) == ("rule_layer_order", "interventions[0].actions[0]")
    error = refused({"type": "rules", "text": TEXT.replace("relu, 3", "late, 3").replace('"layer": 2', '"layer": 1')})
    assert (error.code, error.param) == ("rule_layer_order", "interventions[0].text")
    assert "line 3" in error.message
    assert compiled({**STEER, "when": "toxic"}).program
    assert refused({**early, "strength": 0, "when": "toxic"}).code == "rule_layer_order"  # what does nothing is checked
    # through another rule set's conclusion too
    error = refused({**early, "when": "danger"}, dict(RULES, rules=[{"if": "toxic", "then": "danger"}]))
    assert (error.code, error.param) == ("rule_layer_order", "interventions[0].when")


def test_evidence_needs_an_armed_layer_and_the_whole_dictionary_where_membership_does(refused, compiled, late):
    late.saes["far"] = Offered("far", 3, make_sae("relu", seed=31, layer=3))
    error = refused({**STEER, "when": "feature(far, 1) > 1"})
    assert (error.code, error.param) == ("layer_not_armed", "interventions[0].when")
    found = compiled({**STEER, "when": "feature(topk, 1) > 1"})
    assert (found.program.rules.propositions[0].whole, found.needs_full) == (True, {"topk"})
    late.saes["topk"].full_encode = False
    error = refused({"type": "rules", "text": "rule r: feature(topk, 1) > 1 -> c"})
    assert (error.code, error.param) == ("invalid_intervention", "interventions[0].text")
    assert "--full-encode topk" in error.message


def test_a_name_that_two_rule_sets_define_differently_is_ambiguous(refused, compiled):
    other = {"type": "rules", "text": "proposition weapon = feature(relu, 9) > 1 rule r: weapon -> c"}
    error = refused(RULES, other, {**STEER, "when": "weapon"})
    assert (error.code, error.param) == ("rule_syntax", "interventions[2].when")
    assert "interventions[0] and interventions[1]" in error.message
    same = {"type": "rules", "text": "proposition weapon = feature(relu, 3) >= 0.5 rule r: weapon -> c"}
    assert compiled(RULES, same, {**STEER, "when": "weapon"}).program
    assert compiled(RULES, {**other, "when": "weapon"}).program  # its own comes first


def test_sizes_are_limited_over_the_request(refused, compiled, late):
    def sized(i: int) -> dict:
        return {
            "type": "rules",
            "text": f"rule r: feature(relu, {i}) > 1 and feature(relu, {i + 1}) > 1 -> c on c: flag",
        }

    for limits, count in (
        ({"rules": 2}, 3),
        ({"propositions": 2}, 2),
        ({"rule_actions": 1}, 2),
        ({"rule_steps": 5}, 2),
    ):
        late.limits = replace(Limits(), **limits)
        assert compiled(*(sized(0) for _ in range(min(count, 2)))).program  # equal ones are one
        error = refused(*(sized(3 * i) for i in range(count)))
        assert (error.code, error.param) == ("limit_exceeded", "interventions")
    late.limits = Limits(rows=3)
    assert (
        refused({**STEER, "when": "feature(relu, 1) + feature(relu, 2) + feature(relu, 3) > 1"}).code
        == "limit_exceeded"
    )
    late.limits = Limits(gates=1)
    error = refused({**STEER, "when": "feature(relu, 1) > 1"}, {**STEER, "when": "feature(relu, 2) > 1"})
    assert "2 gates" in error.message


def test_the_tokens_of_an_action_must_be_able_to_select(compiled):
    entry = dict(RULES, actions=[{"on": "danger", "do": {**STEER, "tokens": "generated"}}])
    check_selectable(compiled(entry), [1, 2, 3], 2)
    with pytest.raises(InterventionError) as caught:
        check_selectable(compiled(entry), [1, 2, 3], 1)
    assert caught.value.param == "interventions[0].actions[0].do.tokens"
    check_selectable(compiled({**STEER, "when": "feature(relu, 3) > 1"}, FLAG), [1, 2, 3], 1)


def test_a_stand_in_read_as_evidence_makes_the_entry_approximate(compiled):
    entries = compiled({**STEER, "when": "feature(stand-in, 3) > 1"}, FLAG).entries
    assert [entry.approximate for entry in entries] == [True, False]


def test_a_rule_set_is_read_again_where_its_names_mean_something_else(compiled, late):
    entry = {"type": "rules", "text": "rule r: toxic -> c on c: flag"}
    first = compiled(entry).program.rules.propositions
    assert compiled(entry).program.rules.propositions == first
    late.propositions = {"toxic": Proposition("relu", Sum(((4, 1.0),)), ">=", 0.75)}
    assert compiled(entry).program.rules.propositions != first
    late.propositions = {}
    with pytest.raises(InterventionError):
        compiled(entry)


def test_what_was_read_last_is_kept():
    cache = RulesetCache(kept=2)
    texts = [f"rule r: feature(relu, {i}) > 1 -> c" for i in range(3)]
    found = [cache.read(text, Context(), "x") for text in texts]
    assert cache.read(texts[2], Context(), "x") is found[2]
    assert cache.read(texts[0], Context(), "x") == found[0]
    assert cache.read(texts[0], Context(), "x") is not found[0]
