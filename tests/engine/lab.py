"""Handles on a real engine: reference runs, runs stepped by hand, small budgets, and a look at what was scheduled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from editserver.engine.bank import BankLedger
from editserver.engine.compat.core import CoreState
from editserver.engine.wire import KEY
from interventions.compile import Compiled
from tests.engine.support import Answer, Ask, Engine, answer_of

DIFFERENT = 0.1
"""Smallest max |Δ log p| at which an edited answer counts as different from the plain one."""


def plain(ask: Ask) -> Ask:
    """The same request without interventions."""
    return replace(ask, interventions=(), inspect=None)


@dataclass
class Lab:
    """An engine, and what it answers to requests that it runs alone and cold.

    Attributes:
        floor: what two runs of one request may differ by at least; vanilla's own noise is measured on top of it.
    """

    engine: Engine
    floor: float = 1e-4
    _alone: dict[str, Answer] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    """Largest differences seen, by what was compared: for the report."""

    def alone(self, ask: Ask) -> Answer:
        """The request's answer when nothing else runs and no prefix is cached."""
        key = repr(ask)
        if key not in self._alone:
            self._alone[key] = self.engine.run([ask], cold=True)[0]
        return self._alone[key]

    def noise(self, asks: Sequence[Ask], answers: Sequence[Answer]) -> float:
        """What vanilla itself does: the largest difference of *plain* requests from their runs alone, or ``floor``."""
        seen = max(answer.differs(self.alone(plain(ask))) for ask, answer in zip(asks, answers, strict=True))
        self.note("vanilla", seen)
        return max(2 * seen, self.floor)

    def note(self, name: str, value: float) -> float:
        """Remember the largest value per name."""
        self.worst[name] = max(value, self.worst.get(name, 0.0))
        return value

    def assert_as_alone(self, ask: Ask, answer: Answer, tolerance: float) -> None:
        """The answer equals the request's run alone."""
        gap = self.note("edited", answer.differs(self.alone(ask)))
        assert gap <= tolerance, f"differs from its run alone by {gap:.2e}, vanilla by at most {tolerance:.2e}: {ask}"

    def assert_edit_shows(
        self, ask: Ask, answer: Answer, unedited: Answer | None = None, tolerance: float = 0.0
    ) -> None:
        """The edited answer is not the plain one (``unedited``, or the plain request's run alone), noise or not."""
        gap = answer.differs(unedited or self.alone(plain(ask)))
        assert gap >= max(DIFFERENT, tolerance), f"the edit changed no log-probability by more than {gap:.2e}: {ask}"

    @property
    def state(self) -> CoreState:
        """What the scheduler knows about edited requests."""
        state = self.engine.scheduler.__dict__[KEY]
        assert isinstance(state, CoreState)
        return state

    def assert_nothing_left(self) -> None:
        """No finished or aborted request left anything behind: no rows held, no records, no queue, no residents."""
        from editserver.engine import op

        assert self.state.ledger.holders == 0
        assert self.state.ledger.in_use == 0
        assert not self.state.waiting
        assert not self.state.pending
        self.engine.run([Ask([1, 2, 3], max_tokens=1)])  # workers learn about finished requests with the next step
        worker = op.current()
        assert worker is not None
        assert not worker.residents.requests
        assert not self.engine.scheduler.requests

    def bank(self, patch: pytest.MonkeyPatch, rows: int) -> BankLedger:
        """A bank of so few rows, until the patch is undone."""
        ledger = BankLedger(rows)
        patch.setattr(self.state, "ledger", ledger)
        return ledger


@dataclass
class Steps:
    """What the scheduler put into each step: request id → number of tokens; and who was ever preempted."""

    tokens: list[dict[str, int]] = field(default_factory=list)
    requests: dict[str, Any] = field(default_factory=dict)

    @property
    def preemptions(self) -> int:
        """vLLM's own counters, summed over the requests."""
        return sum(request.num_preemptions for request in self.requests.values())

    def preempted(self, request_id: str) -> int:
        """How often the request (its external id) was preempted."""
        return sum(r.num_preemptions for key, r in self.requests.items() if key.rpartition("-")[0] == request_id)

    def computed(self, request_id: str) -> int:
        """Tokens scheduled for the request (its external id) over all steps, recomputed ones included."""
        mine = [key for key, request in self.requests.items() if key.rpartition("-")[0] == request_id]
        return sum(step.get(key, 0) for step in self.tokens for key in mine)


