"""An engine that speculates, in a process of its own next to the session's engine that does not.

It runs requests that the other one compiled, with n-gram drafts or with drafts that a test made up: the true next tokens as
far as the test likes, and wrong ones behind them.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from editserver.engine.journal import Journal
from interventions.compile import Compiled
from sae_weights.formats import Origin
from tests.engine.support import Answer, Ask, Engine

DRAFTS = 4
Job = tuple[dict[str, Any], Any]
"""vLLM's prompt and sampling parameters."""


@dataclass(frozen=True)
class Script:
    """What to draft behind ``prompt``: the next tokens of the ``truth``; with ``wrong`` ones, these behind 0 to k − 1 of it."""

    prompt: tuple[int, ...]
    truth: tuple[int, ...]
    wrong: tuple[int, ...] = ()

    def drafts(self, ids: Sequence[int], k: int) -> list[int]:
        """For a request that has come to ``ids``."""
        done = len(ids) - len(self.prompt)
        right = self.truth[done : done + (done // 2 % k if self.wrong else k)]
        return [*right, *self.wrong][:k]


@dataclass
class Outcome:
    """One request's answer, and what was drafted for it."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: Any
    top: list[dict[int, float]]
    cached: int
    journal: Journal | None
    error: tuple[str, str] | None
    accepted: int = 0
    rejected: dict[int, set[int]] = field(default_factory=dict)
    """Position → drafts that were rejected there."""

    def answer(self, compiled: Compiled) -> Answer:
        """As the session's engine answers."""
        return Answer(
            self.token_ids,
            [step[token] for step, token in zip(self.top, self.token_ids, strict=True)],
            self.top,
            self.cached,
            self.journal,
            compiled,
        )


class Speculating:
    """The test's end."""

    def __init__(self, model: Path, saes: Mapping[str, Path | Origin], armed: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, model, dict(saes), tuple(armed)))
        self._process.start()
        there.close()
        self._answer()

    def run(self, engine: Engine, asks: Sequence[Ask], scripts: Sequence[Script] = ()) -> list[Outcome]:
        """All requests in one cold batch, as ``engine`` would compile them; n-gram drafts unless there are scripts."""
        compiled = [engine.compile(ask) for ask in asks]
        return self.send(
            [(engine.prompt(a), engine.params(a, c)) for a, c in zip(asks, compiled, strict=True)], scripts
        )

    def send(self, jobs: Sequence[Job], scripts: Sequence[Script] = ()) -> list[Outcome]:
        """As :meth:`run`, of ready requests."""
        self._pipe.send(("run", list(jobs), list(scripts)))
        outcomes: list[Outcome] = self._answer()
        return outcomes

    @contextmanager
    def mutated(self, change: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
        """The engine over there is broken by ``change``, a function of a module, and whole again behind it."""
        self._pipe.send(("mutate", change, ()))
        self._answer()
        try:
            yield
        finally:
            self._pipe.send(("heal", (), ()))
            self._answer()

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send(("stop", (), ()))
        self._process.join(60)
        self._process.kill()

    def _answer(self) -> Any:
        kind, value = self._pipe.recv()
        if kind == "failed":
            raise RuntimeError(f"the speculating engine failed:\n{value}")
        return value


def _serve(pipe: Connection, model: Path, saes: dict[str, Path | Origin], armed: tuple[int, ...]) -> None:
    try:
        engine = Engine.start(
            model,
            saes,
            armed,
            num_gpu_blocks_override=96,
            max_num_batched_tokens=512,
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": DRAFTS,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            },
        )
        served, patch = _Served(engine), pytest.MonkeyPatch()
        pipe.send(("ready", None))
        while True:
            kind, what, scripts = pipe.recv()
            if kind == "stop":
                return
            if kind == "run":
                pipe.send(("done", served.run(what, scripts)))
                continue
            patch.undo() if kind == "heal" else what(patch)
            pipe.send(("done", None))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


class _Served:
    """The engine with its drafter and its scheduler watched."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._scripts = engine, list[Script]()
        self._steps: list[tuple[str, int, list[int], int]] = []
        drafter, scheduler = engine.runner.drafter, engine.scheduler
        propose, update = drafter.propose, scheduler.update_from_output

        def proposing(k: int, sampled: list[list[int]], lengths: np.ndarray, ids: np.ndarray, **rest: Any) -> Any:
            if not self._scripts:
                return propose(k, sampled, lengths, ids, **rest)
            return [
                self._drafts(ids[row, : lengths[row]].tolist(), k) if tokens else []
                for row, tokens in enumerate(sampled)
            ]

        def updating(scheduled: Any, output: Any, *rest: Any) -> Any:
            for request_id, drafts in scheduled.scheduled_spec_decode_tokens.items():
                accepted = max(0, len(output.sampled_token_ids[output.req_id_to_index[request_id]]) - 1)
                request = scheduler.requests[request_id]
                self._steps.append((request_id.rpartition("-")[0], request.num_tokens, list(drafts), accepted))
            return update(scheduled, output, *rest)

        drafter.propose, scheduler.update_from_output = proposing, updating

    def _drafts(self, ids: list[int], k: int) -> list[int]:
        for script in self._scripts:
            if tuple(ids[: len(script.prompt)]) == script.prompt:
                return script.drafts(ids, k)
        return []

    def run(self, jobs: Sequence[Job], scripts: Sequence[Script]) -> list[Outcome]:
        """One cold batch."""
        self._scripts, self._steps = list(scripts), []
        self._engine.reset_cache()
        outputs = self._engine.llm.generate(
            [prompt for prompt, _ in jobs], [params for _, params in jobs], use_tqdm=False
        )
        return [self._outcome(output) for output in outputs]

    def _outcome(self, output: Any) -> Outcome:
        choice = output.outputs[0]
        journal: Journal | None = choice.editserver
        error = None
        if journal is not None and journal.error is not None:
            error, journal.error = (journal.error.code, journal.error.message), None  # what a pipe can carry
        top = [{token: entry.logprob for token, entry in step.items()} for step in choice.logprobs or ()]
        outcome = Outcome(
            list(choice.token_ids),
            choice.text,
            choice.finish_reason,
            choice.stop_reason,
            top,
            output.num_cached_tokens or 0,
            journal,
            error,
        )
        for request_id, known, drafts, accepted in self._steps:
            if request_id == output.request_id:
                outcome.accepted += accepted
                for i, draft in enumerate(drafts[accepted:], accepted):
                    outcome.rejected.setdefault(known + i, set()).add(draft)
        return outcome
