"""Remaps: what a request may say, and what a map compiles into on each kind of dictionary."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from interventions.compile import check_selectable
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.maps.gates import START as FIRST
from interventions.maps.gates import CusumGate, ShareGate, WindowGate, update
from interventions.maps.map import AllTokens, LatentMap, MentionTokens, SequenceGate, TriggerTokens
from interventions.maps.transfer import Transfer, Unit, clamp_active, interpolate, move
from interventions.program import GateKind, Op, OpKind, Payload, Program, ReadKind, UnitKind, feature_key, mean_key
from interventions.remapping import check_map
from interventions.selectors import ALL, Selector
from interventions.spec import Remap, parse_interventions

PARIS, LONDON = (6,), (8, 9)
"""Token sequences of the test server's pieces."""


def remap(name: str = "m", **fields: Any) -> dict[str, Any]:
    return {"type": "remap", "map": name, **fields}


@pytest.fixture
def put(server):
    """``put(*transfers, sae="jumprelu", name="m", scope=…, gate=…)``: a map of that server."""

    def store(*transfers: Transfer, sae: str = "jumprelu", name: str = "m", **fields: Any) -> LatentMap:
        ordered = tuple(sorted(transfers, key=lambda t: t.latent))
        made = LatentMap("model", server.saes[sae].sae.digest, 1, ordered, **fields)
        server.maps[name] = made
        return made

    return store


def ops_of(program: Program) -> dict[int, tuple[Op, ...]]:
    """Latent → its ops, of a program at one layer."""
    (layer,) = program.layers
    return {int(channel.row.rpartition(":")[2]): channel.ops for channel in layer.channels}


def only(program: Program) -> Op:
    ((op,),) = ops_of(program).values()
    return op


# what may be said ----------------------------------------------------------------------------------------------------


