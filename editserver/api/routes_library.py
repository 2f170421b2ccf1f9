"""The library over HTTP: one set of routes per kind of artefact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from editserver.api.body import read_json
from editserver.api.errors import not_found
from editserver.api.rulesets import SCHEMA, parse_stored, shown_normal
from editserver.api.state import EditState, editing
from editserver.catalogue import ServedCatalogue
from editserver.library import Library, StoredRuleset, Vector, concept_body, parse_concept, parse_vector
from editserver.library.concepts import DETECTOR_SCHEMA
from interventions.concepts.concept import FACTS, TENSORS, Concept
from interventions.errors import InterventionError
from interventions.maps.body import from_body, to_body
from interventions.maps.map import GATES, MAX_LATENTS, UNITS, LatentMap
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
    | {"detector": DETECTOR_SCHEMA}
    | {name: _NUMBERS | {"description": f"Shape [{', '.join(dims.split())}]."} for name, (_, dims) in TENSORS.items()},
}

_LATENT = {"type": "integer", "minimum": 0}
_LATENTS = {"type": "array", "items": _LATENT, "minItems": 1, "maxItems": MAX_LATENTS}

_TRANSFER: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["latent"],
    "description": "x ← clip(alpha·x + beta·s + gamma·a[source], lo, hi); a: original activations.",
    "properties": {
        "latent": _LATENT,
        "alpha": {"type": "number", "default": 1},
        "beta": {"type": "number", "default": 0},
        "gamma": {"type": "number", "default": 0},
        "source": _LATENT | {"description": "Exactly where gamma is not 0."},
        "lo": {"type": "number"},
        "hi": {"type": "number"},
        "unit": {"enum": [unit.value for unit in UNITS], "default": "absolute", "description": "s, of beta."},
        "only_if_active": {"type": "boolean", "default": False},
    },
}

_MAP: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["model", "sae", "layer", "transfers"],
    "properties": {
        "model": {"type": "string", "description": "The served model's name (GET /v1/capabilities)."},
        "sae": {"type": "string", "description": "Content digest of the SAE (GET /v1/saes)."},
        "layer": _LATENT,
        "transfers": {"type": "array", "items": _TRANSFER, "minItems": 1, "maxItems": MAX_LATENTS},
        "scope": {
            "type": "object",
            "required": ["kind"],
            "properties": {
                "kind": {"enum": ["all", "trigger", "mentions"]},
                "latents": _LATENTS | {"description": "trigger: tokens where any of them is active."},
                "sequences": {"type": "array", "description": "mentions: token ids of each way to write the name."},
                "tokens": {
                    "enum": ["last", "all"],
                    "description": "mentions: last token anywhere, or all in the prompt.",
                },
                "names": {"type": "array", "items": {"type": "string"}},
            },
        },
        "gate": {
            "type": "object",
            "required": ["kind", "threshold", "evidence"],
            "properties": {
                "kind": {"enum": list(GATES)},
                "threshold": {"type": "number", "minimum": 0},
                "evidence": _LATENTS,
                "over": {"enum": ["prompt", "seen"], "description": "share"},
                "least": {"type": "integer", "description": "share over seen, window"},
                "window": {"type": "integer", "description": "window"},
                "k": {"type": "number", "description": "cusum"},
                "reset": {"type": "boolean", "description": "cusum"},
                "latch": {"type": "boolean"},
                "include_bos": {"type": "boolean"},
                "calibration": {"type": "object"},
            },
        },
        "provenance": {"type": "object"},
        "report": {"type": "object"},
    },
}

_RULESET: dict[str, Any] = SCHEMA | {
    "properties": SCHEMA["properties"] | {"description": {"type": "string"}, "meta": {"type": "object"}}
}


def _parse_vector(raw: Any, state: EditState) -> Vector:
    return parse_vector(raw, state.catalogue.d_model, state.catalogue.n_layers)


def _parse_concept(raw: Any, state: EditState) -> Concept:
    concept = parse_concept(raw)
    state.catalogue.dictionary_of(concept)
    try:
        check_bins(concept.n_bins, state.catalogue.d_model)
    except InterventionError as error:
        raise InterventionError("invalid_artifact", f"posterior: {error}", "posterior") from None
    return concept


def _detector(name: str, concept: Concept, state: EditState) -> dict[str, Any]:
    """How rules name what the concept's detector says, where its dictionary is served."""
    if concept.detector is None:
        return {}
    shown = concept.detector.as_dict()
    with suppress(InterventionError):
        sae = state.catalogue.dictionary_of(concept).id
        shown |= {"sae": sae, "expressions": concept.detector.expressions(sae, name)}
    return {"detector": shown}


def _parse_map(raw: Any, state: EditState) -> LatentMap:
    found = from_body(raw)
    state.catalogue.dictionary_of_map(found)
    return found


@dataclass(frozen=True)
class Kind:
    """One kind of artefact.

    Attributes:
        name: plural, as in the path.
        library: where it is kept.
        parse: a body, checked against the server.
        body: inverse of ``parse``.
        schema: JSON schema of the body.
        beside: what ``GET`` shows beside the body: what this server makes of it, by name.
    """

    name: str
    library: Callable[[ServedCatalogue], Library[Any]]
    parse: Callable[[Any, EditState], Any]
    body: Callable[[Any], dict[str, Any]]
    schema: dict[str, Any]
    beside: Callable[[str, Any, EditState], dict[str, Any]] = lambda name, artefact, state: {}


KINDS = (
    Kind("vectors", lambda catalogue: catalogue.library, _parse_vector, Vector.body, _VECTOR),
    Kind("concepts", lambda catalogue: catalogue.concepts, _parse_concept, concept_body, _CONCEPT, _detector),
    Kind("maps", lambda catalogue: catalogue.maps, _parse_map, to_body, _MAP),
    Kind("rulesets", lambda catalogue: catalogue.rulesets, parse_stored, StoredRuleset.body, _RULESET, shown_normal),
)


def _add(kind: Kind) -> None:
    path, one = f"/v1/library/{kind.name}", kind.name.removesuffix("s")

    async def list_all(request: Request) -> dict[str, Any]:
        """Every artefact of the kind, without its body."""
        listings = kind.library(editing(request).catalogue).listings()
        return {"object": "list", "data": [listing.as_dict() for listing in listings]}

    async def put(request: Request, name: str) -> dict[str, Any]:
        """Store a new version; requests in flight keep the content that they were sent with."""
        state = editing(request)
        raw = await read_json(request, "invalid_artifact")
        return kind.library(state.catalogue).put(name, kind.parse(raw, state)).as_dict()

    async def get(request: Request, name: str) -> dict[str, Any]:
        """One artefact with its body."""
        state = editing(request)
        library = kind.library(state.catalogue)
        try:
            artefact = library.get(name)
            shown = library.find(name).as_dict() | {"body": kind.body(artefact)}
            return shown | kind.beside(name, artefact, state)
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