@contextmanager
def watched(engine: Engine) -> Iterator[Steps]:
    """Record every step that runs inside."""
    steps = Steps()
    schedule = engine.scheduler.schedule

    def recording(*args: Any, **kwargs: Any) -> Any:
        steps.requests.update(engine.scheduler.requests)
        output = schedule(*args, **kwargs)
        steps.tokens.append(dict(output.num_scheduled_tokens))
        return output

    engine.scheduler.schedule = recording
    try:
        yield steps
    finally:
        del engine.scheduler.schedule


@contextmanager
def chunked(engine: Engine, tokens: int) -> Iterator[None]:
    """Every step computes at most so many tokens (``--max-num-batched-tokens``, as the scheduler reads it)."""
    before = engine.scheduler.max_num_scheduled_tokens
    engine.scheduler.max_num_scheduled_tokens = tokens
    try:
        yield
    finally:
        engine.scheduler.max_num_scheduled_tokens = before


@contextmanager
def scarce(engine: Engine, blocks: int) -> Iterator[None]:
    """Only so many KV blocks are there (``--num-gpu-blocks-override``): the others are held by nobody."""
    engine.reset_cache()
    pool = engine.scheduler.kv_cache_manager.block_pool
    held = pool.get_new_blocks(pool.get_num_free_blocks() - blocks)
    try:
        yield
    finally:
        pool.free_blocks(held)
        engine.reset_cache()


@dataclass
class Driver:
    """Requests that arrive, run and leave one step at a time."""

    engine: Engine
    asks: dict[str, Ask] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    _compiled: dict[str, Compiled] = field(default_factory=dict)

    @property
    def _llm(self) -> Any:
        return self.engine.llm.llm_engine

    def add(self, ask: Ask) -> str:
        """A request arrives; returns its id."""
        name = f"r{len(self.asks)}"
        self.asks[name] = ask
        self._compiled[name] = compiled = self.engine.compile(ask)
        self._llm.add_request(name, self.engine.prompt(ask), self.engine.params(ask, compiled))
        return name

    def abort(self, name: str) -> None:
        """Its client hangs up."""
        self.aborted.add(name)
        self._llm.abort_request([name])

    def step(self) -> None:
        """One step of the engine."""
        for output in self._llm.step():
            self.outputs[output.request_id] = output

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self.running:
            self.abort(name)

    def drain(self) -> None:
        """Step until nothing is left to do."""
        while self._llm.has_unfinished_requests():
            self.step()

    def finished(self, name: str) -> bool:
        """Whether the request ran to its end."""
        return name in self.outputs and self.outputs[name].finished

    @property
    def running(self) -> list[str]:
        """Requests that neither finished nor were aborted."""
        return [name for name in self.asks if not self.finished(name) and name not in self.aborted]

    def answer(self, name: str) -> Answer:
        """What was delivered so far."""
        output = self.outputs[name]
        return answer_of(output.outputs[0], output.num_cached_tokens, self._compiled[name])


def steer(layer: int, feature: int, strength: float = 40.0, tokens: Any = "all") -> Mapping[str, Any]:
    """Steer along a decoder row of the test's own dictionary at ``layer`` (norm 3; 40 is a dose near 0.7)."""
    sae = f"standard/l{layer}"
    return {"type": "steer", "sae": sae, "feature": feature, "strength": strength, "tokens": tokens}


def set_features(sae: str, features: Mapping[int, float], tokens: Any = "all") -> Mapping[str, Any]:
    """Set latents of ``sae``, whatever their activations are."""
    edits = [{"index": index, "op": "set", "value": value} for index, value in features.items()]
    return {"type": "edit_features", "sae": sae, "features": edits, "tokens": tokens}
