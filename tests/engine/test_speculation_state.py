"""Rejected drafts leave nothing in the state of rules and gates, nor in what is said of them; without vLLM."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine import gates
from editserver.engine.rule_table import RuleRun
from editserver.engine.wire import RuleRecord, StepRecord
from tests.engine.remap_programs import LAYER, Run, random_sequence
from tests.engine.remap_programs import Server as GateServer
from tests.engine.test_remap_kernel import gated, paged, run_through
from tests.engine.test_rules_kernel import Server, text_of

DRAFTS = 3


def _ruled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    server = Server(drafts=DRAFTS)
    for i in range(int(rng.integers(1, 4))):
        server.add(f"r{i}", text_of(rng))
    while any(server.at[name] < len(server.texts[name]) for name in server.texts):
        for name in list(server.texts):
            if rng.random() < 0.07:
                server.preempt(name, int(rng.integers(0, 3)))
        chosen = {name: int(rng.integers(1, 5)) for name in server.texts if rng.random() < 0.7}
        server.step(chosen, wrong={name: int(rng.integers(0, DRAFTS + 1)) for name in chosen})
    for name in server.texts:
        server.due(name)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_rules_are_those_of_the_accepted_tokens_whatever_was_drafted(seed: int) -> None:
    _ruled(seed)


def test_after_rejected_drafts_only_the_tokens_of_the_last_step_are_gone_through_again() -> None:
    server, rng = Server(drafts=DRAFTS), np.random.default_rng(5)
    server.add("a", text_of(rng, 29))
    server.step({"a": 20})
    run = server.worker.residents.requests["a"].rules
    assert run is not None
    for at in range(20, 28, 2):
        server.step({"a": 2}, wrong={"a": 2})
        assert (run.first, run.next) == (at, at + 4)
        assert copy.deepcopy(run).go_to(at + 2) == 2
    server.due("a")


def _speculated(run: Run, seed: int) -> None:
    """The whole of ``run`` in small steps with rejected drafts, against the same without."""
    random = np.random.default_rng(seed)
    calm, server = GateServer(), GateServer()
    server.worker._facts = DRAFTS + 1
    for one in (calm, server):
        paged(one, np.random.default_rng(1))
    want = run_through(calm, "calm", run, random)
    server.add("a", run)
    at, after, n = 0, [], len(run.ids)
    while at < n:
        own, wrong = min(int(random.integers(1, 4)), n - at), int(random.integers(0, DRAFTS + 1))
        stop = at + own
        noise = torch.from_numpy(random.normal(size=(wrong, *run.hidden.shape[1:])) * 15).to(run.hidden.dtype)
        drafted = replace(
            run,
            ids=torch.cat([run.ids[:stop], torch.from_numpy(random.integers(0, 5, wrong))]),
            hidden=torch.cat([run.hidden[:stop], noise]),
        )
        after.append(server.step({"a": (drafted, at, stop + wrong, 0)}, {"a": wrong})["a"][:own])
        at = stop
    assert torch.equal(torch.cat(after), want)
    assert server.facts("a") == calm.facts("calm")
    mine, theirs = server.journals["a"], calm.journals["calm"]
    assert mine.covers(0, n)
    assert not mine.covers(n, n + 1), "a rejected draft was reported"
    for intervention in range(64):
        assert mine.stats(intervention, LAYER, n + DRAFTS) == theirs.stats(intervention, LAYER, n)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_gates_are_those_of_the_accepted_tokens_whatever_was_drafted(seed: int) -> None:
    _speculated(random_sequence(seed), seed)


def test_what_a_gate_says_can_be_asked_for_any_token_of_the_last_step() -> None:
    run = gated(0)
    server = GateServer()
    paged(server, np.random.default_rng(0))
    server.worker._facts = DRAFTS + 1
    server.add("a", run)
    server.step({"a": (run, 0, 20, 0)})
    server.step({"a": (run, 20, 24, 0)})
    for stop in range(21, 25):
        alone = GateServer()
        paged(alone, np.random.default_rng(0))
        alone.add("a", run)
        alone.step({"a": (run, 0, stop, 0)})
        for i, gate in enumerate(run.program.layers[0].gates):
            if gate.over_sequence:
                assert server.journals["a"].gate(LAYER, i, stop) == alone.journals["a"].gate(LAYER, i)


def _keeps_rejected_rules(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RuleRun, "go_to", lambda self, position: 0)


def _keeps_rejected_gates(patch: pytest.MonkeyPatch) -> None:
    def at(self: Any, position: int) -> gates.Track:
        return replace(self.now, state=replace(self.now.state, position=position))

    patch.setattr(gates.Tracks, "at", at)


def _reports_rejected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepRecord, "cut", lambda self, n: self)


@pytest.mark.parametrize("mutant", [_keeps_rejected_rules, _reports_rejected])
def test_an_engine_whose_rules_keep_rejected_drafts_is_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        _ruled(seed)
    mutant(monkeypatch)
    caught = 0
    for seed in range(8):
        try:
            _ruled(seed)
        except (AssertionError, ValueError):
            caught += 1
    assert caught >= 4, f"only {caught} of 8 random texts show it"


@pytest.mark.parametrize("mutant", [_keeps_rejected_gates, _reports_rejected])
def test_an_engine_whose_gates_keep_rejected_drafts_is_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gated(0)
    _speculated(run, 0)
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        _speculated(run, 0)


def test_a_record_is_cut_by_token_in_every_part() -> None:
    rng = np.random.default_rng(0)
    fired, dose = rng.integers(0, 9, (2, 5)).astype(np.uint64), rng.random((2, 5), np.float32)
    listed, index = rng.random((5, 3), np.float32), rng.integers(0, 9, (5, 2)).astype(np.int32)
    held = rng.integers(0, 4, (7, 1)).astype(np.uint64)  # two positions before the step's own
    scores = np.arange(np.unpackbits(held[2:].view(np.uint8)).sum(), dtype=np.float32)
    rules = RuleRecord(8, held.tobytes(), held.tobytes(), b"", scores.tobytes())
    clamped = rng.integers(0, 3, (2, 5)).astype(np.uint8)
    reads = ((listed.tobytes(), index.tobytes(), dose[0].tobytes()), (b"", b"", b""))
    facts = (tuple((i, float(i)) for i in range(4)),)
    record = StepRecord(10, 5, fired.tobytes(), dose.tobytes(), clamped.tobytes(), reads, facts, rules)
    for n in (1, 3, 5, 9):
        cut = record.cut(n)
        n = min(n, 5)
        assert (cut.start, cut.n) == (10, n)
        assert cut.fired == fired[:, :n].tobytes()
        assert cut.dose == dose[:, :n].tobytes()
        assert cut.clamped == clamped[:, :n].tobytes()
        assert cut.reads[0] == (listed[:n].tobytes(), index[:n].tobytes(), dose[0, :n].tobytes())
        assert cut.reads[1] == (b"", b"", b"")
        assert cut.gates == (facts[0][: len(facts[0]) - (5 - n)],)
        assert cut.rules is not None
        assert cut.rules.first == 8
        assert cut.rules.held == cut.rules.concluded == held[: 2 + n].tobytes()
        kept = int(np.unpackbits(held[2 : 2 + n].view(np.uint8)).sum())
        assert np.array_equal(np.frombuffer(cut.rules.scores, np.float32), scores[:kept])
