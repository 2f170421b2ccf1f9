"""Everything that this client raises about the server or the connection to it.

    EditserverError
    ├── APIConnectionError            no answer: refused, reset, unreachable
    │   └── APITimeoutError           no answer within the client's timeout
    ├── APIStatusError                the server answered with an error: .status .code .param .message .body
    │   ├── BadRequest                400, 413, 422 and other 4xx; .code says which (see ErrorCode)
    │   │   └── RuleError             a rule set or a `when`; .line and .column where it is a text
    │   ├── Unauthorized              401
    │   ├── Forbidden                 403
    │   ├── NotFound                  404
    │   ├── RateLimited               429, after the retries; .retry_after in seconds
    │   └── ServerError               5xx
    │       └── InterventionFailed    the engine could not apply what it had accepted
    ├── StreamError                   the stream broke off, or carried an error of unknown kind
    ├── JobFailed                     a job failed or was cancelled: .state .code .param .message
    └── UnexpectedResponse            a success whose body is not what the contract promises

A stable error *inside* a stream raises the same class as it would outside one (`InterventionFailed`, `BadRequest` with
code `dose_exceeded`, …). Arguments that can be seen to be wrong before anything is sent raise
`pydantic.ValidationError`, which is a `ValueError`, or `TypeError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

ErrorCode = Literal[
    "invalid_intervention",
    "invalid_inspection",
    "invalid_artifact",
    "unknown_sae",
    "unknown_feature",
    "unknown_vector",
    "unknown_concept",
    "unknown_map",
    "unknown_ruleset",
    "unknown_job",
    "layer_not_armed",
    "wrong_dimension",
    "rule_syntax",
    "rule_layer_order",
    "dose_exceeded",
    "limit_exceeded",
    "unsupported_with_interventions",
    "capacity",
    "forbidden_by_policy",
    "unauthorized",
    "intervention_failed",
]
"""The server's stable error codes. `APIStatusError.code` is a plain `str`: a newer server may know more."""

_STATUS_OF_CODE = {"capacity": 429, "forbidden_by_policy": 403, "unauthorized": 401, "intervention_failed": 500}
_RULE_CODES = ("rule_syntax", "rule_layer_order")
_BAD_REQUEST_CODES = frozenset(ErrorCode.__args__) - _STATUS_OF_CODE.keys()  # type: ignore[attr-defined]


class EditserverError(Exception):
    """Base of everything below."""


class APIConnectionError(EditserverError):
    """The server gave no answer."""


class APITimeoutError(APIConnectionError):
    """The server gave no answer within the client's timeout."""


class APIStatusError(EditserverError):
    """The server answered with an error.

    Attributes:
        status: HTTP status; for an error inside a stream, the status that the same code has outside one.
        code: stable code such as ``"unknown_feature"``, or None when the server sent none.
        param: path of the field at fault, such as ``"interventions[2].features[0].index"``, or None.
        message: the server's sentence.
        body: the decoded answer (whatever it was), for what the fields above do not carry.
    """

    def __init__(
        self, message: str, *, status: int, code: str | None = None, param: str | None = None, body: Any = None
    ) -> None:
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.body = body
        where = f" (at {param})" if param else ""
        super().__init__(f"{status} {code}: {message}{where}" if code else f"{status}: {message}{where}")


class BadRequest(APIStatusError):
    """The request was refused; `code` and `param` say why and where."""


class RuleError(BadRequest):
    """A rule set or a `when` was refused.

    Attributes:
        line, column: where in its text, from 1; None in the JSON form, where `param` is the path.
    """

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None, **fields: Any) -> None:
        self.line = line
        self.column = column
        super().__init__(message, **fields)


class Unauthorized(APIStatusError):
    """The API key is missing or wrong."""


class Forbidden(APIStatusError):
    """The operator's policy does not allow it."""


class NotFound(APIStatusError):
    """No such SAE, feature, artefact or route."""


