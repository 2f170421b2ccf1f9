"""What the requests of the serving benchmark carry: every one a program, rules or an inspection of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from benchmarks.rule_sets import STRIDE, flagged
from editserver.engine.config import SAESource
from interventions.program import Channel, LayerProgram, Op, Payload, Program, Read, ReadKind, feature_key
from interventions.selectors import ALL

Kind = Literal["edited", "rules", "inspected"]

PROPOSITIONS, TERMS = 8, 4
RULES = """
rule r01: p0 and p1 -> c01
rule r02: p2 or p3 and not p4 -> c02
rule r03: p5 xor p6 -> c03
rule r04: seen(p7) -> c04
rule r05: p0 -> latch c05
rule r06: last(8, p1) -> c06
rule r07: at least 3 of seen(p2) -> c07
rule r08: at least 40 % of seen(p3) -> c08
rule r09: c01 or c02 -> c09
rule r10: c09 and not c03 -> c10
rule r11: c04 and c06 -> c11
rule r12: c10 or c11 or c05 xor c07 and c08 -> c12
"""
CONCLUSIONS = 12

_INF = float("inf")
ADD = Op(1.0, 0.05, -_INF, _INF, False, 0, 0)
"""f + 0.05: changes every latent at every token, active or not."""


def payload(kind: Kind, request: int, latents: int, saes: Mapping[int, SAESource], width: int) -> bytes:
    """Of request number ``request``, on latents that no other request has, at every layer of ``saes``."""
    first = request * latents
    features = [(first + i) * STRIDE % width for i in range(latents)]
    if len(set(features)) != latents:
        raise ValueError(f"{latents} latents of a dictionary of {width}")
    if kind == "inspected":
        reads = tuple(Read(sae.digest, layer, tuple(features), 0, ALL) for layer, sae in saes.items())
        return Payload(None, reads, None).to_bytes()
    if kind == "rules":
        program = _rules(features, *list(saes.items())[-1])
        return Payload(program, (), program.digest()).to_bytes()
    layers = []
    for layer, sae in saes.items():
        keys = sorted(feature_key(sae.digest, feature) for feature in features)
        layers.append(LayerProgram(layer, tuple(Channel(ReadKind.LATENT, key, (ADD,)) for key in keys)))
    program = Program(tuple(layers), (ALL,), {})
    return Payload(program, (), program.digest()).to_bytes()


def _rules(features: list[int], layer: int, sae: SAESource) -> Program:
    terms = [features[p * TERMS : (p + 1) * TERMS] for p in range(PROPOSITIONS)]
    return Program((), (), {}, rules=flagged(RULES, CONCLUSIONS, terms, sae.id, sae.digest, layer).program)
