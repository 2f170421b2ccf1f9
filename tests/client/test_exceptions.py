from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, get_args

import pytest

import editserver_client
from editserver_client import (
    APIStatusError,
    BadRequest,
    EditserverError,
    ErrorCode,
    Forbidden,
    InterventionFailed,
    NotFound,
    RateLimited,
    RuleError,
    ServerError,
    StreamError,
    Unauthorized,
    exceptions,
)
from editserver_client.exceptions import error_from_response, error_from_stream, parse_retry_after

CLASSES = {
    "capacity": (429, RateLimited),
    "forbidden_by_policy": (403, Forbidden),
    "unauthorized": (401, Unauthorized),
    "intervention_failed": (500, InterventionFailed),
    "rule_syntax": (400, RuleError),
    "rule_layer_order": (400, RuleError),
}


def envelope(code: Any, message: str = "what was wrong", param: str | None = "interventions[0].layer") -> Any:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


@pytest.mark.parametrize("code", get_args(ErrorCode))
def test_every_stable_code_has_the_same_class_outside_and_inside_a_stream(code: str) -> None:
    status, expected = CLASSES.get(code, (400, BadRequest))
    outside = error_from_response(status, envelope(code), {})
    inside = error_from_stream(envelope(code))
    assert type(outside) is type(inside) is expected
    assert isinstance(inside, APIStatusError)
    for error in (outside, inside):
        assert (error.status, error.code, error.param) == (status, code, "interventions[0].layer")
        assert error.message == "what was wrong"
        assert error.body == envelope(code)
        assert code in str(error)
        assert "interventions[0].layer" in str(error)


def test_an_error_in_a_rule_text_says_where() -> None:
    body = envelope("unknown_concept", "text, line 2, column 7: no concept toxcity", "text")
    body["error"] |= {"line": 2, "column": 7}
    for error in (error_from_response(400, body, {}), error_from_stream(body)):
        assert isinstance(error, RuleError)
        assert (error.line, error.column, error.code, error.param) == (2, 7, "unknown_concept", "text")
    in_json = error_from_response(400, envelope("rule_syntax", param="rules[0].if"), {})
    assert isinstance(in_json, RuleError)
    assert (in_json.line, in_json.column) == (None, None)


@pytest.mark.parametrize(
    "status, expected",
    [
        (400, BadRequest),
        (413, BadRequest),
        (422, BadRequest),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (429, RateLimited),
        (500, ServerError),
        (503, ServerError),
    ],
)
def test_the_status_decides_the_class_of_errors_without_a_known_code(status: int, expected: type[Exception]) -> None:
    assert type(error_from_response(status, envelope(status), {})) is expected


@pytest.mark.parametrize(
    "body, message",
    [
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"detail": "Not Found"}, "Not Found"),
        ("<html>502 Bad Gateway</html>", "<html>502 Bad Gateway</html>"),
        ("", "the server answered 502 without a message"),
        (None, "the server answered 502 without a message"),
        ([1], "the server answered 502 without a message"),
    ],
)
def test_answers_of_proxies_and_middleware_still_give_a_message(body: Any, message: str) -> None:
    error = error_from_response(502, body, {})
    assert (error.message, error.code, error.param) == (message, None, None)


def test_vllms_own_stream_errors_take_their_status_from_the_numeric_code() -> None:
    error = error_from_stream(envelope(400, "too long"))
    assert type(error) is BadRequest
    assert (error.status, error.code) == (400, None)


@pytest.mark.parametrize("code", [None, "code_of_next_year", 7])
def test_a_stream_error_of_unknown_kind_is_a_stream_error(code: Any) -> None:
    error = error_from_stream(envelope(code))
    assert type(error) is StreamError
    assert error.message == "what was wrong"
    assert error.code == (code if isinstance(code, str) else None)


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("3", 3.0),
        ("0.25", 0.25),
        ("-5", 0.0),
        ("Wed, 21 Oct 2026 07:28:07 GMT", 7.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
        ("Wed, 21 Oct 2026 09:28:07 +0200", 7.0),
        ("soon", None),
        ("nan", None),
        (None, None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, now=datetime(2026, 10, 21, 7, 28, 0, tzinfo=UTC)) == seconds


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    drawn = [line.strip() for line in (exceptions.__doc__ or "").splitlines() if "──" in line]
    names = [line.split("── ")[1].split()[0] for line in drawn]
    public = {
        name
        for name in editserver_client.__all__
        if isinstance(getattr(editserver_client, name), type)
        and issubclass(getattr(editserver_client, name), EditserverError)
    }
    assert public == {"EditserverError", *names}
    depth_to_name = {-1: EditserverError}
    for line in (exceptions.__doc__ or "").splitlines():
        if "── " not in line:
            continue
        depth = (line.index("──") - 5) // 4
        cls = getattr(editserver_client, line.split("── ")[1].split()[0])
        assert cls.__base__ is depth_to_name[depth - 1], line
        depth_to_name[depth] = cls
