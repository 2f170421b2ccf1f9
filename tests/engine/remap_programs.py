"""Random programs with remaps, scopes and gates, and a worker that runs one request after the other over a paged KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import msgspec
import numpy as np
import torch

from editserver.engine.gates import Blocks
from editserver.engine.journal import Journal
from editserver.engine.worker import EngineWorker
from interventions.oracle import GateFacts, LayerResult, edit_layer, listen, row_source, select
from interventions.program import (
    Channel,
    Gate,
    GateKind,
    LayerProgram,
    Op,
    OpKind,
    Payload,
    Program,
    ReadKind,
    UnitKind,
    feature_key,
    mean_key,
    parse_feature_key,
)
from interventions.selectors import ALL, Selector, slice_selector
from sae_weights import SAE
from tests.engine.dictionaries import N_FEATURES
from tests.engine.kernel_steps import LAYER, D, by_digest, dictionaries, new_worker, random_op, random_selector

BLOCK, N_BLOCKS = 4, 40
VOCAB = 5


def read_kind(sae: SAE, *, evidence: bool = False) -> ReadKind:
    if sae.row_separable:
        return ReadKind.LATENT
    return ReadKind.MEMBER if evidence or sae.additive else ReadKind.JOINT


LISTENING = tuple(kind for kind in GateKind if kind is not GateKind.RULE)
"""Gates with evidence of their own; those of rules are tested in ``test_rules_kernel``."""


def random_gate(random: np.random.Generator, sae: SAE, kind: GateKind | None = None) -> Gate:
    kind = LISTENING[int(random.integers(len(LISTENING)))] if kind is None else kind
    latents = random.choice(N_FEATURES, int(random.integers(1, 4)), replace=False).tolist()
    evidence = tuple(sorted(feature_key(sae.digest, i) for i in latents))
    read = read_kind(sae, evidence=True)
    if kind is GateKind.TRIGGER:
        return Gate(kind, read, evidence)
    window = int(random.integers(1, 9))
    cusum = kind is GateKind.CUSUM
    return Gate(
        kind,
        read,
        evidence,
        float(random.uniform(0, 3)) if cusum else float(random.uniform(0, 0.9)),
        int(random.integers(1, window + 1)),
        window if kind is GateKind.WINDOW else 0,
        float(random.uniform(0, 0.9)) if cusum else 0.0,
        bool(random.integers(2)) and cusum,
        bool(random.integers(2)) and kind is not GateKind.SHARE_PROMPT,
        bool(random.integers(2)),
    )


def random_mentions(random: np.random.Generator) -> Selector:
    sequences = {tuple(random.integers(0, VOCAB, int(random.integers(1, 4))).tolist()) for _ in range(3)}
    return Selector(ends=tuple(sorted(sequences)), include_bos=bool(random.integers(2)))


def random_remap(random: np.random.Generator, sae: SAE, op: Op, unit: UnitKind | None = None) -> Op:
    unit = UnitKind(int(random.integers(len(UnitKind)))) if unit is None else unit
    source = feature_key(sae.digest, int(random.integers(N_FEATURES))) if random.integers(2) else ""
    return msgspec.structs.replace(
        op,
        kind=OpKind.REMAP,
        alpha=float(np.float32(random.choice([0.0, 1.0, random.normal()]))),
        beta=float(np.float32(random.normal() * (0.1 if unit is UnitKind.RESIDUAL_NORM else 3))),
        lo=-math.inf if random.integers(2) else float(np.float32(-random.uniform(0, 20))),
        hi=math.inf if random.integers(2) else float(np.float32(random.uniform(0, 20))),
        unit=unit,
        mean=mean_key(sae.digest) if unit is UnitKind.PREACT_MEAN else "",
        gamma=float(np.float32(random.normal() * 2)) if source else 0.0,
        source=source,
    )


def random_program(random: np.random.Generator, prompt_len: int, names: Sequence[str] | None = None) -> Program:
    """Remaps beside other ops on one or two dictionaries, behind mentions and gates of every kind."""
    every = sorted(dictionaries()[1])
    names = names or [every[i] for i in random.choice(len(every), 2, replace=False)]
    selectors = (ALL, slice_selector(2, None), random_selector(random, prompt_len), random_mentions(random))
    gates = tuple(random_gate(random, dictionaries()[1][names[random.integers(len(names))]]) for _ in range(3))
    channels: dict[tuple[ReadKind, str], Channel] = {}
    for _ in range(random.integers(1, 6)):
        sae = dictionaries()[1][names[random.integers(len(names))]]
        ops = []
        for _ in range(random.integers(1, 4)):
            op = random_op(random, 3)
            op = random_remap(random, sae, op) if random.random() < 0.75 else op
            behind = tuple(sorted(set(random.integers(0, 3, int(random.integers(0, 3))).tolist())))
            scope = int(random.choice([-1, -1, 2, 3]))
            ops.append(msgspec.structs.replace(op, gates=behind, scope=scope))
        key = feature_key(sae.digest, int(random.integers(N_FEATURES)))
        channels[read_kind(sae), key] = Channel(read_kind(sae), key, tuple(ops))
    layer = LayerProgram(LAYER, tuple(channels[k] for k in sorted(channels)), gates)
    max_dose = float(np.float32(random.choice([np.inf, np.inf, 1.5])))
    return Program((layer,), selectors, {}, max_dose)


@dataclass(frozen=True)
class Run:
    """One request from its first token to its last: ``hidden [n, D]`` before the edit."""

    program: Program
    ids: torch.Tensor
    prompt_len: int
    hidden: torch.Tensor

    @property
    def payload(self) -> Payload:
        return Payload(self.program, (), self.program.digest())

    def expected(self) -> tuple[LayerResult, tuple[GateFacts, ...]]:
        """The oracle's word."""
        h, layer = self.hidden.float(), self.program.layers[0]
        rows = cache(row_source(self.program.vectors, by_digest()))
        members = cache(lambda digest: by_digest()[digest].encode(h))
        opened, facts = listen(h, layer, rows, members, self.prompt_len)
        selected = select(self.program.selectors, torch.arange(len(h)), self.ids, self.prompt_len)
        result = edit_layer(
            h,
            layer,
            selected,
            rows,
            members,
            self.program.max_dose,
            self.program.refuse_over_dose,
            lambda digest, z, edited: by_digest()[digest].delta(h, z, edited),
            opened,
        )
        return result, facts

    def doubtful(self) -> torch.Tensor:
        """Tokens at which the last bit may decide whether some latent that the program knows of is on, bool ``[n]``."""
        layer = self.program.layers[0]
        keys = {c.row for c in layer.channels} | {k for g in layer.gates for k in g.evidence}
        keys |= {op.source for c in layer.channels for op in c.ops if op.source}
        close = torch.zeros(len(self.hidden), dtype=torch.bool)
        wanted: dict[str, list[int]] = {}
        for digest, index in map(parse_feature_key, sorted(keys)):
            wanted.setdefault(digest, []).append(index)
        noise = torch.Generator().manual_seed(0)
        for digest, indices in wanted.items():
            sae = by_digest()[digest]
            on = sae.encode(self.hidden.float()) != 0
            for _ in range(6):
                moved = self.hidden.float() * (1 + 3e-4 * torch.randn(self.hidden.shape, generator=noise))
                there = (sae.encode(moved) != 0) != on
                close |= there.any(dim=-1) if not sae.row_separable else there[:, indices].any(dim=-1)
        return close


