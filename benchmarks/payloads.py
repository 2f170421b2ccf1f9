"""What each request of a load carries: compiled programs for an engine, JSON for a server, vectors for a peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

from benchmarks.rule_sets import STRIDE, behind, flagged
from benchmarks.scenarios import D_MODEL, N_BINS, TOP_K, WIDTHS, Ask, Load
from editserver.engine.config import SAESource
from interventions.program import (
    Channel,
    LayerProgram,
    Op,
    OpKind,
    Payload,
    Program,
    Read,
    ReadKind,
    feature_key,
    vector_key,
)
from interventions.selectors import ALL, END, START, Range, Selector

VECTOR_NORM = 4.0
EVERY_TOKEN = Selector((Range(START, END),), (), True)
"""Position 0 as well, which vllm-lens cannot leave out."""

RULES = """
rule r01: p0 and p1 -> c01
rule r02: p2 or p3 and not p4 -> c02
rule r03: p5 xor p6 -> c03
rule r04: seen(p7) -> c04
rule r05: p0 -> latch c05
rule r06: last(8, p1) -> c06
rule r07: at least 3 of seen(p2) -> c07
rule r08: at least 40 % of seen(p3) -> c08
rule r09: seen(p4 before p5) -> c09
rule r10: prompt(p6) and not p7 -> c10
rule r11: c01 or c02 -> c11
rule r12: c11 and not c03 -> c12
rule r13: c04 and c06 -> c13
rule r14: c12 or c13 -> c14
rule r15: c07 xor c08 -> c15
rule r16: c14 and c05 or p6 -> c16
"""

_INF = float("inf")
_ADD = Op(1.0, 0.0, -_INF, _INF, False, 0, 0)


def latents(load: Load, request: int) -> list[int]:
    """The ``load.n`` latents of one request, no two requests the same ones (until the dictionary is used up)."""
    width = WIDTHS[load.dictionary]
    return [(request * load.n + i) * STRIDE % width for i in range(load.n)]


def vectors(load: Load, request: int) -> dict[int, np.ndarray]:
    """Layer → float32 ``[d_model]`` of norm 4: the steering vectors of one request."""
    drawn = np.random.default_rng(request).standard_normal((len(load.layers), D_MODEL)).astype("<f4")
    drawn *= VECTOR_NORM / np.linalg.norm(drawn, axis=1, keepdims=True)
    return dict(zip(load.layers, drawn, strict=True))


def payload(load: Load, request: int, sources: Mapping[str, SAESource]) -> bytes | None:
    """What the engine runs for ``request``: a compiled payload, None for a plain request."""
    digests = {layer: sources[f"{load.dictionary}/l{layer}"].digest for layer in load.layers}
    match load.ask:
        case Ask.NOTHING:
            return None
        case Ask.TOP_K:
            return _payload(reads=tuple(Read(digest, layer, (), TOP_K, ALL) for layer, digest in digests.items()))
        case Ask.INSPECT:
            chosen = tuple(sorted(latents(load, request)))
            return _payload(reads=tuple(Read(digest, layer, chosen, 0, ALL) for layer, digest in digests.items()))
        case Ask.RULES_FLAG | Ask.RULES_STEER:
            return _rules(load, request, digests)
        case Ask.VECTORS:
            return _vectors(load, request)
        case Ask.LATENTS | Ask.APP:
            return _latents(load, request, digests)


def interventions(load: Load, request: int) -> dict[str, Any]:
    """Fields of the HTTP request: the same edits as :func:`payload`, for loads of latents."""
    if load.ask is Ask.NOTHING:
        return {}
    if load.ask is not Ask.LATENTS:
        raise ValueError(f"load {load.id!r} is not measured over HTTP")
    features = [{"index": i, "op": "add", "value": load.amount} for i in latents(load, request)]
    return {
        "interventions": [
            {
                "type": "edit_features",
                "sae": f"{load.dictionary}/l{layer}",
                "features": features,
            }
            for layer in load.layers
        ]
    }


def _payload(program: Program | None = None, reads: tuple[Read, ...] = ()) -> bytes:
    return Payload(program, reads, program.digest() if program else None).to_bytes()


def _latents(load: Load, request: int, digests: Mapping[int, str]) -> bytes:
    kind = ReadKind.MEMBER if load.dictionary == "topk" else ReadKind.LATENT
    rows: dict[str, bytes] = {}
    layers = []
    for layer, digest in digests.items():
        keys = sorted(feature_key(digest, index) for index in latents(load, request))
        add = replace(_ADD, beta=load.amount)
        ops = [_gain(rows, request * load.n + i) if load.ask is Ask.APP else add for i in range(load.n)]
        layers.append(LayerProgram(layer, tuple(Channel(kind, k, (op,)) for k, op in zip(keys, ops, strict=True))))
    return _payload(Program(tuple(layers), (ALL,), rows))


def _gain(rows: dict[str, bytes], seed: int) -> Op:
    row = np.zeros(D_MODEL, "<f4")
    row[:3] = 0.0, N_BINS / 20.0, N_BINS  # activations from 0 to 20
    row[3 : 3 + N_BINS] = np.random.default_rng(seed).uniform(0.1, 0.9, N_BINS)
    key = vector_key(row.tobytes())
    rows[key] = row.tobytes()
    return replace(_ADD, kind=OpKind.GAIN, strength=1.0, table=key)


def _vectors(load: Load, request: int) -> bytes:
    rows, layers = {}, []
    for layer, vector in vectors(load, request).items():
        key = vector_key(vector.tobytes())
        rows[key] = vector.tobytes()
        layers.append(LayerProgram(layer, (Channel(ReadKind.NONE, key, (replace(_ADD, beta=1.0),)),)))
    return _payload(Program(tuple(layers), (EVERY_TOKEN,), rows))


def _rules(load: Load, request: int, digests: Mapping[int, str]) -> bytes:
    ((layer, digest),) = digests.items()
    numbers = np.arange(request * 32, (request + 1) * 32) * STRIDE % WIDTHS[load.dictionary]
    made = flagged(RULES, 16, numbers.reshape(8, 4).tolist(), f"{load.dictionary}/l{layer}", digest, layer)
    op = replace(_ADD, beta=load.amount)
    steer = behind(made.actions[-1], feature_key(digest, 5 * request), op, layer)
    edits = (steer,) if load.ask is Ask.RULES_STEER else ()
    return _payload(Program(edits, (ALL,) if edits else (), {}, rules=made.program))
