"""The oracle against the definitions: dense SAE formulas and steering formulas, written out independently."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from interventions.oracle import LayerResult, edit_layer, read_latents, row_source, select
from interventions.program import Channel, LayerProgram, Op, ReadKind, feature_key
from interventions.selectors import Selector
from sae_weights.sae import SAE
from tests.engine.dictionaries import WHOLE

D, N_TOKENS, PROMPT_LEN = 16, 24, 15
RAMP = [float(i - 5) for i in range(D)]
NAMES = [
    "relu", "jumprelu", "gated", "topk", "batchtopk", "rescaled", "layer_norm", "topk_layer_norm", "unit_norm", "centre",
    *WHOLE, "polysae_unit_norm", "stand-in",
]  # fmt: skip


@pytest.fixture
def h() -> torch.Tensor:
    return 2 * torch.randn(N_TOKENS, D, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def run(compiled, saes, h):
    """``run(*interventions, layer=1)``: the layer's result on ``h``."""
    by_digest = {sae.digest: sae for sae in saes.values()}

    def execute(*interventions: dict[str, Any], layer: int = 1) -> LayerResult:
        program = compiled(*interventions).program
        assert program is not None
        ids = torch.arange(N_TOKENS)
        return edit_layer(
            h,
            next(lp for lp in program.layers if lp.layer == layer),
            select(program.selectors, torch.arange(N_TOKENS), ids, PROMPT_LEN),
            row_source(program.vectors, by_digest),
            lambda digest: by_digest[digest].encode(h),
            program.max_dose,
            program.refuse_over_dose,
            lambda digest, z, edited: by_digest[digest].delta(h, z, edited),
        )

    return execute


def edit(sae: str, *features: dict[str, Any], **common: Any) -> dict[str, Any]:
    return {"type": "edit_features", "sae": sae, "features": list(features), "include_bos": True, **common}


def op(index: int, name: str, **fields: Any) -> dict[str, Any]:
    return {"index": index, "op": name, **fields}


