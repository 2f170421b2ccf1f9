"""From a map and a strength to one instruction per transfer, with the scope and the gates under which it acts.

Equal meanings get equal parts, so that requests which mean the same share KV: a transfer without source or unit is a plain
affine op, mentions of one token are token ids, of two mentions that end alike the shorter one says it all, and a gate
keeps only the fields that its kind looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from interventions.errors import InterventionError
from interventions.instruction import Instruction, rounded
from interventions.maps.gates import STEP, CusumGate, WindowGate
from interventions.maps.map import LatentMap, MentionTokens, Scope, SequenceGate, TriggerTokens, invalid
from interventions.maps.transfer import Transfer, Unit
from interventions.program import Gate, GateKind, OpKind, ReadKind, UnitKind, feature_key, mean_key
from interventions.selectors import Selector
from interventions.wording import show

UNIT_KINDS = {
    Unit.ABSOLUTE: UnitKind.ABSOLUTE,
    Unit.RESIDUAL_NORM: UnitKind.RESIDUAL_NORM,
    Unit.PREACT_MEAN: UnitKind.PREACT_MEAN,
}


@dataclass(frozen=True)
class Remapped:
    """What becomes of a map.

    Attributes:
        parts: latent and instruction of every transfer, in the map's order; some may be identities.
        scope: the mentions, unresolved; ``None`` = every token.
        gate: the sequence gate.
        rows: row keys of the latents that are only listened to.
    """

    parts: tuple[tuple[int, Instruction], ...]
    scope: Selector | None
    gate: Gate | None
    rows: tuple[str, ...]


def remapped(map_: LatentMap, strength: float, read: ReadKind, base: Instruction) -> Remapped:
    """The map at a request's strength.

    Args:
        map_: fitted on an SAE that is served.
        strength: λ ≥ 0.
        read: how that SAE's latents are read in order to be edited.
        base: has selector and intervention.

    Raises:
        InterventionError: ``invalid_intervention``, ``param`` "strength": coefficients beyond float32.
    """
    listens = ReadKind.LATENT if read is ReadKind.LATENT else ReadKind.MEMBER

    def keys(latents: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(sorted(feature_key(map_.sae, latent) for latent in latents))

    gate = None if map_.gate is None else _sequence_gate(map_.gate, listens, keys)
    scope = _mentions(map_.scope, base.selector)
    gates = () if gate is None else (gate,)
    if isinstance(map_.scope, TriggerTokens):
        gates = (Gate(GateKind.TRIGGER, listens, keys(map_.scope.latents)), *gates)
    base = replace(base, scope=scope, gates=gates)
    try:
        made = [(one.latent, _instruction(map_.sae, one.at(strength), base)) for one in map_.transfers]
    except OverflowError as error:
        raise InterventionError("invalid_intervention", f"{error} at strength {show(strength)}", "strength") from None
    listened = {key for one in gates for key in one.evidence}
    return Remapped(tuple(made), scope, gate, tuple(sorted(listened)))


def check_map(map_: LatentMap, vocab_size: int) -> None:
    """Refuse what no request could run: token ids that the model does not have, coefficients beyond float32.

    Raises:
        InterventionError: ``invalid_artifact``, ``param`` naming the field.
    """
    if isinstance(map_.scope, MentionTokens):
        for i, sequence in enumerate(map_.scope.sequences):
            if max(sequence) >= vocab_size:
                message = f"token id {max(sequence)}; the model has 0..{vocab_size - 1}"
                raise invalid(f"scope.sequences[{i}]", message)
    for i, transfer in enumerate(map_.transfers):
        try:
            _coefficients(transfer)
        except OverflowError as error:
            raise invalid(f"transfers[{i}]", str(error)) from None


def _coefficients(t: Transfer) -> tuple[float, float, float, float, float]:
    """alpha, beta, gamma, lo, hi in float32; OverflowError beyond it. A bound beyond it that says nothing is none."""
    alpha, beta, gamma, lo, hi = (rounded(value) for value in (t.alpha, t.beta, t.gamma, t.lo, t.hi))
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if not math.isfinite(value):
            raise OverflowError(f"{name} of latent {t.latent} is {getattr(t, name):g}, beyond float32,")
    if lo == math.inf or hi == -math.inf:
        name = "lo" if lo == math.inf else "hi"
        raise OverflowError(f"{name} of latent {t.latent} is {getattr(t, name):g}, beyond float32,")
    return alpha, beta, gamma, lo, hi


def _instruction(sae: str, t: Transfer, base: Instruction) -> Instruction:
    alpha, beta, gamma, lo, hi = _coefficients(t)
    plain = replace(base, alpha=alpha, beta=beta, lo=lo, hi=hi, only_if_active=t.only_if_active)
    unit = UNIT_KINDS[t.unit] if beta else UnitKind.ABSOLUTE
    if not gamma and unit is UnitKind.ABSOLUTE:
        return plain
    source = "" if not gamma or t.source is None else feature_key(sae, t.source)
    mean = mean_key(sae) if unit is UnitKind.PREACT_MEAN else ""
    return replace(plain, kind=OpKind.REMAP, gamma=gamma, source=source, unit=unit, mean=mean)


def _mentions(scope: Scope, selector: Selector) -> Selector | None:
    """The tokens of the mentions; position 0 where the request's own selector may hold it."""
    if not isinstance(scope, MentionTokens):
        return None
    if scope.tokens == "all":
        return Selector(include_bos=selector.include_bos, inside=scope.sequences)
    token_ids = tuple(sequence[0] for sequence in scope.sequences if len(sequence) == 1)
    given = set(scope.sequences)
    ends = (s for s in scope.sequences if len(s) > 1 and given.isdisjoint(s[i:] for i in range(1, len(s))))
    return Selector((), token_ids, selector.include_bos, tuple(ends))


def _sequence_gate(given: SequenceGate, read: ReadKind, keys: Callable[[tuple[int, ...]], tuple[str, ...]]) -> Gate:
    rule = given.gate
    threshold = float(rule.threshold) + 0.0  # -0.0 and 0.0 are one threshold
    gate = Gate(GateKind.SHARE_PROMPT, read, keys(given.evidence), threshold, include_bos=rule.include_bos)
    if isinstance(rule, CusumGate):
        k = round(rule.k / STEP) * STEP
        k = k if k < 1.0 else rule.k
        return replace(gate, kind=GateKind.CUSUM, k=k, reset=rule.reset, latch=rule.latch)
    if isinstance(rule, WindowGate):
        return replace(gate, kind=GateKind.WINDOW, window=rule.window, least=rule.least, latch=rule.latch)
    if rule.over == "seen":
        return replace(gate, kind=GateKind.SHARE_SEEN, least=rule.least, latch=rule.latch)
    return gate  # looked at once, and held: nothing else matters
