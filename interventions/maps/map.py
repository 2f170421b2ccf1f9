"""The artefact of a fitted remap: which latents of which SAE, mapped how, on which tokens, behind which gate.

A map belongs to one SAE at one layer of one model. Its digest covers everything in it, report and provenance included; how
a request executes it is in the program's own digest.

::

    to_bytes()   one safetensors file: the transfers as arrays, the rest as canonical JSON in its metadata
    to_body()    the same as one JSON object, for the HTTP contract
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from interventions.errors import InterventionError
from interventions.maps.calibration import Calibration
from interventions.maps.gates import CusumGate, Gate, ShareGate, WindowGate
from interventions.maps.transfer import Transfer, Unit, canonical, reads
from interventions.wording import show

MAX_LATENTS = 4096
"""Most transfers, trigger latents and evidence latents, each."""
MAX_SEQUENCES, MAX_SEQUENCE = 1024, 64
"""Most token sequences of one scope, and their greatest length."""
MAX_NOTES_BYTES = 64 * 1024
"""Largest provenance and report together, as JSON."""

GATES: dict[str, type[Gate]] = {"share": ShareGate, "window": WindowGate, "cusum": CusumGate}
"""Kind of a gate → class; the fields are the class's."""
UNITS: tuple[Unit, ...] = tuple(Unit)
"""Codes of the units in files."""


@dataclass(frozen=True)
class AllTokens:
    """Every token but position 0."""


@dataclass(frozen=True)
class TriggerTokens:
    """Tokens where any of these latents of the same SAE is active (≠ 0). Sorted."""

    latents: tuple[int, ...]


@dataclass(frozen=True)
class MentionTokens:
    """Tokens of an entity's mentions.

    Attributes:
        sequences: token ids of the ways in which its names tokenise, sorted (:mod:`interventions.maps.mentions`).
        tokens: "last": the last token of a mention, anywhere; "all": all its tokens, in the prompt only.
        names: for people.
    """

    sequences: tuple[tuple[int, ...], ...]
    tokens: Literal["last", "all"] = "last"
    names: tuple[str, ...] = ()


Scope = AllTokens | TriggerTokens | MentionTokens


@dataclass(frozen=True)
class SequenceGate:
    """A gate and what it listens to.

    Attributes:
        gate: closed until it opens; threshold finite.
        evidence: latents of the same SAE; a token is a hit where any is active. Sorted.
        calibration: where the threshold comes from; ``None`` when it was set by hand.
    """

    gate: Gate
    evidence: tuple[int, ...]
    calibration: Calibration | None = None


@dataclass(frozen=True)
class LatentMap:
    """A fitted remap.

    Attributes:
        model: the model that it was fitted on, as its server names it.
        sae: content digest of the SAE.
        layer: decoder layer (0-based) whose ``resid_post`` is edited.
        transfers: what strength 1 does, in canonical order.
        scope: on which tokens.
        gate: ``None`` = always open.
        provenance: how it was fitted (JSON).
        report: figures on held-out text (JSON).

    Raises:
        InterventionError: ``invalid_artifact``, ``param`` naming the field (``transfers[2].lo``).
    """

    model: str
    sae: str
    layer: int
    transfers: tuple[Transfer, ...]
    scope: Scope = AllTokens()
    gate: SequenceGate | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model or not self.model.isprintable():
            raise invalid("model", f"must name the model, got {show(self.model)}")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sae):
            raise invalid("sae", f"must be the SAE's content digest, 64 hexadecimal digits, got {show(self.sae)}")
        if self.layer < 0:
            raise invalid("layer", f"layer {show(self.layer)}; layers count from 0")
        if not self.transfers:
            raise invalid("transfers", "a map needs at least one transfer that changes something")
        if len(self.transfers) > MAX_LATENTS:
            raise invalid("transfers", f"has {len(self.transfers)} transfers; at most {MAX_LATENTS}")
        if canonical(self.transfers) != self.transfers:
            raise invalid("transfers", "not in canonical order: sort them by latent and leave identities out")
        if isinstance(self.scope, TriggerTokens):
            _check_latents(self.scope.latents, "scope.latents")
        if isinstance(self.scope, MentionTokens):
            _check_mentions(self.scope)
        if self.gate is not None:
            _check_latents(self.gate.evidence, "gate.evidence")
            if not math.isfinite(self.gate.gate.threshold):
                raise invalid("gate.threshold", "must be a finite number")
            facts = self.gate.calibration
            if facts is not None and facts.threshold != self.gate.gate.threshold:
                message = f"is of the threshold {show(facts.threshold)}, the gate has {show(self.gate.gate.threshold)}"
                raise invalid("gate.calibration", message)
        for name in ("provenance", "report"):
            _notes(getattr(self, name), name)
        if len(_notes([self.provenance, self.report], "report")) > MAX_NOTES_BYTES:
            raise invalid("report", f"provenance and report are more than {MAX_NOTES_BYTES} bytes as JSON")

    @property
    def latents(self) -> tuple[int, ...]:
        """Every latent that the map reads: mapped ones, sources, triggers and evidence; sorted."""
        found = set(reads(self.transfers))
        if isinstance(self.scope, TriggerTokens):
            found.update(self.scope.latents)
        if self.gate is not None:
            found.update(self.gate.evidence)
        return tuple(sorted(found))

    @property
    def needs_all_latents(self) -> bool:
        """Whether a unit depends on every latent of the dictionary, whatever the SAE's architecture."""
        return any(t.unit.reads_all_latents for t in self.transfers if t.beta != 0.0)

    @property
    def needs_prompt_len(self) -> bool:
        """Whether requests with equal prefixes but different prompts can differ: then the prompt enters the salt."""
        over_prompt = self.gate is not None and getattr(self.gate.gate, "over", None) == "prompt"
        return over_prompt or (isinstance(self.scope, MentionTokens) and self.scope.tokens == "all")

    def at(self, strength: float) -> tuple[Transfer, ...]:
        """The transfers at a request's strength; none at 0."""
        return canonical([t.at(strength) for t in self.transfers])

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content."""
        sha = hashlib.sha256(b"editserver-map/1")
        parts = [canonical_json(self.header()), *(array.tobytes() for array in self.arrays().values())]
        for part in parts:
            sha.update(len(part).to_bytes(8, "little") + part)
        return sha.hexdigest()

    def check(self, sae: str, layer: int, n_features: int, model: str | None = None) -> None:
        """Refuse to run on anything else than what the map was fitted on.

        Args:
            sae, layer, n_features: content digest, layer and size of the SAE that is served.
            model: name of the served model; ``None`` = not compared.

        Raises:
            InterventionError: ``invalid_artifact``, ``param`` naming what does not match.
        """
        if self.sae != sae:
            raise invalid(
                "sae", f"the map was fitted on the SAE {self.sae[:12]}…, the one served is {sae[:12]}…; fit it again"
            )
        if self.layer != layer:
            raise invalid("layer", f"the map was fitted at layer {self.layer}, the SAE is served at layer {layer}")
        if model is not None and self.model != model:
            raise invalid("model", f"the map was fitted on {show(self.model)}, the model served is {show(model)}")
        if self.latents[-1] >= n_features:
            raise invalid("transfers", f"latent {self.latents[-1]}; the SAE has 0..{n_features - 1}")

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The transfers column by column (little-endian): latent, source (−1 = none), coefficients ``[m, 5]``, unit, active."""
        rows = [(t.alpha, t.beta, t.gamma, t.lo, t.hi) for t in self.transfers]
        return {
            "latent": np.array([t.latent for t in self.transfers], "<i8"),
            "source": np.array([-1 if t.source is None else t.source for t in self.transfers], "<i8"),
            "coefficients": np.array(rows, "<f8") + 0.0,  # -0.0 and 0.0 are one value
            "unit": np.array([UNITS.index(t.unit) for t in self.transfers], "u1"),
            "only_if_active": np.array([t.only_if_active for t in self.transfers], "u1"),
        }

    def header(self) -> dict[str, Any]:
        """All but the transfers, as JSON."""
        return {
            "model": self.model,
            "sae": self.sae,
            "layer": self.layer,
            "scope": _scope_fields(self.scope),
            "gate": None if self.gate is None else _gate_fields(self.gate),
            "provenance": dict(self.provenance),
            "report": dict(self.report),
        }


