from __future__ import annotations

import inspect
import socket
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest

from editserver_client import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    BadRequest,
    Client,
    EditFeatures,
    Inspect,
    InterventionFailed,
    NotFound,
    RateLimited,
    RuleError,
    Rules,
    ServerError,
    SetFeature,
    Steer,
    Unauthorized,
    UnexpectedResponse,
    Vector,
    pack,
)

SAE = "smollm2-135m/l15"
CHAT = "/v1/chat/completions"

READING = {
    "position": 12,
    "token": " Paris",
    "token_id": 7042,
    "phase": "prompt",
    "features": [{"index": 88, "activation": 6.1, "label": "French cities"}],
}
RECEIPT = {
    "digest": "ab" * 32,
    "receipt": [
        {"id": "0", "type": "steer", "layers": {"10": {"tokens_edited": 4, "fired": 4, "dose_mean": 0.5}}},
        {
            "id": "quiet",
            "type": "edit_features",
            "layer": 15,
            "tokens_edited": 41,
            "prompt_tokens_edited": 12,
            "fired": 9,
            "computed_from": 1,
            "dose_mean": 0.21,
            "dose_max": 0.63,
            "clamped": 0,
        },
        {
            "id": "forget",
            "type": "remap",
            "layer": 15,
            "tokens_edited": 3,
            "gate": {"kind": "share", "over": "prompt", "threshold": 0.1, "statistic": 0.25, "open_from": 11},
        },
        {
            "id": "gone",
            "type": "remap",
            "gate": {"kind": "cusum", "threshold": 2.0, "statistic": 0.5, "open_from": None},
        },
        {"id": "6", "type": "rules", "fired": [{"rule": "r1", "conclusion": "dangerous", "position": 17}]},
    ],
}


def chat_answer(**ours: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Bonjour.", "tool_calls": [], "annotations": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        **ours,
    }


PREMISE = {"rule": "r1", "conclusion": "danger", "position": 2, "because": [{"evidence": "not seen(b)"}]}
EVIDENCE = {"evidence": "seen(a)", "count": 40, "positions": [2, 3], "scores": {"a": [2.5, None]}}
RULES = {
    "id": "guard",
    "type": "rules",
    "digest": "cd" * 32,
    "fired": [
        {
            "rule": "r2",
            "conclusion": "worse",
            "position": 3,
            "proof": {"rule": "r2", "because": [PREMISE, EVIDENCE, {"conclusion": "given"}]},
        }
    ],
    "fired_count": 70,
    "propositions": [{"name": "a", "count": 40, "positions": [2, 3], "scores": [2.5, None]}],
    "actions": [{"on": "worse", "do": "refuse", "position": 3, "tokens": 1}],
    "edited": {"15": {"fired": 1, "dose_mean": 0.5, "dose_max": 0.5, "clamped": 0}},
    "computed_from": 0,
}
RULESET = {"name": "safety", "kind": "ruleset", "version": 1, "digest": "ef" * 32}
BROKEN = {"error": {"message": "m", "type": "t", "param": "text", "code": "rule_syntax", "line": 1, "column": 5}}
NORMAL = {
    "text": "rule r1: a -> b\n",
    "json": {"rules": []},
    "digest": "cd" * 32,
    "propositions": {"a": "feature(s, 1) > 0"},
    "conclusions": ["b"],
    "rules": ["rule r1: a -> b"],
    "actions": [],
}


def test_the_receipt_of_rules_tells_the_chain(server: Any, driver: Any, reply: Any) -> None:
    gated = {"id": "1", "type": "steer", "layer": 15, "fired": 2, "when": {"open_from": 4, "tokens": 2}}
    server.on("POST", CHAT, reply(json=chat_answer(interventions={"digest": "d", "receipt": [RULES, gated]})))
    rules = [Rules(text="…", id="guard"), Steer(vector="v", when="worse")]
    answer = driver.call(server.url, lambda client: client.chat("Hi", interventions=rules))
    (entry,) = answer.receipt.rules
    assert entry is answer.receipt.entry("guard")
    assert (entry.refused, entry.conclusions, entry.fired_count) == (True, {"worse": 3}, 70)
    assert entry.edited[15].dose_mean == 0.5
    assert entry.propositions[0].scores == [2.5, None]
    assert answer.receipt.entry("1").when.open_from == 4
    assert entry.fired[0].explain().splitlines() == [
        "worse at token 3, by rule r2",
        "  danger at token 2, by rule r1",
        "    not seen(b)",
        "  seen(a) at 2, 3 …",
        "  given",
    ]