def dense(sae: SAE, h: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """decode(z') − decode(z) with the whole dictionary, in the space of h."""
    return sae.decode_for(h, edited) - sae.decode_for(h, sae.encode(h))


def feature_with_both(sae: SAE, h: torch.Tensor) -> int:
    """A latent that is on for some tokens and off for others."""
    rate = (sae.encode(h) != 0).float().mean(dim=0)
    return int((rate - 0.4).abs().argmin())


# latents -------------------------------------------------------------------------------------------------------------

FORMULAS = {
    "set": ({"value": 2.5}, lambda a: torch.full_like(a, 2.5)),
    "scale": ({"value": -1.5}, lambda a: -1.5 * a),
    "add": ({"value": 0.75}, lambda a: a + 0.75),
    "clamp": ({"min": 0.3, "max": 0.9}, lambda a: torch.clip(a, 0.3, 0.9)),
    "ablate": ({}, torch.zeros_like),
}


@pytest.mark.parametrize("only_if_active", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FORMULAS)
def test_a_latent_edit_is_the_difference_of_two_decodings(run, saes, h, name, kind, only_if_active):
    sae, (fields, formula) = saes[name], FORMULAS[kind]
    i = feature_with_both(sae, h)
    z = sae.encode(h)
    assert 0 < int((z[:, i] != 0).sum()) < N_TOKENS
    edited = z.clone()
    new = formula(z[:, i])
    edited[:, i] = torch.where(z[:, i] != 0, new, z[:, i]) if only_if_active else new
    result = run(edit(name, op(i, kind, **fields, only_if_active=only_if_active)))
    torch.testing.assert_close(result.delta, dense(sae, h, edited), rtol=1e-4, atol=1e-5)
    changed = edited[:, i] != z[:, i]
    assert torch.equal(result.fired != 0, changed)
    assert torch.equal(result.written, changed)
    assert (result.delta[~changed] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_many_edits_of_one_dictionary_are_one_difference_of_decodings(run, saes, h, name):
    sae = saes[name]
    z = sae.encode(h)
    edited = z.clone()
    edited[:, 1] = 2 * z[:, 1]
    edited[:, 2] = 1.5
    edited[:, 3] = torch.where(z[:, 3] != 0, z[:, 3] - 4, z[:, 3])
    specs = edit(name, op(1, "scale", value=2), op(2, "set", value=1.5), op(3, "add", value=-4, only_if_active=True))
    torch.testing.assert_close(run(specs).delta, dense(sae, h, edited), rtol=1e-4, atol=1e-5)


def test_results_are_not_rectified(run, saes, h):
    sae = saes["jumprelu"]
    i = feature_with_both(sae, h)
    z = sae.encode(h)
    edited = z.clone()
    edited[:, i] = z[:, i] - 100
    assert (edited[:, i] < 0).all()
    torch.testing.assert_close(
        run(edit("jumprelu", op(i, "add", value=-100))).delta, dense(sae, h, edited), rtol=1e-4, atol=1e-4
    )


def test_a_lower_clamp_bound_above_zero_wakes_a_latent(run, saes, h):
    i = feature_with_both(saes["jumprelu"], h)
    a = saes["jumprelu"].encode(h)[:, i]
    result = run(edit("jumprelu", op(i, "clamp", min=0.5)))
    asleep = a == 0
    expected = 0.5 * saes["jumprelu"].W_dec[i].expand(int(asleep.sum()), -1)
    torch.testing.assert_close(result.delta[asleep], expected)


@pytest.mark.parametrize("name", ["topk", "topk_layer_norm", "abstopk", "groupmax", "plain_topk"])
def test_editing_one_topk_latent_never_evicts_or_admits_another(run, saes, h, name):
    sae = saes[name]
    z = sae.encode(h)
    outsider = int((z[0] == 0).nonzero()[0])
    edited = z.clone()
    edited[:, outsider] = 50.0  # far above every member: re-selecting would evict one
    result = run(edit(name, op(outsider, "set", value=50)))
    torch.testing.assert_close(result.delta, dense(sae, h, edited), rtol=1e-4, atol=1e-4)
    assert result.written[0]


def test_topk_activity_is_membership_with_a_nonzero_value(run, saes, h):
    sae = saes["topk"]
    i = feature_with_both(sae, h)
    member = sae.encode(h)[:, i] != 0
    positive = torch.relu(sae.pre_activations(h)[:, i]) > 0
    assert (positive & ~member).any(), "some token has a positive pre-activation without membership"
    result = run(edit("topk", op(i, "set", value=1.0, only_if_active=True)))
    assert torch.equal(result.fired != 0, member)


@pytest.mark.parametrize("name", ["abstopk", "itda", "vsae"])
def test_a_negative_activation_is_an_active_one(run, saes, h, name):
    z = saes[name].encode(h)
    i = int((z < 0).sum(dim=0).argmax())
    assert (z[:, i] < 0).any()
    assert (z[:, i] == 0).any()
    result = run(edit(name, op(i, "scale", value=3, only_if_active=True)))
    assert torch.equal(result.fired != 0, z[:, i] != 0)
    edited = z.clone()
    edited[:, i] *= 3
    torch.testing.assert_close(result.delta, dense(saes[name], h, edited), rtol=1e-4, atol=1e-5)


# decoders that are not additive --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["polysae", "polysae_unit_norm"])
def test_edits_of_a_non_additive_decoder_are_one_delta_of_all_of_them(run, saes, h, name):
    """Not the sum of what each does alone: the products of two edited latents are in it."""
    sae = saes[name]
    z = sae.encode(h)
    i, j = z.mean(dim=0).argsort(descending=True)[:2].tolist()
    edited = z.clone()
    edited[:, i], edited[:, j] = 3 * z[:, i], 2.0
    one, two = edit(name, op(i, "scale", value=3)), edit(name, op(j, "set", value=2))
    both = run(one, two)
    torch.testing.assert_close(both.delta, dense(sae, h, edited), rtol=1e-4, atol=1e-5)
    apart = run(one).delta + run(two).delta
    assert ((both.delta - apart).norm(dim=-1) > 0.05 * both.delta.norm(dim=-1)).any()
    fired = [(1 if z[t, i] != 0 else 0) | (2 if z[t, j] != 2 else 0) for t in range(N_TOKENS)]
    assert both.fired.tolist() == fired


def test_a_non_additive_decoder_composes_ops_in_request_order_on_their_own_tokens(run, saes, h):
    sae = saes["polysae"]
    z = sae.encode(h)
    i = feature_with_both(sae, h)
    first = edit("polysae", op(i, "set", value=1), tokens="prompt")
    second = edit("polysae", op(i, "add", value=3, only_if_active=True), tokens={"from": 10, "to": 20})
    x = z[:, i].clone()
    x[:PROMPT_LEN] = 1
    x[10:20] += 3 * (z[10:20, i] != 0)
    edited = z.clone()
    edited[:, i] = x
    result = run(first, second)
    torch.testing.assert_close(result.delta, dense(sae, h, edited), rtol=1e-4, atol=1e-5)
    assert not result.written[20:].any()
    assert torch.equal(result.written, x != z[:, i])


def test_a_non_additive_edit_that_is_undone_leaves_every_bit(run, saes, h):
    i = feature_with_both(saes["polysae"], h)
    double, halve = edit("polysae", op(i, "scale", value=2)), edit("polysae", op(i, "scale", value=0.5))
    result = run(double, halve)
    assert not result.written.any()
    assert (result.fired == 0).all()


def test_a_dose_bound_holds_for_the_sum_with_a_non_additive_delta(run, server):
    specs = edit("polysae", op(1, "set", value=4), op(2, "set", value=4)), STEER, edit("relu", op(1, "set", value=3))
    free = run(*specs)
    server.max_dose = float(free.dose.median())
    result = run(*specs)
    excess = free.dose > np.float32(server.max_dose)
    assert torch.equal(result.clamped, excess)
    torch.testing.assert_close(result.dose, free.dose.clamp(max=server.max_dose))
    torch.testing.assert_close(torch.cosine_similarity(result.delta, free.delta), torch.ones(N_TOKENS))


# composition ---------------------------------------------------------------------------------------------------------


def test_edits_of_one_latent_compose_in_request_order(run, saes, h):
    sae = saes["relu"]
    i = feature_with_both(sae, h)
    a = sae.encode(h)[:, i]
    first, second = edit("relu", op(i, "scale", value=2)), edit("relu", op(i, "add", value=3))
    for specs, final in (((first, second), 2 * a + 3), ((second, first), 2 * (a + 3))):
        expected = (final - a)[:, None] * sae.W_dec[i]
        torch.testing.assert_close(run(*specs).delta, expected, rtol=1e-4, atol=1e-5)


def test_each_op_of_a_chain_acts_where_its_own_selector_holds(run, saes, h):
    sae = saes["relu"]
    i = feature_with_both(sae, h)
    a = sae.encode(h)[:, i]
    first = edit("relu", op(i, "set", value=1), tokens="prompt")
    second = edit("relu", op(i, "add", value=3), tokens={"from": 10, "to": 20})
    x = a.clone()
    x[:PROMPT_LEN] = 1
    x[10:20] += 3
    result = run(first, second)
    torch.testing.assert_close(result.delta, (x - a)[:, None] * sae.W_dec[i], rtol=1e-4, atol=1e-5)
    assert not result.written[20:].any()


def test_only_if_active_looks_at_the_original_activation(run, saes, h):
    sae = saes["jumprelu"]
    i = feature_with_both(sae, h)
    a = sae.encode(h)[:, i]
    woken = edit("jumprelu", op(i, "set", value=2))
    only_active = edit("jumprelu", op(i, "add", value=1, only_if_active=True))
    x = torch.where(a != 0, 3.0, 2.0)  # the woken latent is not "active" for the second op
    expected = (x - a)[:, None] * sae.W_dec[i]
    torch.testing.assert_close(run(woken, only_active).delta, expected, rtol=1e-4, atol=1e-5)


def test_steering_along_a_decoder_row_is_outside_the_latents_composition(run, saes):
    sae = saes["jumprelu"]
    steer = {"type": "steer", "sae": "jumprelu", "feature": 3, "strength": 2, "include_bos": True}
    set_zero = edit("jumprelu", op(3, "set", value=0))
    together, alone = run(set_zero, steer), run(set_zero)
    torch.testing.assert_close(together.delta - alone.delta, (2 * sae.W_dec[3]).expand(N_TOKENS, -1))


def test_all_channels_read_the_same_unedited_h(run):
    one = {"type": "steer", "layer": 1, "values": RAMP, "mode": "project_out", "include_bos": True}
    two = {**one, "values": RAMP[::-1]}
    torch.testing.assert_close(run(one, two).delta, run(one).delta + run(two).delta)


# steering ------------------------------------------------------------------------------------------------------------

V = torch.tensor(RAMP)
UNIT = V / V.norm()
STEER = {"type": "steer", "layer": 1, "values": RAMP, "include_bos": True}


@pytest.mark.parametrize(
    ("fields", "formula"),
    [
        ({"strength": 0.5}, lambda h: h + 0.5 * V),
        ({}, lambda h: h + V),
        ({"mode": "normalized", "strength": 0.25}, lambda h: h + 0.25 * h.norm(dim=-1, keepdim=True) * UNIT),
        ({"mode": "project_out"}, lambda h: h - (h @ UNIT)[:, None] * UNIT),
        ({"mode": "project_out", "strength": 0.3}, lambda h: h - 0.3 * (h @ UNIT)[:, None] * UNIT),
        ({"mode": "project_out", "strength": 2}, lambda h: h - 2 * (h @ UNIT)[:, None] * UNIT),
        ({"mode": "cap", "min": -1, "max": 0.5}, lambda h: h + ((h @ UNIT).clip(-1, 0.5) - h @ UNIT)[:, None] * UNIT),
        ({"mode": "cap", "max": 0.5}, lambda h: h + ((h @ UNIT).clip(max=0.5) - h @ UNIT)[:, None] * UNIT),
        ({"mode": "cap", "min": 1}, lambda h: h + ((h @ UNIT).clip(min=1) - h @ UNIT)[:, None] * UNIT),
    ],
)
def test_steering_follows_its_formula(run, h, fields, formula):
    torch.testing.assert_close(run({**STEER, **fields}).apply(h), formula(h), rtol=1e-5, atol=1e-5)


def test_a_direction_projected_out_is_gone(run, h):
    assert (run({**STEER, "mode": "project_out"}).apply(h) @ UNIT).abs().max() < 1e-5


def test_project_out_and_cap_on_opposite_vectors_compose_on_one_coordinate(run, h):
    halve = {**STEER, "mode": "project_out", "strength": 0.5}
    cap_negated = {**STEER, "values": [-x for x in RAMP], "mode": "cap", "max": 0.25}
    for specs, final in (
        ((halve, cap_negated), lambda c: torch.clip(0.5 * c, min=-0.25)),
        ((cap_negated, halve), lambda c: 0.5 * torch.clip(c, min=-0.25)),
    ):
        torch.testing.assert_close(run(*specs).apply(h) @ UNIT, final(h @ UNIT), rtol=1e-4, atol=1e-5)


def test_a_cap_that_holds_already_writes_nothing(run, h):
    result = run({**STEER, "mode": "cap", "min": -1000, "max": 1000})
    assert not result.written.any()
    assert (result.fired == 0).all()
    assert torch.equal(result.apply(h), h)


# receipts and dose ---------------------------------------------------------------------------------------------------


def test_fired_names_the_interventions_that_changed_something(run, saes, h):
    sae = saes["jumprelu"]
    i = feature_with_both(sae, h)
    active = sae.encode(h)[:, i] != 0
    result = run(
        {**STEER, "tokens": {"to": 4}},
        edit("jumprelu", op(i, "ablate")),
        {**STEER, "mode": "cap", "max": 1000},
    )
    for token in range(N_TOKENS):
        expected = (1 if token < 4 else 0) | (2 if active[token] else 0)
        assert int(result.fired[token]) == expected


def test_edits_that_cancel_on_their_channel_have_not_fired(run, h):
    result = run(STEER, {**STEER, "strength": -1})
    assert (result.fired == 0).all()
    assert not result.written.any()
    assert (result.dose == 0).all()


def test_a_cancelled_channel_does_not_fire_beside_one_that_does(run, saes, h):
    i = feature_with_both(saes["jumprelu"], h)
    active = saes["jumprelu"].encode(h)[:, i] != 0
    result = run(STEER, {**STEER, "strength": -1}, edit("jumprelu", op(i, "ablate")))
    assert result.fired.tolist() == [4 if on else 0 for on in active]


def test_channels_whose_deltas_cancel_write_nothing(run, h):
    result = run(STEER, {**STEER, "values": [-x for x in RAMP]})
    assert not result.written.any()
    assert (result.fired == 0).all()
    assert (result.dose == 0).all()


def test_unwritten_tokens_keep_even_the_sign_of_their_zeros(run, h):
    h[20:] = -0.0
    result = run({**STEER, "tokens": "prompt"}).apply(h)
    assert torch.signbit(result[20:]).all()


def test_an_activation_at_its_threshold_is_off(saes, h):
    sae = SAE.from_tensors(
        architecture="jumprelu",
        hook=saes["jumprelu"].hook,
        W_enc=torch.eye(2, D),
        W_dec=torch.eye(2, D),
        b_dec=torch.zeros(D),
        gate={"b_enc": torch.zeros(2), "threshold": torch.full((2,), 0.5)},
    )
    at = torch.zeros(2, D)
    at[:, 0] = torch.tensor([0.5, 0.5 + 2**-20])
    channel = Channel(ReadKind.LATENT, feature_key(sae.digest, 0), (Op(0.0, 0.0, -math.inf, math.inf, False, 0, 0),))
    selected = torch.ones(1, 2, dtype=torch.bool)
    result = edit_layer(at, LayerProgram(1, (channel,)), selected, row_source({}, {sae.digest: sae}))
    assert result.written.tolist() == [False, True]
    assert read_latents(at, sae, [0], 0).listed.flatten().tolist() == [0.0, 0.5 + 2**-20]


def test_without_position_zero_in_the_selector_it_keeps_its_bits(run, h):
    result = run({"type": "steer", "layer": 1, "values": RAMP})
    assert torch.equal(result.apply(h)[0], h[0])
    assert result.written.tolist() == [False] + [True] * (N_TOKENS - 1)


def test_dose_is_the_size_of_the_whole_delta_against_h(run, h):
    result = run(STEER, edit("relu", op(1, "set", value=3)))
    torch.testing.assert_close(result.dose, result.delta.norm(dim=-1) / h.norm(dim=-1))
    assert not result.clamped.any()
    assert not result.over.any()


def test_a_clamping_dose_policy_scales_the_sum(run, server, h):
    free = run(STEER, edit("relu", op(1, "set", value=3)))
    bound = float(free.dose.median())
    server.max_dose = bound
    result = run(STEER, edit("relu", op(1, "set", value=3)))
    excess = free.dose > np.float32(bound)
    assert 0 < int(excess.sum()) < N_TOKENS
    assert torch.equal(result.clamped, excess)
    assert not result.over.any()
    assert torch.equal(result.delta[~excess], free.delta[~excess])
    torch.testing.assert_close(result.delta.norm(dim=-1)[excess], bound * h.norm(dim=-1)[excess])
    torch.testing.assert_close(result.dose, free.dose.clamp(max=bound))
    cosine = torch.cosine_similarity(result.delta, free.delta)
    torch.testing.assert_close(cosine, torch.ones(N_TOKENS))


def test_a_refusing_dose_policy_flags_the_excess(run, server):
    free = run(STEER)
    server.max_dose, server.refuse_over_dose = float(free.dose.median()), True
    result = run(STEER)
    assert torch.equal(result.over, free.dose > np.float32(server.max_dose))
    assert result.over.any()
    assert not result.clamped.any()
    assert torch.equal(result.delta, free.delta)


def test_written_tokens_are_rounded_once_to_the_models_dtype(run, h):
    result = run({**STEER, "tokens": "prompt", "strength": 0.01})
    low = h.bfloat16()
    edited = result.apply(low)
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited[PROMPT_LEN:], low[PROMPT_LEN:])
    assert torch.equal(edited[:PROMPT_LEN], (low.float() + result.delta).bfloat16()[:PROMPT_LEN])


@pytest.mark.parametrize(("name", "missing"), [("topk", "whole dictionary"), ("polysae", "all its activations")])
def test_a_member_channel_needs_the_full_encode(compiled, saes, h, name, missing):
    program = compiled(edit(name, op(1, "ablate"))).program
    selected = torch.ones(len(program.selectors), N_TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match=missing):
        edit_layer(h, program.layers[0], selected, row_source({}, {saes[name].digest: saes[name]}))


def test_an_unknown_row_is_an_error_not_an_edit(compiled, h):
    program = compiled(edit("relu", op(1, "ablate"))).program
    selected = torch.ones(1, N_TOKENS, dtype=torch.bool)
    with pytest.raises(KeyError):
        edit_layer(h, program.layers[0], selected, row_source({}, {}))


def test_selection_follows_the_programs_selectors():
    selectors = (Selector((), (3,)), Selector())
    mask = select(selectors, torch.arange(5, 9), torch.tensor([3, 4, 3, 5]), 6)
    assert mask.tolist() == [[True, False, True, False], [False] * 4]
    assert select((), torch.arange(3), torch.arange(3), 2).shape == (0, 3)


def test_the_whole_of_a_program_is_a_plain_loop(compiled, saes, h, run):
    """program.py's definition executed op by op in Python floats, for one mixed program."""
    specs = [
        {**STEER, "strength": 0.7, "tokens": "prompt"},
        {**STEER, "mode": "normalized", "strength": -0.2},
        {**STEER, "mode": "cap", "max": 0.1, "tokens": {"from": 5}},
        edit("gated", op(2, "scale", value=3), op(4, "clamp", min=0.2)),
        edit("rescaled", op(2, "add", value=1, only_if_active=True)),
    ]
    program = compiled(*specs).program
    by_digest = {sae.digest: sae for sae in saes.values()}
    selected = select(program.selectors, torch.arange(N_TOKENS), torch.arange(N_TOKENS), PROMPT_LEN)
    expected = torch.zeros(N_TOKENS, D, dtype=torch.float64)
    for channel in program.layers[0].channels:
        for t in range(N_TOKENS):
            a, c = 0.0, 1.0
            if channel.row.startswith("v:"):
                row = torch.tensor(np.frombuffer(program.vectors[channel.row], "<f4").copy()).double()
                if channel.read is ReadKind.DOT:
                    a = float(h[t].double() @ row)
                if channel.read is ReadKind.NORM:
                    c = float(h[t].double().norm())
            else:
                _, digest, index = channel.row.split(":")
                sae = by_digest[digest]
                row = sae.W_dec[int(index)].double()
                a = float(sae.encode(h[t : t + 1])[0, int(index)])
                if sae.input_norm == "constant_norm_rescale":
                    c = float(h[t].norm()) / math.sqrt(D)
            x = a
            for one in channel.ops:
                assert isinstance(one, Op)
                if selected[one.selector, t] and (a != 0 or not one.only_if_active):
                    x = min(max(one.alpha * x + one.beta, one.lo), one.hi)
            expected[t] += c * (x - a) * row
    torch.testing.assert_close(run(*specs).delta.double(), expected, rtol=1e-4, atol=1e-5)


# readings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_listed_features_read_as_in_the_full_encode(saes, h, name):
    f = saes[name].encode(h)
    listed = read_latents(h, saes[name], [5, 2, 7], 0)
    torch.testing.assert_close(listed.listed, f[:, [5, 2, 7]], rtol=1e-4, atol=1e-5)
    assert listed.top_index.shape == (N_TOKENS, 0)


def test_top_k_are_the_largest_by_magnitude(saes, h):
    f = saes["jumprelu"].encode(h)
    latents = read_latents(h, saes["jumprelu"], [5], 6)
    values, _ = f.abs().sort(dim=-1, descending=True)
    assert torch.equal(latents.top_value.abs(), values[:, :6])
    assert torch.equal(f.gather(1, latents.top_index), latents.top_value)
    assert torch.equal(latents.listed, f[:, [5]])
