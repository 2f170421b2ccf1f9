"""The programs of the self-test's made-up requests: every transfer function, way of reading, gate and kind of rule at one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from editserver.engine.triton.encode import Weights
from editserver.engine.triton.self_test_made import EVERYWHERE, Made, Request, op, payload, stream_of
from interventions.program import (
    Channel,
    Gate,
    GateKind,
    OpKind,
    Payload,
    Read,
    ReadKind,
    UnitKind,
    mean_key,
    parse_feature_key,
)
from interventions.rules.code import (
    ActionCode,
    Branch,
    ConclusionCode,
    MemoryCode,
    MemoryKind,
    OpCode,
    PropositionCode,
    RuleCode,
    RuleProgram,
)
from interventions.selectors import ALL, GENERATED, LAST_PROMPT_TOKEN, PROMPT, Selector
from sae_weights.input_norm import INPUT_NORMS, InputNorm

EDITS, GATES, MENTIONS, RULES, WHOLE = (
    "edits and inspections",
    "gates over sequences",
    "mentions",
    "rules",
    "whole dictionaries",
)
"""Stages of the device's engine."""

# -- edits and inspections ------------------------------------------------------------------------------------------


def edits(made: Made, layer: int, lengths: Sequence[int]) -> list[Request]:
    """Vectors, then a dictionary of each input norm; of so many tokens each, anywhere in their sequences."""
    payloads = [_steering(made, layer)] + [_latents(made, layer, norm, i) for i, norm in enumerate(INPUT_NORMS)]
    return [
        Request(EDITS, one, i % 3 + 1 + n // 2, made.tokens(n), made.halves(n), i % 3)
        for i, (one, n) in enumerate(zip(payloads, lengths, strict=True))
    ]


def _steering(made: Made, layer: int) -> Payload:
    """Vectors: added, added in units of ‖h‖, projected out, capped; nothing of a dictionary."""
    none, norm, dot, cap = (made.unit() for _ in range(4))
    channels = (
        Channel(ReadKind.NONE, none, (op(1.0, 4.0), op(0.5, 0.0, selector=1, intervention=1))),
        Channel(ReadKind.NORM, norm, (op(1.0, 0.125, selector=1, intervention=2),)),
        Channel(ReadKind.DOT, dot, (op(0.0, 0.0, intervention=3),)),
        Channel(ReadKind.DOT, cap, (op(1.0, 0.0, -0.25, 0.25, intervention=4),)),
    )
    return payload(made, layer, channels, (ALL, PROMPT))


def _latents(made: Made, layer: int, norm: InputNorm, number: int) -> Payload:
    """A dictionary's latents through every transfer function, behind a trigger here and a scope there; and inspected."""
    key = made.dictionary(norm)
    digest, _ = parse_feature_key(key[0])
    remap: dict[str, Any] = {"kind": OpKind.REMAP, "intervention": 3}
    residual = op(1.0, 0.05, unit=UnitKind.RESIDUAL_NORM, **remap)
    mean: dict[str, Any] = {"unit": UnitKind.PREACT_MEAN, "mean": mean_key(digest)}
    channels = (
        Channel(ReadKind.LATENT, key[0], (op(0.0, 2.0), op(1.5, 0.0, hi=2.5, selector=1, intervention=1))),
        Channel(ReadKind.LATENT, key[1], (op(0.0, 0.0, 0.2, 1.5, kind=OpKind.RANGE, intervention=2),)),
        Channel(ReadKind.LATENT, key[2], (op(1.0, 0.0, kind=OpKind.GAIN, strength=0.75, table=made.table()),)),
        Channel(ReadKind.LATENT, key[3], (op(0.5, 1.0, source=key[4], gamma=1.25, **remap), residual)),
        Channel(ReadKind.LATENT, key[4], (op(1.0, 0.5, only_if_active=True, **mean, **remap),)),
        Channel(ReadKind.LATENT, key[5], (op(3.0, 0.0, gates=(0,), scope=2, intervention=4),)),
    )
    gate = Gate(GateKind.TRIGGER, ReadKind.LATENT, (key[1], key[2]))
    selectors = (ALL, GENERATED if number % 2 else LAST_PROMPT_TOKEN, Selector(ALL.ranges, (2,), True))
    reads = (Read(digest, layer, (1, 3), 0, ALL, False), Read(digest, layer, (0, 5), 0, PROMPT, True))
    policy = {"max_dose": (math.inf, 0.5, 0.5)[number % 3], "refuse_over_dose": number % 3 == 2}
    return payload(made, layer, channels, selectors, reads, (gate,), **policy)


# -- what looks back ------------------------------------------------------------------------------------------------


HEARD = ("100100001", "010000000", "001100010", "000001100", "001000101", "000110001")
"""Where each latent of the gates' dictionary is active: every gate below opens, and every one but those that latch shuts."""

SAID = ("011000010", "000000000", "010000100", "000100100", "000001100", "100001111")
"""Where each of the rules' is: latches, durations, counts, windows and orders make a difference."""

NAMED = (0, 2, 3, 1, 2, 0), (1, 2, 3)
"""First and last tokens of the text with mentions: almost a name, and at its end one."""


def gates(made: Made, layer: int, n: int) -> Request:
    """Every statistic over a sequence of ``n`` tokens, and a trigger; an op behind each."""
    key = made.dictionary()

    def over(kind: GateKind, i: int, threshold: float, **more: Any) -> Gate:
        return Gate(kind, ReadKind.LATENT, (key[i], key[i + 1]), threshold, **more)

    found = (
        Gate(GateKind.TRIGGER, ReadKind.LATENT, (key[0], key[5])),
        over(GateKind.SHARE_PROMPT, 0, 0.3, include_bos=True),
        over(GateKind.SHARE_SEEN, 1, 0.55, least=3),
        over(GateKind.WINDOW, 2, 0.5, least=2, window=3),
        over(GateKind.WINDOW, 3, 0.9, window=2, latch=True),
        over(GateKind.CUSUM, 4, 0.75, k=0.625),
    )
    ops = tuple(op(1.0, 0.5, intervention=i, gates=(i,)) for i in range(len(found)))
    channel = Channel(ReadKind.NONE, made.unit(), ops)
    carried = payload(made, layer, (channel,), gates=found)
    return Request(GATES, carried, n // 2, made.tokens(n), made.evident(key, HEARD, n))


def mentions(made: Made, layer: int, n: int) -> Request:
    """Names of one token and of several, which end in this step and begin in earlier ones."""
    ids = made.tokens(n)
    for where, given in zip((slice(6), slice(n - 3, n)), NAMED, strict=True):
        ids[where] = torch.tensor(given)[: len(ids[where])]
    selectors = (Selector(ends=(NAMED[1], (0,))), Selector(ends=((0,), (2, 3)), include_bos=True))
    ops = tuple(op(1.0, 0.5, selector=i, intervention=i) for i in range(2))
    channel = Channel(ReadKind.NORM, made.unit(), ops)
    return Request(MENTIONS, payload(made, layer, (channel,), selectors), n // 2, ids, made.halves(n))


def rules(made: Made, layer: int, n: int) -> Request:
    """Sums and a tree; counts, windows and orders; bodies of every connective, latches, and actions of every duration."""
    key = made.dictionary()
    tree = (
        Branch(0, False, 0.5, 1, 2),
        Branch(-1, value=1.0),
        Branch(1, True, 0.25, 3, 4),
        Branch(-1, value=0.25),
        Branch(-1, value=-1.0),
    )
    propositions = (
        PropositionCode(layer, False, (key[0], key[1]), (1.0, -1.0), (), True, 0.0),
        PropositionCode(layer, False, (key[2], key[3]), (), tree, False, 0.25),
        PropositionCode(layer, False, (key[4], key[5]), (0.5, 0.75), (), True, 0.25),
    )
    zero, one, two = (((int(OpCode.PROPOSITION), i),) for i in range(3))
    neither, both, either, odd = (((int(code), 0),) for code in (OpCode.NOT, OpCode.AND, OpCode.OR, OpCode.XOR))
    memories = (
        MemoryCode(layer, MemoryKind.COUNT, (zero,), least=2),
        MemoryCode(layer, MemoryKind.COUNT, (one,), over_prompt=True, share=200_000),
        MemoryCode(layer, MemoryKind.WINDOW, ((*zero, *two, *either),), least=2, window=3),
        MemoryCode(layer, MemoryKind.ORDER, (zero, one, (*zero, *neither))),
    )
    counted, shared, lately, ordered = (((int(OpCode.MEMORY), i),) for i in range(4))
    said = [((int(OpCode.CONCLUSION), i),) for i in range(4)]
    ended = ((int(OpCode.ENDED), 0),)
    bodies = (
        (0, (*zero, *counted, *both)),
        (0, (*two, *neither, *lately, *both)),
        (0, shared),
        (1, (*said[0], *said[1], *odd)),
        (1, (*said[2], *ordered, *either, *ended, *both)),
    )
    conclusions = (
        ConclusionCode(layer),
        ConclusionCode(layer, latch=True),
        ConclusionCode(layer, closed=True),
        ConclusionCode(layer),
        ConclusionCode(layer),
    )
    actions = (ActionCode(0, tokens=2), ActionCode(3), ActionCode(4, tokens=0))
    program = RuleProgram(
        propositions,
        memories,
        tuple(RuleCode(group, body, head) for head, (group, body) in enumerate(bodies)),
        conclusions,
        actions,
    )
    follows = tuple(Gate(GateKind.RULE, ReadKind.LATENT, (), action=i) for i in range(len(actions)))
    ops = tuple(op(1.0, 0.5, intervention=i, gates=(i,)) for i in range(len(actions)))
    channel = Channel(ReadKind.NONE, made.unit(), ops)
    carried = payload(made, layer, (channel,), gates=follows, rules=program)
    return Request(RULES, carried, n // 2, made.tokens(n), made.evident(key, SAID, n))


# -- whole dictionaries ---------------------------------------------------------------------------------------------


def whole(made: Made, layer: int, digest: str, weights: Weights, top: int, n: int) -> Request:
    """Latents of one of the server's dictionaries whose activations need all of it: edited, listened to and inspected; of a
    dictionary of single rows its largest ones are inspected. ``top``: most of one token that are kept."""
    made.whole(digest, weights)
    halves, ids = made.awake(digest, n), made.tokens(n)
    most = min(5, top, made[digest].n_features)
    before, after = (Read(digest, layer, (), most, ALL, edited) for edited in (False, True))
    if made[digest].row_separable:
        channel = Channel(ReadKind.NONE, made.unit(), (op(1.0, 4.0),))
        return Request(WHOLE, payload(made, layer, (channel,), reads=(before, after)), n, ids, halves)
    keys = made.marginal(digest, stream_of(halves).float(), 3)
    features = tuple(parse_feature_key(key)[1] for key in keys)
    listed = Read(digest, layer, features, most, EVERYWHERE, False)
    evidence = tuple(sorted(keys[:2]))
    listens = (
        Gate(GateKind.TRIGGER, ReadKind.MEMBER, evidence),
        Gate(GateKind.SHARE_SEEN, ReadKind.MEMBER, evidence, 0.5),
    )
    remap: dict[str, Any] = {"kind": OpKind.REMAP, "gamma": 1.25, "source": keys[1]}
    behind = tuple(op(1.0, 0.25, intervention=2 + i, gates=(i,)) for i in range(len(listens)))
    channels = (
        Channel(ReadKind.MEMBER, keys[0], (op(2.0, 0.5),)),
        Channel(ReadKind.MEMBER, keys[2], (op(0.5, 1.0, intervention=1, **remap),)),
        Channel(ReadKind.NONE, made.unit(), behind),
    )
    return Request(WHOLE, payload(made, layer, channels, reads=(listed, after), gates=listens), n, ids, halves)
