"""What of an output is delivered when a step brings several tokens: token by token the same as when it brings one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists

from editserver.engine.compat.one_behind import judged

PROMPT = 10


class Client:
    """A request's state in the API process, and what it has been given."""

    def __init__(self, may_refuse: bool) -> None:
        self.state = SimpleNamespace(
            prompt_len=PROMPT, detokenizer=SimpleNamespace(num_output_tokens=lambda: len(self.tokens))
        )
        self.journal: Any = SimpleNamespace(may_refuse=may_refuse, ends_at=None, covers=self.covers)
        self.tokens: list[int] = []
        self.values: list[float] = []
        self.stats: list[Any] = []
        self.reason: Any = None
        self.known = PROMPT

    def covers(self, start: int, stop: int) -> bool:
        return stop < self.known

    def step(self, tokens: list[int], finish: Any = None) -> None:
        """The next tokens were sampled: all tokens before the last of them were fed."""
        n = len(tokens)
        values = np.array(tokens, np.float32).reshape(-1, 1)
        logprobs = LogprobsLists(values.astype(np.int32), values, values[:, 0].astype(np.int32))
        first = self.known == PROMPT
        self.known += n
        output = EngineCoreOutput(
            "a", list(tokens), logprobs, finish_reason=finish, prefill_stats="stats" if first else None
        )
        for given in judged(self.state, self.journal, output):
            assert self.reason is None, "an output behind the last"
            self.tokens += given.new_token_ids
            if given.new_token_ids:
                assert given.new_logprobs is not None
                assert given.new_logprobs.logprob_token_ids[:, 0].tolist() == given.new_token_ids
                self.values += given.new_logprobs.logprobs[:, 0].tolist()
            self.stats += [given.prefill_stats] if given.prefill_stats else []
            self.reason = given.finish_reason


def _run(cuts: list[int], *, may_refuse: bool, end: int | None, finish: bool) -> Client:
    """Tokens 100, 101, … in steps of these sizes; position ``end`` ends the request when it is fed."""
    client, token = Client(may_refuse), 100
    for i, n in enumerate(cuts):
        fed = PROMPT + token - 100 + n - 1  # all but the last of the tokens that are known after this step
        if end is not None and end < fed:
            client.journal.ends_at = end
        client.step(list(range(token, token + n)), FinishReason.LENGTH if finish and i == len(cuts) - 1 else None)
        token += n
        if client.reason is not None:
            break
    return client


CUTS = [[1, 5, 1, 3, 2], [1, 2, 2, 2, 5], [1, 11], [1, 1, 1, 4, 4, 1]]


@pytest.mark.parametrize("may_refuse", [True, False])
@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("end", [None, PROMPT - 3, PROMPT, PROMPT + 1, PROMPT + 4, PROMPT + 10])
@pytest.mark.parametrize("cuts", CUTS)
def test_tokens_that_come_together_are_delivered_as_one_by_one(
    cuts: list[int], end: int | None, finish: bool, may_refuse: bool
) -> None:
    mine = _run(cuts, may_refuse=may_refuse, end=end, finish=finish)
    alone = _run([1] * 12, may_refuse=may_refuse, end=end, finish=finish)
    assert (mine.tokens, mine.reason) == (alone.tokens, alone.reason)
    assert mine.values == [float(token) for token in mine.tokens]
    assert mine.stats == alone.stats == ["stats"] * (mine.reason is not None or bool(mine.tokens))
    if end is None:
        assert mine.tokens == list(range(100, 112 if finish or not may_refuse else 111))
        assert mine.reason == (FinishReason.LENGTH if finish else None)
    else:
        assert mine.tokens == list(range(100, 100 + max(0, end - PROMPT + (not may_refuse))))
        assert mine.reason == FinishReason.ABORT


def test_an_abort_from_outside_brings_no_token_without_a_verdict() -> None:
    client = Client(True)
    client.step([100])
    client.step([101, 102, 103])
    assert client.tokens == [100, 101, 102]
    client.step([], FinishReason.ABORT)
    assert client.tokens == [100, 101, 102]
    assert client.reason == FinishReason.ABORT
