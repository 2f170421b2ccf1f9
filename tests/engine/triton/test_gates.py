"""Gates over sequences: what they conclude from bits that lie with the KV, against the oracle on the whole sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from editserver.engine.triton import kernel_gates
from editserver.engine.triton import step as step_module
from editserver.engine.triton.fill import NotOnDevice
from editserver.engine.triton.step import Cache
from interventions.maps.gates import STEP
from interventions.oracle import listen, row_source
from interventions.program import Channel, Gate, GateKind, LayerProgram, Op, Payload, Program, ReadKind, feature_key
from interventions.selectors import ALL
from tests.engine.dictionaries import N_FEATURES
from tests.engine.flat_batches import Part, random_stream
from tests.engine.triton.batches import LAYER, ON, ROWS, TOKENS, Batch, Device, by_digest, dictionaries, f32

D = 40
BLOCK, N_BLOCKS, LONGEST = 4, 24, 20
KINDS = [kind for kind in GateKind if kind not in (GateKind.TRIGGER, GateKind.RULE)]


def random_gate(random: np.random.Generator, kind: GateKind, latch: bool = False) -> Gate:
    sae = dictionaries(D)[1][("standard", "gated", "layer_norm")[random.integers(3)]]
    latents = random.choice(N_FEATURES, 2, replace=False).tolist()
    evidence = tuple(sorted(feature_key(sae.digest, i) for i in latents))
    window = int(random.integers(1, 9))
    cusum = kind is GateKind.CUSUM
    return Gate(
        kind,
        ReadKind.LATENT,
        evidence,
        threshold=f32(random.uniform(0, 2)) if cusum else f32(random.uniform(0.2, 0.8)),
        least=int(random.integers(1, window + 1)),
        window=window if kind is GateKind.WINDOW else 0,
        k=f32(random.uniform(0.2, 0.8)) if cusum else 0.0,
        latch=latch,
        include_bos=bool(random.integers(2)),
    )


def gated(gates: tuple[Gate, ...]) -> Payload:
    """A program with these gates at the layer, and something behind each."""
    sae = dictionaries(D)[1]["jumprelu"]
    ops = tuple(Op(1.0, 0.5, -math.inf, math.inf, False, 0, i, gates=(i,)) for i in range(len(gates)))
    layer = LayerProgram(LAYER, (Channel(ReadKind.LATENT, feature_key(sae.digest, 5), ops),), gates)
    program = Program((layer,), (ALL,), {})
    return Payload(program, (), program.digest())


@dataclass
class Sequence:
    """One request from its first token to its last, and how much of it the device has seen."""

    payload: Payload
    h: torch.Tensor
    prompt_len: int
    done: int = 0

    @property
    def open(self) -> torch.Tensor:
        """The oracle's word: bool ``[gates, n]``."""
        program = self.payload.program
        assert program is not None
        source = row_source(program.vectors, by_digest(D))
        return listen(self.h, program.layers[0], source, None, self.prompt_len)[0]


