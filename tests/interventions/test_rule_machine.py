"""Assembled programs mean what their rule sets mean, whatever else runs beside them, and whatever things are called."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from interventions.rules.assemble import Assembled, Dictionary, Part, Trigger, assemble
from interventions.rules.build import Context
from interventions.rules.code import Code, OpCode, PropositionCode
from interventions.rules.errors import RuleError
from interventions.rules.machine import Machine, RuleTrace, scores
from interventions.rules.reading import parse_ruleset, parse_when
from interventions.rules.reference import evaluate
from interventions.rules.ruleset import Ruleset
from tests.rules.random_rulesets import DECLARED, READS, expressions, rulesets, texts

LAYERS = {"s": 3, "z": 1}


def dictionary(sae: str) -> Dictionary:
    return Dictionary(f"digest-{sae}", LAYERS[sae], False)


def triggers(part: int, ruleset: Ruleset) -> list[Trigger]:
    return [Trigger(part, one.conclusion, one.tokens, one.kind == "refuse") for one in ruleset.actions]


def held_by(code: PropositionCode, readings: dict[tuple[str, int], np.ndarray]) -> np.ndarray:
    names = [key.split(":") for key in code.features]
    return np.stack([readings[sae.removeprefix("digest-"), int(index)] for _, sae, index in names], axis=1)


def held(found: Assembled, readings: dict[tuple[str, int], np.ndarray]) -> np.ndarray:
    """Where the program's propositions hold, from the activations by name of the SAE."""
    columns = []
    for code in found.program.propositions:
        score = scores(code, held_by(code, readings))
        limit = np.float32(code.threshold)
        columns.append(score > limit if code.strict else score >= limit)
    n = len(next(iter(readings.values())))
    return np.stack(columns, axis=1) if columns else np.zeros((n, 0), bool)


def in_chunks(found: Assembled, bits: np.ndarray, prompt_len: int, chunks: list[int]) -> RuleTrace:
    """The program run chunk by chunk, the machine copied between chunks as state that is kept would be."""
    machine, start, traces = Machine(found.program, prompt_len), 0, []
    for size in chunks:
        machine = copy.deepcopy(machine)
        traces.append(machine.run(bits[start : start + size]))
        start += size
    fields = ("held", "concluded", "active", "scores")
    return RuleTrace(*(np.concatenate([getattr(trace, name) for trace in traces]) for name in fields))


def agree(found: Assembled, trace: RuleTrace, part: int, ruleset: Ruleset, steps: list, actions: list[int]) -> None:
    for step in steps:
        t = step.position
        for name, i in found.propositions[part].items():
            assert trace.held[t, i] == (name in step.propositions), (t, name)
        for name, i in found.conclusions[part].items():
            assert trace.concluded[t, i] == (name in step.conclusions), (t, name)
        for k, i in enumerate(actions):
            assert trace.active[t, i] == (k in step.active), (t, k)


@settings(max_examples=80, deadline=None)
@given(rulesets(), texts())
def test_a_program_concludes_what_its_rule_set_means_in_every_chunking(ruleset, text) -> None:
    readings, prompt_len, n, chunks = text
    found = assemble([Part(ruleset)], triggers(0, ruleset), dictionary)
    trace = in_chunks(found, held(found, readings), prompt_len, chunks)
    agree(found, trace, 0, ruleset, evaluate(ruleset, readings, prompt_len, n), list(found.actions))


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[Ruleset], Ruleset, int]:
    """Two rule sets, and a ``when`` that names conclusions of one of them."""
    sets = [draw(rulesets()), draw(rulesets())]
    named = draw(st.integers(0, 1))
    heads = {name: name in sets[named].closed for level in sets[named].strata for name in level}
    words = draw(expressions(sorted(heads)))
    library = dict(parse_ruleset(DECLARED).propositions)
    try:
        return sets, parse_when(f"({words}) or (a and {sorted(heads)[0]})", Context(library=library), "", heads), named
    except RuleError:  # it always holds
        reject()


@settings(max_examples=60, deadline=None)
@given(requests(), texts())
def test_several_rule_sets_and_a_when_run_side_by_side_as_each_would_alone(request_, text) -> None:
    (first, second), condition, named = request_
    readings, prompt_len, n, chunks = text
    heads = [name for level in (first, second)[named].strata for name in level]
    parts = [Part(first), Part(second), Part(condition, {name: (named, name) for name in heads})]
    wanted = [*triggers(0, first), *triggers(1, second), Trigger(2, "when")]
    found = assemble(parts, wanted, dictionary)
    trace = in_chunks(found, held(found, readings), prompt_len, chunks)
    steps = [evaluate(one, readings, prompt_len, n) for one in (first, second)]
    split = len(first.actions)
    agree(found, trace, 0, first, steps[0], list(found.actions[:split]))
    agree(found, trace, 1, second, steps[1], list(found.actions[split:-1]))
    known = {name: [name in step.conclusions for step in steps[named]] for name in heads}
    last = evaluate(condition, readings, prompt_len, n, known)
    agree(found, trace, 2, condition, last, [])
    assert trace.active[:, found.actions[-1]].tolist() == ["when" in step.conclusions for step in last]


