"""A map read from JSON or from a file, and written: strict in, canonical out.

Whatever comes in was written by someone else: every field is checked by name, unknown ones are refused, nothing is
unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from interventions.errors import InterventionError
from interventions.maps.calibration import Calibration
from interventions.maps.gates import Gate
from interventions.maps.map import (
    GATES,
    MAX_LATENTS,
    UNITS,
    AllTokens,
    LatentMap,
    MentionTokens,
    Scope,
    SequenceGate,
    TriggerTokens,
    canonical_json,
    invalid,
)
from interventions.maps.transfer import Transfer, Unit, canonical
from interventions.wording import choices, nearest, printable, show

T = TypeVar("T")

_LARGEST_INTEGER = 2**31 - 1
_FIELDS = ("model", "sae", "layer", "transfers", "scope", "gate", "provenance", "report")
_COLUMNS = {"latent": "<i8", "source": "<i8", "coefficients": "<f8", "unit": "|u1", "only_if_active": "|u1"}


def to_body(map_: LatentMap) -> dict[str, Any]:
    """The map as one JSON object; :func:`from_body` reads it back with the same digest."""
    return map_.header() | {"transfers": [_transfer_body(t) for t in map_.transfers]}


def from_body(raw: Any) -> LatentMap:
    """Read :func:`to_body`'s form; transfers may come in any order of latents and leave defaults out.

    Raises:
        InterventionError: ``invalid_artifact``, ``param`` naming the field.
    """
    fields = _object(raw, "", _FIELDS)
    transfers = [
        _transfer(one, f"transfers[{i}]") for i, one in enumerate(_array(_need(fields, "transfers", ""), "transfers"))
    ]
    return _build(fields, tuple(transfers))


def to_bytes(map_: LatentMap) -> bytes:
    """One safetensors file: the columns of :meth:`LatentMap.arrays`, and ``map``: the rest as UTF-8 JSON (uint8)."""
    header = np.frombuffer(canonical_json(map_.header()), "u1")
    return save_tensors({**map_.arrays(), "map": header})


def from_bytes(data: bytes, digest: str | None = None) -> LatentMap:
    """Inverse of :func:`to_bytes`.

    Args:
        data: the file.
        digest: what the content must have; ``None`` = not compared.

    Raises:
        InterventionError: ``invalid_artifact``: a damaged file, a field that is wrong, another content.
    """
    try:
        tensors = load_tensors(data)
        fields = json.loads(tensors.pop("map").tobytes())
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise invalid("map", f"cannot be read ({error.__class__.__name__}); put it again") from error
    count = len(tensors["latent"]) if "latent" in tensors and tensors["latent"].ndim == 1 else 0
    for name, dtype in _COLUMNS.items():
        shape = (count, 5) if name == "coefficients" else (count,)
        found = tensors.get(name)
        if found is None or found.shape != shape or found.dtype != np.dtype(dtype):
            raise invalid(name, f"expected {np.dtype(dtype).name} {list(shape)}")
    if set(tensors) != set(_COLUMNS) or count > MAX_LATENTS:
        raise invalid("map", f"expected the tensors {choices(_COLUMNS)}, of at most {MAX_LATENTS} transfers")
    bodies = []
    columns = [tensors[name].tolist() for name in _COLUMNS]
    for latent, source, (alpha, beta, gamma, lo, hi), unit, active in zip(*columns, strict=True):
        body = {"latent": latent, "alpha": alpha, "beta": beta, "gamma": gamma, "only_if_active": bool(active)}
        body |= {"source": source} if source >= 0 else {}
        body |= {"lo": lo} if lo != -math.inf else {}
        body |= {"hi": hi} if hi != math.inf else {}
        bodies.append(body | {"unit": UNITS[unit].value if unit < len(UNITS) else unit})
    transfers = tuple(_transfer(body, f"transfers[{i}]") for i, body in enumerate(bodies))
    loaded = _build(_object(fields, "", tuple(f for f in _FIELDS if f != "transfers")), transfers)
    if digest is not None and loaded.digest != digest:
        raise invalid("map", "the content does not match its digest; put it again")
    return loaded


def _build(fields: dict[str, Any], transfers: tuple[Transfer, ...]) -> LatentMap:
    return LatentMap(
        model=_text(_need(fields, "model", ""), "model"),
        sae=_text(_need(fields, "sae", ""), "sae"),
        layer=_integer(_need(fields, "layer", ""), "layer"),
        transfers=canonical(transfers),
        scope=_scope(fields.get("scope", {"kind": "all"})),
        gate=None if fields.get("gate") is None else _gate(fields["gate"]),
        provenance=_notes(fields, "provenance"),
        report=_notes(fields, "report"),
    )


def _notes(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {} if fields.get(name) is None else _object(fields[name], name, None)


def _transfer_body(t: Transfer) -> dict[str, Any]:
    bounds = {"lo": t.lo if t.lo != -math.inf else None, "hi": t.hi if t.hi != math.inf else None}
    return dataclasses.asdict(t) | bounds | {"unit": t.unit.value}


def _transfer(raw: Any, param: str) -> Transfer:
    known = tuple(field.name for field in dataclasses.fields(Transfer))
    fields = {key: value for key, value in _object(raw, param, known).items() if value is not None}
    values: dict[str, Any] = {"latent": _integer(_need(fields, "latent", param), f"{param}.latent")}
    for name in ("alpha", "beta", "gamma", "lo", "hi"):
        if name in fields:
            values[name] = _number(fields[name], f"{param}.{name}")
    if "source" in fields:
        values["source"] = _integer(fields["source"], f"{param}.source")
    if "only_if_active" in fields:
        values["only_if_active"] = _flag(fields["only_if_active"], f"{param}.only_if_active")
    if "unit" in fields:
        values["unit"] = Unit(_word(fields["unit"], f"{param}.unit", tuple(unit.value for unit in Unit)))
    return _within(param, lambda: Transfer(**values))


def _scope(raw: Any) -> Scope:
    if not isinstance(raw, dict):
        raise invalid("scope", f"expected an object, got {show(raw)}")
    kind = _word(raw.get("kind"), "scope.kind", ("all", "trigger", "mentions"))
    if kind == "trigger":
        fields = _object(raw, "scope", ("kind", "latents"))
        return TriggerTokens(tuple(sorted(_integers(_need(fields, "latents", "scope"), "scope.latents"))))
    if kind == "mentions":
        fields = _object(raw, "scope", ("kind", "sequences", "tokens", "names"))
        sequences = _array(_need(fields, "sequences", "scope"), "scope.sequences")
        ids = (_integers(sequence, f"scope.sequences[{i}]") for i, sequence in enumerate(sequences))
        tokens = _word(fields.get("tokens", "last"), "scope.tokens", ("last", "all"))
        names = [_text(n, f"scope.names[{i}]") for i, n in enumerate(_array(fields.get("names", []), "scope.names"))]
        return MentionTokens(tuple(sorted(ids)), "all" if tokens == "all" else "last", tuple(names))
    _object(raw, "scope", ("kind",))
    return AllTokens()


def _gate(raw: Any) -> SequenceGate:
    if not isinstance(raw, dict):
        raise invalid("gate", f"expected an object, got {show(raw)}")
    cls = GATES[_word(raw.get("kind"), "gate.kind", tuple(GATES))]
    known = {field.name: field for field in dataclasses.fields(cls)}
    fields = _object(raw, "gate", ("kind", *known, "evidence", "calibration"))
    parse: dict[str, Callable[[Any, str], Any]] = {"int": _integer, "float": _number, "bool": _flag}
    values: dict[str, Any] = {}
    for name, field in known.items():
        param = f"gate.{name}"
        if name in fields:
            read: Callable[[Any, str], Any] = parse.get(str(field.type), _text)
            values[name] = read(fields[name], param)
        elif field.default is dataclasses.MISSING:
            raise invalid(param, "is missing")
    make: Callable[..., Gate] = cls
    gate = _within("gate", lambda: make(**values))
    evidence = tuple(sorted(_integers(_need(fields, "evidence", "gate"), "gate.evidence")))
    facts = fields.get("calibration")
    return SequenceGate(gate, evidence, None if facts is None else _calibration(facts))


def _calibration(raw: Any) -> Calibration:
    param = "gate.calibration"
    known = tuple(field.name for field in dataclasses.fields(Calibration))
    fields = _object(raw, param, known)
    values = {name: _number(_need(fields, name, param), f"{param}.{name}") for name in known if name != "n"}
    return Calibration(n=_integer(_need(fields, "n", param), f"{param}.n"), **values)


def _within(param: str, make: Callable[[], T]) -> T:
    """Errors of ``make`` name the field below ``param``."""
    try:
        return make()
    except InterventionError as error:
        raise InterventionError("invalid_artifact", f"{param}.{error.message}", f"{param}.{error.param}") from None


def _object(raw: Any, param: str, known: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise invalid(param or "map", f"expected an object, got {show(raw)}")
    for key in raw:
        if known is not None and key not in known:
            where = f"{param}." if param else ""
            raise invalid(
                f"{where}{printable(str(key)[:64])}",
                f"unknown field; there are {choices(known)}.{nearest(str(key), known)}",
            )
    return raw


def _need(fields: dict[str, Any], name: str, param: str) -> Any:
    if fields.get(name) is None:
        raise invalid(f"{param}.{name}" if param else name, "is missing")
    return fields[name]


def _array(raw: Any, param: str) -> list[Any]:
    if not isinstance(raw, list):
        raise invalid(param, f"expected a list, got {show(raw)}")
    return raw


def _integers(raw: Any, param: str) -> tuple[int, ...]:
    return tuple(_integer(one, f"{param}[{i}]") for i, one in enumerate(_array(raw, param)))


def _integer(raw: Any, param: str) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not 0 <= raw <= _LARGEST_INTEGER:
        raise invalid(param, f"expected an integer from 0 to {_LARGEST_INTEGER}, got {show(raw)}")
    return raw


def _number(raw: Any, param: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not abs(raw) <= 1e300:
        raise invalid(param, f"expected a finite number, got {show(raw)}")
    return float(raw) + 0.0  # -0.0 and 0.0 are one value


def _flag(raw: Any, param: str) -> bool:
    if not isinstance(raw, bool):
        raise invalid(param, f"expected true or false, got {show(raw)}")
    return raw


def _text(raw: Any, param: str) -> str:
    if not isinstance(raw, str) or not raw or printable(raw) != raw:
        raise invalid(param, f"expected text, got {show(raw)}")
    return raw


def _word(raw: Any, param: str, words: Sequence[str]) -> str:
    if not isinstance(raw, str) or raw not in words:
        hint = nearest(raw, words) if isinstance(raw, str) else ""
        raise invalid(param, f"expected one of {choices(words)}, got {show(raw)}.{hint}")
    return raw
