"""Endpoints of the contract that this version does not have: not found, in OpenAI's envelope."""

from __future__ import annotations

from typing import NoReturn

from fastapi import APIRouter, HTTPException, Request

router = APIRouter()

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
_PATHS = (
    "/v1/library/{rest:path}",
    "/v1/saes/{rest:path}",
    "/v1/jobs/{rest:path}",
    "/v1/concepts/{rest:path}",
    "/v1/rulesets/{rest:path}",
)


async def missing(request: Request) -> NoReturn:
    """Say that there is no such endpoint here."""
    path = request.url.path[:200]
    raise HTTPException(
        404, f"this version has no endpoint {request.method} {path}; /v1/capabilities lists what it has"
    )


for _path in _PATHS:
    router.add_api_route(_path, missing, methods=_METHODS, include_in_schema=False, response_model=None)
