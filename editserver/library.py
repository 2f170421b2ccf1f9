"""The library of vectors: named, versioned, content-addressed files in one folder.

::

    vectors/names/formal.json              which content the name stands for now: version and digest
    vectors/objects/<digest>.safetensors   one float32 tensor [d_model] per layer, named by the layer
    vectors/objects/<digest>.json          description and meta

Objects never change, names are replaced atomically, so several servers may share the folder without coordination. A
name reaches the file system only after it matched :data:`NAME`; a digest is always our own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from interventions.errors import InterventionError
from interventions.fields import Values
from interventions.wording import choices, nearest, printable, show

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of artefacts: no separators, no leading dot."""

MAX_NOTES_BYTES = 64 * 1024
"""Largest description and meta together, as JSON."""

_CACHED = 256
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


@dataclass(frozen=True)
class Listing:
    """A name and the content it stands for."""

    name: str
    version: int
    digest: str

    def as_dict(self) -> dict[str, Any]:
        """The contract's form."""
        return {"name": self.name, "kind": "vector", "version": self.version, "digest": self.digest}


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


class VectorLibrary:
    """Vectors of one folder. The folder is made when the first vector is put."""

    def __init__(self, root: Path) -> None:
        self._names = root / "vectors" / "names"
        self._objects = root / "vectors" / "objects"
        self._cache: OrderedDict[str, Vector] = OrderedDict()

    def listings(self) -> list[Listing]:
        """Every name, sorted."""
        names = sorted(path.stem for path in self._names.glob("*.json") if NAME.fullmatch(path.stem))
        return [listing for name in names if (listing := self._read_name(name)) is not None]

    def find(self, name: str) -> Listing:
        """What ``name`` stands for now; raises ``unknown_vector``."""
        listing = self._read_name(name) if NAME.fullmatch(name) else None
        if listing is None:
            have = [listing.name for listing in self.listings()]
            shown = choices(have[:20]) + (", …" if len(have) > 20 else "")
            message = f"no vector {show(name)} in the library, which has {shown}.{nearest(name, have)}"
            raise InterventionError("unknown_vector", message)
        return listing

    def get(self, name: str) -> Vector:
        """The content of ``name``; raises ``unknown_vector``, or ``invalid_artifact`` if its files are damaged."""
        listing = self.find(name)
        cached = self._cache.get(listing.digest)
        if cached is None:
            cached = self._cache[listing.digest] = self._load(listing)
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(listing.digest)
        return cached

    def put(self, name: str, vector: Vector) -> Listing:
        """Store ``vector`` and let ``name`` stand for it; the same content again is the same version."""
        if not NAME.fullmatch(name):
            message = f"{show(name)} is not a name: letters, digits, '.', '_', '-', at most 128, not starting with '.'"
            raise InterventionError("invalid_artifact", message, "name")
        before = self._read_name(name)
        listing = Listing(name, before.version if before else 1, vector.digest)
        if before is not None and before.digest != listing.digest:
            listing = Listing(name, before.version + 1, listing.digest)
        tensors = {str(layer): row.astype("<f4") for layer, row in vector.layers.items()}
        _write(self._objects / f"{listing.digest}.safetensors", save_tensors(tensors))
        _write(self._objects / f"{listing.digest}.json", _notes(vector).encode())
        _write(self._names / f"{name}.json", json.dumps(listing.as_dict()).encode())
        return listing

    def delete(self, name: str) -> Listing:
        """Forget ``name``, and its content if no other name has it; raises ``unknown_vector``."""
        listing = self.find(name)
        (self._names / f"{name}.json").unlink(missing_ok=True)
        if all(other.digest != listing.digest for other in self.listings()):
            for suffix in ("safetensors", "json"):
                (self._objects / f"{listing.digest}.{suffix}").unlink(missing_ok=True)
            self._cache.pop(listing.digest, None)
        return listing

    def _read_name(self, name: str) -> Listing | None:
        try:
            raw = json.loads((self._names / f"{name}.json").read_bytes())
            version, digest = raw["version"], raw["digest"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            version, digest = 0, ""
        if isinstance(version, int) and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest):
            return Listing(name, version, digest)
        raise InterventionError("invalid_artifact", f"the library's entry {name!r} is damaged; put it again")

    def _load(self, listing: Listing) -> Vector:
        stem = self._objects / listing.digest
        try:
            tensors = load_tensors(stem.with_suffix(".safetensors").read_bytes())
            notes = json.loads(stem.with_suffix(".json").read_bytes())
            layers = {int(key): tensor for key, tensor in tensors.items()}
            vector = Vector(layers, notes["description"], notes["meta"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            message = f"the content of vector {listing.name!r} cannot be read ({error}); put it again"
            raise InterventionError("invalid_artifact", message) from error
        if vector.digest != listing.digest:
            message = f"the content of vector {listing.name!r} does not match its digest; put it again"
            raise InterventionError("invalid_artifact", message)
        return vector


def _write(path: Path, data: bytes) -> None:
    """Write beside the final place, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