def invalid(param: str, message: str) -> InterventionError:
    """The error for a map's field."""
    return InterventionError("invalid_artifact", f"{param}: {message}", param)


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, floats that read back as they are; ValueError for NaN, infinities and what JSON has not."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _notes(value: Any, param: str) -> bytes:
    try:
        encoded = canonical_json(value)
        if json.loads(encoded) != value:
            raise ValueError
    except (TypeError, ValueError, RecursionError):
        raise invalid(param, "holds something that JSON cannot carry") from None
    return encoded


def _check_latents(latents: tuple[int, ...], param: str) -> None:
    if not latents:
        raise invalid(param, "names no latent")
    if len(latents) > MAX_LATENTS:
        raise invalid(param, f"has {len(latents)} latents; at most {MAX_LATENTS}")
    if latents != tuple(sorted(set(latents))):
        raise invalid(param, "must be sorted, each latent once")
    if latents[0] < 0:
        raise invalid(param, f"latent {latents[0]}; indices count from 0")


def _check_mentions(scope: MentionTokens) -> None:
    param = "scope.sequences"
    if scope.tokens not in ("last", "all"):
        raise invalid("scope.tokens", f"expected last or all, got {show(scope.tokens)}")
    if not scope.sequences:
        raise invalid(param, "names no token sequence")
    if len(scope.sequences) > MAX_SEQUENCES:
        raise invalid(param, f"has {len(scope.sequences)} sequences; at most {MAX_SEQUENCES}")
    if scope.sequences != tuple(sorted(set(scope.sequences))):
        raise invalid(param, "must be sorted, each sequence once")
    for i, sequence in enumerate(scope.sequences):
        if not 1 <= len(sequence) <= MAX_SEQUENCE:
            raise invalid(f"{param}[{i}]", f"has {len(sequence)} tokens; from 1 to {MAX_SEQUENCE}")
        if min(sequence) < 0:
            raise invalid(f"{param}[{i}]", f"token id {min(sequence)}; ids count from 0")


def _scope_fields(scope: Scope) -> dict[str, Any]:
    if isinstance(scope, TriggerTokens):
        return {"kind": "trigger", "latents": list(scope.latents)}
    if isinstance(scope, MentionTokens):
        sequences = [list(sequence) for sequence in scope.sequences]
        return {"kind": "mentions", "sequences": sequences, "tokens": scope.tokens, "names": list(scope.names)}
    return {"kind": "all"}


def _gate_fields(gate: SequenceGate) -> dict[str, Any]:
    kind = next(kind for kind, cls in GATES.items() if isinstance(gate.gate, cls))
    facts = None if gate.calibration is None else _plain(gate.calibration)
    return {"kind": kind, **_plain(gate.gate), "evidence": list(gate.evidence), "calibration": facts}


def _plain(facts: Gate | Calibration) -> dict[str, Any]:
    """The fields as JSON; whole numbers of float fields as floats, so that equal content is written alike."""
    found = {f.name: (getattr(facts, f.name), f.type == "float") for f in dataclasses.fields(facts)}
    return {name: float(value) + 0.0 if is_float else value for name, (value, is_float) in found.items()}
