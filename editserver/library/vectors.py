"""Steering vectors: one float32 tensor per layer in a safetensors file, description and meta in JSON beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from editserver.library.store import Library
from interventions.errors import Code, InterventionError
from interventions.fields import Values
from interventions.wording import choices, nearest, printable, show

MAX_NOTES_BYTES = 64 * 1024
"""Largest description and meta together, as JSON."""

_values: TypeAdapter[npt.NDArray[np.float32]] = TypeAdapter(Values)


@dataclass(frozen=True)
class Vector:
    """A steering vector: one direction per layer, with what its author says about it."""

    layers: Mapping[int, npt.NDArray[np.float32]]
    """Decoder layer (0-based) → float32 ``[d_model]``."""
    description: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content, never of the name."""
        sha = hashlib.sha256(b"editserver-vector/1")
        for layer in sorted(self.layers):
            values = self.layers[layer].astype("<f4").tobytes()
            sha.update(f"{layer}:{len(values)}:".encode() + values)
        sha.update(_notes(self).encode())
        return sha.hexdigest()

    def body(self) -> dict[str, Any]:
        """JSON form, as it was put."""
        layers = {str(layer): [float(x) for x in self.layers[layer]] for layer in sorted(self.layers)}
        return {"layers": layers, "description": self.description, "meta": dict(self.meta)}


def parse_vector(raw: Any, d_model: int, n_layers: int) -> Vector:
    """Read the JSON body of a vector.

    Raises:
        InterventionError: ``invalid_artifact`` or ``wrong_dimension``, ``param`` naming the field.
    """
    if not isinstance(raw, dict):
        raise _invalid(f"expected an object with layers, got {show(raw)}", None)
    known = ("layers", "description", "meta")
    for key in raw:
        if key not in known:
            message = f"unknown field; a vector has {choices(known)}.{nearest(key, known)}"
            raise _invalid(message, printable(key[:64]))
    description, meta = raw.get("description"), raw.get("meta")
    if description is not None and not isinstance(description, str):
        raise _invalid(f"expected a string, got {show(description)}", "description")
    if meta is not None and not isinstance(meta, dict):
        raise _invalid(f"expected an object, got {show(meta)}", "meta")
    layers = raw.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise _invalid('expected an object like {"15": [floats]} with at least one layer', "layers")
    parsed = {_layer(key, n_layers): _row(value, key, d_model) for key, value in layers.items()}
    if len(parsed) != len(layers):
        raise _invalid("names a layer twice", "layers")
    vector = Vector(parsed, description, meta or {})
    try:
        size = len(_notes(vector).encode())
    except (UnicodeEncodeError, ValueError):
        raise _invalid("holds text or numbers that JSON cannot carry", "meta") from None
    if size > MAX_NOTES_BYTES:
        raise _invalid(f"description and meta are {size} bytes; at most {MAX_NOTES_BYTES}", "meta")
    return vector


def _invalid(message: str, param: str | None) -> InterventionError:
    return InterventionError("invalid_artifact", f"{param}: {message}" if param else message, param)


def _layer(key: str, n_layers: int) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 9):
        raise _invalid(f"{show(key)} is not a layer number", "layers")
    if int(key) >= n_layers:
        raise _invalid(f"layer {int(key)}; the model has 0..{n_layers - 1}", f"layers.{int(key)}")
    return int(key)


def _row(value: Any, key: str, d_model: int) -> npt.NDArray[np.float32]:
    param = f"layers.{key}"
    try:
        row = _values.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _invalid(first["msg"], param) from None
    if row.shape != (d_model,):
        have = "×".join(str(extent) for extent in row.shape)
        raise InterventionError("wrong_dimension", f"{param}: has {have} numbers; d_model is {d_model}", param)
    return row


def _notes(vector: Vector) -> str:
    notes = {"description": vector.description, "meta": dict(vector.meta)}
    return json.dumps(notes, sort_keys=True, ensure_ascii=False, allow_nan=False)


class VectorLibrary(Library[Vector]):
    """Vectors of one folder."""

    kind: ClassVar[str] = "vector"
    unknown: ClassVar[Code] = "unknown_vector"
    suffixes: ClassVar[tuple[str, ...]] = ("safetensors", "json")

    def encode(self, artefact: Vector) -> Mapping[str, bytes]:
        """The tensors by layer, and the notes."""
        tensors = {str(layer): row.astype("<f4") for layer, row in artefact.layers.items()}
        return {"safetensors": save_tensors(tensors), "json": _notes(artefact).encode()}

    def decode(self, files: Mapping[str, bytes]) -> Vector:
        """The vector."""
        notes = json.loads(files["json"])
        layers = {int(key): tensor for key, tensor in load_tensors(files["safetensors"]).items()}
        return Vector(layers, notes["description"], notes["meta"])
