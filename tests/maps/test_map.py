"""A map reads back as it was written, its digest is its content, and whatever is wrong is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from interventions.errors import InterventionError
from interventions.maps.body import from_body, from_bytes, to_body, to_bytes
from interventions.maps.calibration import calibrate
from interventions.maps.gates import CusumGate, ShareGate, WindowGate
from interventions.maps.map import AllTokens, LatentMap, MentionTokens, SequenceGate, TriggerTokens
from interventions.maps.transfer import Transfer, Unit, canonical, clamp_active, clamp_hit, interpolate, move

SAE = "ab" * 32
FACTS = calibrate(np.linspace(0, 0.2, 100), 0.05)
GATE = SequenceGate(ShareGate(FACTS.threshold), (3, 17), FACTS)


def make(**changes) -> LatentMap:
    fields = {
        "model": "smollm2-135m-instruct",
        "sae": SAE,
        "layer": 15,
        "transfers": canonical(
            [interpolate(90, 0.25), *move(17, 3, 0.5, 1.0), clamp_active(40, 0.3, Unit.RESIDUAL_NORM)]
        ),
        "scope": MentionTokens(((5, 6), (5, 6, 7), (12,)), "last", ("Paris",)),
        "gate": GATE,
        "provenance": {"method": "known_to_unknown", "unknown": 120},
        "report": {"recall": 0.1, "auroc": [0.45, 0.55]},
    }
    return LatentMap(**{**fields, **changes})


GATES = st.one_of(
    st.builds(ShareGate, st.floats(0, 1), over=st.sampled_from(["prompt", "seen"]), latch=st.booleans()),
    st.builds(WindowGate, st.floats(0, 1), window=st.integers(5, 99), least=st.integers(1, 5)),
    st.builds(CusumGate, st.integers(0, 9) | st.floats(0, 9), k=st.floats(0, 0.9), reset=st.booleans()),
)
SCOPES = st.one_of(
    st.just(AllTokens()),
    st.sets(st.integers(0, 999), min_size=1).map(lambda s: TriggerTokens(tuple(sorted(s)))),
    st.builds(
        MentionTokens,
        st.sets(st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple), min_size=1).map(
            lambda s: tuple(sorted(s))
        ),
        st.sampled_from(["last", "all"]),
        st.just(("Zoë",)),
    ),
)
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
TRANSFERS = st.builds(
    Transfer,
    st.integers(0, 999),
    alpha=FINITE,
    beta=FINITE,
    lo=st.just(-math.inf) | st.floats(-9, 0),
    hi=st.just(math.inf) | st.floats(0, 9),
    unit=st.sampled_from(Unit),
    only_if_active=st.booleans(),
) | st.builds(Transfer, st.integers(0, 99), gamma=FINITE.filter(bool), source=st.integers(0, 99))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_map_survives_both_forms_with_its_digest(data: st.DataObject) -> None:
    transfers = canonical(data.draw(st.lists(TRANSFERS.filter(lambda t: not t.is_identity), min_size=1, max_size=6)))
    gate = data.draw(st.none() | st.builds(SequenceGate, GATES, st.just((1, 2))))
    original = make(transfers=transfers, scope=data.draw(SCOPES), gate=gate)
    for other in (
        from_bytes(to_bytes(original), original.digest),
        from_body(json.loads(json.dumps(to_body(original)))),
    ):
        assert other == original
        assert other.digest == original.digest
        assert to_bytes(other) == to_bytes(original)


def test_the_digest_is_the_content() -> None:
    original = make()
    assert original.digest == make().digest
    different = [
        make(sae="cd" * 32),
        make(layer=10),
        make(model="other"),
        make(transfers=(interpolate(90, 0.25),)),
        make(transfers=(interpolate(90, 0.25000001),)),
        make(transfers=(replace(interpolate(90, 0.25), only_if_active=True),)),
        make(transfers=(replace(interpolate(90, 0.25), unit=Unit.RESIDUAL_NORM),)),
        make(scope=AllTokens()),
        make(scope=MentionTokens(((5, 6),), "last")),
        make(scope=MentionTokens(((5, 6),), "all")),
        make(gate=None),
        make(gate=SequenceGate(ShareGate(FACTS.threshold), (3, 17))),
        make(gate=SequenceGate(ShareGate(FACTS.threshold, "seen"), (3, 17))),
        make(gate=SequenceGate(WindowGate(FACTS.threshold, 64), (3, 17))),
        make(provenance={}),
        make(report={}),
    ]
    digests = {m.digest for m in (original, *different)}
    assert len(digests) == 1 + len(different)


def test_equal_content_has_one_digest_however_it_is_spelled() -> None:
    shuffled = to_body(make())
    shuffled["transfers"].reverse()
    shuffled["scope"]["sequences"].reverse()
    shuffled["gate"]["evidence"].reverse()
    assert from_body(dict(reversed(shuffled.items()))).digest == make().digest
    plain = make(gate=SequenceGate(CusumGate(3, 0.25), (1,)), transfers=(Transfer(1, 0, -0.0),))
    same = make(gate=SequenceGate(CusumGate(3.0, 0.25), (1,)), transfers=(Transfer(1, 0.0, 0.0),))
    assert plain.digest == same.digest
    least = {"model": "m", "sae": SAE, "layer": 0, "transfers": [{"latent": 4, "alpha": 0}]}
    assert from_body(least) == LatentMap("m", SAE, 0, (Transfer(4, alpha=0.0),))


def test_strength_0_does_nothing_and_1_is_the_map() -> None:
    assert make().at(0.0) == ()
    assert make().at(1.0) == make().transfers
    assert [(t.latent, t.alpha, t.beta) for t in make(transfers=(interpolate(9, 4.0),)).at(0.25)] == [(9, 0.75, 1.0)]


def test_what_a_map_reads_and_what_it_needs_is_said() -> None:
    assert make().latents == (3, 17, 40, 90)
    assert make(scope=TriggerTokens((1, 500)), gate=SequenceGate(ShareGate(0.1), (7,))).latents == (
        1,
        3,
        7,
        17,
        40,
        90,
        500,
    )
    assert not make().needs_all_latents
    assert make(transfers=(clamp_active(3, 5.0, Unit.PREACT_MEAN),)).needs_all_latents
    over_prompt = make(scope=AllTokens())
    assert over_prompt.needs_prompt_len
    running = SequenceGate(CusumGate(1.0, 0.1), (3,))
    assert not make(gate=running).needs_prompt_len
    assert make(gate=running, scope=MentionTokens(((5,),), "all")).needs_prompt_len


def test_a_map_runs_only_on_what_it_was_fitted_on() -> None:
    m = make()
    m.check(SAE, 15, 4608, "smollm2-135m-instruct")
    m.check(SAE, 15, 91)
    for arguments, param, words in (
        (("cd" * 32, 15, 4608), "sae", "fitted on the SAE abababababab…, the one served is cdcdcdcdcdcd…"),
        ((SAE, 10, 4608), "layer", "fitted at layer 15, the SAE is served at layer 10"),
        ((SAE, 15, 90), "transfers", "latent 90; the SAE has 0..89"),
        ((SAE, 15, 4608, "gemma"), "model", "fitted on 'smollm2-135m-instruct', the model served is 'gemma'"),
    ):
        with pytest.raises(InterventionError, match=words) as error:
            m.check(*arguments)
        assert (error.value.code, error.value.param) == ("invalid_artifact", param)


def edited(path: str, value: object) -> dict:
    """The body with one field set (path with dots and indices), or removed where the value is ``...``."""
    body = json.loads(json.dumps(to_body(make())))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    at = body
    for key in parents:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return body


@pytest.mark.parametrize(
    ("path", "value", "param"),
    [
        ("model", ..., "model"),
        ("model", "", "model"),
        ("model", "a\nb", "model"),
        ("model", "\ud800", "model"),
        ("sae", "AB" * 32, "sae"),
        ("sae", 7, "sae"),
        ("layer", -1, "layer"),
        ("layer", True, "layer"),
        ("layer", 1.5, "layer"),
        ("layer", 2**40, "layer"),
        ("digest", "x", "digest"),
        ("transfers", [], "transfers"),
        ("transfers", {}, "transfers"),
        ("transfers", [{"latent": 3}], "transfers"),
        ("transfers.1", 3, "transfers[1]"),
        ("transfers.1.latent", ..., "transfers[1].latent"),
        ("transfers.1.latent", -2, "transfers[1].latent"),
        ("transfers.1.beta", "1", "transfers[1].beta"),
        ("transfers.1.beta", math.inf, "transfers[1].beta"),
        ("transfers.1.beta", 10**400, "transfers[1].beta"),
        ("transfers.1.lo", math.nan, "transfers[1].lo"),
        ("transfers.1.source", 4, "transfers[1].source"),
        ("transfers.1.unit", "residualnorm", "transfers[1].unit"),
        ("transfers.1.unit", [], "transfers[1].unit"),
        ("transfers.1.only_if_active", 1, "transfers[1].only_if_active"),
        ("transfers.1.scale", 1, "transfers[1].scale"),
        ("scope", [], "scope"),
        ("scope.kind", "mention", "scope.kind"),
        ("scope.tokens", "first", "scope.tokens"),
        ("scope.sequences", [], "scope.sequences"),
        ("scope.sequences.0", [], "scope.sequences[0]"),
        ("scope.sequences.1", [5, 6], "scope.sequences"),
        ("scope.sequences.1", [5, "6"], "scope.sequences[1][1]"),
        ("scope.sequences.0", list(range(65)), "scope.sequences[0]"),
        ("scope.latents", [1], "scope.latents"),
        ("scope", {"kind": "trigger", "latents": [4, 4]}, "scope.latents"),
        ("scope", {"kind": "trigger", "latents": []}, "scope.latents"),
        ("scope", {"kind": "all", "latents": []}, "scope.latents"),
        ("gate.kind", "ratio", "gate.kind"),
        ("gate.threshold", ..., "gate.threshold"),
        ("gate.threshold", -0.1, "gate.threshold"),
        ("gate.threshold", 0.5, "gate.calibration"),
        ("gate.over", "all", "gate.over"),
        ("gate.latch", "no", "gate.latch"),
        ("gate.window", 5, "gate.window"),
        ("gate.evidence", [], "gate.evidence"),
        ("gate.calibration.n", ..., "gate.calibration.n"),
        ("gate.calibration.low", None, "gate.calibration.low"),
        ("gate.calibration.fpr", 0.1, "gate.calibration.fpr"),
        ("report", [], "report"),
        ("report.x", math.nan, "report"),
        ("provenance.x", "y" * 70_000, "report"),
    ],
)
def test_a_wrong_field_is_named(path: str, value: object, param: str) -> None:
    with pytest.raises(InterventionError) as error:
        from_body(edited(path, value))
    assert (error.value.code, error.value.param) == ("invalid_artifact", param)
    assert error.value.message.startswith(param)


def test_a_misspelled_field_gets_the_nearest() -> None:
    with pytest.raises(InterventionError, match="Did you mean 'only_if_active'"):
        from_body(edited("transfers.1.only_active", True))


def test_a_damaged_file_is_refused_and_named() -> None:
    data = to_bytes(make())
    tensors = load(data)
    header = json.loads(tensors["map"].tobytes())
    damaged = {
        "map": [
            b"",
            data[:100],
            b"\x80\x04" + data,
            save({k: v for k, v in tensors.items() if k != "map"}),
            save({**tensors, "map": np.frombuffer(b"[" * 100_000, "u1")}),
            save({**tensors, "extra": tensors["unit"]}),
        ],
        "latent": [save({k: v for k, v in tensors.items() if k != "latent"})],
        "source": [save({**tensors, "source": tensors["source"][:1]})],
        "coefficients": [save({**tensors, "coefficients": tensors["coefficients"].astype("<f4")})],
        "transfers[0].latent": [save({**tensors, "latent": tensors["latent"] - 100})],
        "transfers[0].unit": [save({**tensors, "unit": tensors["unit"] + 9})],
        "transfers[0].alpha": [save({**tensors, "coefficients": tensors["coefficients"] * np.nan})],
        "transfers": [save({**tensors, "map": np.frombuffer(json.dumps({**header, "transfers": []}).encode(), "u1")})],
    }
    for param, files in damaged.items():
        for file in files:
            with pytest.raises(InterventionError) as error:
                from_bytes(file)
            assert (error.value.code, error.value.param) == ("invalid_artifact", param)
    with pytest.raises(InterventionError, match="does not match its digest"):
        from_bytes(data, "0" * 64)


WORDS = ["model", "sae", "layer", "transfers", "scope", "gate", "kind", "latent"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    raw=ANYTHING,
    path=st.sampled_from(["transfers", "transfers.1", "scope", "gate", "gate.calibration", "report", "sae"]),
)
def test_no_json_makes_anything_but_a_map_or_a_named_error(raw: object, path: str) -> None:
    for body in (raw, edited(path, raw)):
        try:
            found = from_body(body)
        except InterventionError as error:
            named = error.code == "invalid_artifact" and bool(error.param)
        else:
            named = from_bytes(to_bytes(found)) == found
        assert named


def test_what_the_code_gets_wrong_is_named_too() -> None:
    for changes, param in (
        ({"transfers": tuple(reversed(make().transfers))}, "transfers"),
        ({"transfers": clamp_hit(range(5000), 1.0)}, "transfers"),
        ({"scope": TriggerTokens((4, 2))}, "scope.latents"),
        ({"scope": MentionTokens(((7,), (5,)))}, "scope.sequences"),
        ({"scope": MentionTokens(((7, -5),))}, "scope.sequences[0]"),
        ({"gate": SequenceGate(ShareGate(math.inf), (1,))}, "gate.threshold"),
        ({"report": {1: 2}}, "report"),
        ({"provenance": {"f": object()}}, "provenance"),
    ):
        with pytest.raises(InterventionError) as error:
            make(**changes)
        assert error.value.param == param
