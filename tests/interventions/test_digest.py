"""Digests are promises: logs, receipts and what is kept with a KV cache name programs by them, across releases."""

from __future__ import annotations

import math

import pytest

from interventions.program import (
    Channel,
    Gate,
    GateKind,
    LayerProgram,
    Op,
    OpKind,
    Program,
    ReadKind,
    UnitKind,
    feature_key,
    mean_key,
)
from interventions.selectors import ALL, END, GENERATED, START, Range, Selector

INF = math.inf
SAE = "ab" * 32
LATENT = feature_key(SAE, 7)
EVERY = Selector((Range(START, END),), (), True)
GATE = Gate(GateKind.WINDOW, ReadKind.LATENT, (LATENT,), 0.5, window=8)
ADD = Op(1.0, -0.0, -INF, INF, False, 0, 3)
SCOPED = Op(0.5, 2.0, 0.0, 9.0, True, 1, 0, scope=0)
RANGE = Op(1.0, 0.0, -INF, INF, False, 0, 0, kind=OpKind.RANGE)
GAIN = Op(1.0, 0.0, -INF, INF, False, 0, 0, kind=OpKind.GAIN, strength=0.25, table="v:" + "cd" * 32)
MEAN, SOURCE = mean_key(SAE), feature_key(SAE, 9)
MOVE = Op(
    1.0, 0.5, -INF, INF, True, 1, 0, OpKind.REMAP, gamma=2.0, source=SOURCE, unit=UnitKind.PREACT_MEAN, mean=MEAN, gates=(0,)
)  # fmt: skip

ONE_EDIT = Program(
    (LayerProgram(0, (Channel(ReadKind.LATENT, LATENT, (Op(1.0, 2.0, -INF, INF, False, 0, 0),)),)),), (ALL,), {}
)
ALL_KINDS = Program(
    (
        LayerProgram(
            3,
            (
                Channel(ReadKind.NONE, "v:" + "01" * 32, (ADD,)),
                *(Channel(ReadKind.LATENT, LATENT, (op,)) for op in (ADD, SCOPED, RANGE, GAIN, MOVE)),
            ),
            (GATE,),
        ),
        LayerProgram(5, (Channel(ReadKind.DOT, "v:" + "23" * 32, (SCOPED,)),)),
    ),
    (EVERY, GENERATED),
    {},
    0.75,
    True,
)


@pytest.mark.parametrize(
    ("program", "digest"),
    [
        (ONE_EDIT, "759c0857710c62b59576501970eb8ebbdc88a9f700130b947e0ff2d027435229"),
        (ALL_KINDS, "84116aaa423f172d154e509e01be0f456e4511aff2af930dbcda1e9000d719de"),
    ],
    ids=["one edit", "all kinds"],
)
def test_a_programs_digest_stays_what_it_was(program: Program, digest: str) -> None:
    assert program.digest() == digest