@settings(max_examples=40, deadline=None)
@given(rulesets(), rulesets())
def test_layers_and_groups_are_in_the_order_in_which_they_are_known(first, second) -> None:
    program = assemble([Part(first), Part(second)], triggers(0, first) + triggers(1, second), dictionary).program
    for part in (program.propositions, program.memories, program.conclusions):
        assert [one.layer for one in part] == sorted(one.layer for one in part)
    assert [rule.group for rule in program.rules] == sorted(rule.group for rule in program.rules)
    group = {rule.head: rule.group for rule in program.rules}
    for rule in program.rules:
        at = program.conclusions[rule.head].layer
        for op, argument in rule.body:
            if op == OpCode.CONCLUSION:
                assert program.conclusions[argument].layer <= at
                assert group[argument] <= rule.group
            elif op in (OpCode.PROPOSITION, OpCode.MEMORY):
                known = program.propositions if op == OpCode.PROPOSITION else program.memories
                assert known[argument].layer <= at


RENAMED = {"a": "aa", "b": "y", "e": "c1", "t": "b2", "p": "later", "q": "earlier", "r": "m"}


@settings(max_examples=60, deadline=None)
@given(rulesets(), st.randoms(use_true_random=False))
def test_names_labels_and_order_leave_no_trace_in_a_program(ruleset, random) -> None:
    raw = ruleset.as_json()

    def rename(value):
        if isinstance(value, dict):
            return {key: rename(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rename(item) for item in value]
        return RENAMED.get(value, value) if isinstance(value, str) else value

    other = {
        "propositions": {RENAMED[name]: one for name, one in raw["propositions"].items()},
        "rules": [rename(rule) | {"label": f"z{i}"} for i, rule in enumerate(raw["rules"])],
        "actions": [one | {"on": RENAMED[one["on"]]} for one in raw["actions"]],
    }
    for key in ("rules", "actions"):
        random.shuffle(other[key])
    again = parse_ruleset(other)
    assert (
        assemble([Part(again)], triggers(0, again), dictionary).program
        == assemble([Part(ruleset)], triggers(0, ruleset), dictionary).program
    )


@pytest.mark.parametrize("prompt_len", [1, 2, 9])
def test_a_share_of_no_tokens_is_none(prompt_len) -> None:
    ruleset = parse_ruleset(DECLARED + "rule r: at least 1 % of prompt(a) -> c rule s: at least 1 % of seen(a) -> d")
    found = assemble([Part(ruleset)], [], dictionary)
    readings = {read: np.zeros(4, np.float32) for read in READS}
    readings["s", 0][2] = 1
    trace = in_chunks(found, held(found, readings), prompt_len, [1, 3])
    agree(found, trace, 0, ruleset, evaluate(ruleset, readings, prompt_len, 4), [])
    assert trace.concluded[:, found.conclusions[0]["d"]].tolist() == [False, False, True, True]
    assert not trace.concluded[:, found.conclusions[0]["c"]].any()


def test_what_two_rule_sets_share_is_in_the_program_once() -> None:
    first = parse_ruleset(
        'rule x: seen(feature(s, 0) > 1) -> p  rule y: p and feature(s, 1) > 0 -> q  on q: refuse "a"'
    )
    second = parse_ruleset(
        'proposition k = feature(s, 1) > 0 rule z: k and u -> v rule y: seen(feature(s, 0) > 1) -> u on v: refuse "b"'
    )
    both = assemble([Part(first), Part(second)], triggers(0, first) + triggers(1, second), dictionary)
    assert both.program == assemble([Part(first)], triggers(0, first), dictionary).program
    assert both.conclusions[0] == {"p": both.conclusions[1]["u"], "q": both.conclusions[1]["v"]}
    assert both.actions == (0, 0)


def test_conclusions_without_evidence_are_known_at_the_lowest_layer_of_anything() -> None:
    late = parse_ruleset("rule r: prompt_ended -> p  rule s: p and feature(s, 0) > 1 -> q  on p: flag")
    found = assemble([Part(late)], triggers(0, late), dictionary, effects=(2,), otherwise=7)
    layers = {name: found.program.conclusions[i].layer for name, i in found.conclusions[0].items()}
    assert layers == {"p": 2, "q": 3}
    alone = parse_ruleset("rule r: prompt_ended -> p  on p: flag")
    assert assemble([Part(alone)], triggers(0, alone), dictionary, otherwise=7).program.layers == (7,)


def stack_need(code: Code) -> int:
    size = most = 0
    for op, _ in code:
        size += 0 if op == OpCode.NOT else -1 if op in (OpCode.AND, OpCode.OR, OpCode.XOR) else 1
        most = max(most, size)
    return most


def test_codes_of_large_bodies_need_few_values_on_the_stack() -> None:
    """A body is nested deeply or widely; what needs most comes first."""
    words = " and ".join(f"(feature(s, {2 * i}) > 1 or feature(s, {2 * i + 1}) > 1)" for i in range(40))
    comb = "feature(s, 0) > 1"
    for i in range(1, 50):
        comb = f"(feature(s, {i}) > 1 {('and', 'or')[i % 2]} {comb})"
    for body in (words, comb):
        found = parse_ruleset(f"rule r: {body} -> p")
        assert stack_need(assemble([Part(found)], [], dictionary).program.rules[0].body) <= 3


def test_float32_scores_are_summed_in_the_documented_order() -> None:
    code = PropositionCode(0, False, ("f:d:0", "f:d:1", "f:d:2"), (1.0, 1.0, -1.0), (), False, 0.0)
    a = np.array([[1e8, 1.0, 1e8]], np.float32)
    assert scores(code, a).tolist() == [0.0]  # (1e8 + 1) rounds to 1e8 before 1e8 is taken off
