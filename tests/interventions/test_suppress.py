"""Suppression: what a request may say, what it compiles into, and what the oracle makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from interventions.concepts.gain import Range, apply
from interventions.errors import InterventionError
from interventions.instruction import Instruction
from interventions.limits import Limits
from interventions.oracle import LayerResult, edit_layer, row_source, select
from interventions.program import Op, OpKind, Payload, Program, ReadKind, feature_key, vector_key
from interventions.spec import InlineConcept, Suppress, parse_interventions
from interventions.suppression import table_rows
from tests.concepts.samples import made_concept

D, N_TOKENS, PROMPT_LEN = 16, 24, 15
FEATURES = [1, 3, 4, 7, 12, 20]
METHODS = ("mask", "attenuate", "range", "app")
NAMES = (
    "relu",
    "jumprelu",
    "gated",
    "topk",
    "rescaled",
    "layer_norm",
    "topk_layer_norm",
    "abstopk",
    "polysae",
    "stand-in",
)


def suppress(concept: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "suppress", "concept": concept, "include_bos": True, **fields}


def inline(sae: str = "jumprelu", features: Any = (1, 3), **fields: Any) -> dict[str, Any]:
    return {"sae": sae, "features": list(features), **fields}


def add(sae: str, index: int, value: float) -> dict[str, Any]:
    edits = [{"index": index, "op": "add", "value": value}]
    return {"type": "edit_features", "sae": sae, "features": edits, "include_bos": True}


# what may be said ----------------------------------------------------------------------------------------------------


def test_the_method_is_app_for_a_name_and_mask_for_latents():
    named, given = parse_interventions([suppress("sports"), suppress(inline())])
    assert isinstance(named, Suppress)
    assert (named.chosen, named.strength, named.concept) == ("app", 1.0, "sports")
    assert given.chosen == "mask"
    assert isinstance(given.concept, InlineConcept)
    assert given.concept.features == [1, 3]


def test_null_fields_mean_absent():
    (spec,) = parse_interventions([suppress(inline(mu=None), method=None, strength=None, tau=None)])
    assert (spec.chosen, spec.strength) == ("mask", 1.0)


WRONG = [
    ({}, "concept", "is required"),
    (suppress(3), "concept", "name of a library concept"),
    (suppress(""), "concept", "1 to 256 characters"),
    (suppress([1]), "concept", "a list of 1"),
    (suppress({"features": [1]}), "concept.sae", "is required"),
    (suppress({"sae": "s"}), "concept.features", "is required"),
    (suppress({"sae": "s", "features": []}), "concept.features", "empty"),
    (suppress({"sae": "s", "features": [1, 2, 1]}), "concept.features[2]", "already at [0]"),
    (suppress({"sae": "s", "features": [1, True]}), "concept.features[1]", "integer"),
    (suppress({"sae": "s", "feature": [1]}), "concept.feature", "Did you mean 'features'"),
    (suppress(inline(mu=[1.0])), "concept.mu", "1 numbers for 2 features"),
    (suppress(inline(sigma=[1.0, "x"])), "concept.sigma[1]", "expected a number"),
    (suppress(inline(sigma=[1.0, -1])), "concept.sigma[1]", "≥ 0"),
    (suppress(inline(sigma=-1)), "concept.sigma", "≥ 0"),
    (suppress(inline(mu=float("nan"))), "concept.mu", "finite"),
    (suppress("c", method="erase"), "method", "'erase' is not one of app, attenuate, mask, range"),
    (suppress("c", strength=-0.5), "strength", "≥ 0"),
    (suppress("c", strength=float("inf")), "strength", "finite"),
    (suppress("c", strength="1"), "strength", "expected a number"),
    (suppress("c", tau=1), "tau", "range only, not with app"),
    (suppress("c", method="range", tau=-1), "tau", "≥ 0"),
    (suppress(inline(), method="app"), "method", "only a fitted concept"),
    (suppress(inline(), method="range"), "concept.mu", "is required"),
    (suppress(inline(mu=1.0), method="range"), "concept.sigma", "is required"),
    (suppress("c", threshold=0.3), "threshold", "unknown field"),
]


@pytest.mark.parametrize(("raw", "param", "says"), WRONG)
def test_what_is_wrong_is_refused_by_its_field(raw, param, says):
    with pytest.raises(InterventionError) as caught:
        parse_interventions([{"type": "suppress"} | raw])
    assert (caught.value.code, caught.value.param) == ("invalid_intervention", f"interventions[0].{param}")
    assert says in caught.value.message


# what it compiles into -----------------------------------------------------------------------------------------------


def ops_of(program: Program) -> dict[int, tuple[Op, ...]]:
    """Latent → its ops, of a program at one layer."""
    (layer,) = program.layers
    return {int(channel.row.rpartition(":")[2]): channel.ops for channel in layer.channels}


def test_mask_and_attenuate_are_affine_ops(compiled):
    masked = ops_of(compiled(suppress(inline())).program)
    assert sorted(masked) == [1, 3]
    for (op,) in masked.values():
        assert (op.kind, op.alpha, op.beta) == (OpKind.AFFINE, 0.0, 0.0)
    for (op,) in ops_of(compiled(suppress("jumprelu", method="attenuate", strength=2.5)).program).values():
        assert (op.kind, op.alpha, op.beta) == (OpKind.AFFINE, -1.5, 0.0)


def test_equal_meanings_share_a_digest(compiled, server):
    mask = compiled(suppress(inline())).program.digest()
    ablate = {"index": 1, "op": "ablate"}, {"index": 3, "op": "ablate"}
    edit = {"type": "edit_features", "sae": "jumprelu", "features": list(ablate), "include_bos": True}
    for same in (suppress(inline(), strength=7), suppress(inline(), method="attenuate"), edit):
        assert compiled(same).program.digest() == mask
    concept = server.concepts["jumprelu"][1]
    row = concept.classes.index("sports")
    mu, sigma = concept.mean[row].tolist(), concept.std[row].tolist()
    given = inline(features=FEATURES, mu=mu, sigma=sigma)
    fitted = compiled(suppress("jumprelu", method="range", tau=1.5)).program
    assert fitted.digest() == compiled(suppress(given, method="range", tau=1.5)).program.digest()
    assert fitted.digest() != compiled(suppress(given, method="range")).program.digest()
    app = compiled(suppress("jumprelu")).program
    server.concepts["other name"] = server.concepts["jumprelu"]
    assert compiled(suppress("other name")).program.digest() == app.digest()
    assert compiled(suppress("jumprelu", strength=1.1)).program.digest() != app.digest()
    server.concepts["jumprelu"] = ("jumprelu", replace(concept, posterior=concept.posterior.flip(1).contiguous()))
    assert compiled(suppress("jumprelu")).program.digest() != app.digest()


def test_a_range_op_has_its_bounds_and_no_lower_one_below_zero(compiled):
    given = inline(features=[1, 3], mu=[5.0, 1.0], sigma=1.0)
    ops = ops_of(compiled(suppress(given, method="range")).program)
    assert [(op.kind, op.lo, op.hi) for (op,) in (ops[1], ops[3])] == [(OpKind.RANGE, 3, 7), (OpKind.RANGE, 0, 3)]


def test_app_brings_one_table_a_latent_as_a_row_of_the_bank(compiled, server):
    program = compiled(suppress("jumprelu", strength=0.7)).program
    concept = server.concepts["jumprelu"][1]
    ops = ops_of(program)
    assert sorted(ops) == FEATURES
    for j, latent in enumerate(FEATURES):
        (op,) = ops[latent]
        assert (op.kind, op.strength) == (OpKind.GAIN, np.float32(0.7))
        row = np.frombuffer(program.vectors[op.table], "<f4")
        assert op.table == vector_key(program.vectors[op.table])
        assert (row.shape, row[2]) == ((D,), 9)
        np.testing.assert_array_equal(row[:2], concept.table.rows[j, :2])
        np.testing.assert_array_equal(row[3:12], concept.posterior[j])
        assert not row[12:].any()
    keys = program.row_keys
    assert len(keys) == len(set(keys)) == 2 * len(FEATURES)
    assert set(program.vectors) < set(keys)
    assert Payload(program, (), None).row_keys == keys


def test_a_table_may_fill_its_row_to_the_last_number(compiled, refused):
    assert all(np.frombuffer(row, "<f4")[2] == 13 for row in compiled(suppress("full")).program.vectors.values())
    error = refused(suppress("fine"))
    assert (error.code, error.param) == ("limit_exceeded", "interventions[0].concept")
    assert "16 bins" in error.message
    assert "13" in error.message
    assert compiled(suppress("fine", method="range")).program is not None


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_is_checked_and_dropped(compiled, refused, method):
    result = compiled(suppress("jumprelu", method=method, strength=0))
    assert result.program is None
    assert result.entries[0].noop
    assert result.entries[0].layers == (1,)
    assert refused(suppress("nope", method=method, strength=0)).code == "unknown_concept"


def test_a_range_without_positive_values_is_dropped(compiled):
    assert compiled(suppress(inline(mu=-5.0, sigma=1.0), method="range")).program is None


@pytest.mark.parametrize(
    ("spec", "code", "param"),
    [
        (suppress("nope"), "unknown_concept", "concept"),
        (suppress(inline("nope")), "unknown_sae", "concept.sae"),
        (suppress(inline(features=[1, 40])), "unknown_feature", "concept.features[1]"),
        (suppress(inline(features=[-1])), "unknown_feature", "concept.features[0]"),
        (suppress("jumprelu", strength=1e30), "invalid_intervention", None),
        (suppress("jumprelu", tokens={"tokens": [1000]}), "invalid_intervention", "tokens.tokens[0]"),
    ],
)
def test_what_the_server_does_not_have_is_refused(refused, spec, code, param):
    error = refused(spec)
    assert (error.code, error.param) == (code, f"interventions[0].{param}" if param else "interventions[0]")


def test_an_unarmed_layer_and_a_missing_full_encode_are_refused(refused, server):
    server.saes["topk"].full_encode = False
    for spec, param in ((suppress("topk"), "concept"), (suppress(inline("topk")), "concept.sae")):
        error = refused(spec)
        assert (error.code, error.param) == ("invalid_intervention", f"interventions[0].{param}")
        assert "--full-encode topk" in error.message
    server.armed_layers = (2,)
    assert refused(suppress("jumprelu")).code == "layer_not_armed"


def test_latents_and_tables_count_as_rows_and_ops_as_instructions(refused, compiled, server):
    server.limits = Limits(rows=11)
    assert refused(suppress("jumprelu")).code == "limit_exceeded"
    assert compiled(suppress("jumprelu", method="range")).program is not None
    server.limits = Limits(instructions=5)
    assert refused(suppress("jumprelu", method="mask")).code == "limit_exceeded"


def test_programs_of_before_still_read_and_keep_their_digest(compiled):
    program = compiled(suppress(inline())).program
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(program))
    for channel in raw[0][0][1]:
        channel[2] = [op[:7] for op in channel[2]]
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(raw), type=Program)
    assert old == program
    assert old.digest() == program.digest()


def test_a_payload_with_every_kind_of_op_survives_the_wire(compiled):
    payload = compiled(
        suppress("jumprelu"), suppress("jumprelu", method="range"), suppress("gated", method="attenuate", strength=0.3)
    ).payload()
    again = Payload.from_bytes(payload.to_bytes())
    assert again == payload
    assert again.program.digest() == payload.digest


def test_a_stand_in_is_reported(compiled):
    assert compiled(suppress("stand-in")).entries[0].approximate
    assert not compiled(suppress("jumprelu")).entries[0].approximate


# what it does --------------------------------------------------------------------------------------------------------


@pytest.fixture
def h() -> torch.Tensor:
    return 2 * torch.randn(N_TOKENS, D, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def run(compiled, saes, h):
    by_digest = {sae.digest: sae for sae in saes.values()}

    def execute(*interventions: dict[str, Any]) -> LayerResult:
        program = compiled(*interventions).program
        ids = torch.arange(N_TOKENS)
        return edit_layer(
            h,
            program.layers[0],
            select(program.selectors, ids, ids, PROMPT_LEN),
            row_source(program.vectors, by_digest),
            lambda digest: by_digest[digest].encode(h),
            program.max_dose,
            program.refuse_over_dose,
            lambda digest, z, edited: by_digest[digest].delta(h, z, edited),
        )

    return execute


def dense(sae, h, edited):
    return sae.decode_for(h, edited) - sae.decode_for(h, sae.encode(h))


def wanted(x: torch.Tensor, concept, method: str, strength: float) -> torch.Tensor:
    """The fitted concept's columns of ``x`` after one suppression, by the concept's own transfer functions."""
    return apply(concept.transfer(method), x, 1.0 if method in ("mask", "range") else strength)


@pytest.mark.parametrize("strength", [0.6, 2.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_suppression_is_the_difference_of_two_decodings(run, saes, server, h, name, method, strength):
    sae, concept = saes[name], server.concepts[name][1]
    z = sae.encode(h)
    edited = z.clone()
    edited[:, FEATURES] = wanted(z[:, FEATURES], concept, method, strength)
    result = run(suppress(name, method=method, strength=strength))
    assert bool(result.written.any()) == ((name, method) != ("abstopk", "range"))  # its values lie above the range
    torch.testing.assert_close(result.delta, dense(sae, h, edited), rtol=1e-4, atol=1e-5)
    assert torch.equal(result.fired != 0, (edited != z).any(dim=1))


def test_ops_on_one_latent_map_the_current_value_in_request_order(run, saes, server, h):
    sae, concept = saes["jumprelu"], server.concepts["jumprelu"][1]
    z = sae.encode(h)
    edits = [add("jumprelu", j, 1.0) for j in FEATURES]
    raised_first, raised_last = z.clone(), z.clone()
    raised_first[:, FEATURES] = wanted(z[:, FEATURES] + 1.0, concept, "app", 1.0)
    raised_last[:, FEATURES] = wanted(z[:, FEATURES], concept, "app", 1.0) + 1.0
    after, before = run(*edits, suppress("jumprelu")).delta, run(suppress("jumprelu"), *edits).delta
    torch.testing.assert_close(after, dense(sae, h, raised_first), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before, dense(sae, h, raised_last), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before)


def test_suppress_stands_beside_steering_and_follows_its_selector(run, saes, server, h):
    steer = {"type": "steer", "layer": 1, "values": [1.0] * D, "strength": 2.0, "include_bos": True}
    sae, concept = saes["gated"], server.concepts["gated"][1]
    z = sae.encode(h)
    edited = z.clone()
    edited[:PROMPT_LEN, FEATURES] = wanted(z[:PROMPT_LEN, FEATURES], concept, "app", 1.5)
    result = run(suppress("gated", strength=1.5, tokens="prompt"), steer)
    torch.testing.assert_close(result.delta, dense(sae, h, edited) + 2.0, rtol=1e-4, atol=1e-5)


def test_no_value_escapes_a_table(run, saes, server, h):
    """Far outside its range on either side, the outer bins count."""
    sae, concept = saes["jumprelu"], server.concepts["jumprelu"][1]
    z = sae.encode(h)
    for value, place in ((1e4, -1), (-1e4, 0)):
        edited = z.clone()
        edited[:, FEATURES] = (z[:, FEATURES] + value) * (1 - concept.posterior[:, place])
        result = run(*[add("jumprelu", j, value) for j in FEATURES], suppress("jumprelu"))
        torch.testing.assert_close(result.delta, dense(sae, h, edited), rtol=1e-4, atol=0.05)


def test_zero_stays_zero_under_every_method(run, saes, h):
    z = saes["jumprelu"].encode(h)
    off = (z[:, FEATURES] == 0).all(dim=1)
    assert off.any()
    for method in METHODS:
        result = run(suppress("jumprelu", method=method, strength=3.0))
        assert not result.written[off].any()
        assert (result.fired[off] == 0).all()


def test_a_range_leaves_what_is_outside_it_or_not_positive(run, saes, h):
    sae = saes["relu"]
    z = sae.encode(h)
    j = int((z > 0).sum(dim=0).argmax())
    values = z[:, j][z[:, j] > 0].sort().values
    assert len(values) > 4
    low, high = float(values[:2].mean()), float(values[-2:].mean())
    mu, sigma = (low + high) / 2, (high - low) / 4
    bounds = [float(b[0]) for b in Range(torch.tensor([mu]), torch.tensor([sigma]), 2.0).bounds]
    edited = z.clone()
    edited[:, j] = torch.where((z[:, j] >= bounds[0]) & (z[:, j] <= bounds[1]), 0.0, z[:, j])
    assert 0 < int((edited != z).sum()) < len(values)
    result = run(suppress(inline("relu", [j], mu=mu, sigma=sigma), method="range"))
    torch.testing.assert_close(result.delta, dense(sae, h, edited), rtol=1e-4, atol=1e-5)
    negative = add("relu", j, -50.0), suppress(inline("relu", [j], mu=0.0, sigma=1e6), method="range")
    torch.testing.assert_close(run(*negative).delta, run(negative[0]).delta)


def test_rows_of_one_concept_are_shared_by_requests(saes):
    """Content-addressed: the same table twice is one row, another concept's is another."""
    one, two = made_concept(saes["relu"], 1, n_bins=9), made_concept(saes["relu"], 1, n_bins=9, seed=1)
    assert table_rows(one.table, D) == table_rows(one.table, D)
    assert not set(table_rows(one.table, D)) & set(table_rows(two.table, D))


def test_reach_grows_with_the_strength_only(compiled):
    assert compiled(suppress("jumprelu", strength=1e9)).program is not None
    gain = Instruction(compiled(suppress("jumprelu")).entries[0].selector, 0, kind=OpKind.GAIN, strength=0.5)
    assert gain.reach(3.0) == 3.0
    assert msgspec.structs.replace(gain, strength=5.0).reach(3.0) == 12.0


def test_the_kinds_of_reading_are_the_dictionaries_own(compiled, saes):
    for name, kind in (("jumprelu", ReadKind.LATENT), ("topk", ReadKind.MEMBER), ("polysae", ReadKind.JOINT)):
        (layer,) = compiled(suppress(name)).program.layers
        assert {channel.read for channel in layer.channels} == {kind}
        assert {channel.row for channel in layer.channels} == {feature_key(saes[name].digest, j) for j in FEATURES}
