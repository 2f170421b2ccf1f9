"""Rule sets are checked before they are used: by name, by layer, and against what this server has."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from editserver.api.body import read_json
from editserver.api.rulesets import SCHEMA, check_body
from editserver.api.state import editing
from editserver.api.vllm_entry import ErrorResponse

router = APIRouter()


@router.post(
    "/v1/rulesets/check",
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": SCHEMA}}, "required": True}},
    responses={400: {"model": ErrorResponse}},
)
async def check(request: Request) -> dict[str, Any]:
    """The normal form of a rule set, or what is wrong with it: `line` and `column` in a text, `param` in JSON."""
    return check_body(await read_json(request, "rule_syntax"), editing(request))
