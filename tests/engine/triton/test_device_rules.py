"""Rules on the device against the plain machine: any chunks, batches, prefix hits, preemptions and rejected drafts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache

import msgspec
import numpy as np
import pytest
import torch

from editserver.engine.resident import Resident, ResidentSet
from editserver.engine.rows import Dictionaries, RowBank
from editserver.engine.rule_table import RuleRun
from editserver.engine.triton import rules as rules_module
from editserver.engine.triton.capacity import Capacity, RuleCapacity
from editserver.engine.triton.encode import DeviceEncode, EncodeCapacity
from editserver.engine.triton.fill import NotOnDevice, fill
from editserver.engine.triton.readout import take
from editserver.engine.triton.step import Cache, DeviceStep, Stages
from interventions.program import Payload, Read, parse_feature_key
from interventions.rules.code import (
    ActionCode,
    ConclusionCode,
    MemoryCode,
    MemoryKind,
    OpCode,
    PropositionCode,
    RuleCode,
    RuleProgram,
)
from interventions.rules.machine import Machine, RuleTrace, holds, scores
from interventions.selectors import ALL, Selector
from tests.engine.rule_programs import random_program
from tests.engine.test_rules_kernel import (
    BLOCK,
    LAYERS,
    LONGEST,
    N_BLOCKS,
    D,
    Server,
    Text,
    dictionaries,
    keys,
    streams,
)
from tests.engine.triton.batches import ON

EVERYWHERE = Selector(ALL.ranges, (), True)
CAPACITY = Capacity(
    tokens=64,
    rows=6,
    residents=12,
    selectors=64,
    intervals=128,
    wanted_ids=16,
    channels=64,
    ops=256,
    reads=512,
    request_channels=12,
    request_reads=24,
    listed=300,
    members=16,
    bank_rows=1024,
)
RULES = RuleCapacity(requests=10, rows=4096)


@cache
def named() -> dict[int, list[list[str]]]:
    """What programs may name, by layer: all dictionaries but the one that no device encodes."""
    joint = dictionaries()[1]["polysae"].digest
    return {layer: [sae for sae in saes if parse_feature_key(sae[0])[0] != joint] for layer, saes in keys()[0].items()}


def steps(program: RuleProgram) -> int:
    parts = [rule.body for rule in program.rules] + [part for memory in program.memories for part in memory.parts]
    return sum(map(len, parts))


def text_of(rng: np.random.Generator, n: int, most: int = 22) -> Text:
    """Of a program that is not too long for the interpreter."""
    while True:
        program = random_program(rng, named(), keys()[1])
        if 10 < steps(program) <= most and len(program.propositions) <= 8 and program.memories:
            return Text(program, int(rng.integers(1, n + 1)), streams(rng, n))


class DeviceServer(Server):
    """A device, its KV blocks, and requests that come, stand back and come again."""

    def __init__(self, rules: RuleCapacity | None = RULES) -> None:
        super().__init__()
        self.dictionaries = Dictionaries(dictionaries()[0])
        config = dataclasses.replace(dictionaries()[0], full_encode=("topk",))
        small = EncodeCapacity(rows=32, programs=1)
        encode = DeviceEncode(small, config, self.dictionaries, CAPACITY.tokens, CAPACITY.residents, D, ON)
        stages = Stages(after=False)
        self.device = DeviceStep(CAPACITY, LAYERS, D, ON, stages, lanes=5, rules=rules, encode=encode)
        self.bank = RowBank(CAPACITY.bank_rows, D, self.dictionaries)
        self.residents = ResidentSet(self.dictionaries, LAYERS)
        width = LONGEST // BLOCK + 2  # a part of something wider: the next row does not begin where one ends
        self.table = torch.zeros(CAPACITY.rows, width + 3, dtype=torch.int32, device=ON)[:, :width]
        self.kv = torch.full((CAPACITY.tokens,), -1, dtype=torch.int64, device=ON)
        self.device.attach(Cache(self.table, self.kv, BLOCK, BLOCK * N_BLOCKS))
        self.opened: dict[int, torch.Tensor] = {}

    def add(self, name: str, text: Text, shared: list[int] = []) -> None:  # noqa: B006  never changed
        super().add(name, text, shared)
        self.settle(name, text.payload, text.prompt_len)

    def settle(self, name: str, payload: Payload, prompt_len: int) -> None:
        slots = {key: self.slots.setdefault(key, len(self.slots)) for key in payload.row_keys}
        at = torch.tensor(list(slots.values()), dtype=torch.int64)
        self.bank.upload(list(slots), list(slots.values()), payload.program.vectors if payload.program else {})
        self.device.bank.put(at, self.bank.read[at], self.bank.write[at], self.bank.gate[at])
        self.residents.add(Resident(name, payload, prompt_len, slots, rules=RuleRun.of(payload.program)))

    def step(self, chunks: dict[str, int], plain: int = 0, wrong: Mapping[str, int] | None = None) -> None:
        wrong = wrong or {}
        sizes = {name: min(n, len(self.texts[name]) - self.at[name]) for name, n in chunks.items()}
        names = [name for name, n in sizes.items() if n]
        if not names:
            return
        parts: dict[int, list[torch.Tensor]] = {layer: [torch.zeros(plain, D)] for layer in LAYERS}
        rows: list[str | None] = [None, *names] if plain else [*names]
        positions, slots = [np.arange(plain)] if plain else [], [-1] * plain
        for row, name in enumerate(names, len(rows) - len(names)):
            start, own = self.at[name], self.at[name] + sizes[name]
            stop = own + wrong.get(name, 0)
            while len(self.held[name]) * BLOCK < stop:
                self.held[name].append(self.free.pop())
            blocks = self.held[name]
            self.table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            slots += [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, stop)]
            positions.append(np.arange(start, stop))
            for layer in LAYERS:
                parts[layer] += [self.texts[name].h[layer][start:own], 9 * torch.randn(stop - own, D)]
            self.at[name] = own
        self.kv.fill_(-1)
        self.kv[: len(slots)] = torch.tensor(slots)
        self.forward(rows, parts, positions)
        known = {name: [0] * len(self.texts[name]) for name in names}
        requests = [self.residents.requests[name] if name else None for name in rows]
        records = take(self.device, requests, len(slots), known).records()
        assert set(records) == set(names)
        for name, record in records.items():
            self.journals[name].add(record.cut(sizes[name]))

    def forward(
        self, names: list[str | None], parts: Mapping[int, list[torch.Tensor]], positions: list[np.ndarray]
    ) -> None:
        self.residents.refresh()
        device = self.device
        fill(device.tables, self.residents, remembers=True, rules=device.rules, encode=device.encode)
        mapped = np.full(CAPACITY.residents, -1, np.int32)
        mapped[: len(names)] = [self.residents.index.get(name, -1) if name else -1 for name in names]
        self.device.tables.map_slots(mapped)
        lengths, flat = [len(p) for p in positions], np.concatenate(positions)
        arrays = (np.cumsum([0, *lengths], dtype=np.int32), np.arange(len(names)), flat, np.zeros(len(flat), np.int32))
        on_device = (torch.from_numpy(one).to(ON) for one in arrays)
        self.device.plan(*on_device, len(names), len(flat), max(lengths))
        for layer in LAYERS:
            hidden = torch.cat(parts[layer]).to(ON)
            self.device.run(layer, hidden, None, max(lengths) == 1)

    def meant(self, name: str, n: int) -> RuleTrace:
        text = self.texts[name]
        acts, propositions = activations(text), text.program.propositions
        score = np.zeros((n, len(propositions)), np.float32)
        for i, one in enumerate(propositions):
            score[:, i] = scores(one, np.stack([acts[key][:n] for key in one.features], axis=1))
        held = np.array([holds(one, score[:, i]) for i, one in enumerate(propositions)]).T
        return Machine(text.program, text.prompt_len).run(held, score)


SEEN: dict[int, tuple[Text, dict[str, np.ndarray]]] = {}


def activations(text: Text) -> dict[str, np.ndarray]:
    """Of what the program names, as inspections of the device show them."""
    if id(text) not in SEEN:
        SEEN[id(text)] = text, _activations(text)
    return SEEN[id(text)][1]


def _activations(text: Text) -> dict[str, np.ndarray]:
    wanted: dict[tuple[int, str], dict[str, int]] = {}
    for one in text.program.propositions:
        for key in one.features:
            digest, index = parse_feature_key(key)
            wanted.setdefault((one.layer, digest), {})[key] = index
    reads = tuple(Read(digest, layer, tuple(k.values()), 0, EVERYWHERE) for (layer, digest), k in wanted.items())
    reader = DeviceServer()
    reader.settle("reader", Payload(None, reads, None), 1)
    reader.forward(["reader"], {layer: [text.h[layer]] for layer in LAYERS}, [np.arange(len(text))])
    taken = take(reader.device, [reader.residents.requests["reader"]], len(text)).records()["reader"]
    found: dict[str, np.ndarray] = {}
    for named, (listed, _, _) in zip(wanted.values(), taken.reads, strict=True):
        found |= dict(zip(named, np.frombuffer(listed, np.float32).reshape(len(text), -1).T, strict=True))
    return found


def test_rules_mean_the_same_in_any_chunks_batches_prefix_hits_and_preemptions() -> None:
    rng = np.random.default_rng(1)
    server = DeviceServer()
    for i in range(2):
        server.add(f"r{i}", text_of(rng, int(rng.integers(9, 12))))
    turn = 0
    while any(server.at[name] < len(server.texts[name]) for name in server.texts):
        turn += 1
        if turn == 3:
            server.preempt("r1", 1)
            server.add("again", server.texts["r0"], server.held["r0"][:1])
        single = turn % 3 == 0
        server.step({name: 1 if single else int(rng.integers(2, 6)) for name in server.texts}, 0 if single else 2)
    assert turn > 3
    for name in server.texts:
        server.due(name)


def lively(rng: np.random.Generator, n: int) -> Text:
    """A text at whose every token something shows how many tokens before it counted, and how long ago that was.

    Its propositions are in the second word of bits.
    """
    key = named()[2][0][0]
    atoms = [((int(OpCode.PROPOSITION), i),) for i in range(66)]
    on, off = atoms[65], (*atoms[65], (int(OpCode.NOT), 0))
    propositions = tuple(PropositionCode(2, False, (key,), (1.0,), (), True, 1e9 if i < 65 else 0.0) for i in range(66))
    memories = [MemoryCode(2, MemoryKind.COUNT, (part,), least=k) for part in (on, off) for k in (1, 2, 3, 5)]
    memories += [MemoryCode(2, MemoryKind.WINDOW, (on,), least=2, window=3)]
    memories += [MemoryCode(2, MemoryKind.ORDER, (on, off, on))]
    said = [((int(OpCode.MEMORY), i),) for i in range(len(memories))]
    shut = ((int(OpCode.CONCLUSION), 2), *off, (int(OpCode.AND), 0))
    rules = (RuleCode(0, said[8], 0), RuleCode(0, said[9], 1), RuleCode(0, on, 2), RuleCode(1, shut, 3))
    conclusions = (ConclusionCode(2), ConclusionCode(2), ConclusionCode(2, latch=True), ConclusionCode(2))
    rules += tuple(RuleCode(2, part, 4 + i) for i, part in enumerate(said[:8]))
    conclusions += tuple(ConclusionCode(5) for _ in range(8))
    actions = (ActionCode(0, tokens=2), ActionCode(1, tokens=0), ActionCode(3))
    program = RuleProgram(propositions, tuple(memories), rules, conclusions, actions)
    while True:
        text = Text(program, 3, streams(rng, n))
        held = activations(text)[key][1:] > 0
        if held.any() and np.diff(held.astype(int)).any() and (held[:3] != held[3:6]).any() and 2 < held.sum() < n - 3:
            return text


def test_a_prefix_may_be_computed_in_the_step_that_shares_it() -> None:
    server, text = DeviceServer(), lively(np.random.default_rng(7), 11)
    server.add("first", text)
    server.held["first"] = [server.free.pop() for _ in range(3)]
    server.add("second", text, server.held["first"][:2])
    server.step({"second": 3, "first": 11}, 1)
    server.due("first")
    server.due("second")


def test_rejected_drafts_leave_nothing_behind() -> None:
    server = DeviceServer()
    server.add("a", lively(np.random.default_rng(8), 11))
    for n, wrong in ((3, 0), (2, 3), (2, 2), (2, 0), (2, 0)):
        server.step({"a": n}, 0, {"a": wrong})
    server.due("a")


def test_a_seat_that_somebody_left_is_as_new() -> None:
    rng = np.random.default_rng(9)
    server, text = DeviceServer(), lively(rng, 10)
    server.add("a", lively(rng, 9))
    server.add("first", text)
    server.step({"a": 8, "first": 8})
    server.residents.remove("a")
    server.residents.remove("first")
    server.add("b", text, server.held["first"][:2])  # at the position where the seat's last tokens ended
    server.step({"b": 2})
    server.due("b")


def test_the_size_of_a_block_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_module, "PROMPT_STAGE", rules_module.PROMPT_STAGE | {"B": 4})
    server = DeviceServer()
    server.add("a", lively(np.random.default_rng(3), 11))
    server.step({"a": 11})
    server.due("a")
    trace = server.journals["a"].rules
    assert trace is not None
    assert trace.concluded[:, :4].any(axis=0).all()


def test_what_is_not_run_is_refused_by_name() -> None:
    rng = np.random.default_rng(5)
    server, text = DeviceServer(), text_of(rng, 9)
    server.add("a", text)
    server.residents.refresh()
    device = server.device
    with pytest.raises(NotOnDevice, match="rules are not run"):
        fill(device.tables, server.residents, remembers=True)
    with pytest.raises(NotOnDevice, match="kept with the KV"):
        fill(device.tables, server.residents, rules=device.rules)
    one = PropositionCode(5, True, (keys()[0][5][1][0],), (1.0,), (), True, 0.0)
    program = msgspec.structs.replace(text.program, propositions=(one, *text.program.propositions[1:]))
    server.add("b", Text(program, 3, text.h))
    with pytest.raises(NotOnDevice, match="polysae"):
        server.step({"b": 3})
