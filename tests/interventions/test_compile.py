"""Requests become canonical programs: equal meanings share a digest, no-ops vanish, everything else is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from interventions.compile import check_selectable, compile_request
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.program import Payload, ReadKind, feature_key, vector_key
from interventions.selectors import ALL, GENERATED, Selector
from interventions.spec import parse_inspect, parse_interventions

D = 16
RAMP = [float(i - 5) for i in range(D)]
AXIS = [1.0] + [0.0] * (D - 1)
FORMAL = {"type": "steer", "vector": "formal", "strength": 1.5}
VALUES = {"type": "steer", "layer": 1, "values": RAMP, "strength": 2.0}
FEATURE = {"type": "steer", "sae": "jumprelu", "feature": 3}


def edit(*features: dict[str, Any], sae: str = "jumprelu", **common: Any) -> dict[str, Any]:
    return {"type": "edit_features", "sae": sae, "features": list(features), **common}


SET = edit({"index": 3, "op": "set", "value": 2.0})
EVERYTHING = [
    {**FORMAL, "id": "tone"},
    {**VALUES, "tokens": "generated"},
    {**VALUES, "strength": -1, "mode": "normalized", "id": "n"},
    {**VALUES, "mode": "project_out", "strength": 0.5},
    {"type": "steer", "layers": [2, 1], "values": RAMP[::-1], "mode": "cap", "min": -1, "max": 2},
    FEATURE,
    edit({"index": 3, "op": "set", "value": 0}, {"index": 5, "op": "clamp", "min": 1.0, "max": 3}),
    edit({"index": 7, "op": "add", "value": 1, "only_if_active": True}, sae="topk"),
]


def digest_of(compiled, *interventions) -> str | None:
    return compiled(*interventions).payload().digest


def channel(compiled, *interventions):
    """The only channel of what compiles to one."""
    program = compiled(*interventions).program
    ((layer,),) = (program.layers,)
    (only,) = layer.channels
    return only


# rows and ops --------------------------------------------------------------------------------------------------------


def test_steering_adds_the_vector_as_given(compiled):
    result = compiled(FORMAL)
    assert [layer.layer for layer in result.program.layers] == [1, 2]
    assert result.entries[0].layers == (1, 2)
    for layer in result.program.layers:
        (added,) = layer.channels
        assert added.read is ReadKind.NONE
        assert [(op.alpha, abs(op.beta)) for op in added.ops] == [(1.0, 1.5)]
        assert added.row == vector_key(result.program.vectors[added.row])
    ((key, values),) = compiled(VALUES).program.vectors.items()
    (op,) = channel(compiled, VALUES).ops
    assert (channel(compiled, VALUES).row, key) == (key, vector_key(values))
    assert (op.beta * np.frombuffer(values, "<f4")).tolist() == [2.0 * x for x in RAMP]


def test_a_vector_and_its_opposite_share_a_row_so_that_they_cancel_exactly(compiled):
    there, back = VALUES, {**VALUES, "values": [-x for x in RAMP]}
    added = channel(compiled, there, back)
    assert sum(op.beta for op in added.ops) == 0
    assert channel(compiled, back) == channel(compiled, {**there, "strength": -there.get("strength", 1.0)})


def test_a_feature_steers_along_its_decoder_row_not_normalised(compiled, saes):
    added = channel(compiled, FEATURE)
    row = np.frombuffer(compiled(FEATURE).program.vectors[added.row], "<f4")
    np.testing.assert_array_equal(row, saes["jumprelu"].W_dec[3].numpy())
    assert abs(np.linalg.norm(row) - 1) > 0.01


def test_one_vector_serves_all_layers_or_each_has_its_own(compiled):
    shared = compiled({"type": "steer", "layers": [2, 1], "values": RAMP})
    assert [layer.channels[0].row for layer in shared.program.layers] == [channel(compiled, VALUES).row] * 2
    own = compiled({"type": "steer", "layers": [2, 1], "values": [RAMP, [1.0] * D]})
    rows = [np.frombuffer(own.program.vectors[layer.channels[0].row], "<f4") for layer in own.program.layers]
    np.testing.assert_array_equal(np.abs(rows), np.abs([[1.0] * D, RAMP]))


@pytest.mark.parametrize("mode", ["normalized", "project_out", "cap"])
def test_directions_are_unit_vectors_with_a_canonical_sign(compiled, mode):
    bounds = {"min": -1.0, "max": 3.0} if mode == "cap" else {}
    base = {"type": "steer", "layer": 1, "mode": mode}
    flipped = {"min": -3.0, "max": 1.0} if mode == "cap" else {}
    strength = {} if mode == "cap" else {"strength": 0.5}
    mirrored = {"strength": -0.5} if mode == "normalized" else strength
    one = {**base, **bounds, **strength, "values": RAMP}
    other = {**base, **flipped, **mirrored, "values": [-2 * x for x in RAMP]}
    assert digest_of(compiled, one) == digest_of(compiled, other)
    row = np.frombuffer(compiled(one).program.vectors[channel(compiled, one).row], "<f4")
    assert row[0] > 0
    assert abs(np.linalg.norm(row) - 1) < 1e-6


def test_project_out_and_cap_along_one_line_share_a_channel_in_request_order(compiled):
    negated = [-x for x in RAMP]
    program = compiled(
        {"type": "steer", "layer": 1, "values": RAMP, "mode": "project_out", "strength": 0.25},
        {"type": "steer", "layer": 1, "values": negated, "mode": "cap", "min": -1.0},
    ).program
    (only,) = program.layers[0].channels
    assert only.read is ReadKind.DOT
    assert [(op.alpha, op.beta, op.intervention) for op in only.ops] == [(0.75, 0.0, 0), (1.0, 0.0, 1)]
    # the canonical direction of RAMP is -RAMP (its first entry is -5): the cap keeps its own sense
    assert (only.ops[1].lo, only.ops[1].hi) == (-1.0, math.inf)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"op": "set", "value": 2.5}, (0.0, 2.5, -math.inf, math.inf)),
        ({"op": "scale", "value": -2}, (-2.0, 0.0, -math.inf, math.inf)),
        ({"op": "add", "value": 3}, (1.0, 3.0, -math.inf, math.inf)),
        ({"op": "clamp", "min": 1}, (1.0, 0.0, 1.0, math.inf)),
        ({"op": "clamp", "min": -1, "max": 0.5}, (1.0, 0.0, -1.0, 0.5)),
        ({"op": "ablate"}, (0.0, 0.0, -math.inf, math.inf)),
    ],
)
def test_latent_ops_are_affine_maps_with_bounds(compiled, saes, fields, expected):
    only = channel(compiled, edit({"index": 3, "only_if_active": True, **fields}))
    assert (only.read, only.row) == (ReadKind.LATENT, feature_key(saes["jumprelu"].digest, 3))
    (op,) = only.ops
    assert ((op.alpha, op.beta, op.lo, op.hi), op.only_if_active) == (expected, True)


def test_edits_of_one_latent_meet_in_one_channel_in_request_order(compiled):
    first = edit({"index": 3, "op": "scale", "value": 2})
    second = edit({"index": 3, "op": "add", "value": 1}, {"index": 2, "op": "ablate"})
    program = compiled(first, second).program
    ((two, three),) = (program.layers[0].channels,)
    assert [op.intervention for op in two.ops + three.ops] == [1, 0, 1]
    assert digest_of(compiled, first, second) != digest_of(compiled, second, first)


def test_topk_latents_are_members_of_a_full_encode(compiled):
    result = compiled(edit({"index": 3, "op": "ablate"}, sae="topk"))
    assert result.program.layers[0].channels[0].read is ReadKind.MEMBER
    assert result.needs_full == {"topk"}
    assert compiled(SET).needs_full == frozenset()


def test_latents_of_a_non_additive_decoder_are_edited_jointly(compiled, refused, server):
    result = compiled(edit({"index": 3, "op": "ablate"}, {"index": 5, "op": "set", "value": 2}, sae="polysae"))
    assert [channel.read for channel in result.program.layers[0].channels] == [ReadKind.JOINT, ReadKind.JOINT]
    assert result.needs_full == {"polysae"}
    error = refused(edit({"index": 3, "op": "set", "value": 1e7}, sae="polysae"))
    assert (error.code, error.param) == ("invalid_intervention", "interventions[0]")
    server.saes["polysae"].full_encode = False
    error = refused(edit({"index": 3, "op": "ablate"}, sae="polysae"))
    assert "its decoder is not additive" in error.message
    assert "--full-encode polysae" in error.message
    assert "--approximate" not in error.message


def test_a_stand_in_is_edited_row_by_row_and_says_that_it_is_one(compiled, server):
    server.saes["stand-in"].full_encode = False
    spec = edit({"index": 3, "op": "ablate"}, sae="stand-in")
    along = {"type": "steer", "sae": "stand-in", "feature": 3}
    inspect = [{"sae": "stand-in", "features": [1]}, {"sae": "relu", "features": [1]}]
    result = compiled(spec, SET, along, inspect=inspect)
    latent = next(channel for channel in result.program.layers[0].channels if channel.read is ReadKind.LATENT)
    assert latent.row.split(":")[1] in {one.sae.digest for one in server.saes.values()}
    assert [entry.approximate for entry in result.entries] == [True, False, False]
    assert result.inspect_approximate == (True, False)
    assert digest_of(compiled, spec) != digest_of(compiled, {**spec, "sae": "topk"})


# digests -------------------------------------------------------------------------------------------------------------


def test_the_digest_ignores_order_labels_and_names(compiled, server):
    digest = digest_of(compiled, *EVERYTHING)
    assert digest_of(compiled, *EVERYTHING[::-1]) == digest
    assert digest_of(compiled, *({**spec, "id": f"label {i}"} for i, spec in enumerate(EVERYTHING))) == digest
    server.saes["alias"] = dataclasses.replace(server.saes["jumprelu"], id="alias")
    server.vectors["polite"] = server.vectors["formal"]
    renamed = [{**spec, "sae": "alias"} if spec.get("sae") == "jumprelu" else spec for spec in EVERYTHING]
    renamed[0] = {**renamed[0], "vector": "polite"}
    assert digest_of(compiled, *renamed) == digest


def test_adds_of_one_vector_commute(compiled):
    adds = [{**VALUES, "strength": s, "tokens": t} for s, t in [(1, "all"), (2, "prompt"), (3, "all"), (0.5, "all")]]
    assert digest_of(compiled, *adds) == digest_of(compiled, *adds[::-1]) == digest_of(compiled, *adds[2:], *adds[:2])
    assert digest_of(compiled, *adds) != digest_of(compiled, *adds[:3])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({**VALUES, "tokens": ["prompt", "generated"]}, VALUES),
        ({**VALUES, "tokens": {"from": 1}}, VALUES),
        ({**VALUES, "tokens": {"tokens": ["Paris", 4]}}, {**VALUES, "tokens": {"tokens": [4, 6, 6]}}),
        ({**VALUES, "values": [*RAMP[:5], -0.0, *RAMP[6:]]}, VALUES),
        ({**VALUES, "layer": None, "layers": [1]}, VALUES),
        (edit({"index": 3, "op": "set", "value": 0}), edit({"index": 3, "op": "scale", "value": 0})),
        (edit({"index": 3, "op": "ablate"}), edit({"index": 3, "op": "set", "value": -0.0})),
        ({**VALUES, "strength": 0.1}, {**VALUES, "strength": float(np.float32(0.1))}),
    ],
)
def test_equal_meanings_have_equal_digests(compiled, one, other):
    assert digest_of(compiled, one) == digest_of(compiled, other) is not None


def test_an_edit_of_several_latents_equals_several_edits_of_one(compiled):
    a, b = {"index": 3, "op": "ablate"}, {"index": 1, "op": "add", "value": 2}
    assert digest_of(compiled, edit(a, b)) == digest_of(compiled, edit(b), edit(a))


@pytest.mark.parametrize(
    "changes",
    [
        [VALUES, {**VALUES, "strength": 2.0000002}],
        [VALUES, {**VALUES, "layer": 2}, {**VALUES, "values": [*RAMP[:-1], 10.5]}, {**VALUES, "mode": "normalized"}],
        [{**VALUES, "tokens": t} for t in ("all", "prompt", "generated", "last_prompt_token", {"from": 2}, {"to": 9})],
        [{**VALUES, "tokens": t} for t in ({"tokens": [3]}, {"tokens": [4]}, [{"tokens": [3]}, "prompt"])],
        [VALUES, {**VALUES, "include_bos": True}],
        [SET, edit({"index": 3, "op": "set", "value": 2.5}), edit({"index": 4, "op": "set", "value": 2})],
        [SET, edit({"index": 3, "op": "set", "value": 2, "only_if_active": True})],
        [SET, edit({"index": 3, "op": "set", "value": 2}, sae="gated")],
        [edit({"index": 3, "op": "clamp", "min": 1}), edit({"index": 3, "op": "clamp", "max": 1})],
        [{**VALUES, "values": AXIS, "mode": mode} for mode in ("add", "normalized")],  # one row, one op, two readings
        [FEATURE, SET, {**FEATURE, "mode": "project_out"}],
    ],
)
def test_different_meanings_have_different_digests(compiled, changes):
    digests = [digest_of(compiled, change) for change in changes]
    assert None not in digests
    assert len(set(digests)) == len(changes)


def test_the_dose_policy_is_part_of_every_program(compiled, server):
    digests = {digest_of(compiled, VALUES)}
    for server.max_dose, server.refuse_over_dose in ((0.5, False), (0.5, True), (0.75, False)):
        program = compiled(VALUES).program
        assert (program.max_dose, program.refuse_over_dose) == (server.max_dose, server.refuse_over_dose)
        digests.add(program.digest())
    assert len(digests) == 4


def test_inspections_are_not_part_of_the_digest(compiled):
    assert compiled(SET, inspect={"sae": "relu", "top_k": 3}).payload().digest == digest_of(compiled, SET)


def test_the_payload_survives_its_journey(compiled):
    payload = compiled(*EVERYTHING, inspect=[{"sae": "topk", "top_k": 3, "tokens": {"from": -2}}]).payload()
    arrived = Payload.from_bytes(payload.to_bytes())
    assert arrived == payload
    assert arrived.program.digest() == payload.digest


def test_only_used_selectors_and_rows_travel(compiled):
    program = compiled(VALUES, {**VALUES, "strength": 0, "tokens": "prompt"}, {**FORMAL, "strength": 0}).program
    assert program.selectors == (ALL,)
    assert list(program.vectors) == [channel(compiled, VALUES).row]


# no-ops --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noop",
    [
        {**VALUES, "strength": 0},
        {**VALUES, "strength": -0.0, "mode": "normalized"},
        {**VALUES, "strength": 1e-60},
        {**VALUES, "strength": 0, "mode": "project_out"},
        {**VALUES, "values": [0] * D},
        {"type": "steer", "vector": "zero"},
        {**FEATURE, "strength": 0},
        edit({"index": 3, "op": "scale", "value": 1}),
        edit({"index": 3, "op": "add", "value": 0}, {"index": 4, "op": "scale", "value": 1}),
        {**VALUES, "tokens": {"from": 5, "to": 5}},
        edit({"index": 3, "op": "ablate"}, tokens={"from": 7, "to": 2}),
        edit({"index": 3, "op": "ablate"}, tokens=[{"from": -1, "to": -4}, {"from": -3, "to": 0}]),
    ],
)
def test_noops_are_dropped_and_marked(compiled, noop):
    alone = compiled(noop)
    assert alone.program is None
    assert alone.payload().digest is None
    assert [entry.noop for entry in alone.entries] == [True]
    assert alone.entries[0].layers[0] == 1
    together = compiled(noop, SET)
    assert [entry.noop for entry in together.entries] == [True, False]
    assert together.payload().digest == digest_of(compiled, SET)


def test_noops_are_validated_like_anything_else(refused):
    assert refused({**VALUES, "strength": 0, "layer": 3}).code == "layer_not_armed"
    assert refused(edit({"index": 40, "op": "scale", "value": 1})).code == "unknown_feature"
    assert refused({**VALUES, "strength": 0, "values": [1.0]}).code == "wrong_dimension"
    assert refused({**VALUES, "values": [0] * D, "mode": "normalized", "strength": 0}).code == "invalid_intervention"


def test_an_edit_is_a_noop_only_if_all_of_it_is(compiled):
    entry = compiled(edit({"index": 3, "op": "scale", "value": 1}, {"index": 4, "op": "ablate"})).entries[0]
    assert not entry.noop
    half = compiled({"type": "steer", "vector": "half zero"})
    assert (half.entries[0].noop, half.entries[0].layers) == (False, (1, 2))
    assert [layer.layer for layer in half.program.layers] == [2]


def test_setting_to_zero_and_clamping_are_not_noops(compiled):
    for feature in ({"op": "set", "value": 0}, {"op": "clamp", "min": 0}, {"op": "scale", "value": 0}):
        assert not compiled(edit({"index": 3, **feature})).entries[0].noop


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "code", "param", "says"),
    [
        ({**VALUES, "layer": 3}, "layer_not_armed", "layer", "armed are 1, 2"),
        ({**VALUES, "layer": 3}, "layer_not_armed", "layer", "--arm-layers 3"),
        ({**VALUES, "layer": 4}, "invalid_intervention", "layer", "0..3"),
        ({**VALUES, "layer": -1}, "invalid_intervention", "layer", "0..3"),
        ({**VALUES, "layer": 10**5000}, "invalid_intervention", "layer", "bits"),
        ({**VALUES, "layer": None, "layers": [1, 3]}, "layer_not_armed", "layers[1]", "layer 3"),
        ({**VALUES, "values": [1.0]}, "wrong_dimension", "values", "d_model is 16"),
        ({**VALUES, "values": [RAMP, RAMP]}, "wrong_dimension", "values", "2 vectors for 1 layers"),
        ({**VALUES, "layer": None, "layers": [1, 2], "values": [RAMP]}, "wrong_dimension", "values", "1 vectors"),
        (
            {**VALUES, "values": [0] * D, "mode": "cap", "strength": None, "min": 0},
            "invalid_intervention",
            "values",
            "zero",
        ),
        ({**VALUES, "values": [0] * D, "mode": "project_out"}, "invalid_intervention", "values", "zero"),
        ({"type": "steer", "vector": "nobody"}, "unknown_vector", "vector", "nobody"),
        ({"type": "steer", "vector": "zero", "mode": "normalized"}, "invalid_intervention", "vector", "direction"),
        ({"type": "steer", "vector": "elsewhere"}, "layer_not_armed", "vector", "layer 3"),
        ({"type": "steer", "vector": "narrow"}, "wrong_dimension", "vector", "15"),
        ({"type": "steer", "vector": "broken"}, "invalid_intervention", "vector", "finite"),
        ({**FEATURE, "sae": "nobody"}, "unknown_sae", "sae", "nobody"),
        ({**FEATURE, "feature": 40}, "unknown_feature", "feature", "index 40; jumprelu has 0..39"),
        ({**FEATURE, "feature": -1}, "unknown_feature", "feature", "index -1"),
        (edit({"index": 1, "op": "ablate"}, sae="nobody"), "unknown_sae", "sae", "nobody"),
        (
            edit({"index": 1, "op": "ablate"}, {"index": 10**5000, "op": "ablate"}),
            "unknown_feature",
            "features[1].index",
            "0..39",
        ),
        ({**SET, "tokens": {"tokens": [100]}}, "invalid_intervention", "tokens.tokens[0]", "0..99"),
        ({**SET, "tokens": ["prompt", {"tokens": [1, -1]}]}, "invalid_intervention", "tokens[1].tokens[1]", "0..99"),
        ({**SET, "tokens": {"tokens": ["London"]}}, "invalid_intervention", "tokens.tokens[0]", "' Lond', 'on'"),
    ],
)
def test_what_this_server_cannot_do_is_refused_with_its_field(refused, spec, code, param, says):
    error = refused(VALUES, {**spec, "id": "it"})
    assert (error.code, error.param) == (code, f"interventions[1].{param}")
    assert says in error.message
    assert error.status == 400


@pytest.mark.parametrize(
    "specs",
    [
        [{**VALUES, "values": [3e38] * D}],
        [{**VALUES, "strength": 1e18}],
        [{**VALUES, "strength": 4e16}] * 2,
        [{**VALUES, "strength": 1e13, "mode": "normalized"}],
        [{**VALUES, "strength": 1e13, "mode": "project_out"}],
        [{**VALUES, "strength": None, "min": 1e30, "mode": "cap"}],
        [edit({"index": 3, "op": "set", "value": 3e38})],
        [edit({"index": 3, "op": "clamp", "min": 3e38})],
        [edit({"index": 3, "op": "scale", "value": 1e7})] * 2,
    ],
)
def test_edits_that_would_overflow_float32_are_refused(refused, specs):
    error = refused(*specs)
    assert (error.code, error.param) == ("invalid_intervention", f"interventions[{len(specs) - 1}]")
    assert "float32" in error.message


def test_large_but_representable_edits_are_served(compiled):
    compiled({**VALUES, "strength": 1e15}, edit({"index": 3, "op": "set", "value": 1e15}))
    compiled({**VALUES, "strength": None, "mode": "cap", "min": -1e30, "max": 1e30})
    compiled(edit({"index": 3, "op": "scale", "value": 1e10}), edit({"index": 3, "op": "clamp", "min": 0, "max": 10}))


def test_a_string_is_one_token_as_given_or_else_with_a_leading_space(compiled):
    as_given = compiled({**SET, "tokens": {"tokens": ["Paris"]}}).entries[0].selector
    assert as_given == Selector((), (6,))
    with_space = compiled({**SET, "tokens": {"tokens": [" Paris"]}}).entries[0].selector
    assert with_space == Selector((), (7,))


def test_a_string_that_is_one_token_only_after_a_space_matches_that(compiled, server):
    server.encode_text = lambda text: {" dog": [11]}.get(text, [1, 2])
    assert compiled({**SET, "tokens": {"tokens": ["dog"]}}).entries[0].selector == Selector((), (11,))


def test_topk_edits_without_the_full_encode_path_name_the_flag(refused, compiled, server):
    server.saes["topk"].full_encode = server.saes["jumprelu"].full_encode = False
    error = refused(edit({"index": 1, "op": "ablate"}, sae="topk"))
    assert (error.code, error.param) == ("invalid_intervention", "interventions[0].sae")
    assert "--full-encode topk" in error.message
    assert "--approximate topk" in error.message
    error = refused(inspect={"sae": "topk", "features": [1]})
    assert (error.code, error.param) == ("invalid_inspection", "inspect.sae")
    error = refused(inspect={"sae": "jumprelu", "top_k": 1})
    assert (error.code, error.param) == ("invalid_inspection", "inspect.top_k")
    assert "--full-encode jumprelu" in error.message
    assert "--approximate" not in error.message
    assert compiled(SET, inspect={"sae": "jumprelu", "features": [1]}).needs_full == frozenset()


@pytest.mark.parametrize(
    ("limits", "specs", "inspect", "param"),
    [
        ({"interventions": 2}, [SET, VALUES, FORMAL], None, "interventions"),
        ({"instructions": 3}, [SET, FORMAL, VALUES], None, "interventions[2]"),
        ({"rows": 2}, [SET, FORMAL], None, "interventions[1]"),
        ({"instructions": 1}, [{**FORMAL, "strength": 0}], None, "interventions[0]"),
        (
            {"inspected_features": 3},
            [],
            [{"sae": "relu", "features": [1, 2]}, {"sae": "topk", "features": [1, 2]}],
            "inspect",
        ),
        ({"selector_parts": 2}, [{**SET, "tokens": ["prompt"] * 3}], None, "interventions[0].tokens"),
        (
            {"selector_tokens": 2},
            [{**SET, "tokens": [{"tokens": [1, 2]}, {"tokens": [3]}]}],
            None,
            "interventions[0].tokens",
        ),
        ({"top_k": 4}, [], {"sae": "relu", "top_k": 5}, "inspect.top_k"),
    ],
)
def test_limits_are_checked_and_named(refused, server, limits, specs, inspect, param):
    server.limits = Limits(**limits)
    error = refused(*specs, inspect=inspect)
    assert (error.code, error.param) == ("limit_exceeded", param)


def test_at_the_limits_a_request_is_served(compiled, server):
    server.limits = Limits(interventions=3, instructions=4, rows=4, inspected_features=2, top_k=5)
    compiled(SET, FORMAL, VALUES, inspect={"sae": "relu", "top_k": 5, "features": [1, 2]})


def test_default_limits_are_those_of_the_contract():
    limits = Limits().as_dict()
    assert limits["interventions"] == 32
    assert limits["instructions"] == limits["rows"] == 1024
    assert (limits["rules"], limits["propositions"], limits["inspected_features"]) == (64, 128, 256)
    assert (limits["top_k"], limits["bank_rows"]) == (128, 8192)
    for bad in ({"interventions": 64}, {"top_k": 0}, {"rows": 10_000}):
        with pytest.raises(ValueError):
            Limits(**bad)


# inspections ---------------------------------------------------------------------------------------------------------


def test_reads_mirror_the_inspections(compiled, saes):
    result = compiled(
        inspect=[{"sae": "relu", "features": [5, 2]}, {"sae": "topk", "top_k": 50, "tokens": "generated"}]
    )
    assert result.program is None
    assert result.entries == ()
    assert result.inspect_ids == ("relu", "topk")
    first, second = result.reads
    assert (first.sae, first.layer, first.features, first.top_k) == (saes["relu"].digest, 1, (5, 2), 0)
    assert (second.selector, second.top_k) == (GENERATED, 40)  # the dictionary has only 40 latents


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("all", True),
        ("prompt", True),
        ("generated", False),
        ("last_prompt_token", True),
        ({"from": -1}, True),
        ({"from": 3}, True),
        ({"tokens": [3]}, True),
        (["generated", {"tokens": [3]}], True),
    ],
)
def test_an_inspection_that_can_reach_the_prompt_is_known(compiled, tokens, expected):
    assert compiled(inspect={"sae": "relu", "features": [1], "tokens": tokens}).inspects_prompt is expected


@pytest.mark.parametrize(
    ("inspect", "code", "param"),
    [
        ({"sae": "nobody", "top_k": 1}, "unknown_sae", "inspect.sae"),
        ([{"sae": "relu", "features": [1, 40]}], "unknown_feature", "inspect[0].features[1]"),
        ({"sae": "relu", "top_k": 1, "tokens": {"tokens": [100]}}, "invalid_inspection", "inspect.tokens.tokens[0]"),
    ],
)
def test_an_inspection_of_what_is_not_there_is_refused(refused, inspect, code, param):
    error = refused(inspect=inspect)
    assert (error.code, error.param) == (code, param)


# selectors that never select -----------------------------------------------------------------------------------------

PROMPT_IDS = [50, 51, 52, 53]


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "selectable"),
    [
        ("all", 1, True),
        ("generated", 1, False),  # the only sampled token is never fed
        ("generated", 2, True),
        ("generated", None, True),
        ({"from": 4}, 1, False),
        ({"from": 5}, 2, False),  # positions 0..4 are fed
        ({"from": 5}, 3, True),
        ({"from": 10**6}, None, True),
        ({"from": 0, "to": 1}, 9, False),
        ({"from": 3, "to": -1}, 9, False),
        ({"tokens": [53]}, 1, True),
        ({"tokens": [60]}, 1, False),
        ({"tokens": [60]}, 2, True),
        ({"tokens": [50]}, 1, False),  # only at position 0
    ],
)
def test_a_selector_that_can_never_select_is_refused(compiled, tokens, max_tokens, selectable):
    result = compiled({**SET, "tokens": tokens})
    reading = compiled(inspect={"sae": "relu", "features": [1], "tokens": tokens})
    if selectable:
        check_selectable(result, PROMPT_IDS, max_tokens)
        check_selectable(reading, PROMPT_IDS, max_tokens)
        return
    with pytest.raises(InterventionError) as caught:
        check_selectable(result, PROMPT_IDS, max_tokens)
    assert (caught.value.code, caught.value.param) == ("invalid_intervention", "interventions[0].tokens")
    with pytest.raises(InterventionError) as caught:
        check_selectable(reading, PROMPT_IDS, max_tokens)
    assert (caught.value.code, caught.value.param) == ("invalid_inspection", "inspect.tokens")


def test_the_refusal_hints_at_include_bos_where_that_would_help(compiled):
    for tokens, helps in (({"to": 1}, True), ({"tokens": [50]}, True), ("generated", False)):
        with pytest.raises(InterventionError) as caught:
            check_selectable(compiled({**SET, "tokens": tokens}), PROMPT_IDS, 1)
        assert ("include_bos" in caught.value.message) is helps
        if helps:
            check_selectable(compiled({**SET, "tokens": tokens, "include_bos": True}), PROMPT_IDS, 1)


def test_noops_need_not_select_anything(compiled):
    check_selectable(compiled({**SET, "tokens": {"from": 2, "to": 2}}), PROMPT_IDS, 1)
    check_selectable(compiled({**VALUES, "strength": 0, "tokens": "generated"}), PROMPT_IDS, 1)


def test_requests_compile_without_anything(server):
    result = compile_request(parse_interventions(None), parse_inspect(None), server)
    assert (result.program, result.entries, result.reads, result.inspects_prompt) == (None, (), (), False)