class RateLimited(APIStatusError):
    """Still no capacity after the client's retries.

    Attributes:
        retry_after: seconds that the server asks to wait, or None when it did not say.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, **fields: Any) -> None:
        self.retry_after = retry_after
        super().__init__(message, **fields)


class ServerError(APIStatusError):
    """The server failed."""


class InterventionFailed(ServerError):
    """The engine could not apply an accepted intervention; no unedited answer was passed off as edited."""


class StreamError(EditserverError):
    """A stream ended early or carried an error without a known code.

    Attributes:
        code, param, message, body: as in `APIStatusError`; code, param and body are None when the connection broke.
    """

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None, body: Any = None) -> None:
        self.message = message
        self.code = code
        self.param = param
        self.body = body
        super().__init__(f"{code}: {message}" if code else message)


class JobFailed(EditserverError):
    """A job ended without a result.

    Attributes:
        state: "failed" or "cancelled".
        code, param, message: as in `APIStatusError`; code and param are None for one that was cancelled.
    """

    def __init__(self, message: str, *, state: str, code: str | None = None, param: str | None = None) -> None:
        self.message = message
        self.state = state
        self.code = code
        self.param = param
        super().__init__(f"job {state}: {message}" + (f" (at {param})" if param else ""))


class UnexpectedResponse(EditserverError):
    """A success whose body does not follow the contract: usually another kind of server at this address."""


def error_from_response(status: int, body: Any, headers: Mapping[str, str]) -> APIStatusError:
    """The exception for an HTTP answer with `status` >= 400, its decoded `body` and its `headers`."""
    message, code, param = _envelope(body)
    message = message or f"the server answered {status} without a message"
    if status == 429:
        wait = parse_retry_after(headers.get("retry-after"))
        return RateLimited(message, status=status, code=code, param=param, body=body, retry_after=wait)
    return _status_error(message, status, code, param, body)


def error_from_stream(body: Mapping[str, Any]) -> APIStatusError | StreamError:
    """The exception for an event ``data: {"error": …}``; the HTTP status was 200, so the code decides the class."""
    message, code, param = _envelope(body)
    message = message or "the server reported an error without a message"
    error = body.get("error")
    numeric = error.get("code") if isinstance(error, Mapping) else None
    if code is not None:
        status = 400 if code in _BAD_REQUEST_CODES else _STATUS_OF_CODE.get(code)
    else:  # vLLM's own errors carry the HTTP status as the code
        status = numeric if isinstance(numeric, int) and 400 <= numeric <= 599 else None
    if status is None:
        return StreamError(message, code=code, param=param, body=body)
    return _status_error(message, status, code, param, body)


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds to wait from a Retry-After header (seconds or an HTTP date), never negative; None when unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - (now or datetime.now(UTC))).total_seconds()
    return max(seconds, 0.0) if seconds == seconds else None


def _status_error(message: str, status: int, code: str | None, param: str | None, body: Any) -> APIStatusError:
    cls = _class_for(status, code)
    error = body.get("error") if isinstance(body, Mapping) else None
    line, column = (error.get("line"), error.get("column")) if isinstance(error, Mapping) else (None, None)
    if cls is BadRequest and (code in _RULE_CODES or isinstance(line, int)):
        return RuleError(message, line=line, column=column, status=status, code=code, param=param, body=body)
    return cls(message, status=status, code=code, param=param, body=body)


def _class_for(status: int, code: str | None) -> type[APIStatusError]:
    if code == "intervention_failed":
        return InterventionFailed
    by_status: dict[int, type[APIStatusError]] = {401: Unauthorized, 403: Forbidden, 404: NotFound, 429: RateLimited}
    if status in by_status:
        return by_status[status]
    return ServerError if status >= 500 else BadRequest


def _envelope(body: Any) -> tuple[str | None, str | None, str | None]:
    """(message, code, param) of OpenAI's envelope, or of the looser shapes that proxies and middleware send."""
    if isinstance(body, str):
        return body.strip()[:500] or None, None, None
    if not isinstance(body, Mapping):
        return None, None, None
    error = body.get("error", body.get("detail"))
    if isinstance(error, Mapping):
        message, code, param = error.get("message"), error.get("code"), error.get("param")
        return (
            str(message) if message is not None else None,
            code if isinstance(code, str) else None,
            param if isinstance(param, str) else None,
        )
    return (str(error) if error is not None else None), None, None
