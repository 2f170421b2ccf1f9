"""The library of vectors over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from editserver.api.body import read_json
from editserver.api.errors import not_found
from editserver.api.state import editing
from editserver.library import parse_vector
from interventions.errors import InterventionError

router = APIRouter()

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["layers"],
    "properties": {
        "layers": {
            "type": "object",
            "description": 'Layer → d_model numbers, or {"dtype", "shape", "data"} with base64.',
            "additionalProperties": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "object"}]},
        },
        "description": {"type": "string"},
        "meta": {"type": "object"},
    },
}


@router.get("/v1/library/vectors")
async def list_vectors(request: Request) -> dict[str, Any]:
    """Every vector, without its body."""
    listings = editing(request).catalogue.library.listings()
    return {"object": "list", "data": [listing.as_dict() for listing in listings]}


@router.put(
    "/v1/library/vectors/{name}",
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": _SCHEMA}}, "required": True}},
)
async def put_vector(request: Request, name: str) -> dict[str, Any]:
    """Store a new version; requests in flight keep the content that they were sent with."""
    catalogue = editing(request).catalogue
    raw = await read_json(request, "invalid_artifact")
    return catalogue.library.put(name, parse_vector(raw, catalogue.d_model, catalogue.n_layers)).as_dict()


@router.get("/v1/library/vectors/{name}")
async def get_vector(request: Request, name: str) -> dict[str, Any]:
    """One vector with its body."""
    library = editing(request).catalogue.library
    try:
        return library.find(name).as_dict() | {"body": library.get(name).body()}
    except InterventionError as error:
        raise _in_path(error) from None


@router.delete("/v1/library/vectors/{name}")
async def delete_vector(request: Request, name: str) -> dict[str, Any]:
    """Forget a vector."""
    try:
        return editing(request).catalogue.library.delete(name).as_dict() | {"deleted": True}
    except InterventionError as error:
        raise _in_path(error) from None


def _in_path(error: InterventionError) -> InterventionError:
    return not_found(error) if error.code == "unknown_vector" else error
