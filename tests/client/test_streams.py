from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editserver_client import (
    ActionEvent,
    APITimeoutError,
    AsyncClient,
    BadRequest,
    ChatResponse,
    Client,
    FinishEvent,
    Inspect,
    InspectionEvent,
    InterventionFailed,
    RateLimited,
    ReasoningDelta,
    ReceiptEvent,
    RuleEvent,
    Rules,
    Steer,
    StreamError,
    TextDelta,
    ToolCallDelta,
    UnexpectedResponse,
    UsageEvent,
)
from editserver_client.sse import SSEDecoder
from editserver_client.transcript import Transcript

CHAT = "/v1/chat/completions"
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def delta(choice: int = 0, finish: str | None = None, logprobs: Any = None, **fields: Any) -> dict[str, Any]:
    entry = {"index": choice, "delta": fields, "logprobs": logprobs, "finish_reason": finish}
    return {**HEAD, "choices": [entry]}


def ours(choice: int | None = None, **fields: Any) -> dict[str, Any]:
    return {**HEAD, "choices": [], **fields, **({} if choice is None else {"choice": choice})}


def reading(position: int, phase: str = "generated") -> dict[str, Any]:
    features = [{"index": 88, "activation": position / 2, "label": None}]
    return {"position": position, "token": f"t{position}", "token_id": position, "phase": phase, "features": features}


def inspection(*positions: int, sae: str = "a/b", phase: str = "generated") -> dict[str, Any]:
    return {"sae": sae, "tokens": [reading(position, phase) for position in positions]}


def receipt(fired: int = 2) -> dict[str, Any]:
    return {"digest": "d", "receipt": [{"id": "0", "type": "steer", "layer": 15, "tokens_edited": 4, "fired": fired}]}


WHOLE = [
    ours(0, inspection=inspection(1, 2, phase="prompt")),
    delta(role="assistant", content=""),
    delta(content="Bon"),
    ours(0, inspection=inspection(3)),
    delta(content="jour. 東"),
    delta(finish="stop", content=""),
    ours(0, interventions=receipt()),
    {**HEAD, "choices": [], "usage": USAGE},
]


def test_a_stream_gives_typed_events_in_order_and_the_whole_answer(server: Any, driver: Any, sse_reply: Any) -> None:
    server.on("POST", CHAT, sse_reply(*WHOLE))
    got = driver.stream(
        server.url,
        lambda c: c.chat_stream("Hi", interventions=[Steer(vector="v")], inspect=Inspect("a/b", top_k=1), seed=1),
    )
    assert server.seen[0].json == {
        "messages": [{"role": "user", "content": "Hi"}],
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "interventions": [{"type": "steer", "vector": "v"}],
        "inspect": {"sae": "a/b", "top_k": 1},
    }
    assert server.seen[0].headers["accept"] == "text/event-stream"
    assert got.error is None
    assert [type(event) for event in got.events] == [
        InspectionEvent,
        TextDelta,
        InspectionEvent,
        TextDelta,
        FinishEvent,
        ReceiptEvent,
        UsageEvent,
    ]
    assert [token.position for token in got.events[0].tokens] == [1, 2]
    assert (got.events[0].choice, got.events[0].sae, got.events[4].reason) == (0, "a/b", "stop")
    assert got.events[5].receipt.entry("0").fired == 2
    assert "".join(event.text for event in got.events if isinstance(event, TextDelta)) == got.stream.text
    assert got.stream.text == "Bonjour. 東"
    assert [token.position for token in got.stream.inspection.tokens] == [1, 2, 3]
    assert got.stream.usage.total_tokens == 5
    assert got.stream.finish_reason == "stop"

    message = {"role": "assistant", "content": "Bonjour. 東", "tool_calls": None, "reasoning": None}
    tokens = [reading(1, "prompt"), reading(2, "prompt"), reading(3)]
    assert got.final == ChatResponse.model_validate(
        {
            **HEAD,
            "object": "chat.completion",
            "choices": [
                {"index": 0, "message": message, "finish_reason": "stop", "stop_reason": None, "logprobs": None}
            ],
            "usage": USAGE,
            "interventions": receipt(),
            "inspection": {"sae": "a/b", "tokens": tokens},
        }
    )