class Paged(Device):
    """A device with a KV cache of few blocks, dealt out at random."""

    def __init__(self, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(step_module, "GATE_BLOCK", 8)
        super().__init__(D)
        self.free = random.permutation(N_BLOCKS).tolist()
        # A part of something wider: the next row does not begin where one ends.
        self.table = torch.zeros(ROWS, LONGEST // BLOCK + 3, dtype=torch.int32, device=ON)[:, : LONGEST // BLOCK]
        self.slots = torch.full((TOKENS,), -1, dtype=torch.int64, device=ON)
        self.step.attach(Cache(self.table, self.slots, BLOCK, BLOCK * N_BLOCKS))
        self.remembers = True
        self.last: Batch | None = None

    def feed(
        self, sequences: list[tuple[Sequence, list[int], torch.Tensor]], random: np.random.Generator
    ) -> torch.Tensor:
        """One step: per row its sequence, its KV blocks, and the tokens that follow ``done``. The opened bits by token."""
        rows, slots = [], []
        for i, (one, blocks, h) in enumerate(sequences):
            rows.append(Part(one.payload, one.done, one.prompt_len, torch.zeros(len(h), dtype=torch.int64)))
            self.table[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            slots += [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(one.done, one.done + len(h))]
        self.slots.fill_(-1)
        self.slots[: len(slots)] = torch.tensor(slots)
        batch = Batch(tuple(rows), torch.cat([h for _, _, h in sequences]), None)
        self.last = batch
        self.run(batch, random, decode=all(len(h) == 1 for _, _, h in sequences))
        return self.left("opened")[0]


def check(device: Paged, opened: torch.Tensor, fed: list[tuple[Sequence, list[int], torch.Tensor]]) -> int:
    """The step's bits against the oracle; how many are set."""
    at = found = 0
    for i, (one, _, h) in enumerate(fed):
        want = one.open
        for gate in range(len(want)):
            here = want[gate, one.done : one.done + len(h)]
            assert torch.equal((opened[at : at + len(h)] >> gate & 1).bool(), here)
            found += int(here.sum())
            first = torch.nonzero(want[gate, : one.done + len(h)])
            assert device.left("open_from")[0, i, gate, -1] == (int(first[0]) if len(first) else -1)
        at += len(h)
    return found


def start(random: np.random.Generator, device: Paged, n: int) -> tuple[Sequence, list[int]]:
    plain = [random_gate(random, kind) for kind in KINDS]
    latched = random_gate(random, KINDS[1 + random.integers(len(KINDS) - 1)], latch=True)
    gates = (*plain, latched)
    h = random_stream(random, n, D, torch.float32, False)[0]
    blocks = [device.free.pop() for _ in range(-(-n // BLOCK))]
    return Sequence(gated(gates), h, int(random.integers(2, n))), blocks


@pytest.mark.parametrize("seed", range(2))
def test_chunks_of_any_size_conclude_what_the_whole_sequence_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    device = Paged(random, monkeypatch)
    both = [start(random, device, 11), start(random, device, 7)]
    opened = 0
    while any(one.done < len(one.h) for one, _ in both):
        live = [pair for pair in both if pair[0].done < len(pair[0].h)]
        fed = [(one, blocks, one.h[one.done : one.done + int(random.choice([1, 5]))]) for one, blocks in live]
        opened += check(device, device.feed(fed, random), fed)
        for one, _, h in fed:
            one.done += len(h)
    assert opened


def test_a_rejected_draft_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    device = Paged(random, monkeypatch)
    one, blocks = start(random, device, 12)
    draft = Sequence(
        one.payload, torch.cat([one.h[:6], random_stream(random, 6, D, torch.float32, False)[0]]), one.prompt_len
    )
    assert not torch.equal(draft.open[:, 6:10], one.open[:, 6:10])
    device.feed([(one, blocks, one.h[:6])], random)
    one.done = draft.done = 6
    fed = [(draft, blocks, draft.h[6:10])]
    check(device, device.feed(fed, random), fed)
    fed = [(one, blocks, one.h[6:12])]
    check(device, device.feed(fed, random), fed)


def test_a_prefix_that_another_request_computes_in_the_same_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(6)
    device = Paged(random, monkeypatch)
    one, blocks = start(random, device, 12)
    other = Sequence(
        one.payload, torch.cat([one.h[:8], random_stream(random, 3, D, torch.float32, False)[0]]), one.prompt_len, 8
    )
    fed = [(other, [*blocks[:2], device.free.pop()], other.h[8:]), (one, blocks, one.h)]
    assert check(device, device.feed(fed, random), fed)


def test_without_a_cache_or_with_resets_they_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(7)
    device = Paged(random, monkeypatch)
    one, blocks = start(random, device, 4)
    device.remembers = False
    with pytest.raises(NotOnDevice, match="kept with the KV"):
        device.feed([(one, blocks, one.h)], random)
    device.remembers = True
    gate = Gate(
        GateKind.CUSUM, ReadKind.LATENT, one.payload.program.layers[0].gates[0].evidence, 1.0, k=0.5, reset=True
    )
    with pytest.raises(NotOnDevice, match="after an alarm"):
        device.feed([(Sequence(gated((gate,)), one.h, 2), blocks, one.h)], random)


def test_its_step_is_the_gates() -> None:
    assert kernel_gates.STEPS.value == 1 / STEP
