"""What both clients share: settings, requests, errors, and when to try again. No I/O here."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import httpx

from ._version import __version__
from .calls import Call, T
from .exceptions import (
    APIConnectionError,
    APITimeoutError,
    RateLimited,
    UnexpectedResponse,
    error_from_response,
)

DEFAULT_BASE_URL = "http://localhost:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
"""Seconds; generation may take minutes, connecting may not."""

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0
# Nothing of the request has reached the server: repeating it is always safe.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
# The connection closed before an answer, typically a kept-alive one that the server had just dropped.
_HUNG_UP = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class BaseClient:
    """Settings of a client.

    Args:
        base_url: the server's root; a trailing ``/v1``, as OpenAI's SDK wants it, is dropped.
        api_key: sent as a bearer token when given.
        timeout: seconds or `httpx.Timeout`; None waits for ever.
        retries: further attempts after a 429 or a lost connection. A stream that has begun is never repeated.
        max_retry_wait: seconds; a server that asks (Retry-After) for more is not waited for: `RateLimited` is raised.
        headers: sent with every request.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout: float | httpx.Timeout | None,
        retries: int,
        max_retry_wait: float,
        headers: Mapping[str, str] | None,
    ) -> None:
        if retries < 0:
            raise ValueError(f"retries is a count of further attempts, got {retries}")
        self._retries = retries
        self._max_retry_wait = max_retry_wait
        sent = {"User-Agent": f"editserver-client/{__version__}", "Accept": "application/json", **(headers or {})}
        if api_key is not None:
            sent["Authorization"] = f"Bearer {api_key}"
        root = base_url.rstrip("/").removesuffix("/v1")
        self._settings: dict[str, Any] = {
            "base_url": root,
            "headers": sent,
            "timeout": timeout,
            "follow_redirects": True,
        }

    @staticmethod
    def _request(http: httpx.Client | httpx.AsyncClient, call: Call[Any], *, stream: bool = False) -> httpx.Request:
        headers = {"Accept": "text/event-stream"} if stream else None
        return http.build_request(call.method, call.path, json=call.json, params=call.params, headers=headers)

    def _wait_after_error(self, attempt: int, retries: int, error: httpx.RequestError, method: str) -> float:
        """Seconds to wait before attempt `attempt + 1`.

        Generating has no lasting effect and a repeated PUT stores the same content, so both may be repeated even if the
        server had received them; a repeated DELETE could fail on its own success.

        Raises:
            APIConnectionError: this error is not to be repeated, or not any more.
        """
        repeatable = isinstance(error, _NEVER_SENT) or (isinstance(error, _HUNG_UP) and method != "DELETE")
        if not repeatable or attempt >= retries:
            kind = APITimeoutError if isinstance(error, httpx.TimeoutException) else APIConnectionError
            where = self._settings["base_url"]
            tries = f" after {attempt + 1} attempts" if attempt else ""
            raise kind(f"no answer from {where}{tries}: {type(error).__name__} {error}".rstrip()) from error
        return _backoff(attempt)

    def _wait_after_answer(self, attempt: int, retries: int, response: httpx.Response) -> float:
        """Seconds to wait before trying again; `response` is an error and has been read.

        Raises:
            APIStatusError: the answer is final.
        """
        error = error_from_response(response.status_code, _decoded(response), response.headers)
        if not isinstance(error, RateLimited) or attempt >= retries:
            raise error
        wait = error.retry_after if error.retry_after is not None else _backoff(attempt)
        if wait > self._max_retry_wait:
            raise error
        return wait

    @staticmethod
    def _read(call: Call[T], response: httpx.Response) -> T:
        return call.read(_decoded(response, strict=bool(response.content)))

    @staticmethod
    def _check_stream(response: httpx.Response) -> None:
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise UnexpectedResponse(f"expected text/event-stream, the server sent {kind or 'no content type'}")


def _decoded(response: httpx.Response, strict: bool = False) -> Any:
    """The JSON of a read response; text when it is not JSON, unless `strict`."""
    try:
        return json.loads(response.content)
    except ValueError:
        if strict:
            raise UnexpectedResponse(
                f"expected JSON from {response.request.url}, got {response.text[:200]!r}"
            ) from None
        return response.text


def _backoff(attempt: int) -> float:
    """Exponential with jitter, so that many clients do not come back in step."""
    longest: float = min(_FIRST_WAIT_S * 2.0**attempt, _LONGEST_WAIT_S)
    return longest * random.uniform(0.5, 1.0)