def test_rule_sets_are_checked_stored_and_read(server: Any, driver: Any, reply: Any) -> None:
    path = "/v1/library/rulesets/safety"
    server.on("PUT", path, reply(json=RULESET), reply(json=RULESET))
    server.on("GET", path, reply(json=RULESET | {"body": {"text": "x"}, "normal": NORMAL}))
    server.on("POST", "/v1/rulesets/check", reply(json=NORMAL), reply(status=400, json=BROKEN))
    form = Rules(rules=[{"if": "a", "then": "b"}])
    assert driver.call(server.url, lambda c: c.rulesets.put("safety", "x", description="d", meta={"k": 1})).version == 1
    assert driver.call(server.url, lambda c: c.library.rulesets.put("safety", form)).name == "safety"
    stored = driver.call(server.url, lambda c: c.rulesets.get("safety"))
    assert (stored.body, stored.normal.conclusions) == ({"text": "x"}, ["b"])
    assert driver.call(server.url, lambda c: c.rulesets.check({"rules": []})).json_form == {"rules": []}
    with pytest.raises(RuleError) as caught:
        driver.call(server.url, lambda c: c.rulesets.check("rule"))
    assert (caught.value.line, caught.value.column) == (1, 5)
    assert [seen.json for seen in server.seen] == [
        {"text": "x", "description": "d", "meta": {"k": 1}},
        {"rules": [{"if": "a", "then": "b"}]},
        None,
        {"rules": []},
        {"text": "rule"},
    ]
    for more_than_a_set in (Rules("safety"), Rules(text="x", when="y")):
        with pytest.raises(TypeError, match="a rule set itself"):
            driver.call(server.url, lambda c, given=more_than_a_set: c.rulesets.put("safety", given))


def refusal(code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": f"refused: {code}", "type": "invalid_request_error", "param": param, "code": code}}


def test_chat_sends_the_contract_and_reads_text_receipt_and_readings(server: Any, driver: Any, reply: Any) -> None:
    inspection = {"sae": SAE, "tokens": [READING]}
    server.on("POST", CHAT, reply(json=chat_answer(interventions=RECEIPT, inspection=inspection, field_of_2030=1)))
    answer = driver.call(
        server.url,
        lambda client: client.chat(
            [{"role": "user", "content": "Hi"}],
            model="m",
            interventions=[EditFeatures(SAE, [SetFeature(12, 0)])],
            inspect=Inspect(SAE, top_k=1),
            temperature=0.5,
            logprobs=True,
            min_p=0.1,
            response_format={"type": "json_object"},
        ),
        api_key="secret",
    )
    (seen,) = server.seen
    assert seen.json == {
        "messages": [{"role": "user", "content": "Hi"}],
        "model": "m",
        "temperature": 0.5,
        "logprobs": True,
        "min_p": 0.1,
        "response_format": {"type": "json_object"},
        "interventions": [{"type": "edit_features", "sae": SAE, "features": [{"index": 12, "op": "set", "value": 0}]}],
        "inspect": {"sae": SAE, "top_k": 1},
    }
    assert seen.headers["authorization"] == "Bearer secret"
    assert seen.headers["user-agent"].startswith("editserver-client/")
    assert (answer.text, answer.finish_reason, answer.usage.total_tokens) == ("Bonjour.", "stop", 5)
    assert answer.receipt is answer.interventions
    assert answer.receipt.digest == "ab" * 32
    assert answer.receipt.entry("quiet").dose_max == 0.63
    assert answer.receipt.entry("0").layers[10].fired == 4
    assert answer.receipt.entry("6").conclusions == {"dangerous": 17}
    gate = answer.receipt.entry("forget").gate
    assert (gate.kind, gate.over, gate.threshold, gate.statistic, gate.open_from) == ("share", "prompt", 0.1, 0.25, 11)
    assert answer.receipt.entry("gone").gate.open_from is None
    assert answer.receipt.entry("quiet").gate is None
    with pytest.raises(KeyError, match="quiet"):
        answer.receipt.entry("loud")
    assert answer.readings.tokens[0].activation(88) == 6.1
    assert answer.readings.tokens[0].activation(89) is None
    assert answer.model_dump()["field_of_2030"] == 1


def test_a_plain_chat_has_nothing_of_ours_in_it(server: Any, driver: Any, reply: Any) -> None:
    server.on("POST", CHAT, reply(json=chat_answer()))
    answer = driver.call(server.url, lambda client: client.chat("Hi"))
    assert server.seen[0].json == {"messages": [{"role": "user", "content": "Hi"}]}
    assert "authorization" not in server.seen[0].headers
    assert answer.receipt is None
    assert answer.readings is None


def test_choices_of_n_carry_their_own_receipts_and_tool_calls(server: Any, driver: Any, reply: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": None, "tool_calls": [call]},
            "finish_reason": "tool_calls",
            "interventions": {"digest": "d", "receipt": [{"id": "0", "type": "steer", "fired": i}]},
            "inspection": [{"sae": SAE, "tokens": []}, {"sae": "other", "tokens": [READING]}],
        }
        for i in range(3)
    ]
    server.on("POST", CHAT, reply(json={**chat_answer(), "choices": choices}))
    answer = driver.call(server.url, lambda client: client.chat("Hi", n=3, tools=[{"type": "function"}]))
    assert server.seen[0].json["n"] == 3
    assert [choice.interventions.entry("0").fired for choice in answer.choices] == [0, 1, 2]
    assert answer.receipt.entry("0").fired == 0
    assert answer.readings[1].tokens[0].token == " Paris"
    assert answer.text == ""
    assert answer.tool_calls[0].function.name == "weather"
    assert answer.tool_calls[0].function.arguments == '{"city": "Paris"}'


