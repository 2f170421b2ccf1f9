"""A server whose engine is one of kernels refuses what those do not do, before anything reaches the engine."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from vllm import SamplingParams

from editserver.api.capacity import Capacity
from editserver.api.concept_report import readout
from editserver.api.edit import Edit
from editserver.api.evidence import read_all
from editserver.api.plugin import bounded, why_unheard
from editserver.api.routes_catalogue import _without_prefix, capabilities
from editserver.api.routes_concepts import FitConceptBody, _check_limits, _check_stream, _dictionary
from editserver.api.rulesets import check_body, parse_stored, shown_normal
from editserver.api.state import EditState
from editserver.catalogue import build_catalogue
from editserver.engine.abilities import Abilities
from editserver.engine.compat.core import FORGETFUL, STAGED
from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.triton import capacity as reserved
from editserver.library import parse_ruleset_body
from editserver.settings import Settings
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.maps.body import from_body
from interventions.spec import parse_inspect, parse_interventions
from sae_weights import load_sae
from tests.engine.dictionaries import write_native

D = 24


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> EditState:
    folder = tmp_path_factory.mktemp("served")
    sources = []
    for name in ("polysae", "abstopk", "relu"):
        sae = load_sae(write_native(folder / name, 1, name, D))
        assert sae.origin is not None
        sources.append(SAESource(name, sae.origin.as_dict(), sae.digest, 1))
    config = EngineConfig((1,), tuple(sources), ("polysae", "abstopk"))
    catalogue = build_catalogue(
        config, Settings(library=Path(folder) / "library"), d_model=D, n_layers=3, vocab_size=32, tokenizer=None
    )
    made = EditState(config, Settings(), catalogue, Capacity(config.bank_rows), "0", "model", None)
    by_id = {source.id: source.digest for source in sources}
    sizes = (
        reserved.Capacity.of(tokens=64, rows=4, bank_rows=64),
        reserved.RuleCapacity.of(requests=8, propositions=128),
    )
    whole, other = {by_id["abstopk"]: "abstopk"}, {by_id["polysae"]: "polysae"}
    made.device = Abilities(*sizes, reserved.EncodeCapacity(), whole, other)
    return made


def edit(sae: str) -> list[dict[str, object]]:
    return [{"type": "edit_features", "sae": sae, "features": [{"index": 3, "op": "set", "value": 2.0}]}]


def test_what_the_kernels_do_is_compiled(state: EditState) -> None:
    for sae in ("relu", "abstopk"):
        inspect = {"sae": sae, "features": [1]} | ({"top_k": 4} if sae == "abstopk" else {})
        assert state.compile(parse_interventions(edit(sae)), parse_inspect(inspect)).program is not None


def refusal(
    state: EditState,
    interventions: list[dict[str, object]],
    inspect: object = None,
    code: str = "unsupported_with_interventions",
) -> InterventionError:
    with pytest.raises(InterventionError) as refused:
        state.compile(parse_interventions(interventions), parse_inspect(inspect))
    assert (refused.value.code, refused.value.status) == (code, 400)
    return refused.value


def test_what_they_do_not_do_is_refused_with_the_contracts_code_and_the_field(state: EditState) -> None:
    inspect = {"sae": "polysae", "top_k": 2}
    for interventions, reads, field in (
        (edit("polysae"), None, "interventions[0]"),
        (edit("polysae"), inspect, "interventions[0]"),
        ([*edit("relu"), *edit("polysae")], None, "interventions[1]"),
        (edit("relu"), inspect, "inspect"),
        ([], inspect, "inspect"),
    ):
        error = refusal(state, interventions, reads)
        assert (error.message, error.param) == (
            "on a GPU, dictionaries of this kind are not encoded yet: polysae",
            field,
        )
        if field == "inspect":
            assert _without_prefix(error).param is None  # POST …/activations has no such field


def test_what_is_listed_says_what_they_do_not_do(state: EditState, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {name: state.shown(sae) for name, sae in state.catalogue.saes.items()}
    assert {name: (one["editable"], one["top_k"]) for name, one in shown.items()} == {
        "polysae": (False, False),
        "abstopk": (True, True),
        "relu": (True, False),
    }
    assert shown["polysae"]["reason"] == "on a GPU, dictionaries of this kind are not encoded yet"
    monkeypatch.setattr(state, "device", None)
    assert state.shown(state.catalogue.sae("polysae")) == state.catalogue.sae("polysae").as_dict()


def test_mentions_beyond_the_room_are_refused_as_soon_as_the_prompt_is_known(state: EditState) -> None:
    scope = {"kind": "mentions", "sequences": [[5, 6]], "tokens": "all"}
    digest = state.catalogue.sae("relu").sae.digest
    body = {"model": "model", "sae": digest, "layer": 1, "transfers": [{"latent": 1, "alpha": 0}], "scope": scope}
    state.catalogue.maps.put("forget", from_body(body))
    compiled = state.compile(parse_interventions([{"type": "remap", "map": "forget"}]), [])
    room = state.device.capacity.intervals if state.device else 0
    few, many = [0, *[5, 6, 7] * (room - 1)], [0, *[5, 6, 7] * room]  # the selector of the whole request is one, too
    edit = Edit(state, compiled, False)
    edit.set_prompts([few, many])
    edit.admit(SamplingParams(max_tokens=4))
    with pytest.raises(InterventionError, match=f"needs {room + 1} intervals") as refused:
        edit.admit(SamplingParams(max_tokens=4))
    assert (refused.value.code, refused.value.status, refused.value.param) == (
        "limit_exceeded",
        400,
        "interventions[0]",
    )


def test_the_inspection_at_fault_is_named_and_all_of_them_where_none_is_alone(
    state: EditState, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine, other = {"sae": "relu", "features": [1, 2]}, {"sae": "polysae", "top_k": 2}
    assert refusal(state, edit("relu"), [fine, other]).param == "inspect[1]"
    assert state.device is not None
    monkeypatch.setattr(state, "device", replace(state.device, capacity=replace(state.device.capacity, listed=3)))
    assert state.compile([], parse_inspect([fine])).reads
    assert refusal(state, [], [fine, {"sae": "abstopk", "features": [3, 4]}], "limit_exceeded").param == "inspect"
    four = {"sae": "relu", "features": [1, 2, 3, 4]}
    assert refusal(state, [], [{"sae": "abstopk", "features": [1]}, four], "limit_exceeded").param == "inspect[1]"


def test_the_rule_set_at_fault_is_named(state: EditState, monkeypatch: pytest.MonkeyPatch) -> None:
    def rules(feature: int) -> dict[str, object]:
        return {"type": "rules", "text": f"rule: feature(relu, {feature}) > 0 -> found\non found: flag"}

    steer: dict[str, object] = {"type": "steer", "sae": "relu", "feature": 1, "strength": 2}
    conditioned = steer | {"when": "feature(relu, 2) > 0"}
    assert state.device is not None
    assert state.device.rules is not None
    with monkeypatch.context() as patch:
        patch.setattr(state, "device", replace(state.device, rules=None))
        for asked in ([steer, rules(1)], [steer, rules(1), rules(2)], [steer, conditioned]):
            error = refusal(state, asked)
            assert (error.message, error.param) == ("on a GPU, rules are not run", "interventions[1]")
    few = replace(state.device.rules, features=1)
    monkeypatch.setattr(state, "device", replace(state.device, rules=few))
    assert state.compile(parse_interventions([steer, rules(1)]), []).program is not None
    two = {"type": "rules", "text": "rule: feature(relu, 1) > 0 and feature(relu, 2) > 0 -> found\non found: flag"}
    assert refusal(state, [steer, two], code="limit_exceeded").param == "interventions[1]"
    assert refusal(state, [rules(1), rules(2)], code="limit_exceeded").param == "interventions"


def test_what_only_all_together_exceeds_is_of_interventions(state: EditState, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state.device is not None
    monkeypatch.setattr(state, "device", replace(state.device, capacity=replace(state.device.capacity, members=2)))
    three = [{"index": i, "op": "set", "value": 2.0} for i in range(3)]
    one, two = ({"type": "edit_features", "sae": "abstopk", "features": some} for some in (three[:1], three[1:]))
    assert state.compile(parse_interventions([one]), []).program is not None
    assert refusal(state, [one, two], code="limit_exceeded").param == "interventions"
    whole = {"type": "edit_features", "sae": "abstopk", "features": three}
    assert refusal(state, [*edit("relu"), whole], code="limit_exceeded").param == "interventions[1]"


def served(state: EditState) -> Request:
    app = FastAPI()
    app.state.editserver = state
    return Request({"type": "http", "app": app})


def test_what_a_device_has_room_for_is_published(state: EditState, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state.device is not None
    published = asyncio.run(capabilities(served(state)))["device_limits"]
    assert published["layer_whole_dictionary_features"] == state.device.capacity.members
    assert published["layer_top_k"] == 128
    assert published["rule_conclusions"] == 128
    without = replace(state.device, encode=None, rules=None).limits()
    assert (without["layer_whole_dictionary_features"], without["layer_top_k"]) == (0, 0)
    assert not any(name.startswith("rule") for name in without)
    monkeypatch.setattr(state, "device", None)
    assert "device_limits" not in asyncio.run(capabilities(served(state)))


def test_limits_are_published_as_far_as_there_is_room(state: EditState, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state.device is not None
    assert bounded(Limits(), state.device) == Limits()
    raised = Limits(inspected_features=512, top_k=200)
    assert bounded(raised, state.device) == Limits(inspected_features=256, top_k=128)
    assert bounded(raised, replace(state.device, encode=None)).top_k == 200  # of nothing
    narrow = replace(state.device, encode=replace(reserved.EncodeCapacity(), top=16))
    monkeypatch.setattr(state, "device", narrow)
    everything = read_all(state, state.catalogue.sae("abstopk"))
    assert refusal(state, [], everything, "limit_exceeded").param == "inspect"
    monkeypatch.setattr(state, "catalogue", replace(state.catalogue, limits=bounded(Limits(), narrow)))
    everything = read_all(state, state.catalogue.sae("abstopk"))
    assert state.compile([], parse_inspect(everything)).reads[0].top_k == 16


def test_a_fit_that_must_fail_is_refused_before_there_is_a_job(state: EditState) -> None:
    with pytest.raises(InterventionError, match=r"^sae: on a GPU, dictionaries of this kind") as refused:
        _dictionary(state, "polysae")
    assert (refused.value.code, refused.value.param) == ("unsupported_with_interventions", "sae")

    def check(sae: str, top: int) -> None:
        texts = {"a": ["one", "two"], "b": ["three", "four"]}
        fit = {"name": "n", "sae": sae, "concepts": texts, "target": "a", "top": top, "bins": 16}
        body = FitConceptBody.model_validate(fit)
        _check_limits(state, body, state.catalogue.sae(sae), list(body.concepts), list(body.concepts.values()))

    for sae, most in (("abstopk", 64), ("relu", 512)):
        check(sae, most)
        with pytest.raises(InterventionError, match=f"top: {most + 1}; this server allows {most}") as refused:
            check(sae, most + 1)
        assert (refused.value.code, refused.value.param) == ("limit_exceeded", "top")


def test_the_readout_of_a_fit_is_a_dictionary_that_is_encoded(
    state: EditState, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = dict(state.catalogue.saes)
    later = saes["polysae"] = replace(saes["polysae"], layer=2)
    monkeypatch.setattr(state, "catalogue", replace(state.catalogue, saes=saes))
    assert readout(state, saes["abstopk"]) == (saes["abstopk"], True)
    monkeypatch.setattr(state, "device", None)
    assert readout(state, saes["abstopk"]) == (later, False)


def test_a_detector_is_refused_before_there_is_a_job(state: EditState) -> None:
    with pytest.raises(InterventionError) as refused:
        _check_stream(state, state.catalogue.sae("relu"))
    assert (refused.value.code, refused.value.param) == ("unsupported_with_interventions", "detector")
    assert "null fits a concept without one" in str(refused.value)


def test_what_listens_is_not_served_in_a_pipeline_nor_where_drafts_make_tokens_run_again_that_nobody_kept() -> None:
    keeps, forgets = {"remembers": True}, {"remembers": False}
    assert why_unheard(1, False, [keeps, forgets]) is None
    assert why_unheard(1, True, [keeps, keeps]) is None
    assert why_unheard(1, True, [keeps, forgets]) == FORGETFUL
    assert why_unheard(2, False, [keeps, keeps]) == STAGED


@pytest.mark.parametrize("why", [FORGETFUL, STAGED])
def test_where_nothing_is_kept_what_listens_is_refused_by_its_field(
    state: EditState, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(state, "device", None)
    monkeypatch.setattr(state, "unheard", why)
    steer: dict[str, object] = {"type": "steer", "sae": "relu", "feature": 1, "strength": 2}
    rules = {"type": "rules", "text": "rule: feature(relu, 1) > 0 -> found\non found: flag"}
    gated = steer | {"when": "seen(feature(relu, 1) > 0)"}
    for listening in (rules, gated):
        assert refusal(state, [steer, steer | {"feature": 2}, listening]).param == "interventions[2]"
    body = {"text": rules["text"]}
    for look in (check_body, parse_stored):
        with pytest.raises(InterventionError, match=re.escape(why)) as refused:
            look(body, state)
        assert (refused.value.code, refused.value.param) == ("unsupported_with_interventions", None)
    shown = shown_normal("guard", parse_ruleset_body(body), state)
    assert (shown["normal"], shown["problem"]["code"]) == (None, "unsupported_with_interventions")
    assert state.compile(parse_interventions([steer, gated | {"strength": 0}]), []).program is not None


def test_elsewhere_the_same_requests_are_compiled(state: EditState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "device", None)
    assert state.compile(parse_interventions(edit("polysae")), []).program is not None
