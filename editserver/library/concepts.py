"""Concepts: one safetensors file each (:mod:`interventions.concepts.concept`), and their JSON form over HTTP."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from editserver.library.store import Library
from interventions.concepts.concept import FACTS, TENSORS, Concept
from interventions.concepts.detector import KINDS, detector_from_dict
from interventions.errors import Code, InterventionError
from interventions.fields import MAX_VALUES, Values
from interventions.wording import choices, nearest, printable, show

DETECTOR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "How rules tell that the concept is present: a token counts where score >= threshold.",
    "additionalProperties": False,
    "required": ["kind", "threshold"],
    "properties": {
        "kind": {"enum": list(KINDS)},
        "features": {
            "type": "array",
            "description": "score = Σ weight·activation; one feature for single.",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["index"],
                "properties": {"index": {"type": "integer", "minimum": 0}, "weight": {"type": "number", "default": 1}},
            },
        },
        "tree": {
            "type": "object",
            "description": "relation: feature, op, threshold, then, else; a leaf is its score.",
        },
        "op": {"const": ">="},
        "threshold": {"type": "number"},
        "text": {
            "anyOf": [{"type": "object", "minProperties": 1, "maxProperties": 1}, {"type": "null"}],
            "description": 'When a text counts: {"threshold"} of its largest score, or {"percent"} of its tokens.',
        },
    },
}

_OPTIONAL: dict[str, Any] = {"background": None, "max_rate": None, "dense": 0, "fitted_on": {}}
_values: TypeAdapter[Any] = TypeAdapter(Values)


class ConceptLibrary(Library[Concept]):
    """Concepts of one folder."""

    kind: ClassVar[str] = "concept"
    unknown: ClassVar[Code] = "unknown_concept"
    suffixes: ClassVar[tuple[str, ...]] = ("safetensors",)

    def encode(self, artefact: Concept) -> Mapping[str, bytes]:
        """The artefact's own file."""
        return {"safetensors": artefact.to_bytes()}

    def decode(self, files: Mapping[str, bytes]) -> Concept:
        """The concept."""
        return Concept.from_bytes(files["safetensors"])


def parse_concept(raw: Any) -> Concept:
    """Read the JSON body of a concept: its facts, and its tensors as (nested) lists or ``{"dtype", "shape", "data"}``.

    Raises:
        InterventionError: ``invalid_artifact``, ``param`` naming the field.
    """
    if not isinstance(raw, dict):
        raise _invalid(f"expected an object with {choices((*FACTS, *TENSORS))}; got {show(raw)}", None)
    known = (*FACTS, *TENSORS, "detector")
    for key in raw:
        if key not in known:
            raise _invalid(f"unknown field.{nearest(key, known)}", printable(key[:64]))
    fields: dict[str, Any] = {}
    for name in FACTS:
        value = raw.get(name)
        if value is None and name not in _OPTIONAL:
            raise _invalid("is required", name)
        fields[name] = _OPTIONAL[name] if value is None else value
    if isinstance(fields["classes"], list):
        fields["classes"] = tuple(fields["classes"])
    for name, (dtype, _) in TENSORS.items():
        value = raw.get(name)
        if value is None:
            raise _invalid("is required", name)
        fields[name] = _integers(value, name) if dtype is torch.int64 else _floats(value, name)
    given = raw.get("detector")
    return Concept(**fields, detector=None if given is None else detector_from_dict(given))


def concept_body(concept: Concept) -> dict[str, Any]:
    """The JSON form that :func:`parse_concept` reads: facts as they are, tensors in base64."""
    facts = {name: getattr(concept, name) for name in FACTS}
    facts |= {"classes": list(concept.classes), "fitted_on": dict(concept.fitted_on)}
    if concept.detector is not None:
        facts["detector"] = concept.detector.as_dict()
    return facts | {name: _packed(getattr(concept, name)) for name in TENSORS}


def _packed(tensor: torch.Tensor) -> dict[str, Any]:
    dtype, code = ("int64", "<i8") if tensor.dtype is torch.int64 else ("float32", "<f4")
    data = base64.b64encode(tensor.numpy().astype(code).tobytes()).decode("ascii")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": data}


def _floats(value: Any, name: str) -> torch.Tensor:
    try:
        array = _values.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _invalid(first["msg"], name) from None
    return torch.from_numpy(np.array(array, np.float32))


def _integers(value: Any, name: str) -> torch.Tensor:
    if isinstance(value, dict):
        return _packed_integers(value, name)
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for row in rows:
        if not isinstance(row, list) or not row or len(row) != len(rows[0]):
            raise _invalid(f"expected integers, or rows of one length of them; got {show(row)}", name)
    if sum(map(len, rows)) > MAX_VALUES:
        raise _invalid(f"expected at most {MAX_VALUES} numbers", name)
    flat = [item for row in rows for item in row]
    for item in flat:
        if isinstance(item, bool) or not isinstance(item, int) or abs(item) >= 2**63:
            raise _invalid(f"expected integers, got {show(item)}", name)
    shape = (len(rows), len(rows[0])) if rows is value else (len(flat),)
    return torch.tensor(flat, dtype=torch.int64).reshape(shape)


def _packed_integers(value: dict[Any, Any], name: str) -> torch.Tensor:
    expected = '{"dtype": "int64", "shape", "data"}'
    if set(value) != {"dtype", "shape", "data"} or value["dtype"] != "int64":
        raise _invalid(f"expected integers, or {expected} with base64 of little-endian int64", name)
    shape, data = value["shape"], value["data"]
    if not isinstance(shape, list) or len(shape) not in (1, 2):
        raise _invalid(f"expected a shape of one or two numbers, got {show(shape)}", f"{name}.shape")
    for extent in shape:
        if isinstance(extent, bool) or not isinstance(extent, int) or not 0 < extent <= MAX_VALUES:
            raise _invalid(f"expected 1 to {MAX_VALUES}, got {show(extent)}", f"{name}.shape")
    try:
        raw = base64.b64decode(data, validate=True) if isinstance(data, str) else b""
    except (binascii.Error, ValueError):
        raise _invalid("expected base64 (standard alphabet, padded)", f"{name}.data") from None
    if len(raw) != 8 * int(np.prod(shape, dtype=np.int64)):
        raise _invalid(f"int64 of shape {shape} is {8 * int(np.prod(shape))} bytes, got {len(raw)}", f"{name}.data")
    return torch.from_numpy(np.frombuffer(raw, "<i8").astype(np.int64).reshape(shape))


def _invalid(message: str, param: str | None) -> InterventionError:
    return InterventionError("invalid_artifact", f"{param}: {message}" if param else message, param)
