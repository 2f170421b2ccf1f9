"""Bad input: always a 4xx with code and param, never a 5xx, never silently unedited; and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import D_MODEL, MODEL, N_FEATURES, RELU, TOPK

pytestmark = pytest.mark.engine

Chat = Callable[..., httpx.Response]
STEER: dict[str, Any] = {"type": "steer", "sae": RELU, "feature": 3}
VALUES: dict[str, Any] = {"type": "steer", "values": [0.5] * D_MODEL, "layer": 15}
EDIT: dict[str, Any] = {"type": "edit_features", "sae": RELU}
NOT_BASE64 = {"dtype": "float32", "shape": [4], "data": "!!!!"}
THREE_ROWS = [[1.0] * D_MODEL] * 3


def one(op: dict[str, Any]) -> list[Any]:
    return [EDIT | {"features": [op]}]


INTERVENTIONS: list[tuple[Any, str, str]] = [
    ("steer", "invalid_intervention", "interventions"),
    ({"type": "steer"}, "invalid_intervention", "interventions"),
    ([1], "invalid_intervention", "interventions[0]"),
    ([{}], "invalid_intervention", "interventions[0].type"),
    ([{"type": "stear"}], "invalid_intervention", "interventions[0].type"),
    ([{"type": "remap"}], "invalid_intervention", "interventions[0].map"),
    ([{"type": "remap", "map": "m"}], "unknown_map", "interventions[0].map"),
    ([{"type": "remap", "map": "m", "strength": -1}], "invalid_intervention", "interventions[0].strength"),
    ([{"type": "rules", "ruleset": "safety"}], "unknown_ruleset", "interventions[0].ruleset"),
    ([STEER | {"when": "feature(x, 1) > 3"}], "unknown_sae", "interventions[0].when"),
    ([STEER | {"sae": "nope"}], "unknown_sae", "interventions[0].sae"),
    ([STEER | {"feature": N_FEATURES}], "unknown_feature", "interventions[0].feature"),
    ([STEER | {"feature": -1}], "unknown_feature", "interventions[0].feature"),
    ([STEER | {"feature": "3"}], "invalid_intervention", "interventions[0].feature"),
    ([STEER | {"feature": 10**30}], "unknown_feature", "interventions[0].feature"),
    ([STEER | {"strength": float("nan")}], "invalid_intervention", "interventions[0].strength"),
    ([STEER | {"strength": 1e39}], "invalid_intervention", "interventions[0].strength"),
    ([STEER | {"strength": "8"}], "invalid_intervention", "interventions[0].strength"),
    ([STEER | {"strengh": 8}], "invalid_intervention", "interventions[0].strengh"),
    ([STEER | {"layer": 15}], "invalid_intervention", "interventions[0].layer"),
    ([STEER | {"mode": "cap"}], "invalid_intervention", "interventions[0].min"),
    ([STEER | {"mode": "cap", "min": 2, "max": 1}], "invalid_intervention", "interventions[0].min"),
    ([STEER | {"mode": "rotate"}], "invalid_intervention", "interventions[0].mode"),
    ([STEER | {"tokens": "everything"}], "invalid_intervention", "interventions[0].tokens"),
    ([STEER | {"tokens": []}], "invalid_intervention", "interventions[0].tokens"),
    ([STEER | {"tokens": {"from": 0, "to": 1}}], "invalid_intervention", "interventions[0].tokens"),
    ([STEER | {"tokens": {"from": 5000}}], "invalid_intervention", "interventions[0].tokens"),
    ([STEER | {"tokens": {"tokens": ["two words here"]}}], "invalid_intervention", "interventions[0].tokens.tokens[0]"),
    ([STEER | {"tokens": {"tokens": [10**7]}}], "invalid_intervention", "interventions[0].tokens.tokens[0]"),
    ([STEER | {"id": ""}], "invalid_intervention", "interventions[0].id"),
    ([STEER | {"id": "a"}, STEER | {"id": "a"}], "invalid_intervention", "interventions[1].id"),
    ([STEER | {"include_bos": 1}], "invalid_intervention", "interventions[0].include_bos"),
    ([STEER | {"strength": None, "values": [1.0]}], "invalid_intervention", "interventions[0]"),
    ([{"type": "steer", "vector": "nope"}], "unknown_vector", "interventions[0].vector"),
    ([{"type": "steer", "vector": "../../etc/passwd"}], "unknown_vector", "interventions[0].vector"),
    ([VALUES | {"layer": 3}], "layer_not_armed", "interventions[0].layer"),
    ([VALUES | {"layer": 30}], "invalid_intervention", "interventions[0].layer"),
    ([VALUES | {"layer": -1}], "invalid_intervention", "interventions[0].layer"),
    ([VALUES | {"layer": None}], "invalid_intervention", "interventions[0].layer"),
    ([VALUES | {"layer": None, "layers": [15, 15]}], "invalid_intervention", "interventions[0].layers[1]"),
    ([VALUES | {"values": [1.0] * 5}], "wrong_dimension", "interventions[0].values"),
    ([VALUES | {"values": []}], "invalid_intervention", "interventions[0].values"),
    ([VALUES | {"values": [None] * D_MODEL}], "invalid_intervention", "interventions[0].values[0]"),
    ([VALUES | {"values": [0.0] * D_MODEL, "mode": "project_out"}], "invalid_intervention", "interventions[0].values"),
    ([VALUES | {"values": NOT_BASE64}], "invalid_intervention", "interventions[0].values.data"),
    ([VALUES | {"values": THREE_ROWS, "layer": None, "layers": [10, 15]}], "wrong_dimension", "interventions[0].values"),
    ([EDIT], "invalid_intervention", "interventions[0].features"),
    ([EDIT | {"features": []}], "invalid_intervention", "interventions[0].features"),
    (one({"index": 1}), "invalid_intervention", "interventions[0].features[0].op"),
    (one({"index": 1, "op": "set"}), "invalid_intervention", "interventions[0].features[0].value"),
    (one({"index": 1, "op": "ablate", "value": 1}), "invalid_intervention", "interventions[0].features[0].value"),
    (one({"index": 1, "op": "clamp"}), "invalid_intervention", "interventions[0].features[0].min"),
    (one({"index": N_FEATURES, "op": "ablate"}), "unknown_feature", "interventions[0].features[0].index"),
    ([EDIT | {"features": [{"index": 1, "op": "ablate"}] * 2}], "invalid_intervention", "interventions[0].features[1].index"),
    ([STEER | {"id": str(i)} for i in range(33)], "limit_exceeded", "interventions"),
]  # fmt: skip

INSPECTIONS: list[tuple[Any, str, str]] = [
    ("all", "invalid_inspection", "inspect"),
    ({}, "invalid_inspection", "inspect.sae"),
    ({"sae": RELU}, "invalid_inspection", "inspect"),
    ({"sae": "nope", "top_k": 1}, "unknown_sae", "inspect.sae"),
    ({"sae": RELU, "top_k": 0}, "invalid_inspection", "inspect.top_k"),
    ({"sae": RELU, "top_k": 129}, "limit_exceeded", "inspect.top_k"),
    ({"sae": RELU, "features": [1, 1]}, "invalid_inspection", "inspect.features[1]"),
    ({"sae": RELU, "features": [N_FEATURES]}, "unknown_feature", "inspect.features[0]"),
    ({"sae": RELU, "top_k": 1, "tokens": {"from": 9999}}, "invalid_inspection", "inspect.tokens"),
    ([{"sae": RELU, "top_k": 1}] * 2, "invalid_inspection", "inspect[1].sae"),
    ([{"sae": RELU, "top_k": 1}, {"sae": TOPK, "topk": 1}], "invalid_inspection", "inspect[1].topk"),
]


def check_refused(answer: httpx.Response, code: str, param: str | None) -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error"), error["message"]
    assert error["message"]


def post_chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    """As the fixture ``chat``, but sends what strict JSON cannot (NaN)."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **fields}
    return http.post(
        "/v1/chat/completions", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )


@pytest.mark.parametrize(
    ("raw", "code", "param"), INTERVENTIONS, ids=[f"{p}-{i}" for i, (_, _, p) in enumerate(INTERVENTIONS)]
)
def test_a_bad_intervention_is_refused_by_its_field(http: httpx.Client, raw: Any, code: str, param: str) -> None:
    check_refused(post_chat(http, interventions=raw), code, param)


@pytest.mark.parametrize(
    ("raw", "code", "param"), INSPECTIONS, ids=[f"{p}-{i}" for i, (_, _, p) in enumerate(INSPECTIONS)]
)
def test_a_bad_inspection_is_refused_by_its_field(http: httpx.Client, raw: Any, code: str, param: str) -> None:
    check_refused(post_chat(http, inspect=raw), code, param)


SLIPS: list[tuple[dict[str, Any], str]] = [
    ({"interventions": [{"type": "stear"}]}, "steer"),
    ({"interventions": [STEER | {"sae": RELU.replace("l15", "l51")}]}, RELU),
    ({"interventions": [STEER | {"strengh": 8}]}, "strength"),
    ({"interventions": [STEER | {"mode": "normalised"}]}, "normalized"),
    ({"interventions": [STEER | {"tokens": "promt"}]}, "prompt"),
    ({"interventions": one({"index": 1, "op": "scal", "value": 2})}, "scale"),
    ({"interventions": [{"type": "suppress", "concept": {"sae": RELU, "features": [1]}, "method": "maks"}]}, "mask"),
    ({"interventions": [STEER | {"when": "seen(feature(probe/l51, 3) > 1)"}]}, RELU),
    ({"interventions": [{"type": "rules", "text": "rul r: a -> b"}]}, "rule"),
    ({"inspect": {"sae": RELU, "topk": 1}}, "top_k"),
    ({"inspect": {"sae": TOPK.replace("topk", "topp"), "top_k": 1}}, TOPK),
]