@pytest.mark.parametrize("prompt", ["Once", ["Once", "Twice"], [1, 2, 3], [[1, 2], [3]]])
def test_complete_takes_every_form_of_prompt(server: Any, driver: Any, reply: Any, prompt: Any) -> None:
    choice = {"index": 0, "text": " upon", "finish_reason": "length", "logprobs": None}
    body = {**chat_answer(), "object": "text_completion", "choices": [choice]}
    server.on("POST", "/v1/completions", reply(json=body))
    steer = Steer(layer=1, values=np.array([1, 2], dtype=np.float32))
    answer = driver.call(server.url, lambda client: client.complete(prompt, interventions=[steer], max_tokens=4))
    assert server.seen[0].json["prompt"] == prompt
    assert server.seen[0].json["interventions"][0]["values"] == pack([1, 2]).to_dict()
    assert answer.text == " upon"


SAE_INFO = {
    "id": SAE,
    "layer": 15,
    "hook": "resid_post",
    "architecture": "jumprelu",
    "d_model": 576,
    "n_features": 4608,
    "digest": "d",
    "editable": True,
    "top_k": True,
}
FEATURE = {"index": 12, "label": "Paris", "density": 0.01, "max_activation": 9.5}
STORED = {"name": "formal tone/v2", "kind": "vector", "version": 1, "digest": "d"}
NAME = "formal%20tone%2Fv2"