def test_choices_of_n_are_kept_apart(server: Any, driver: Any, sse_reply: Any) -> None:
    events = [ours(i, inspection=inspection(1, phase="prompt")) for i in (2, 0, 1)]
    events += [delta(i, content=f"{i}a") for i in (1, 0, 2)]
    events += [ours(1, inspection=inspection(2)), ours(0, inspection=inspection(2))]
    events += [delta(i, content=f" {i}b", finish="length") for i in (0, 1, 2)]
    events += [ours(i, interventions=receipt(fired=i)) for i in (0, 1, 2)]
    server.on("POST", CHAT, sse_reply(*events))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi", n=3))
    assert got.error is None
    assert [choice.text for choice in got.stream.choices] == ["0a 0b", "1a 1b", "2a 2b"]
    assert got.final.interventions is None
    assert got.final.inspection is None
    assert [choice.interventions.entry("0").fired for choice in got.final.choices] == [0, 1, 2]
    assert [[token.position for token in c.inspection.tokens] for c in got.final.choices] == [[1, 2], [1, 2], [1]]
    assert [choice.finish_reason for choice in got.final.choices] == ["length"] * 3
    assert got.final.receipt.entry("0").fired == 0
    assert [event.choice for event in got.events if isinstance(event, ReceiptEvent)] == [0, 1, 2]


def call_piece(index: int, arguments: str | None = None, **fields: Any) -> dict[str, Any]:
    name = fields.pop("name", None)
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"index": index, "function": function, **fields}


def test_tool_calls_are_put_together_from_their_pieces(server: Any, driver: Any, sse_reply: Any) -> None:
    events = [
        delta(role="assistant", content="", reasoning="I need "),
        delta(reasoning_content="the weather."),
        delta(tool_calls=[call_piece(0, "", id="c0", type="function", name="weather")]),
        delta(tool_calls=[call_piece(0, '{"city": ')]),
        delta(tool_calls=[call_piece(1, "{", id="c1", name="time"), call_piece(0, '"Paris"}')]),
        delta(tool_calls=[call_piece(1, "}")], finish="tool_calls"),
    ]
    server.on("POST", CHAT, sse_reply(*events))
    got = driver.stream(server.url, lambda c: c.chat_stream("Weather?", tools=[{"type": "function"}]))
    calls = got.final.tool_calls
    assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
        ("c0", "weather", '{"city": "Paris"}'),
        ("c1", "time", "{}"),
    ]
    assert got.final.choices[0].message.content is None
    assert got.final.choices[0].message.reasoning == "I need the weather."
    assert [event.text for event in got.events if isinstance(event, ReasoningDelta)] == ["I need ", "the weather."]
    pieces = [event for event in got.events if isinstance(event, ToolCallDelta)]
    assert "".join(piece.arguments for piece in pieces if piece.index == 0) == '{"city": "Paris"}'
    assert (pieces[0].id, pieces[0].name) == ("c0", "weather")
    assert got.final.finish_reason == "tool_calls"


def test_firings_come_as_they_happen_and_a_refused_answer_calls_no_tool(
    server: Any, driver: Any, sse_reply: Any
) -> None:
    firing = {"id": "g", "rule": "r1", "conclusion": "danger", "position": 4}
    acts = {"id": "g", "action": "refuse", "conclusion": "danger", "position": 4}
    entry = {"id": "g", "type": "rules", "fired": [{"rule": "r1", "conclusion": "danger", "position": 4}]}
    events = [
        delta(role="assistant", content=""),
        delta(content="Sure"),
        delta(tool_calls=[call_piece(0, '{"city', id="c0", type="function", name="weather")]),
        ours(0, interventions={"events": [firing, acts]}),
        delta(content=" Sorry.", finish="content_filter"),
        ours(0, interventions={"digest": "d", "receipt": [entry]}),
    ]
    server.on("POST", CHAT, sse_reply(*events))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi", interventions=[Rules("safety", id="g")]))
    told = [event for event in got.events if isinstance(event, (RuleEvent, ActionEvent))]
    assert told == [RuleEvent(0, "g", "r1", "danger", 4), ActionEvent(0, "g", "refuse", "danger", 4)]
    assert got.stream.choices[0].rule_events == told
    assert (got.final.text, got.final.finish_reason, got.final.tool_calls) == ("Sure Sorry.", "content_filter", [])
    assert got.final.receipt.entry("g").conclusions == {"danger": 4}


