"""Chat and completions with typed edits; they take the place of vLLM's routes and call its functions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from editserver.api.requests import EditChatRequest, EditCompletionRequest
from editserver.api.vllm_entry import (
    ErrorResponse,
    create_chat_completion,
    create_completion,
    validate_json_request,
)

router = APIRouter()

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    **{status: {"model": ErrorResponse} for status in (400, 404, 429, 500)},
}


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)], responses=_RESPONSES)
async def chat_completions(request: EditChatRequest, raw_request: Request) -> Any:
    """OpenAI's chat completions; `interventions` edit the model while it answers, `inspect` reports what an SAE sees."""
    return await create_chat_completion(request=request, raw_request=raw_request)


@router.post("/v1/completions", dependencies=[Depends(validate_json_request)], responses=_RESPONSES)
async def completions(request: EditCompletionRequest, raw_request: Request) -> Any:
    """OpenAI's text completions, with `interventions` and `inspect` as for chat."""
    return await create_completion(request=request, raw_request=raw_request)