@pytest.mark.parametrize(("fields", "meant"), SLIPS, ids=[meant for _, meant in SLIPS])
def test_a_slip_of_the_pen_is_answered_with_what_was_meant(
    http: httpx.Client, fields: dict[str, Any], meant: str
) -> None:
    answer = post_chat(http, **fields)
    assert answer.status_code == 400
    assert f"Did you mean {meant!r}?" in answer.json()["error"]["message"]


def test_what_is_out_of_range_is_answered_with_the_range(http: httpx.Client) -> None:
    for raw, known in (
        (STEER | {"feature": N_FEATURES}, f"0..{N_FEATURES - 1}"),
        (VALUES | {"layer": 14}, "armed are 10, 15, 20"),
        (VALUES | {"layer": 30}, "0..29"),
    ):
        assert known in post_chat(http, interventions=[raw]).json()["error"]["message"]


def test_what_cannot_be_combined_is_refused(http: httpx.Client) -> None:
    check_refused(
        post_chat(http, interventions=[STEER], use_beam_search=True, n=2),
        "unsupported_with_interventions",
        "use_beam_search",
    )
    generated = [STEER | {"tokens": "generated"}]
    check_refused(
        post_chat(http, interventions=generated, max_tokens=1), "invalid_intervention", "interventions[0].tokens"
    )


def test_bodies_that_are_no_json_object_get_vllms_own_error(http: httpx.Client) -> None:
    for content in (b"", b"{", b"[]", b'"interventions"', b'["interventions"]', b'{"interventions": [', b"\xff\xfe"):
        answer = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500
        assert "error" in answer.json()