def random_sequence(
    seed: int, dtype: torch.dtype = torch.float32, n: int = 20, names: Sequence[str] | None = None
) -> Run:
    random = np.random.default_rng(seed)
    prompt_len = int(random.integers(1, n + 1))
    program = random_program(random, prompt_len, names)
    ids = torch.from_numpy(random.integers(0, VOCAB, n))
    scale = np.exp(random.normal(size=(n, 1)) * 0.5) * 60 / math.sqrt(D)
    return Run(program, ids, prompt_len, torch.from_numpy(random.normal(size=(n, D)) * scale).to(dtype))


@dataclass
class Server:
    """A worker and its KV blocks; a step runs one chunk of each of some requests."""

    dtype: torch.dtype = torch.float32
    worker: EngineWorker = field(init=False)
    table: np.ndarray = field(default_factory=lambda: np.zeros((8, 16), np.int32))
    journals: dict[str, Journal] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    without_blocks: bool = False

    def __post_init__(self) -> None:
        self.worker = new_worker(self.dtype)

    def add(self, name: str, sequence: Run) -> None:
        keys = sequence.payload.row_keys
        slots = [self.slots.setdefault(key, len(self.slots)) for key in keys]
        self.worker.add_request(
            name, sequence.payload, slots, sequence.prompt_len, sequence.ids[: sequence.prompt_len].tolist()
        )
        self.journals[name] = Journal(sequence.payload)

    def step(
        self, chunks: dict[str, tuple[Run, int, int, int]], wrong: Mapping[str, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """name → (sequence, first, stop, row of the block table); returns the tokens after the edit.

        Of these, as many at the end as ``wrong`` says turn out to be rejected drafts.
        """
        names = list(chunks)
        rows = [row for *_, row in chunks.values()]
        spans = [(s, a, b) for s, a, b, _ in chunks.values()]
        hidden = torch.cat([s.hidden[a:b] for s, a, b in spans])
        start = np.cumsum([0] + [b - a for _, a, b in spans], dtype=np.int32)
        positions = np.concatenate([np.arange(a, b) for _, a, b in spans])
        ids = torch.cat([s.ids[a:b] for s, a, b in spans]).to(torch.int32).numpy()
        blocks = None if self.without_blocks else Blocks(self.table[rows], BLOCK, BLOCK * N_BLOCKS)
        self.worker.begin_step(names, start, positions, ids, blocks)
        self.worker.run(LAYER, hidden, None)
        for name, record in self.worker.end_step().items():
            self.journals[name].add(record.cut(record.n - (wrong or {}).get(name, 0)))
        return {name: hidden[a:b] for name, a, b in zip(names, start[:-1], start[1:], strict=True)}

    def facts(self, name: str) -> list[GateFacts | None]:
        """What the journal says of each gate; None for triggers."""
        layer = self.journals[name].payload.program.layers[0]
        return [
            GateFacts(*self.journals[name].gate(LAYER, i)) if gate.over_sequence else None
            for i, gate in enumerate(layer.gates)
        ]


def heard(facts: Sequence[GateFacts], program: Program) -> list[GateFacts | None]:
    """The oracle's facts as :meth:`Server.facts` has them."""
    gates = program.layers[0].gates
    return [fact if gate.over_sequence else None for fact, gate in zip(facts, gates, strict=True)]
