"""Looks at every request body before a route does: our fields go where they work, and nowhere else.

vLLM's request models ignore unknown fields, so ``interventions`` on a route that does not know them would silently run
unedited; and ``vllm_xargs`` (or ``extra_args``) with our key would reach the engine past every check. Both are refused
here, for every route of the app, present and future. Plain traffic is not parsed: a body without our words in it passes, and so
does one with our fields, on a route that carries them out, in which no engine arguments can be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from editserver.api.errors import envelope, error_response
from editserver.engine.wire import KEY
from interventions.errors import InterventionError

FIELDS = ("interventions", "inspect")
"""Our fields in a request body."""

EDITED_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions"})
"""The routes that carry out :data:`FIELDS`."""

RELEASES = "editserver.releases"
"""Key of the ASGI scope: callables to run when the response has ended, however it ended."""

_EXTRA_ARGS = ("vllm_xargs", "extra_args")
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# A key may be spelt with \u escapes, and JSON may be UTF-16 or UTF-32 (then ASCII letters stand beside NUL bytes).
_DISGUISES = (b"\\u", b"\0")
_WORDS = (*(name.encode() for name in FIELDS), KEY.encode(), *_DISGUISES)
_ENGINE_WORDS = (*(name.encode() for name in _EXTRA_ARGS), *_DISGUISES)
_MANY_BRACKETS = 500
"""As few can be no deeper than a parser goes."""


def is_present(value: Any) -> bool:
    """``null`` and ``[]`` mean absent."""
    return value is not None and value != []


class BodyGuard:
    """Pure ASGI middleware.

    Args:
        app: the application.
        max_bytes: returns the largest body that is accepted (known once the server's state is).
        edits: returns whether this server carries out edits.
    """

    def __init__(self, app: ASGIApp, max_bytes: Callable[[], int], edits: Callable[[], bool]) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.edits = edits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _BODY_METHODS:
            await self.app(scope, receive, send)
            return
        limit = self.max_bytes()
        body = await _read(scope, receive, limit)
        if body is None:
            await _too_large(limit)(scope, receive, send)
            return
        try:
            self.check(scope, body)
        except InterventionError as error:
            await error_response(error)(scope, receive, send)
            return
        releases: list[Callable[[], None]] = []
        scope[RELEASES] = releases
        try:
            await self.app(scope, _replay(body, receive), send)
        finally:
            for release in releases:
                release()

    def check(self, scope: Scope, body: bytes) -> None:
        """Raise :class:`InterventionError` if the body carries our fields or our key where they do not belong."""
        if not any(word in body for word in _WORDS):
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        edited = self.edits() and scope["method"] == "POST" and path in EDITED_ROUTES
        content_type = dict(scope["headers"]).get(b"content-type", b"").lower()
        for kind, pattern in ((b"multipart/", 'name="{}"'), (b"application/x-www-form-urlencoded", "{}=")):
            if content_type.startswith(kind):
                for name in FIELDS:
                    if pattern.format(name).encode() in body:
                        raise _unsupported(path, name, self.edits())
                return
        shallow = body.count(b"[") + body.count(b"{") < _MANY_BRACKETS
        if edited and shallow and not any(word in body for word in _ENGINE_WORDS):
            return  # our fields may be there, and nothing else can be
        try:
            parsed = json.loads(body)
        except RecursionError:
            message = "the body is nested too deeply"
            raise InterventionError("invalid_intervention", message, None) from None
        except ValueError:
            return  # not JSON: the route says so
        for item in parsed if isinstance(parsed, list) else [parsed]:
            if not isinstance(item, dict):
                continue
            for name in FIELDS:
                if not edited and is_present(item.get(name)):
                    raise _unsupported(path, name, self.edits())
        for place, key in _extra_keys(parsed):
            message = f"{place}: the key {key!r} is reserved; ask for edits in the field interventions"
            raise InterventionError("unsupported_with_interventions", message, place)


def _unsupported(path: str, name: str, edits: bool) -> InterventionError:
    where = " and ".join(sorted(EDITED_ROUTES))
    message = f"{name} is not supported on {path}; it works on {where}"
    if not edits:
        message = f"{name}: this server was not started for editing; start it with `editserver serve`"
    return InterventionError("unsupported_with_interventions", message, name)


def _extra_keys(parsed: Any) -> Iterator[tuple[str, str]]:
    """(path, key) of every key of ours inside a dictionary of engine arguments, at any depth; not recursive."""
    todo: list[tuple[str, Any]] = [("", parsed)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, list):
            todo.extend((f"{place}[{i}]", item) for i, item in enumerate(value) if isinstance(item, (dict, list)))
        elif isinstance(value, dict):
            for key, item in value.items():
                inner = f"{place}.{key[:64]}" if place else key[:64]
                if key in _EXTRA_ARGS and isinstance(item, dict):
                    for found in item:
                        if found.startswith(KEY):
                            yield f"{inner}.{found[:64]}", found[:64]
                if isinstance(item, (dict, list)):
                    todo.append((inner, item))


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None if it is larger than ``limit``."""
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)  # disconnected: the application will see it too
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the connection brings (its disconnect)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large(limit: int) -> JSONResponse:
    error = InterventionError(
        "limit_exceeded", f"the request body is larger than {limit} bytes", None, HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    )
    return error_response(error)


class UnauthorizedEnvelope:
    """Gives the answer of vLLM's API-key check (``{"error": "Unauthorized"}``) the form of every other error."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = False

        async def forward(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.UNAUTHORIZED:
                refused = True
                error = InterventionError("unauthorized", "the API key is missing or wrong (Authorization: Bearer …)")
                body = json.dumps(envelope(error)).encode()
                headers = [
                    (k, v) for k, v in message["headers"] if k.lower() not in (b"content-length", b"content-type")
                ]
                headers += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
                await send({**message, "headers": headers})
                await send({"type": "http.response.body", "body": body, "more_body": False})
            elif not refused:
                await send(message)

        await self.app(scope, receive, forward)