def test_a_remap_is_a_name_and_a_strength():
    (spec,) = parse_interventions([remap("forget-paris", strength=None)])
    assert isinstance(spec, Remap)
    assert (spec.map, spec.strength) == ("forget-paris", 1.0)


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        ({"map": None}, "map", "is required"),
        ({"map": ""}, "map", "1 to 256 characters"),
        ({"map": {"sae": "x"}}, "map", "expected a string"),
        ({"strength": -0.5}, "strength", "≥ 0"),
        ({"strength": "1"}, "strength", "expected a number"),
        ({"strength": float("nan")}, "strength", "finite"),
        ({"strength": 1e39}, "strength", "finite"),
        ({"scope": "all"}, "scope", "unknown field"),
        ({"mapp": "m"}, "mapp", "Did you mean 'map'"),
        ({"when": ["x"]}, "when", "expected a rule expression"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(raw, param, says):
    with pytest.raises(InterventionError) as caught:
        parse_interventions([remap() | raw])
    assert (caught.value.code, caught.value.param) == ("invalid_intervention", f"interventions[0].{param}")
    assert says in caught.value.message


def test_an_unknown_map_is_refused_by_its_field(refused):
    error = refused(remap("nope"))
    assert (error.code, error.param) == ("unknown_map", "interventions[0].map")


# transfers -----------------------------------------------------------------------------------------------------------


def test_a_plain_transfer_is_the_affine_op_of_an_equal_edit(compiled, put):
    put(interpolate(3, 2.5), Transfer(5, alpha=0.0, lo=1.0, only_if_active=True))
    ops = ops_of(compiled(remap()).program)
    assert [(op.kind, op.alpha, op.beta, op.scope, op.gates) for op in ops[3]] == [(OpKind.AFFINE, 0, 2.5, -1, ())]
    assert (ops[5][0].lo, ops[5][0].only_if_active) == (1.0, True)
    put(interpolate(3, 2.5))
    edit = {"type": "edit_features", "sae": "jumprelu", "features": [{"index": 3, "op": "set", "value": 2.5}]}
    assert compiled(remap()).payload().digest == compiled(edit).payload().digest


def test_sources_and_units_name_rows_of_the_same_dictionary(compiled, put, saes):
    digest = saes["jumprelu"].digest
    put(*move(2, 7, 0.5), clamp_active(3, 4.0, Unit.PREACT_MEAN), clamp_active(4, 0.25, Unit.RESIDUAL_NORM))
    program = compiled(remap()).program
    ops = ops_of(program)
    assert (ops[7][0].kind, ops[7][0].gamma, ops[7][0].source) == (OpKind.REMAP, 0.5, feature_key(digest, 2))
    assert (ops[3][0].unit, ops[3][0].mean, ops[3][0].beta) == (UnitKind.PREACT_MEAN, mean_key(digest), -4.0)
    assert (ops[4][0].unit, ops[4][0].mean) == (UnitKind.RESIDUAL_NORM, "")
    assert ops[2][0].kind is OpKind.AFFINE
    assert {mean_key(digest), feature_key(digest, 2)} <= set(program.row_keys)


def test_a_unit_without_beta_says_nothing(compiled, put):
    put(Transfer(3, alpha=0.5, unit=Unit.PREACT_MEAN))
    with_unit = compiled(remap()).payload().digest
    put(Transfer(3, alpha=0.5))
    assert compiled(remap()).payload().digest == with_unit


@pytest.mark.parametrize("strength", [0.25, 1.0, 2.0])
def test_the_strength_is_that_of_the_map(compiled, put, strength):
    fitted = put(Transfer(3, alpha=-1.0, beta=4.0, gamma=2.0, source=5, lo=-3.0, unit=Unit.RESIDUAL_NORM))
    op, want = only(compiled(remap(strength=strength)).program), fitted.transfers[0].at(strength)
    assert (op.alpha, op.beta, op.gamma, op.lo, op.hi) == (want.alpha, want.beta, want.gamma, want.lo, want.hi)


def test_strength_zero_is_a_checked_no_op(compiled, put, refused):
    gate = SequenceGate(ShareGate(0.1), (8,))
    put(interpolate(3, 2.5), Transfer(4, lo=1.0), scope=TriggerTokens((1,)), gate=gate)
    result = compiled(remap(strength=0))
    assert result.program is None
    assert result.entries[0].noop
    assert result.entries[0].count(range(9), 5) == (0, 0)
    assert refused(remap("other", strength=0)).code == "unknown_map"


def test_edits_of_one_latent_compose_in_request_order(compiled, put):
    put(interpolate(3, 2.0), name="a")
    put(Transfer(3, alpha=3.0), Transfer(3, beta=1.0), name="b")
    mask = {"type": "suppress", "concept": {"sae": "jumprelu", "features": [3]}, "method": "attenuate", "strength": 0.5}
    program = compiled(remap("b"), mask, remap("a")).program
    assert [(op.alpha, op.beta, op.intervention) for op in ops_of(program)[3]] == [
        (3.0, 0.0, 0),
        (1.0, 1.0, 0),
        (0.5, 0.0, 1),
        (0.0, 2.0, 2),
    ]
    assert compiled(remap("a"), mask, remap("b")).program.digest() != program.digest()


def test_order_of_remaps_on_different_latents_and_names_leave_no_trace(compiled, put):
    scope = MentionTokens((PARIS, LONDON))
    gate = SequenceGate(WindowGate(0.3, 8), (8, 9))
    for name in ("a", "x"):
        put(interpolate(3, 2.0), *move(1, 4), scope=scope, gate=gate, name=name, provenance={"n": name})
    put(interpolate(7, 1.0), scope=TriggerTokens((5, 6)), name="b")
    there = compiled(remap("a"), remap("b", tokens="prompt"))
    back = compiled(remap("b", tokens="prompt", id="q"), remap("x"))
    assert there.payload().digest == back.payload().digest
    assert there.program.layers[0].gates == back.program.layers[0].gates
    assert there.program.selectors == back.program.selectors
    assert Payload.from_bytes(there.payload().to_bytes()) == there.payload()


@pytest.mark.parametrize(
    "change",
    [
        {"transfers": (interpolate(3, 2.5),)},
        {"transfers": (Transfer(3, alpha=0.0, beta=2.0, unit=Unit.RESIDUAL_NORM),)},
        {"transfers": (Transfer(3, alpha=0.0, beta=2.0, unit=Unit.PREACT_MEAN),)},
        {"transfers": (Transfer(3, alpha=0.0, beta=2.0, gamma=1.0, source=5),)},
        {"scope": TriggerTokens((1,))},
        {"scope": MentionTokens((LONDON,))},
        {"scope": MentionTokens((PARIS,), "all")},
        {"scope": AllTokens()},
        {"gate": None},
        {"gate": SequenceGate(ShareGate(0.2), (8,))},
        {"gate": SequenceGate(ShareGate(0.1), (8, 9))},
        {"gate": SequenceGate(ShareGate(0.1, "seen"), (8,))},
        {"gate": SequenceGate(ShareGate(0.1, include_bos=True), (8,))},
        {"gate": SequenceGate(WindowGate(0.1, 4), (8,))},
        {"gate": SequenceGate(CusumGate(0.1, 0.5), (8,))},
    ],
)
def test_what_changes_the_meaning_changes_the_digest(compiled, put, server, change):
    fitted = put(interpolate(3, 2.0), scope=MentionTokens((PARIS,)), gate=SequenceGate(ShareGate(0.1), (8,)))
    server.maps["other"] = replace(fitted, **change)
    prompt = [1, 6, 8, 9, 6, 2]
    digests = {compiled(remap(name)).resolved(prompt).payload().digest for name in ("m", "other")}
    assert len(digests) == 2


# scopes --------------------------------------------------------------------------------------------------------------


def test_last_mentions_are_found_by_their_shortest_ends(compiled, put):
    put(interpolate(3, 2.0), scope=MentionTokens(((1, 8, 9), (2, 6), (5, 4), PARIS, LONDON)))
    result = compiled(remap())
    op = only(result.program)
    assert result.program.selectors[op.selector] == ALL
    assert result.program.selectors[op.scope] == Selector((), (6,), False, ((5, 4), (8, 9)))
    assert result.resolved([6, 6]) is result
    assert not result.program.needs_prompt_len


def test_position_0_is_in_a_scope_where_the_request_may_select_it(compiled, put):
    for tokens in ("last", "all"):
        put(interpolate(3, 2.0), scope=MentionTokens((PARIS,), tokens))
        counts = {}
        for fields in ({}, {"include_bos": True}, {"tokens": "generated", "include_bos": True}):
            entry = compiled(remap(**fields)).resolved([6, 6, 1]).entries[0]
            counts[len(counts)] = entry.count([6, 6, 1, 6], 3)
        last = tokens == "last"
        assert counts == {0: (1 + last, 1), 1: (2 + last, 2), 2: (int(last), 0)}


def test_whole_mentions_become_positions_of_the_prompt_before_the_digest(compiled, put):
    put(interpolate(3, 2.0), scope=MentionTokens((LONDON,), "all"))
    result = compiled(remap())
    prompts = [[1, 8, 9, 1], [1, 1, 8, 9], [4, 8, 9, 8], [1, 1, 1, 1], [1, 8, 9, 1, 1]]
    resolved = [result.resolved(prompt) for prompt in prompts]
    digests = [one.payload().digest for one in resolved]
    assert digests[0] == digests[2] == digests[4]
    assert len(set(digests)) == 3
    for one in resolved:
        assert not any(selector.inside for selector in one.program.selectors)
        Payload.from_bytes(one.payload().to_bytes())
    assert [one.entries[0].count([*p, 8, 9], 4)[0] for one, p in zip(resolved[:4], prompts, strict=False)] == [
        2,
        2,
        2,
        0,
    ]
    assert result.row_keys == resolved[0].row_keys


def test_a_scope_that_never_matches_is_no_error_but_a_selector_is(compiled, put):
    put(interpolate(3, 2.0), scope=MentionTokens((PARIS,), "all"))
    check_selectable(compiled(remap()).resolved([1, 2, 3]), [1, 2, 3], 4)
    with pytest.raises(InterventionError) as caught:
        check_selectable(compiled(remap(tokens={"from": 90})), [1, 2, 3], 4)
    assert (caught.value.code, caught.value.param) == ("invalid_intervention", "interventions[0].tokens")


def test_counts_are_of_selector_and_scope_together(compiled, put):
    put(interpolate(3, 2.0), scope=MentionTokens((PARIS, LONDON)), gate=SequenceGate(ShareGate(0.9), (1,)))
    line = [1, 8, 9, 6, 1, 8, 9, 6]
    assert compiled(remap()).entries[0].count(line, 5) == (4, 2)
    assert compiled(remap(tokens="generated")).entries[0].count(line, 5) == (2, 0)
    assert compiled(remap(tokens={"tokens": [9]})).entries[0].count(line, 5) == (2, 1)
    assert compiled(remap()).entries[0].count([], 5) == (0, 0)


# gates ---------------------------------------------------------------------------------------------------------------

GATES = [
    ShareGate(0.1),
    ShareGate(0.1, least=9, latch=True),
    ShareGate(0.1, "seen", least=3, latch=True),
    ShareGate(0.25, "seen", include_bos=True),
    WindowGate(0.4, 6, 2, latch=True),
    CusumGate(2.0, 0.3, reset=True),
    CusumGate(1.5, 1 - 2.0**-30, latch=True),
]


@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_a_gate_travels_as_the_rule_that_it_is(compiled, put, gate):
    put(interpolate(3, 2.0), gate=SequenceGate(gate, (8, 12, 9)[:1]))
    result = compiled(remap())
    (made,) = result.program.layers[0].gates
    assert only(result.program).gates == (0,)
    assert result.entries[0].gate == made
    hits = np.random.default_rng(0).random(40) < 0.3
    for prompt_len in (10, 25):
        want, _ = update(gate, FIRST, hits, prompt_len)
        have, _ = update(made.rule, FIRST, hits, prompt_len)
        np.testing.assert_array_equal(have, want)
    assert result.program.needs_prompt_len is (made.kind is GateKind.SHARE_PROMPT)


def test_fields_that_a_prompt_share_does_not_look_at_leave_no_trace(compiled, put):
    digests = set()
    for gate in GATES[:2]:
        put(interpolate(3, 2.0), gate=SequenceGate(gate, (8,)))
        digests.add(compiled(remap()).payload().digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("sae", "read", "listens"),
    [
        ("gated", ReadKind.LATENT, ReadKind.LATENT),
        ("topk", ReadKind.MEMBER, ReadKind.MEMBER),
        ("matching_pursuit", ReadKind.MEMBER, ReadKind.MEMBER),
        ("polysae", ReadKind.JOINT, ReadKind.MEMBER),
        ("stand-in", ReadKind.LATENT, ReadKind.LATENT),
    ],
)
def test_evidence_is_read_as_the_dictionary_needs(compiled, put, saes, sae, read, listens):
    put(interpolate(3, 2.0), sae=sae, scope=TriggerTokens((2, 11)), gate=SequenceGate(ShareGate(0.1), (8,)))
    result = compiled(remap())
    (layer,) = result.program.layers
    assert [channel.read for channel in layer.channels] == [read]
    assert {gate.kind for gate in layer.gates} == {GateKind.TRIGGER, GateKind.SHARE_PROMPT}
    assert {gate.read for gate in layer.gates} == {listens}
    assert only(result.program).gates == (0, 1)
    assert all(gate.evidence == tuple(sorted(gate.evidence)) for gate in layer.gates)
    evidence = {key for gate in layer.gates for key in gate.evidence}
    assert evidence == {feature_key(saes[sae].digest, j) for j in (2, 8, 11)}
    assert evidence <= set(result.row_keys)
    assert result.needs_full == (frozenset() if read is ReadKind.LATENT else {sae})
    assert result.entries[0].approximate is (sae == "stand-in")


def test_a_dictionary_without_the_full_encode_is_refused_with_the_flag(refused, put, server):
    put(interpolate(3, 2.0), sae="topk")
    server.saes["topk"].full_encode = False
    error = refused(remap())
    assert (error.code, error.param) == ("invalid_intervention", "interventions[0].map")
    assert "--full-encode topk" in error.message


def test_equal_gates_are_one(compiled, put):
    gate = SequenceGate(ShareGate(0.1), (8,))
    put(interpolate(3, 2.0), *move(1, 5), gate=gate, name="a")
    put(interpolate(4, 2.0), gate=replace(gate), scope=TriggerTokens((8,)), name="b")
    program = compiled(remap("a"), remap("b")).program
    assert len(program.layers[0].gates) == 2
    used = {i for ops in ops_of(program).values() for op in ops for i in op.gates}
    assert used == {0, 1}
    alone = compiled(remap("a"), remap("b", strength=0)).program
    assert len(alone.layers[0].gates) == 1


# limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ({"instructions": 2}, "interventions[0]"),
        ({"rows": 5}, "interventions[0]"),
        ({"selectors": 1}, "interventions"),
        ({"gates": 1}, "interventions"),
    ],
)
def test_limits_count_what_a_map_brings(refused, compiled, put, server, limits, param):
    scope, gate = TriggerTokens((30,)), SequenceGate(ShareGate(0.1), (8,))
    put(*move(1, 5), clamp_active(6, 1.0, Unit.PREACT_MEAN), scope=scope, gate=gate)
    put(interpolate(3, 2.0), scope=MentionTokens((PARIS,)), name="n")
    server.limits = Limits(instructions=4, rows=7, selectors=2, gates=2)  # rows: 1, 5, 6, 30, 8, mean and 3
    compiled(remap(), remap("n"))
    server.limits = replace(server.limits, **limits)
    error = refused(remap(), remap("n"))
    assert (error.code, error.param) == ("limit_exceeded", param)