def test_a_body_that_is_nested_too_deeply_is_refused(http: httpx.Client) -> None:
    content = b'{"interventions": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    answer = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_a_body_over_the_limit_is_413(http: httpx.Client) -> None:
    for path in ("/v1/chat/completions", "/tokenize", "/v1/library/vectors/big"):
        content = b'{"messages": "' + b"x" * (2 * 2**20) + b'"}'
        method = "PUT" if "library" in path else "POST"
        answer = http.request(method, path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, path
        assert answer.json()["error"]["code"] == "limit_exceeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ([], None),
        ({"input": "a", "messages": []}, "messages"),
        ({"input": "a", "messages": [{"role": "user", "content": "b"}]}, None),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": "two words", "topk": 1}, "topk"),
        ({"input": "two words", "top_k": 1000}, "top_k"),
        ({"input": "two words", "features": [N_FEATURES]}, "features[0]"),
        ({"input": "two words", "features": ["1"]}, "features[0]"),
        ({"input": "a"}, "input"),
        ({"messages": [{"no": "role"}]}, "messages"),
    ],
)
def test_a_bad_activations_body_is_refused_by_its_field(http: httpx.Client, body: Any, param: str | None) -> None:
    answer = http.post(f"/v1/saes/{RELU}/activations", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert isinstance(error["code"], str)


HOT = f"feature({RELU}, 3) > 1"
SCALE = {"index": 1, "op": "scale", "value": 2}
RULES: dict[str, Any] = {
    "type": "rules",
    "rules": [{"if": HOT, "then": "a"}],
    "actions": [{"on": "a", "do": STEER}, {"on": "a", "refuse": "no"}],
}

NAMES = st.one_of(
    st.sampled_from(["type", "sae", "feature", "features", "values", "layer", "layers", "vector", "strength", "mode"]),
    st.sampled_from(
        ["tokens", "index", "op", "value", "min", "max", "from", "to", "id", "when", "include_bos", "top_k"]
    ),
    st.sampled_from(["after", "only_if_active", "x"]),
    st.sampled_from(
        ["rules", "actions", "propositions", "ruleset", "text", "if", "then", "on", "do", "refuse", "seen", "not"]
    ),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 200),
    st.integers(),
    st.floats(),
    st.sampled_from(["steer", "edit_features", RELU, TOPK, "add", "cap", "set", "clamp", "all", "generated", "prompt"]),
    st.sampled_from(["rules", HOT, f"rule r: seen({HOT}) -> latch a", "a", 'rule r: x -> y\non y: refuse "no"']),
    st.text(max_size=5),
)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=6), max_leaves=12
)
NEAR_MISSES = st.builds(
    lambda base, changes: [base | changes],
    st.sampled_from([STEER, STEER | {"when": HOT}, VALUES, EDIT | {"features": [SCALE]}, RULES, {"type": "rules"}]),
    st.dictionaries(NAMES, JSON_VALUES, max_size=2),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(interventions=st.one_of(JSON_VALUES, NEAR_MISSES), inspect=st.one_of(st.none(), JSON_VALUES))
def test_any_json_is_either_carried_out_with_a_receipt_or_a_4xx(
    http: httpx.Client, interventions: Any, inspect: Any
) -> None:
    try:
        answer = post_chat(http, interventions=interventions, inspect=inspect, max_tokens=2)
    except UnicodeEncodeError:
        return  # json.dumps escapes surrogates; nothing was sent
    body = answer.json()
    if answer.status_code == 200:
        assert ("interventions" in body) == (interventions not in (None, []))
        assert ("inspection" in body) == (inspect not in (None, []))
        return
    assert 400 <= answer.status_code < 500, answer.text
    assert isinstance(body["error"]["code"], str)
    assert body["error"]["param"]


def test_the_server_answers_normally_afterwards(chat: Chat) -> None:
    assert chat().status_code == 200
    edited = chat(interventions=[STEER | {"strength": 90}])
    assert edited.json()["interventions"]["receipt"][0]["fired"] > 0
