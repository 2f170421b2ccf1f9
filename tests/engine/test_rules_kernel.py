"""The stage kernel against the plain machine, without vLLM: any chunks, batches, prefix hits and preemptions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.gates import Blocks
from editserver.engine.journal import Journal
from editserver.engine.kernel_cpu import read_features, read_latents
from editserver.engine.kernel_rules import pack_scores, run_stage
from editserver.engine.warm_up import warm_up
from editserver.engine.worker import EngineWorker
from interventions.program import (
    Channel,
    Gate,
    GateKind,
    LayerProgram,
    Op,
    Payload,
    Program,
    ReadKind,
    feature_key,
    parse_feature_key,
    vector_key,
)
from interventions.rules.code import ActionCode, ConclusionCode, OpCode, PropositionCode, RuleCode, RuleProgram
from interventions.rules.machine import Machine, RuleTrace, holds, scores
from interventions.selectors import ALL
from sae_weights import SAE, load_sae
from tests.engine.dictionaries import write_native, write_sae
from tests.engine.rule_programs import random_program

D = 40
LAYERS = (2, 3, 5)
BLOCK = 4
N_BLOCKS = 72
MAX_TOKENS = 128
LONGEST = 30
READ = 24
"""Latents of each dictionary that programs may name."""


@cache
def dictionaries() -> tuple[EngineConfig, dict[str, SAE]]:
    """Dictionaries of single rows, with and without norms, and whole ones, at three layers."""
    root = Path(mkdtemp(prefix="rules-saes-"))
    folders = {
        "jumprelu": (write_sae(root / "a", 2, "jumprelu", D), 2),
        "normed": (write_sae(root / "b", 2, "gated", D, norm="layer_norm"), 2),
        "topk": (write_sae(root / "c", 3, "topk", D), 3),
        "standard": (write_sae(root / "d", 5, "standard", D), 5),
        "polysae": (write_native(root / "e", 5, "polysae", D), 5),
    }
    saes = {name: load_sae(folder) for name, (folder, _) in folders.items()}
    sources = [SAESource(n, s.origin.as_dict(), s.digest, folders[n][1]) for n, s in saes.items() if s.origin]
    return EngineConfig(LAYERS, tuple(sources), tuple(folders), bank_rows=2048), saes


@dataclass
class Text:
    """One request: its program, and the residual stream at its tokens by layer, fp32 ``[n, D]``."""

    program: RuleProgram
    prompt_len: int
    h: dict[int, torch.Tensor]
    payload: Payload = field(init=False)

    def __post_init__(self) -> None:
        self.payload = Payload(self._gated(), (), None)

    def __len__(self) -> int:
        return len(self.h[LAYERS[0]])

    def _gated(self) -> Program:
        """Behind every action an intervention of the action's number, at its layer or a later one."""
        rules, layers = self.program, []
        values = np.full(D, 0.01, "<f4").tobytes()
        key = vector_key(values)
        for layer in LAYERS:
            acting = [i for i, a in enumerate(rules.actions) if rules.conclusions[a.conclusion].layer <= layer]
            if not acting:
                continue
            gates = tuple(Gate(GateKind.RULE, ReadKind.LATENT, (), action=i) for i in acting)
            ops = tuple(Op(1.0, 1.0, -math.inf, math.inf, False, 0, i, gates=(g,)) for g, i in enumerate(acting))
            layers.append(LayerProgram(layer, (Channel(ReadKind.NONE, key, ops),), gates))
        return Program(tuple(layers), (ALL,), {key: values}, rules=rules)


@cache
def keys() -> tuple[dict[int, list[list[str]]], set[str]]:
    """What programs may name, by layer; and what of it needs a whole dictionary."""
    config, saes = dictionaries()
    by_layer: dict[int, list[list[str]]] = {layer: [] for layer in LAYERS}
    whole = set()
    for source in config.saes:
        sae = saes[source.id]
        named = [feature_key(sae.digest, i) for i in range(READ)]
        by_layer[source.layer].append(named)
        whole |= set() if sae.row_separable else set(named)
    return by_layer, whole