ENDPOINTS: list[tuple[Any, str, str, Any, Any, Any]] = [
    # action, method, raw target, body sent, answer, what must hold for the typed answer
    (
        lambda c: c.capabilities(),
        "GET",
        "/v1/capabilities",
        None,
        {
            "version": "0.1",
            "vllm": "0.32.0",
            "model": "m",
            "d_model": 576,
            "n_layers": 30,
            "armed_layers": [10, 15],
            "limits": {"top_k": 128},
            "saes": [SAE_INFO],
            "intervention_types": ["steer"],
            "schemas": {},
        },
        lambda a: a.armed_layers == [10, 15] and a.saes[0].n_features == 4608 and a.limits["top_k"] == 128,
    ),
    (
        lambda c: c.saes(),
        "GET",
        "/v1/saes",
        None,
        {"object": "list", "data": [SAE_INFO]},
        lambda a: [sae.id for sae in a] == [SAE] and a[0].editable is True,
    ),
    (lambda c: c.sae(SAE), "GET", f"/v1/saes/{SAE}", None, SAE_INFO, lambda a: a.layer == 15),
    (
        lambda c: c.sae("odd name?/#1"),
        "GET",
        "/v1/saes/odd%20name%3F/%231",
        None,
        SAE_INFO,
        lambda a: a.hook == "resid_post",
    ),
    (
        lambda c: c.features(SAE, "R&B", limit=3),
        "GET",
        f"/v1/saes/{SAE}/features?q=R%26B&limit=3",
        None,
        {"object": "list", "data": [{**FEATURE, "score": 0.9}]},
        lambda a: a[0].score == 0.9,
    ),
    (
        lambda c: c.features(SAE),
        "GET",
        f"/v1/saes/{SAE}/features",
        None,
        [FEATURE],
        lambda a: a[0].label == "Paris" and a[0].score is None,
    ),
    (
        lambda c: c.feature(SAE, 12),
        "GET",
        f"/v1/saes/{SAE}/features/12",
        None,
        FEATURE
        | {
            "label_source": "automatic",
            "mean_activation": 2.5,
            "quantiles": {"0.5": 2.0},
            "contexts": [{"tokens": [" in", " Paris"], "activations": [0, 7.5], "peak": 1, "source": "brown"}],
            "promoted": [{"token": " Paris", "weight": 0.5}],
            "suppressed": None,
            "neighbours": [{"index": 3, "label": None, "cosine": 0.7}],
        },
        lambda a: (
            (a.promoted[0].token, a.promoted[0].weight) == (" Paris", 0.5)
            and (a.contexts[0].text, a.contexts[0].tokens[a.contexts[0].peak]) == (" in Paris", " Paris")
            and a.neighbours[0].cosine == 0.7
            and a.suppressed is None
            and (a.label_source, a.mean_activation, a.quantiles) == ("automatic", 2.5, {"0.5": 2.0})
        ),
    ),
    (
        lambda c: c.activations(SAE, ["a", "b"], features=[1], top_k=2),
        "POST",
        f"/v1/saes/{SAE}/activations",
        {"input": ["a", "b"], "features": [1], "top_k": 2},
        {"data": [{"index": 0, "tokens": [READING]}, {"index": 1, "tokens": []}]},
        lambda a: a[0].tokens[0].features[0].activation == 6.1 and a[1].index == 1,
    ),
    (
        lambda c: c.activations(SAE, messages="Hi"),
        "POST",
        f"/v1/saes/{SAE}/activations",
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"data": [{"index": 0, "tokens": []}]},
        lambda a: len(a) == 1,
    ),
    (
        lambda c: c.contrast(SAE, ["good"], ["bad"], limit=4),
        "POST",
        f"/v1/saes/{SAE}/contrast",
        {"positive": ["good"], "negative": ["bad"], "limit": 4},
        {"score_name": "auroc", "data": [{"index": 5, "label": None, "score": 1, "auroc": 1, "density": 0.1}]},
        lambda a: a.score_name == "auroc" and a.data[0].index == 5,
    ),
    (
        lambda c: c.contrast(SAE, ["good", [{"role": "user", "content": "Hi"}]], ["bad"], pool="mean", max_density=0.2),
        "POST",
        f"/v1/saes/{SAE}/contrast",
        {
            "positive": ["good", [{"role": "user", "content": "Hi"}]],
            "negative": ["bad"],
            "limit": 10,
            "pool": "mean",
            "max_density": 0.2,
        },
        {
            "score_name": "difference_of_means",
            "data": [{"index": 5, "score": 0.4, "auroc": 0.9, "auroc_interval": [0.7, 1.0], "mean_positive": 3.0}],
            "truncated_tokens": 2,
        },
        lambda a: a.data[0].auroc_interval == (0.7, 1.0) and a.truncated_tokens == 2,
    ),
    (
        lambda c: c.calibrate_strength(Steer(sae=SAE, feature=12, strength=-1), ["Once upon"], target_kl=0.25),
        "POST",
        "/v1/calibrate_strength",
        {
            "intervention": {"type": "steer", "sae": SAE, "feature": 12, "strength": -1.0},
            "prompts": ["Once upon"],
            "target_kl": 0.25,
        },
        {
            "strength": -31.5,
            "kl": 0.26,
            "dose_mean": 0.18,
            "curve": [{"strength": -1, "kl": 0.001, "dose_mean": 0.006}, {"strength": -31.5, "kl": 0.26}],
            "intervention": {"type": "steer", "sae": SAE, "feature": 12, "strength": -31.5},
        },
        lambda a: a.strength == -31.5 and a.curve[0].kl == 0.001 and a.intervention["strength"] == -31.5,
    ),
    (
        lambda c: c.calibrate_strength({"type": "steer", "vector": "v"}, [[{"role": "user", "content": "Hi"}]]),
        "POST",
        "/v1/calibrate_strength",
        {
            "intervention": {"type": "steer", "vector": "v"},
            "prompts": [[{"role": "user", "content": "Hi"}]],
            "target_kl": 0.5,
        },
        {"strength": 2, "kl": 0.5, "dose_mean": None, "curve": []},
        lambda a: a.strength == 2.0 and a.dose_mean is None,
    ),
    (
        lambda c: c.tokenize("Hi there", add_special_tokens=False),
        "POST",
        "/tokenize",
        {"prompt": "Hi there", "return_token_strs": True, "add_special_tokens": False},
        {"count": 2, "max_model_len": 2048, "tokens": [5, 6], "token_strs": ["Hi", " there"]},
        lambda a: a.tokens == [5, 6] and a.token_strs[1] == " there",
    ),
    (
        lambda c: c.tokenize([{"role": "user", "content": "Hi"}], model="m"),
        "POST",
        "/tokenize",
        {"messages": [{"role": "user", "content": "Hi"}], "model": "m", "return_token_strs": True},
        {"count": 1, "max_model_len": 2048, "tokens": [5], "token_strs": None},
        lambda a: a.count == 1,
    ),
    (
        lambda c: c.library.vectors.list(),
        "GET",
        "/v1/library/vectors",
        None,
        {"object": "list", "data": [STORED]},
        lambda a: a[0].name == "formal tone/v2" and a[0].body is None,
    ),
    (
        lambda c: c.library.vectors.put("formal tone/v2", Vector({15: [1, 2]}, description="x")),
        "PUT",
        f"/v1/library/vectors/{NAME}",
        {"layers": {"15": [1, 2]}, "description": "x"},
        STORED,
        lambda a: a.version == 1,
    ),
    (
        lambda c: c.library.vectors.get("formal tone/v2"),
        "GET",
        f"/v1/library/vectors/{NAME}",
        None,
        {**STORED, "body": {"layers": {"15": [1, 2]}}},
        lambda a: a.body["layers"]["15"] == [1, 2],
    ),
    (
        lambda c: c.library.concepts.put("sports", {"sae": SAE, "features": [1]}),
        "PUT",
        "/v1/library/concepts/sports",
        {"sae": SAE, "features": [1]},
        {**STORED, "kind": "concept"},
        lambda a: a.kind == "concept",
    ),
    (lambda c: c.library.maps.list(), "GET", "/v1/library/maps", None, {"data": []}, lambda a: a == []),
    (
        lambda c: c.library.rulesets.delete("safety"),
        "DELETE",
        "/v1/library/rulesets/safety",
        None,
        {"deleted": True},
        lambda a: a is None,
    ),
]