def test_inspections_need_selectors_too(refused, put, server):
    put(interpolate(3, 2.0), scope=MentionTokens((PARIS,)))
    server.limits = Limits(selectors=2)
    error = refused(remap(), inspect={"sae": "relu", "features": [1]})
    assert (error.code, error.param) == ("limit_exceeded", "interventions")
    for bad in ({"selectors": 65}, {"gates": 65}):
        with pytest.raises(ValueError, match="at most 64"):
            Limits(**bad)


def test_what_float32_cannot_carry_is_refused(refused, put):
    put(Transfer(3, beta=1e30, unit=Unit.ABSOLUTE))
    error = refused(remap(strength=1e20))
    assert (error.code, error.param) == ("invalid_intervention", "interventions[0].strength")
    assert "beyond float32" in error.message
    for transfer in (
        Transfer(3, beta=1e14, unit=Unit.RESIDUAL_NORM),
        Transfer(3, beta=1e14, unit=Unit.PREACT_MEAN),
        Transfer(3, gamma=1e14, source=4),
    ):
        put(transfer)
        error = refused(remap())
        assert (error.code, error.param) == ("invalid_intervention", "interventions[0]")
    put(replace(transfer, gamma=1e10))
    assert refused(remap(strength=1e10)).param == "interventions[0]"