class Server:
    """A worker, its KV blocks, and requests that come, stand back and come again."""

    def __init__(self, blocks: bool = True, drafts: int = 0) -> None:
        self.worker = EngineWorker(dictionaries()[0], D, torch.float32, MAX_TOKENS, drafts)
        self.slots: dict[str, int] = {}
        self.free = list(range(N_BLOCKS))
        self.texts: dict[str, Text] = {}
        self.at: dict[str, int] = {}
        self.held: dict[str, list[int]] = {}
        self.journals: dict[str, Journal] = {}
        self.blocks = blocks

    def add(self, name: str, text: Text, shared: Sequence[int] = ()) -> None:
        """A request arrives; ``shared`` are the blocks that its prefix is found in."""
        slots = [self.slots.setdefault(key, len(self.slots)) for key in text.payload.row_keys]
        self.worker.add_request(name, text.payload, slots, text.prompt_len)
        self.texts[name], self.journals[name] = text, Journal(text.payload)
        self.held[name] = list(shared)
        self.at[name] = len(shared) * BLOCK

    def preempt(self, name: str, keep: int) -> None:
        """It loses its blocks, and when it comes back finds the first ``keep`` of them still there."""
        lost, self.held[name] = self.held[name][keep:], self.held[name][:keep]
        self.free += set(lost).difference(*self.held.values())
        self.at[name] = min(self.at[name], keep * BLOCK)

    def step(self, chunks: dict[str, int], plain: int = 0, wrong: Mapping[str, int] | None = None) -> None:
        """Feed so many tokens of each, between ``plain`` tokens of somebody else's; ``wrong`` are rejected drafts behind them."""
        wrong = wrong or {}
        sizes = {name: min(n, len(self.texts[name]) - self.at[name]) for name, n in chunks.items()}
        names = [name for name, n in sizes.items() if n]
        table = np.zeros((len(names) + 1, LONGEST // BLOCK + 2), np.int32)
        parts, positions = {layer: [torch.zeros(plain, D)] for layer in LAYERS}, [np.arange(plain)]
        for row, name in enumerate(names, 1):
            start, own = self.at[name], self.at[name] + sizes[name]
            stop = own + wrong.get(name, 0)
            while len(self.held[name]) * BLOCK < stop:
                self.held[name].append(self.free.pop())
            table[row, : len(self.held[name])] = self.held[name]
            positions.append(np.arange(start, stop))
            for layer in LAYERS:
                parts[layer] += [self.texts[name].h[layer][start:own], 9 * torch.randn(stop - own, D)]
            self.at[name] = own
        query_start = np.cumsum([0, *(len(p) for p in positions)], dtype=np.int32)
        blocks = Blocks(table, BLOCK, N_BLOCKS * BLOCK) if self.blocks else None
        flat = np.concatenate(positions)
        self.worker.begin_step(["plain", *names], query_start, flat, np.zeros(len(flat), np.int32), blocks)
        for layer in LAYERS:
            hidden = torch.cat(parts[layer])
            self.worker.run(layer, hidden, torch.zeros_like(hidden))
        records = self.worker.end_step()
        assert set(records) == set(names)
        for name, record in records.items():
            self.journals[name].add(record.cut(sizes[name]))

    def meant(self, name: str, n: int) -> RuleTrace:
        """What the first n tokens come to."""
        return meant(self.texts[name], n)

    def due(self, name: str) -> None:
        """Everything that was fed so far is as the program means it."""
        text, journal, n = self.texts[name], self.journals[name], self.at[name]
        wanted = self.meant(name, n)
        trace = journal.rules
        assert trace is not None
        for part in ("held", "concluded", "active"):
            assert np.array_equal(getattr(trace, part), getattr(wanted, part)), f"{name}: {part}"
        later = journal.rules_from(n // 2)
        assert later is not None
        assert np.array_equal(later.active, trace.active[n // 2 :])
        cached = journal.computed_from
        assert np.array_equal(trace.scores[cached:], wanted.scores[cached:], equal_nan=True)
        assert np.isnan(trace.scores[:cached]).all()
        assert journal.refusal == wanted.refusal(text.program)
        for layer in text.payload.program.layers if text.payload.program else ():
            for gate in layer.gates:
                fired = [journal.stats(gate.action, layer.layer, p).fired for p in range(n + 1)]
                assert np.array_equal(np.diff(fired) > 0, wanted.active[:, gate.action] & (np.arange(n) >= cached))


def meant(text: Text, n: int) -> RuleTrace:
    """What the machine makes of the first n tokens, all at once."""
    acts, propositions = activations(text), text.program.propositions
    score = np.zeros((n, len(propositions)), np.float32)
    for i, one in enumerate(propositions):
        score[:, i] = scores(one, np.stack([acts[key][:n] for key in one.features], axis=1))
    held = np.array([holds(one, score[:, i]) for i, one in enumerate(propositions)]).T
    return Machine(text.program, text.prompt_len).run(held, score)


def activations(text: Text) -> dict[str, np.ndarray]:
    """Of what the program names, as the engine reads them."""
    worker = reader()
    found = {}
    for one in text.program.propositions:
        for key in one.features:
            digest, index = parse_feature_key(key)
            h = text.h[one.layer]
            if one.whole:
                found[key] = worker.dictionaries.full_encode(digest, h)[:, index].numpy()
                continue
            worker.bank.upload([key], [0], {})
            out = np.empty((len(h), 1), np.float32)
            norm = worker.dictionaries.input_norm(digest)
            read_latents(
                h.numpy(), np.zeros(1, np.int32), norm, worker.bank.read.numpy(), worker.bank.gate.numpy(), out
            )
            found[key] = out[:, 0]
    return found


@cache
def reader() -> EngineWorker:
    return EngineWorker(dictionaries()[0], D, torch.float32, MAX_TOKENS)


def streams(rng: np.random.Generator, n: int) -> dict[int, torch.Tensor]:
    return {layer: torch.from_numpy(rng.normal(0, 5, (n, D)).astype(np.float32)) for layer in LAYERS}


def text_of(rng: np.random.Generator, n: int | None = None) -> Text:
    n = n or int(rng.integers(2, LONGEST))
    program = random_program(rng, *keys())
    return Text(program, int(rng.integers(1, n + 1)), streams(rng, n))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_rules_mean_the_same_in_any_chunks_batches_prefix_hits_and_preemptions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    server = Server()
    for i in range(int(rng.integers(1, 5))):
        server.add(f"r{i}", text_of(rng))
    while any(server.at[name] < len(server.texts[name]) for name in server.texts):
        for name in list(server.texts):
            if rng.random() < 0.1:
                server.preempt(name, int(rng.integers(0, 3)))
            if rng.random() < 0.15 and len(server.texts) < 8 and server.at[name] >= BLOCK:
                n = int(rng.integers(1, server.at[name] // BLOCK + 1))  # the same prompt again, behind a prefix hit
                if n * BLOCK < len(server.texts[name]):
                    server.add(f"r{len(server.texts)}", server.texts[name], server.held[name][:n])
        chosen = [name for name in server.texts if rng.random() < 0.7]
        server.step(
            {name: int(rng.integers(1, 9)) for name in rng.permutation(chosen).tolist()}, int(rng.integers(0, 3))
        )
    for name in server.texts:
        server.due(name)


def test_a_prefix_may_be_computed_in_the_step_that_shares_it() -> None:
    rng = np.random.default_rng(7)
    for _ in range(10):
        server, text = Server(), text_of(rng, 20)
        server.add("first", text)
        server.held["first"] = [server.free.pop() for _ in range(5)]
        server.add("second", text, server.held["first"][:3])
        server.step({"second": 5, "first": 20}, 1)
        server.due("first")
        server.due("second")


def test_where_nothing_is_kept_with_the_kv_a_continuation_is_an_error_and_a_whole_run_is_right() -> None:
    rng = np.random.default_rng(1)
    server = Server(blocks=False)
    server.add("a", text_of(rng, 20))
    server.step({"a": 7})
    server.step({"a": 20})
    server.due("a")
    server.add("b", text_of(rng, 20), [0])
    with pytest.raises(RuntimeError, match="did not see"):
        server.step({"b": 3})


def test_rules_without_edits_make_their_layers_due() -> None:
    server, rng = Server(), np.random.default_rng(2)
    key = keys()[0][3][0][0]
    program = RuleProgram(
        (PropositionCode(3, True, (key,), (1.0,), (), False, 0.1),),
        (),
        (RuleCode(0, ((int(OpCode.PROPOSITION), 0),), 0),),
        (ConclusionCode(3),),
        (ActionCode(0, refuses=True),),
    )
    text = Text(program, 4, streams(rng, 8))
    text.payload = Payload(Program((), (), {}, rules=program), (), "d")
    server.add("a", text)
    server.step({"a": 8})
    server.due("a")
    server.worker.begin_step(["a"], np.array([0, 1], np.int32), np.array([8]), np.zeros(1, np.int32), None)
    server.worker.run(2, torch.zeros(1, D), torch.zeros(1, D))
    with pytest.raises(RuntimeError, match="layers \\[3\\] did not run"):
        server.worker.end_step()


def test_sums_round_every_product_and_every_sum() -> None:
    """a·w + b is another number where it is computed in one step: then 1.5·x − 1.5·x would not be 0 for every x."""
    rng = np.random.default_rng(3)
    texts = []
    for _ in range(40):
        sae = keys()[0][2][0]
        weights = rng.normal(0, 1, 6).astype(np.float32).tolist()
        one = PropositionCode(2, False, tuple(sae[:6]), tuple(weights), (), False, -1e9)
        texts.append(Text(RuleProgram((one,), (), (), (), ()), 2, streams(rng, 12)))
    for text in texts:
        text.payload = Payload(Program((), (), {}, rules=text.program), (), "d")
        server = Server()
        server.add("a", text)
        server.step({"a": 12})
        server.due("a")


def test_starting_a_worker_compiles_all_that_rules_need() -> None:
    worker = EngineWorker(dictionaries()[0], D, torch.float32, MAX_TOKENS)
    warm_up(worker)
    kernels = (run_stage, pack_scores, read_features)
    compiled = [len(kernel.signatures) for kernel in kernels]
    server = Server()
    server.add("a", text_of(np.random.default_rng(4), 20))
    server.step({"a": 9})
    server.step({"a": 1})
    assert compiled == [len(kernel.signatures) for kernel in kernels] == [1, 1, 1]