@pytest.mark.parametrize(
    "action, method, target, sent, answer, holds", ENDPOINTS, ids=[f"{case[1]} {case[2]}" for case in ENDPOINTS]
)
def test_every_endpoint_has_its_path_body_and_typed_answer(
    server: Any, driver: Any, reply: Any, action: Any, method: str, target: str, sent: Any, answer: Any, holds: Any
) -> None:
    server.on(method, target, reply(json=answer))
    typed = driver.call(server.url, action)
    assert [(seen.method, seen.path, seen.json) for seen in server.seen] == [(method, target, sent)]
    assert holds(typed)


def test_an_answer_without_a_body_is_enough_for_delete(server: Any, driver: Any, reply: Any) -> None:
    server.on("DELETE", "/v1/library/vectors/v", reply(status=204, raw=b""))
    assert driver.call(server.url, lambda c: c.library.vectors.delete("v")) is None


def test_a_base_url_may_end_as_openais_sdk_wants_it(server: Any, driver: Any, reply: Any) -> None:
    server.on("GET", "/v1/saes", reply(json={"data": []}), reply(json={"data": []}))
    assert driver.call(server.url + "/v1", lambda c: c.saes()) == []
    assert driver.call(server.url + "/v1/", lambda c: c.saes()) == []


@pytest.mark.parametrize("params", [{"stream": True}, {"extra_body": {"interventions": []}}, {"extra_headers": {}}])
def test_parameters_that_would_be_lost_are_refused(server: Any, params: dict[str, Any]) -> None:
    with Client(server.url) as client, pytest.raises(TypeError, match=next(iter(params))):
        client.chat("Hi", **params)
    assert server.seen == []


