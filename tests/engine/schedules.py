"""The schedules under which what remembers earlier tokens (gates, rules) must stay what it is: one body for all of them.

``as_alone(lab, ask, answer, tolerance)`` raises where an answer is not that of its request run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tests.engine.lab import Driver, Lab, chunked, plain, scarce, watched
from tests.engine.support import BLOCK, Answer, Ask, prompt_of

SHARED = 2 * BLOCK
"""Tokens that the prompts of a check have in common."""

AsAlone = Callable[[Lab, Ask, Answer, float], None]


def behind_a_prefix(lab: Lab, asks: Sequence[Ask], as_alone: AsAlone) -> None:
    """Behind a prefix hit, of one's own or of another prompt, and beside the request that computes the prefix."""
    first, second = asks
    tolerance = max(lab.floor, 2 * lab.worst.get("vanilla", 0.0))
    lab.engine.reset_cache()
    for ask, cached in ((first, 0), (first, SHARED), (second, SHARED), (first, SHARED)):
        answer = lab.engine.run([ask])[0]
        assert answer.cached == cached, f"{answer.cached} cached tokens, {cached} are due"
        as_alone(lab, ask, answer, tolerance)
    together = lab.engine.run([second, first, plain(first)], cold=True)
    tolerance = lab.noise([plain(first)], together[-1:])
    for ask, answer in zip((second, first), together, strict=False):
        as_alone(lab, ask, answer, tolerance)


def in_chunks(lab: Lab, asks: Sequence[Ask], size: int, as_alone: AsAlone) -> None:
    """However the prompt is cut."""
    lab.engine.reset_cache()
    with watched(lab.engine) as steps, chunked(lab.engine, size):
        answers = lab.engine.run([*asks, plain(asks[0])], cold=True)
    assert max(sum(step.values()) for step in steps.tokens) == size
    tolerance = lab.noise([plain(asks[0])], answers[-1:])
    for ask, answer in zip(asks, answers, strict=False):
        as_alone(lab, ask, answer, tolerance)


def preempted(lab: Lab, asks: Sequence[Ask], seed: int, as_alone: AsAlone) -> None:
    """Requests that lose their blocks while they generate, and come back; ``seed`` makes a prompt that shares nothing."""
    longer = [replace(ask, max_tokens=27) for ask in asks]
    other = replace(longer[0], prompt=prompt_of(seed, SHARED - 3))
    asks = [plain(longer[0]), other, *longer]  # the last one in goes first
    for ask in asks:
        lab.alone(ask)
    lab.engine.reset_cache()
    with scarce(lab.engine, 9), watched(lab.engine) as steps, Driver(lab.engine) as driver:
        named = [driver.add(ask) for ask in asks]
        driver.drain()
    assert steps.preemptions > 0, "nothing was preempted: the test proves nothing"
    answers = [driver.answer(name) for name in named]
    again = [n for n, ask in zip(named, asks, strict=True) if steps.computed(n) > len(ask.prompt) + 26]
    assert set(again) & set(named[1:]), "none of them had to compute a token twice"
    tolerance = lab.noise(asks[:1], answers[:1])
    for ask, answer in zip(asks[1:], answers[1:], strict=True):
        as_alone(lab, ask, answer, tolerance)
    lab.assert_nothing_left()
