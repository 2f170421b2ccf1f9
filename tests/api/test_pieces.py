"""The pieces that decide, without a server: guard, capacity, the engine's word."""

from __future__ import annotations

from typing import Any, get_args

import httpx
import pytest
from starlette.responses import JSONResponse

from editserver.api.capacity import Capacity
from editserver.api.edit import Choice, Edit
from editserver.api.errors import envelope, error_response
from editserver.api.guard import BodyGuard, UnauthorizedEnvelope
from editserver.api.plugin import HandshakeError, check_handshake
from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.journal import Journal
from editserver.engine.wire import StepRecord
from interventions.compile import Compiled
from interventions.errors import Code, InterventionError
from interventions.program import Payload

# guard ---------------------------------------------------------------------------------------------------------------


async def send(
    body: bytes, path: str = "/other", edits: bool = True, limit: int = 1000, **headers: str
) -> httpx.Response:
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        seen.append(message["body"])
        await JSONResponse({"got": len(message["body"])})(scope, receive, send)

    guard = BodyGuard(app, lambda: limit, lambda: edits)
    transport = httpx.ASGITransport(app=guard)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        answer = await client.post(path, content=body, headers=headers)
    assert not seen or seen == [body]
    return answer


async def test_plain_bodies_pass_unchanged() -> None:
    for body in (b"", b"{}", b'{"messages": [{"content": "interventions and inspect"}]}', b"\x00\xff", b"[1, 2]"):
        assert (await send(body)).status_code == 200


async def test_our_fields_pass_on_the_edited_routes_only_when_the_server_edits() -> None:
    body = b'{"interventions": [1]}'
    assert (await send(body, "/v1/completions")).status_code == 200
    for answer in (
        await send(body),
        await send(body, "/v1/completions/"),
        await send(body, "/v1/completions", edits=False),
    ):
        assert answer.json()["error"]["code"] == "unsupported_with_interventions"


async def test_absent_values_of_our_fields_pass_everywhere() -> None:
    assert (await send(b'{"interventions": [], "inspect": null}')).status_code == 200


