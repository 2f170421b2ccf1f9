"""The library over HTTP: one set of routes per kind of artefact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from editserver.api.body import read_json
from editserver.api.errors import not_found
from editserver.api.state import editing
from editserver.catalogue import ServedCatalogue
from editserver.library import Library, Vector, concept_body, parse_concept, parse_vector
from interventions.concepts.concept import FACTS, TENSORS, Concept
from interventions.errors import InterventionError
from interventions.suppression import check_bins

router = APIRouter()

_NUMBERS = {"anyOf": [{"type": "array"}, {"type": "object", "required": ["dtype", "shape", "data"]}]}

_VECTOR: dict[str, Any] = {
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

_FACT: dict[str, dict[str, Any]] = {
    "sae_digest": {"type": "string", "description": "Content digest of the SAE (GET /v1/saes)."},
    "layer": {"type": "integer"},
    "model": {"type": "string", "description": "The served model's name (GET /v1/capabilities)."},
    "target": {"type": "string", "description": "The class that is taken away."},
    "classes": {"type": "array", "items": {"type": "string"}},
    "background": {"type": "string"},
    "by": {"enum": ["mean", "difference", "separability"]},
    "max_rate": {"type": "number"},
    "dense": {"type": "integer"},
    "fitted_on": {"type": "object", "description": "Provenance."},
}

_CONCEPT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["sae_digest", "layer", "model", "target", "classes", "by", *TENSORS],
    "properties": {name: _FACT[name] for name in FACTS}
    | {name: _NUMBERS | {"description": f"Shape [{', '.join(dims.split())}]."} for name, (_, dims) in TENSORS.items()},
}


def _parse_vector(raw: Any, catalogue: ServedCatalogue) -> Vector:
    return parse_vector(raw, catalogue.d_model, catalogue.n_layers)


def _parse_concept(raw: Any, catalogue: ServedCatalogue) -> Concept:
    concept = parse_concept(raw)
    catalogue.dictionary_of(concept)
    try:
        check_bins(concept.n_bins, catalogue.d_model)
    except InterventionError as error:
        raise InterventionError("invalid_artifact", f"posterior: {error}", "posterior") from None
    return concept


@dataclass(frozen=True)
class Kind:
    """One kind of artefact.

    Attributes:
        name: plural, as in the path.
        library: where it is kept.
        parse: a body, checked against the server.
        body: inverse of ``parse``.
        schema: JSON schema of the body.
    """

    name: str
    library: Callable[[ServedCatalogue], Library[Any]]
    parse: Callable[[Any, ServedCatalogue], Any]
    body: Callable[[Any], dict[str, Any]]
    schema: dict[str, Any]


KINDS = (
    Kind("vectors", lambda catalogue: catalogue.library, _parse_vector, Vector.body, _VECTOR),
    Kind("concepts", lambda catalogue: catalogue.concepts, _parse_concept, concept_body, _CONCEPT),
)


def _add(kind: Kind) -> None:
    path, one = f"/v1/library/{kind.name}", kind.name.removesuffix("s")

    async def list_all(request: Request) -> dict[str, Any]:
        """Every artefact of the kind, without its body."""
        listings = kind.library(editing(request).catalogue).listings()
        return {"object": "list", "data": [listing.as_dict() for listing in listings]}

    async def put(request: Request, name: str) -> dict[str, Any]:
        """Store a new version; requests in flight keep the content that they were sent with."""
        catalogue = editing(request).catalogue
        raw = await read_json(request, "invalid_artifact")
        return kind.library(catalogue).put(name, kind.parse(raw, catalogue)).as_dict()

    async def get(request: Request, name: str) -> dict[str, Any]:
        """One artefact with its body."""
        library = kind.library(editing(request).catalogue)
        try:
            return library.find(name).as_dict() | {"body": kind.body(library.get(name))}
        except InterventionError as error:
            raise _in_path(error, library) from None

    async def delete(request: Request, name: str) -> dict[str, Any]:
        """Forget an artefact."""
        library = kind.library(editing(request).catalogue)
        try:
            return library.delete(name).as_dict() | {"deleted": True}
        except InterventionError as error:
            raise _in_path(error, library) from None

    body = {"requestBody": {"content": {"application/json": {"schema": kind.schema}}, "required": True}}
    router.add_api_route(path, list_all, methods=["GET"], name=f"list_{kind.name}")
    router.add_api_route(f"{path}/{{name}}", put, methods=["PUT"], name=f"put_{one}", openapi_extra=body)
    router.add_api_route(f"{path}/{{name}}", get, methods=["GET"], name=f"get_{one}")
    router.add_api_route(f"{path}/{{name}}", delete, methods=["DELETE"], name=f"delete_{one}")


def _in_path(error: InterventionError, library: Library[Any]) -> InterventionError:
    return not_found(error) if error.code == library.unknown else error


for _kind in KINDS:
    _add(_kind)
