"""Our fields on any other route, and our key in the engine's arguments on every route, are refused."""

from __future__ import annotations

import re

import httpx
import pytest

from editserver.api.guard import EDITED_ROUTES

from .conftest import MODEL, RELU, Server

pytestmark = pytest.mark.engine

STEER = {"type": "steer", "sae": RELU, "feature": 3, "strength": 90}
INSPECT = {"sae": RELU, "top_k": 1}


def route_table(server: Server) -> list[tuple[str, str]]:
    """(method, path) of every route of the running app that may take a body, as vLLM logs it at start."""
    found = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", server.log.read_text())
    table = [(method, path) for path, methods in found for method in methods.split(", ")]
    return [(method, path) for method, path in table if method in ("POST", "PUT", "PATCH", "DELETE")]


def test_every_other_route_refuses_our_fields(server: Server, http: httpx.Client) -> None:
    table = route_table(server)
    paths = {path for _, path in table}
    assert {"/v1/responses", "/v1/messages", "/tokenize", "/invocations", "/v1/chat/completions/batch"} <= paths
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "input": "Hi",
        "prompt": "Hi",
        "max_tokens": 2,
    }
    for method, path in table:
        if method == "POST" and path in EDITED_ROUTES:
            continue
        concrete = re.sub(r"\{[^}]*\}", "x", path)
        for field, value in (("interventions", [STEER]), ("inspect", INSPECT)):
            answer = http.request(method, concrete, json=body | {field: value})
            assert answer.status_code == 400, (method, path)
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("unsupported_with_interventions", field), (method, path)


def test_every_route_refuses_our_key_in_the_engines_arguments(server: Server, http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "prompt": "Hi"}
    carriers = (
        {"vllm_xargs": {"editserver": "payload"}},
        {"vllm_xargs": {"editserver_slots": [1]}},
        {"sampling_params": {"extra_args": {"editserver": "payload"}}},
    )
    for method, path in route_table(server):
        concrete = re.sub(r"\{[^}]*\}", "x", path)
        for carrier in carriers:
            answer = http.request(method, concrete, json=body | carrier)
            assert answer.status_code == 400, (method, path, carrier)
            assert answer.json()["error"]["code"] == "unsupported_with_interventions", (method, path)


def test_a_field_spelt_with_escapes_or_in_utf16_is_seen(http: httpx.Client) -> None:
    text = '{"model": "demo", "input": "Hi", "\\u0069nterventions": [1]}'
    for content in (text.encode(), text.replace("\\u0069", "i").encode("utf-16")):
        answer = http.post("/v1/responses", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unsupported_with_interventions"


def test_other_routes_work_without_our_fields(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={"model": MODEL, "prompt": "interventions"}).status_code == 200
    answer = http.post("/v1/responses", json={"model": MODEL, "input": "Hi", "max_output_tokens": 4, "inspect": None})
    assert answer.status_code == 200
    assert http.get("/v1/models").json()["data"][0]["id"] == MODEL
    messages = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "editserver inspect"}]}
    assert http.post("/v1/messages", json=messages).status_code == 200