@pytest.mark.parametrize("path", ["/other", "/v1/completions"])
@pytest.mark.parametrize("beside", ["", '"interventions": [1], '])
@pytest.mark.parametrize("place", ["vllm_xargs", "extra_args", "vllm\\u005fxargs", "\\u0065xtra_args"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-le"])
async def test_our_key_among_the_engines_arguments_is_refused_everywhere(
    path: str, beside: str, place: str, encoding: str
) -> None:
    beside = "" if path == "/other" else beside
    for key in ("editserver", "editserver_slots", "\\u0065ditserver"):
        text = f'{{{beside}"a": [{{"{place}": {{"{key}": "x"}}}}]}}'
        answer = await send(text.encode(encoding), path)
        assert answer.status_code == 400, text
        assert answer.json()["error"]["message"].endswith("ask for edits in the field interventions"), text


async def test_what_is_nested_too_deeply_is_refused_on_the_edited_routes_too() -> None:
    body = b'{"interventions": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    answer = await send(body, "/v1/completions", limit=len(body))
    assert answer.json()["error"]["message"] == "the body is nested too deeply"


async def test_form_fields_and_lists_of_bodies_are_seen() -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert (await send(b"interventions=1", **form)).status_code == 400
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="inspect"\r\n\r\n1\r\n--x--'
    assert (await send(part, **multipart)).status_code == 400
    assert (await send(b'[{"a": 1}, {"inspect": {}}]')).status_code == 400


async def test_a_body_over_the_limit_is_refused_with_and_without_a_length() -> None:
    assert (await send(b"x" * 1001)).status_code == 413
    assert (await send(b"x" * 1000)).status_code == 200

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the route")

    messages = [{"type": "http.request", "body": b"x" * 600, "more_body": True}] * 2
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop()

    async def collect(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await BodyGuard(app, lambda: 1000, lambda: True)(scope, receive, collect)
    assert sent[0]["status"] == 413


async def test_vllms_unauthorized_gets_the_envelope_and_other_answers_stay() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        status = 401 if scope["path"] == "/no" else 200
        await JSONResponse({"error": "Unauthorized"}, status)(scope, receive, send)

    transport = httpx.ASGITransport(app=UnauthorizedEnvelope(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/no")).json()["error"]["code"] == "unauthorized"
        assert (await client.get("/yes")).json() == {"error": "Unauthorized"}


# errors --------------------------------------------------------------------------------------------------------------

CLASSES = {
    "unauthorized": (401, "authentication_error"),
    "forbidden_by_policy": (403, "permission_error"),
    "capacity": (429, "rate_limit_error"),
    "intervention_failed": (500, "server_error"),
}
"""Codes that are not a 400 of a request that is wrong."""


@pytest.mark.parametrize("code", get_args(Code))
def test_every_code_has_its_status_type_and_headers(code: Code) -> None:
    error = InterventionError(code, "what was wrong", "interventions[0].layer")
    status, kind = CLASSES.get(code, (400, "invalid_request_error"))
    told = {"message": "what was wrong", "type": kind, "param": "interventions[0].layer", "code": code}
    assert envelope(error) == {"error": told}
    response = error_response(error)
    assert response.status_code == status
    assert ("retry-after" in response.headers) == (status == 429)


def test_prompts_that_are_no_tokens_are_refused_by_their_field() -> None:
    edit = Edit(None, Compiled(None, ()), False)  # type: ignore[arg-type]
    with pytest.raises(InterventionError) as caught:
        edit.set_prompts([[1, 2], None])
    assert (caught.value.code, caught.value.param) == ("unsupported_with_interventions", "prompt_embeds")


# capacity ------------------------------------------------------------------------------------------------------------


def test_capacity_counts_distinct_rows_and_gives_them_back_once() -> None:
    capacity = Capacity(2)
    first = capacity.reserve(["a", "b"])
    second = capacity.reserve(["b"])
    assert capacity.in_use == 2
    second()
    second()
    assert capacity.in_use == 2
    first()
    assert capacity.in_use == 0


def test_capacity_refuses_what_never_fits_and_what_would_wait_too_long() -> None:
    capacity = Capacity(2)
    with pytest.raises(InterventionError) as caught:
        capacity.reserve(["a", "b", "c"])
    assert (caught.value.code, caught.value.status) == ("limit_exceeded", 400)
    held = [capacity.reserve([str(i), str(i + 1)]) for i in range(0, 8, 2)]
    capacity.reserve(["0", "7"])()
    with pytest.raises(InterventionError) as caught:
        capacity.reserve(["new"])
    assert (caught.value.code, caught.value.status) == ("capacity", 429)
    held[0]()
    capacity.reserve(["new"])


# the engine's word ---------------------------------------------------------------------------------------------------


def choice(journal: Journal | None, n_prompt: int = 5, n_output: int = 3, cached: int | None = 0) -> Choice:
    made = Choice(0, list(range(n_prompt)), Compiled(None, ()))
    made.output = list(range(n_output))
    made.journal, made.cached = journal, cached
    return made


def journal(*spans: tuple[int, int]) -> Journal:
    made = Journal(Payload(None, (), None))
    for start, stop in spans:
        made.add(StepRecord(start, stop - start, b"", b"", b""))
    return made


def test_an_output_that_the_engine_vouches_for_passes() -> None:
    choice(journal((0, 5), (5, 7))).check()
    choice(journal((4, 7)), cached=4).check()
    choice(journal((4, 7)), cached=None).check()


@pytest.mark.parametrize(
    ("record", "cached"),
    [
        (None, 0),
        (journal(), 0),
        (journal((0, 5)), 0),
        (journal((0, 4), (5, 7)), 0),
        (journal((1, 7)), 0),
        (journal((4, 7)), 2),
        (journal((5, 7)), None),
    ],
)
def test_an_output_without_a_complete_record_fails_the_request(record: Journal | None, cached: int | None) -> None:
    with pytest.raises(InterventionError) as caught:
        choice(record, cached=cached).check()
    assert (caught.value.code, caught.value.status) == ("intervention_failed", 500)


def test_a_handshake_that_proves_too_little_stops_the_start() -> None:
    config = EngineConfig(armed=(10, 15), saes=(SAESource("a", {"path": "/a"}, "d" * 64, 15),))
    good = {"version": config.version, "ok": True, "armed": [10, 15], "saes": ["d" * 64], "error": None}
    check_handshake(config, [good, good])
    bad: list[list[Any]] = [[], [None], [good, good | {"ok": False}], [good | {"version": "0"}]]
    bad += [[good | {"armed": [10]}], [good | {"saes": []}], [good | {"error": "silent layer"}]]
    for answers in bad:
        with pytest.raises(HandshakeError):
            check_handshake(config, answers)