def test_readings_of_several_saes_stay_in_the_order_of_the_request(server: Any, driver: Any, sse_reply: Any) -> None:
    pair = [inspection(1, sae="x"), inspection(sae="y")]
    later = [inspection(2, sae="x"), inspection(2, 3, sae="y")]
    server.on("POST", CHAT, sse_reply(ours(inspection=pair), delta(content="a"), ours(inspection=later)))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi", inspect=[Inspect("x"), Inspect("y")]))
    assert [(one.sae, [t.position for t in one.tokens]) for one in got.final.readings] == [("x", [1, 2]), ("y", [2, 3])]
    assert [event.sae for event in got.events if isinstance(event, InspectionEvent)] == ["x", "y", "x", "y"]


def test_a_list_of_one_stays_a_list(server: Any, driver: Any, sse_reply: Any) -> None:
    server.on("POST", CHAT, sse_reply(ours(inspection=[inspection(1)]), delta(content="a")))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi", inspect=[Inspect("a/b")]))
    assert isinstance(got.final.readings, list)


def test_readings_in_another_saes_place_are_never_mixed(server: Any, driver: Any, sse_reply: Any) -> None:
    events = [ours(inspection=[inspection(1, sae="x")]), ours(inspection=[inspection(2, sae="y")])]
    server.on("POST", CHAT, sse_reply(*events))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert isinstance(got.error, UnexpectedResponse)
    assert "'y'" in str(got.error)


def test_logprobs_of_all_chunks_are_joined(server: Any, driver: Any, sse_reply: Any) -> None:
    tokens = [{"token": token, "logprob": -0.5, "top_logprobs": []} for token in ("\ufffd", "東")]
    events = [
        delta(content="", logprobs={"content": [tokens[0]]}),
        delta(content="東", logprobs={"content": [tokens[1]]}, finish="stop"),
    ]
    server.on("POST", CHAT, sse_reply(*events))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi", logprobs=True))
    assert got.final.choices[0].logprobs == {"content": tokens}
    assert [event.logprobs for event in got.events[:2]] == [{"content": [token]} for token in tokens]


def test_completions_stream_in_the_same_way(server: Any, driver: Any, sse_reply: Any) -> None:
    def piece(text: str, token: str, finish: str | None = None) -> dict[str, Any]:
        logprobs = {"tokens": [token], "token_logprobs": [-1.0], "top_logprobs": None, "text_offset": [0]}
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish, "stop_reason": 2}
        return {**HEAD, "object": "text_completion", "choices": [choice]}

    events = [piece(" upon", "_upon"), piece(" a", "_a", "stop"), ours(0, interventions=receipt())]
    server.on("POST", "/v1/completions", sse_reply(*events))
    got = driver.stream(server.url, lambda c: c.complete_stream("Once", stream_options={"include_usage": False}))
    assert server.seen[0].json["stream_options"] == {"include_usage": False}
    assert (got.final.text, got.final.object, got.final.choices[0].stop_reason) == (" upon a", "text_completion", 2)
    assert got.final.choices[0].logprobs["tokens"] == ["_upon", "_a"]
    assert got.final.choices[0].logprobs["top_logprobs"] is None
    assert got.final.receipt.digest == "d"


