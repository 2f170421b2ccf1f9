"""What the server can do, its SAEs, their features, and what an SAE sees in a text."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.responses import JSONResponse

from editserver import __version__
from editserver.api.body import read_json, validate
from editserver.api.errors import as_code, not_found
from editserver.api.passes import (
    MAX_CALIBRATION_PROMPTS,
    MAX_CONTRAST_TEXTS,
    MAX_FIT_CLASSES,
    MAX_FIT_TEXTS,
    MAX_FIT_TOKENS,
)
from editserver.api.requests import EditChatRequest, EditCompletionRequest
from editserver.api.state import EditState, editing
from editserver.api.vllm_entry import ErrorResponse
from editserver.catalogue import ServedSAE
from interventions.errors import InterventionError
from interventions.spec import BUILT, schemas
from interventions.wording import show

router = APIRouter()

DEFAULT_LIMIT = 50
MAX_LIMIT = 1000
MAX_INPUTS = 64
DEFAULT_TOP_K = 8


@router.get("/v1/capabilities")
async def capabilities(request: Request) -> dict[str, Any]:
    """What this server can do: layers, limits, SAEs, intervention types and the schemas of their fields."""
    state = editing(request)
    catalogue = state.catalogue
    dose = state.settings.dose
    limits: dict[str, Any] = {
        **catalogue.limits.as_dict(),
        "bank_rows": state.config.bank_rows,
        "max_dose": None if dose.maximum == float("inf") else dose.maximum,
        "max_dose_mode": "refuse" if dose.refuse else "clamp",
        "max_body_bytes": state.settings.max_body_bytes,
        "activation_inputs": MAX_INPUTS,
        "contrast_texts": MAX_CONTRAST_TEXTS,
        "calibration_prompts": MAX_CALIBRATION_PROMPTS,
        "fit_texts": MAX_FIT_TEXTS,
        "fit_tokens": MAX_FIT_TOKENS,
        "fit_classes": MAX_FIT_CLASSES,
        "jobs_waiting": state.jobs.max_waiting,
    }
    return {
        "version": __version__,
        "vllm": state.vllm_version,
        "model": state.model,
        "d_model": catalogue.d_model,
        "n_layers": catalogue.n_layers,
        "armed_layers": list(catalogue.armed_layers),
        "limits": limits,
        "saes": [state.shown(sae) for sae in catalogue.saes.values()],
        "intervention_types": list(BUILT),
        "schemas": schemas(),
    } | ({} if state.device is None else {"device_limits": state.device.limits()})


@router.get("/v1/saes")
async def list_saes(request: Request) -> dict[str, Any]:
    """The served SAEs."""
    state = editing(request)
    return _list([state.shown(sae) for sae in state.catalogue.saes.values()])


# The id is a path: the longer routes must be tried first.


@router.get("/v1/saes/{sae_id:path}/features/{index}")
async def show_feature(request: Request, sae_id: str, index: str) -> dict[str, Any]:
    """Everything known about one feature."""
    state = editing(request)
    sae = _sae(state, sae_id)
    if not (index.isascii() and index.isdigit() and len(index) <= 12 and int(index) < sae.sae.n_features):
        message = f"no feature {show(index)}; {sae.id} has 0..{sae.sae.n_features - 1}"
        raise not_found(InterventionError("unknown_feature", message))
    return state.knowledge(sae.id).card(int(index))


@router.get("/v1/saes/{sae_id:path}/features")
async def list_features(
    request: Request,
    sae_id: str,
    q: Annotated[
        str | None,
        Query(max_length=1000, description="Words of labels, of what features fire on, of what they promote."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT,
) -> dict[str, Any]:
    """Features in order of their index, or those that the words of `q` find, best first."""
    state = editing(request)
    sae = _sae(state, sae_id)
    return _list(state.knowledge(sae.id).search(q, limit))


class ActivationsBody(BaseModel):
    """Texts, or one chat, to be read by an SAE."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    features: list[int] | None = Field(None, description="Features that are always reported, 0 included.")
    top_k: int | None = Field(None, description=f"The largest ones; default {DEFAULT_TOP_K} without `features`.")

    @model_validator(mode="after")
    def _one_input(self) -> ActivationsBody:
        if (self.input is None) == (self.messages is None):
            raise ValueError("needs exactly one of input and messages")
        return self


@router.post(
    "/v1/saes/{sae_id:path}/activations",
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": ActivationsBody.model_json_schema()}}}},
)
async def activations(request: Request, sae_id: str) -> Any:
    """What the SAE sees in texts (`input`) or a chat (`messages`): one forward pass of the served engine, no edits."""
    state = editing(request)
    sae = _sae(state, sae_id)
    body = validate(ActivationsBody, await read_json(request, "invalid_inspection"), "invalid_inspection")
    top_k = body.top_k if body.top_k is not None or body.features else DEFAULT_TOP_K
    inspect = {"sae": sae.id, "tokens": "prompt"} | {
        name: value for name, value in (("features", body.features), ("top_k", top_k)) if value is not None
    }
    try:
        answer = await _read_input(state, body, inspect, request)
    except InterventionError as error:
        raise _without_prefix(error) from None
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), answer.error.code)
    data = {"data": [{"index": i, "tokens": tokens} for i, tokens in enumerate(_tokens(answer))]}
    return data if sae.sae.approximates is None else data | {"approximate": True}


async def _read_input(state: EditState, body: ActivationsBody, inspect: dict[str, Any], request: Request) -> Any:
    """The input as a request that generates one token (which is never fed), through the served handlers."""
    if body.messages is not None:
        try:
            chat = EditChatRequest(messages=body.messages, max_completion_tokens=1, inspect=inspect)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise InterventionError("invalid_inspection", f"messages: {first['msg']}", "messages") from None
        return await state.app_state.openai_serving_chat.create_chat_completion(chat, request)
    completion = EditCompletionRequest(prompt=body.input, max_tokens=1, temperature=0.0, inspect=inspect)
    return await state.app_state.openai_serving_completion.create_completion(completion, request)


def _without_prefix(error: InterventionError) -> InterventionError:
    """Here the fields of ``inspect`` stand at top level."""
    param = (error.param or "").removeprefix("inspect").removeprefix(".")
    if param == "tokens":
        param = "input"
    message = error.message.replace("inspect.tokens:", "input:").replace("inspect.", "")
    return InterventionError(as_code(error.code), message, param or None, error.status)


def _tokens(answer: Any) -> list[Any]:
    if getattr(answer, "inspection", None) is not None:
        return [answer.inspection["tokens"]]
    return [choice.inspection["tokens"] for choice in answer.choices]


@router.get("/v1/saes/{sae_id:path}")
async def show_sae(request: Request, sae_id: str) -> dict[str, Any]:
    """One SAE."""
    state = editing(request)
    return state.shown(_sae(state, sae_id))


def _sae(state: EditState, sae_id: str) -> ServedSAE:
    try:
        return state.catalogue.sae(sae_id)
    except InterventionError as error:
        raise not_found(error) from None


def _list(data: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": data}
