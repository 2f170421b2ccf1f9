"""Streams: the same answer in pieces, our chunks where the contract puts them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from .conftest import MODEL, RELU, sse

pytestmark = pytest.mark.engine

STEER = {"type": "steer", "sae": RELU, "feature": 3, "strength": 90}
INSPECT = {"sae": RELU, "top_k": 2, "features": [3]}
Chat = Callable[..., httpx.Response]


def kind(event: Any) -> str:
    if event == "[DONE]":
        return "done"
    if event["choices"]:
        return "delta"
    return next(name for name in ("inspection", "interventions", "usage") if name in event)


def test_streamed_text_receipt_and_readings_equal_the_whole_answer(chat: Chat) -> None:
    fields = {"interventions": [STEER], "inspect": INSPECT}
    whole = chat(**fields).json()
    events = sse(chat(stream=True, **fields))
    deltas = [e for e in events if kind(e) == "delta"]
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    (receipt,) = [e["interventions"] for e in events if kind(e) == "interventions"]
    assert receipt == whole["interventions"]
    read = [token for e in events if kind(e) == "inspection" for token in e["inspection"]["tokens"]]
    assert [token["position"] for token in read] == [t["position"] for t in whole["inspection"]["tokens"]]
    assert [t["token_id"] for t in read] == [t["token_id"] for t in whole["inspection"]["tokens"]]


def test_prompt_readings_come_first_then_deltas_then_receipts_then_usage(chat: Chat) -> None:
    sampled = {"n": 2, "temperature": 1, "seed": 3, "stream_options": {"include_usage": True}}
    events = sse(chat(interventions=[STEER], inspect=INSPECT, stream=True, **sampled))
    kinds = [kind(e) for e in events]
    assert kinds[0] == "inspection"
    assert kinds[-4:] == ["interventions", "interventions", "usage", "done"]
    assert set(kinds[:-4]) == {"inspection", "delta"}
    for choice in (0, 1):
        own = [e for e in events[:-2] if (e["choices"][0]["index"] if e["choices"] else e["choice"]) == choice]
        with_text = [e for e in own if e["choices"] and e["choices"][0]["delta"].get("content")]
        first = next(e for e in own if kind(e) == "inspection")
        assert own.index(first) < own.index(with_text[0])
        assert {t["phase"] for t in first["inspection"]["tokens"]} == {"prompt"}
        positions = [t["position"] for e in own if kind(e) == "inspection" for t in e["inspection"]["tokens"]]
        assert positions == list(range(1, 1 + len(positions)))


def test_our_chunks_look_like_the_stream_they_are_in(chat: Chat, http: httpx.Client) -> None:
    events = sse(chat(interventions=[STEER], inspect=[INSPECT], stream=True))[:-1]
    assert len({(e["id"], e["object"], e["model"]) for e in events}) == 1
    assert all(isinstance(e["inspection"], list) for e in events if kind(e) == "inspection")
    body = {"model": MODEL, "prompt": ["A b c", "One two"], "max_tokens": 4, "stream": True, "interventions": [STEER]}
    events = sse(http.post("/v1/completions", json=body))[:-1]
    assert {e["object"] for e in events} == {"text_completion"}
    assert [e["choice"] for e in events if kind(e) == "interventions"] == [0, 1]


def test_a_plain_stream_has_no_chunk_of_ours(chat: Chat) -> None:
    events = sse(chat(stream=True))
    assert {kind(e) for e in events} == {"delta", "done"}


def test_an_invalid_edit_is_refused_before_the_stream_starts(chat: Chat) -> None:
    answer = chat(stream=True, interventions=[STEER | {"feature": 10**6}])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "interventions[0].feature"


def test_a_client_that_hangs_up_frees_its_rows(server: Any, http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 900, "ignore_eos": True}
    with (
        server.client() as other,
        other.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "interventions": [STEER]}) as answer,
    ):
        pieces = answer.iter_bytes()  # held: httpx hangs up as soon as nobody holds the iterator
        next(pieces)
        assert "editserver_bank_rows_in_use 1.0" in http.get("/metrics/").text
    deadline = time.monotonic() + 3  # long before 900 tokens are there
    while "editserver_bank_rows_in_use 0.0" not in http.get("/metrics/").text:
        assert time.monotonic() < deadline, "the rows of a client that hung up are still counted"
        time.sleep(0.05)