@pytest.mark.parametrize(
    "action",
    [
        lambda c: c.sae(""),
        lambda c: c.sae("/"),
        lambda c: c.library.vectors.get(""),
        lambda c: c.activations(SAE),
        lambda c: c.activations(SAE, "a", messages="b"),
        lambda c: c.contrast(SAE, "one text", ["another"]),
        lambda c: c.contrast(SAE, ["a text"], [{"role": "user", "content": "one chat"}]),
        lambda c: c.calibrate_strength(Steer(vector="v"), "one text"),
    ],
)
def test_calls_without_a_subject_are_refused_before_sending(server: Any, driver: Any, action: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        driver.call(server.url, action)
    assert server.seen == []


@pytest.mark.parametrize(
    "status, body, expected",
    [
        (400, refusal("unknown_feature", "interventions[2].features[0].index"), BadRequest),
        (401, refusal("unauthorized"), Unauthorized),
        (404, refusal("unknown_sae"), NotFound),
        (500, refusal("intervention_failed"), InterventionFailed),
        (500, {"error": "boom"}, ServerError),
    ],
)
def test_refusals_and_failures_raise_once_without_a_second_try(
    server: Any, driver: Any, reply: Any, status: int, body: Any, expected: type[Exception]
) -> None:
    server.on("POST", CHAT, reply(status, json=body), reply(json=chat_answer()))
    with pytest.raises(expected) as raised:
        driver.call(server.url, lambda c: c.chat("Hi"))
    assert type(raised.value) is expected
    assert raised.value.status == status
    if isinstance(body["error"], dict):
        assert (raised.value.code, raised.value.param) == (body["error"]["code"], body["error"]["param"])
    assert len(server.seen) == 1


def test_an_error_page_that_is_not_json_keeps_its_text(server: Any, driver: Any, reply: Any) -> None:
    server.on("POST", CHAT, reply(502, raw=b"<html>Bad Gateway</html>"))
    with pytest.raises(ServerError, match="Bad Gateway"):
        driver.call(server.url, lambda c: c.chat("Hi"))


@pytest.mark.parametrize("raw", [b"<html>hello</html>", b'{"some": "other server"}', b"[]", b""])
def test_a_success_of_another_kind_of_server_is_named_as_such(server: Any, driver: Any, reply: Any, raw: bytes) -> None:
    server.on("POST", CHAT, reply(raw=raw))
    server.on("GET", "/v1/saes", reply(raw=raw if raw != b"[]" else b'{"data": 3}'))
    with pytest.raises(UnexpectedResponse):
        driver.call(server.url, lambda c: c.chat("Hi"))
    with pytest.raises(UnexpectedResponse):
        driver.call(server.url, lambda c: c.saes())


def test_429_is_tried_again_after_the_time_that_the_server_asks_for(server: Any, driver: Any, reply: Any) -> None:
    full = reply(429, json=refusal("capacity"), headers={"retry-after": "0.3"})
    server.on("POST", CHAT, full, full, reply(json=chat_answer()))
    answer = driver.call(server.url, lambda c: c.chat("Hi", seed=7), retries=2)
    assert answer.text == "Bonjour."
    first, second, third = server.seen
    assert first.json == second.json == third.json
    assert 0.3 <= second.at - first.at < 2
    assert 0.3 <= third.at - second.at < 2


def test_429_without_retry_after_backs_off_by_itself(server: Any, driver: Any, reply: Any) -> None:
    server.on("POST", CHAT, reply(429, json=refusal("capacity")), reply(json=chat_answer()))
    driver.call(server.url, lambda c: c.chat("Hi"))
    assert 0.2 <= server.seen[1].at - server.seen[0].at < 2


@pytest.mark.parametrize("retries, attempts", [(0, 1), (1, 2)])
def test_429_after_the_last_retry_is_rate_limited(
    server: Any, driver: Any, reply: Any, retries: int, attempts: int
) -> None:
    full = reply(429, json=refusal("capacity"), headers={"retry-after": "0.01"})
    server.on("POST", CHAT, full, full, full)
    with pytest.raises(RateLimited) as raised:
        driver.call(server.url, lambda c: c.chat("Hi"), retries=retries)
    assert (raised.value.code, raised.value.retry_after) == ("capacity", 0.01)
    assert len(server.seen) == attempts


def test_a_wait_beyond_the_callers_patience_is_not_waited_for(server: Any, driver: Any, reply: Any) -> None:
    server.on("POST", CHAT, reply(429, json=refusal("capacity"), headers={"retry-after": "3600"}))
    started = time.monotonic()
    with pytest.raises(RateLimited) as raised:
        driver.call(server.url, lambda c: c.chat("Hi"))
    assert raised.value.retry_after == 3600
    assert time.monotonic() - started < 5


def test_a_connection_that_the_server_hangs_up_is_tried_again(server: Any, driver: Any, reply: Any) -> None:
    server.on("POST", CHAT, reply(hang_up=True), reply(json=chat_answer()))
    assert driver.call(server.url, lambda c: c.chat("Hi")).text == "Bonjour."
    assert len(server.seen) == 2


def test_a_delete_that_may_have_happened_is_not_repeated(server: Any, driver: Any, reply: Any) -> None:
    server.on("DELETE", "/v1/library/vectors/v", reply(hang_up=True), reply(json={}))
    with pytest.raises(APIConnectionError):
        driver.call(server.url, lambda c: c.library.vectors.delete("v"))
    assert len(server.seen) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_is_still_starting_is_waited_for(driver: Any, reply: Any, start_server: Any) -> None:
    port, started = free_port(), []

    def start() -> None:
        running = start_server(port)
        running.on("GET", "/v1/saes", reply(json={"data": []}))
        started.append(running)

    timer = threading.Timer(0.15, start)
    timer.start()
    try:
        assert driver.call(f"http://127.0.0.1:{port}", lambda c: c.saes(), retries=4) == []
    finally:
        timer.join()
        started[0].close()


def test_nobody_at_the_address_is_a_connection_error_that_names_it(driver: Any) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(APIConnectionError, match=rf"{url} after 2 attempts") as raised:
        driver.call(url, lambda c: c.saes(), retries=1)
    assert isinstance(raised.value.__cause__, httpx.ConnectError)


def test_a_slow_answer_is_a_timeout_and_not_repeated(server: Any, driver: Any, reply: Any) -> None:
    server.on("POST", CHAT, reply(json=chat_answer(), delay=2.5), reply(json=chat_answer()))
    with pytest.raises(APITimeoutError):
        driver.call(server.url, lambda c: c.chat("Hi"), timeout=1.0)
    assert len(server.seen) == 1


def test_health_is_true_false_or_an_error_that_is_the_callers(server: Any, driver: Any, reply: Any) -> None:
    server.on("GET", "/health", reply(raw=b""), reply(503, raw=b""), reply(401, json={"error": "Unauthorized"}))
    assert driver.call(server.url, lambda c: c.health()) is True
    assert driver.call(server.url, lambda c: c.health()) is False
    with pytest.raises(Unauthorized):
        driver.call(server.url, lambda c: c.health())
    assert driver.call(f"http://127.0.0.1:{free_port()}", lambda c: c.health()) is False


def test_the_transport_can_be_the_callers() -> None:
    paths: list[str] = []

    class Recording(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            paths.append(request.url.path)
            return httpx.Response(200, json={"data": []})

    with Client(transport=Recording()) as client:
        assert client.saes() == []
    assert paths == ["/v1/saes"]


def test_negative_retries_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        Client(retries=-1)


def test_both_clients_offer_the_same_methods_with_the_same_arguments() -> None:
    def surface(cls: type) -> dict[str, list[tuple[str, Any]]]:
        return {
            name: [(p.name, p.kind) for p in inspect.signature(member).parameters.values()]
            for name, member in vars(cls).items()
            if inspect.isfunction(member) and not name.startswith("_")
        }

    assert surface(Client) == surface(AsyncClient)
    assert len(surface(Client)) >= 14