def test_usage_in_every_chunk_counts_once(server: Any, driver: Any, sse_reply: Any) -> None:
    growing = [
        {**delta(content="a"), "usage": {**USAGE, "completion_tokens": i, "total_tokens": 3 + i}} for i in (1, 2)
    ]
    server.on("POST", CHAT, sse_reply(*growing, {**HEAD, "choices": [], "usage": USAGE}))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert [event.usage.total_tokens for event in got.events if isinstance(event, UsageEvent)] == [5]
    assert got.final.usage.total_tokens == 5


def wire_bytes() -> bytes:
    parts = [b": ping\n\n"]
    for event in WHOLE:
        parts.append(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
        parts.append(b": keep-alive\r\n\r\n")
    pretty = json.dumps(delta(content="!"), indent=1)  # one event over many data lines
    parts.append("".join(f"data: {line}\n" for line in pretty.splitlines()).encode() + b"\n")
    return b"".join([*parts, b"data: [DONE]\n\n"])


def test_bytes_cut_anywhere_over_a_real_connection(server: Any, driver: Any, reply: Any) -> None:
    wire = wire_bytes()
    chunks = [wire[i : i + 7] for i in range(0, len(wire), 7)]
    server.on("POST", CHAT, reply(chunks=chunks, headers={"content-type": "text/event-stream"}))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert got.error is None
    assert got.final.text == "Bonjour. 東!"
    assert [token.position for token in got.final.readings.tokens] == [1, 2, 3]


@given(st.lists(st.integers(0, len(wire_bytes())), max_size=10))
def test_any_cut_gives_the_same_answer(cuts: list[int]) -> None:
    wire, bounds = wire_bytes(), [0, *sorted(cuts), len(wire_bytes())]
    transcript, decoder = Transcript(ChatResponse), SSEDecoder()
    for start, stop in itertools.pairwise(bounds):
        for payload in decoder.feed(wire[start:stop]):
            transcript.feed(payload)
    assert transcript.done
    assert transcript.response().text == "Bonjour. 東!"


def failure(code: Any) -> dict[str, Any]:
    return {"error": {"message": "the worker lost its plugin", "type": "server_error", "param": None, "code": code}}


@pytest.mark.parametrize(
    "code, expected",
    [
        ("intervention_failed", InterventionFailed),
        ("dose_exceeded", BadRequest),
        (400, BadRequest),
        ("a_new_code", StreamError),
        (None, StreamError),
    ],
)
def test_an_error_in_the_middle_raises_and_keeps_what_had_come(
    server: Any, driver: Any, sse_reply: Any, code: Any, expected: type[Exception]
) -> None:
    server.on("POST", CHAT, sse_reply(*WHOLE[:3], failure(code)))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert type(got.error) is expected
    assert "the worker lost its plugin" in str(got.error)
    assert got.stream.text == "Bon"
    assert [token.position for token in got.stream.inspection.tokens] == [1, 2]
    assert got.stream.receipt is None
    assert got.final is None
    assert len(server.seen) == 1


def test_a_stream_that_ends_without_done_is_not_a_whole_answer(server: Any, driver: Any, sse_reply: Any) -> None:
    server.on("POST", CHAT, sse_reply(*WHOLE[:3], done=False))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert type(got.error) is StreamError
    assert "before [DONE]" in str(got.error)
    assert got.stream.text == "Bon"


def test_a_connection_that_breaks_in_the_middle_is_never_repeated(server: Any, driver: Any, sse_reply: Any) -> None:
    server.on("POST", CHAT, sse_reply(*WHOLE[:3], done=False, hang_up=True), sse_reply(*WHOLE))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert type(got.error) is StreamError
    assert "connection broke" in str(got.error)
    assert got.stream.text == "Bon"
    assert len(server.seen) == 1


@pytest.mark.parametrize("data", [b"data: {not json}\n\n", b'data: {"choices": 3}\n\n', b"data: [1]\n\n"])
def test_events_that_are_no_chunks_are_named(server: Any, driver: Any, reply: Any, data: bytes) -> None:
    server.on("POST", CHAT, reply(chunks=[data], headers={"content-type": "text/event-stream"}))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert isinstance(got.error, (StreamError, UnexpectedResponse))


def test_an_answer_that_is_no_stream_is_named(server: Any, driver: Any, reply: Any) -> None:
    server.on("POST", CHAT, reply(json={"hello": 1}, headers={"content-type": "application/json"}))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert isinstance(got.error, UnexpectedResponse)
    assert "application/json" in str(got.error)


def test_a_refusal_comes_when_the_stream_is_entered(server: Any, driver: Any, reply: Any) -> None:
    body = {"error": {"message": "no", "type": "x", "param": "interventions[0].vector", "code": "unknown_vector"}}
    server.on("POST", CHAT, reply(400, json=body))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"))
    assert type(got.error) is BadRequest
    assert (got.error.code, got.error.param) == ("unknown_vector", "interventions[0].vector")
    assert got.events == []


def test_opening_a_stream_is_tried_again_after_429(server: Any, driver: Any, reply: Any, sse_reply: Any) -> None:
    full = reply(429, json=failure("capacity"), headers={"retry-after": "0.1"})
    server.on("POST", CHAT, full, sse_reply(*WHOLE), full, full)
    assert driver.stream(server.url, lambda c: c.chat_stream("Hi"), retries=1).final.text == "Bonjour. 東"
    assert server.seen[1].at - server.seen[0].at >= 0.1
    assert type(driver.stream(server.url, lambda c: c.chat_stream("Hi"), retries=1).error) is RateLimited


def test_a_stream_that_falls_silent_is_a_timeout(server: Any, driver: Any, reply: Any) -> None:
    server.on("POST", CHAT, reply(chunks=[b": ping\n\n"] * 3, headers={"content-type": "text/event-stream"}, delay=0.5))
    got = driver.stream(server.url, lambda c: c.chat_stream("Hi"), timeout=0.2, retries=0)
    assert isinstance(got.error, APITimeoutError)


def test_nothing_is_sent_before_the_stream_is_used_and_for_alone_is_enough(server: Any, sse_reply: Any) -> None:
    server.on("POST", CHAT, sse_reply(*WHOLE), sse_reply(*WHOLE))
    with Client(server.url) as client:
        stream = client.chat_stream("Hi")
        assert server.seen == []
        assert (stream.text, stream.receipt, stream.inspection, stream.choices) == ("", None, None, [])
        assert "".join(event.text for event in stream if isinstance(event, TextDelta)) == "Bonjour. 東"
        assert list(stream) == []
        assert client.chat_stream("Hi").final().receipt.digest == "d"


def test_leaving_early_hangs_up_and_has_no_whole_answer(server: Any, sse_reply: Any) -> None:
    server.on("POST", CHAT, sse_reply(*WHOLE[:3], *[delta(content="more ")] * 3000))
    with Client(server.url) as client:
        with client.chat_stream("Hi") as stream:
            next(iter(stream))
        assert server.client_left.wait(2)
        assert list(stream) == []
        with pytest.raises(StreamError, match="closed"):
            stream.final()


def test_leaving_early_hangs_up_asynchronously_too(server: Any, sse_reply: Any) -> None:
    server.on("POST", CHAT, sse_reply(*WHOLE[:3], *[delta(content="more ")] * 3000))

    async def steps() -> None:
        async with AsyncClient(server.url) as client:
            async with client.chat_stream("Hi") as stream:
                async for _ in stream:
                    break
            assert await asyncio.to_thread(server.client_left.wait, 2)
            assert [event async for event in stream] == []
            with pytest.raises(StreamError, match="closed"):
                await stream.final()

    asyncio.run(steps())


def test_many_asynchronous_streams_run_side_by_side(server: Any, sse_reply: Any) -> None:
    server.on("POST", CHAT, *(sse_reply(*WHOLE) for _ in range(8)))

    async def steps() -> list[str]:
        async with AsyncClient(server.url) as client:
            answers = await asyncio.gather(*(client.chat_stream("Hi").final() for _ in range(8)))
            return [answer.text for answer in answers]

    assert asyncio.run(steps()) == ["Bonjour. 東"] * 8
