"""OpenAI's error envelope for what this server refuses."""

from __future__ import annotations

from dataclasses import replace
from http import HTTPStatus
from typing import Any, cast

from fastapi import Request
from starlette.responses import JSONResponse

from editserver import metrics
from interventions.errors import Code, InterventionError
from interventions.rules.errors import RuleError
from interventions.wording import printable

RETRY_AFTER_S = 1
"""Seconds that a client is asked to wait when the bank is full of others' rows."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def envelope(error: InterventionError) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``; of a rule's text with ``line`` and ``column`` (from 1)."""
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    param = None if error.param is None else printable(error.param)
    told: dict[str, Any] = {"message": printable(error.message), "type": kind, "param": param, "code": error.code}
    if isinstance(error, RuleError) and error.line is not None:
        told |= {"line": error.line, "column": error.column}
    return {"error": told}


def error_response(error: InterventionError) -> JSONResponse:
    """The HTTP answer, counted in the metrics."""
    metrics.REFUSALS.labels(error.code).inc()
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == HTTPStatus.TOO_MANY_REQUESTS else None
    return JSONResponse(envelope(error), error.status, headers=headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's exception handler for :class:`InterventionError`."""
    assert isinstance(error, InterventionError)
    return error_response(error)


def not_found(error: InterventionError) -> InterventionError:
    """The same error where the missing thing is the resource of the path."""
    return InterventionError(as_code(error.code), error.message, None, HTTPStatus.NOT_FOUND)


def moved(error: InterventionError, message: str, param: str | None) -> InterventionError:
    """The same error where the field at fault stands elsewhere; one in a rule's text keeps line and column."""
    if isinstance(error, RuleError):
        return RuleError(error.detail, replace(error.place, path=param or ""), as_code(error.code))
    return InterventionError(as_code(error.code), message, param, error.status)


def as_code(code: str) -> Code:
    """An error's code, typed again, for a new error with the same code."""
    return cast(Code, code)