def test_a_map_that_no_request_could_run_is_refused_by_its_field(put):
    for transfer, field in (
        (Transfer(3, alpha=1e39), "alpha"),
        (Transfer(3, lo=1e39), "lo"),
        (Transfer(3, hi=-1e39), "hi"),
    ):
        with pytest.raises(InterventionError, match=field) as caught:
            check_map(put(interpolate(1, 2.0), transfer), 100)
        assert (caught.value.code, caught.value.param) == ("invalid_artifact", "transfers[1]")
    check_map(put(Transfer(3, alpha=2.0, hi=1e39)), 100)
    with pytest.raises(InterventionError, match=r"0\.\.99") as caught:
        check_map(put(interpolate(1, 2.0), scope=MentionTokens((PARIS, (7, 100)))), 100)
    assert caught.value.param == "scope.sequences[1]"


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_a_large_map_compiles_quickly(compiled, put, server, tokens):
    """A thousand ops share one long scope and one long gate: neither is gone through once per op."""
    sequences = tuple(sorted((i % 90, j % 90, (i * j) % 90, *range(40)) for i in range(32) for j in range(32)))
    scope = MentionTokens(tuple(sorted(set(sequences))), tokens)
    server.limits = Limits(instructions=1024, rows=1024)
    transfers = [Transfer(j % 40, alpha=0.5) for j in range(1000)]
    put(*transfers, scope=scope, gate=SequenceGate(ShareGate(0.1), tuple(range(40))))
    begin = time.perf_counter()
    result = compiled(remap())
    result.resolved([*range(90)] * 20).payload()
    assert time.perf_counter() - begin < 2.0
    assert result.program.n_instructions == 1000
