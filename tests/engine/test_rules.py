"""Promises 1 to 3 for rules, and what a refusal lets through, on a real engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from editserver.engine.rules import KeptBits
from tests.engine import rule_checks
from tests.engine.lab import Driver, Lab, plain
from tests.engine.rule_checks import A, activations, inspected, trace_of
from tests.engine.support import Answer, Ask, prompt_of

pytestmark = pytest.mark.engine


def test_rules_decide_and_act_as_the_machine_does_on_the_engines_own_readings(lab: Lab) -> None:
    for ask in rule_checks.asks_of(lab):
        rule_checks.assert_as_meant(lab, ask)


def test_a_prefix_hit_brings_the_state_of_the_rules_with_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    rule_checks.ruled_prefix(lab)

    def forgetful(self: KeptBits, layer: int, blocks: Any, words: int) -> np.ndarray:
        return np.zeros((blocks.n_slots, words), np.uint64)

    monkeypatch.setattr(KeptBits, "of", forgetful)  # the check can fail
    with pytest.raises(AssertionError, match="differs from"):
        rule_checks.ruled_prefix(lab)


@pytest.mark.parametrize("size", [17, 64])
def test_rules_act_at_the_same_tokens_at_every_chunk_size(lab: Lab, size: int) -> None:
    rule_checks.ruled_chunks(lab, size)


def test_preempted_requests_have_the_same_rules_when_they_come_back(lab: Lab) -> None:
    rule_checks.ruled_preempted(lab)


def test_rules_in_one_row_change_no_bit_of_its_neighbours(lab: Lab) -> None:
    rule_checks.ruled_neighbours(lab)


# -- refusal ----------------------------------------------------------------------------------------------------------

PROMPT = prompt_of(800, 40)


def _refuse(feature: int, limit: float) -> list[Mapping[str, Any]]:
    text = f'rule: feature({A}, {feature}) > {limit!r} -> bad\non bad: refuse "No."'
    return [{"type": "rules", "text": text}]


@pytest.fixture(scope="module")
def seen(lab: Lab) -> np.ndarray:
    """Activations of the plain run, float32 ``[tokens, latents]``; refusals change nothing before they come."""
    ask = Ask(PROMPT, inspect=inspected((A,)), max_tokens=8)
    return activations(lab, ask, lab.alone(ask))[A]


def _late(seen: np.ndarray) -> tuple[list[Mapping[str, Any]], int]:
    """A refusal in the middle of the answer, and its position."""
    n = len(PROMPT)
    for feature in range(seen.shape[1]):
        before, after = seen[1:n, feature].max(), seen[n:, feature]
        first = int((after > before + 0.05).argmax())
        if after[first] > before + 0.05 and 2 <= first <= 5:
            return _refuse(feature, float(before + 0.02)), n + first
    raise AssertionError("no latent is larger in the answer than in the prompt")


def _stands(answer: Answer, plain: Answer, position: int) -> None:
    """The tokens below ``position`` and nothing else, with their log-probabilities."""
    due = max(0, position - len(PROMPT))
    assert answer.token_ids == plain.token_ids[:due]
    assert answer.top == plain.top[:due]
    assert answer.journal is not None
    assert answer.journal.error is None
    assert answer.journal.refusal == (0, position)
    assert trace_of(answer).active[position, 0]


def test_no_token_from_the_refusals_position_on_is_delivered_and_neighbours_go_on(lab: Lab, seen: np.ndarray) -> None:
    refusing, position = _late(seen)
    ask = Ask(PROMPT, refusing, max_tokens=8)
    other = Ask(prompt_of(801, 25), max_tokens=8)
    before = lab.engine.run([plain(ask), other], cold=True)
    with Driver(lab.engine) as driver:
        lab.engine.reset_cache()
        names = [driver.add(ask), driver.add(other)]
        delivered = []
        while driver.running:
            driver.step()
            delivered.append(len(driver.answer(names[0]).token_ids) if names[0] in driver.outputs else 0)
    answer = driver.answer(names[0])
    _stands(answer, before[0], position)
    assert driver.outputs[names[0]].outputs[0].finish_reason == "abort"
    assert delivered[: position - len(PROMPT) + 1] == list(range(position - len(PROMPT) + 1)), "not one token behind"
    assert driver.answer(names[1]).token_ids == before[1].token_ids
    lab.assert_nothing_left()


def test_a_refusal_in_the_prompt_lets_no_token_out_cached_or_not(lab: Lab, seen: np.ndarray) -> None:
    n = len(PROMPT)
    feature = int(seen[1:n].max(axis=0).argmax())
    position = 1 + int(seen[1:n, feature].argmax())
    ask = Ask(PROMPT, _refuse(feature, float(seen[position, feature] - 0.01)), max_tokens=8)
    bare = lab.alone(plain(ask))
    lab.engine.reset_cache()
    for cached in (0, 32):
        answer = lab.engine.run([ask])[0]
        assert answer.cached == cached
        assert not answer.token_ids
        _stands(answer, bare, position)


def test_a_request_that_is_not_refused_is_delivered_whole_however_it_ends(lab: Lab) -> None:
    from vllm import SamplingParams

    ask = Ask(PROMPT, _refuse(0, 1e9), max_tokens=8)
    bare = lab.alone(plain(ask))
    assert lab.engine.run([ask], cold=True)[0].same_bits(bare)
    tokenizer = lab.engine.llm.get_tokenizer()
    ends: list[dict[str, Any]] = [{"stop": tokenizer.decode(bare.token_ids[i])} for i in (0, 3, 6, 7)]
    ends += [{"stop_token_ids": [bare.token_ids[3]]}, {"max_tokens": 1}, {"max_tokens": 2}]
    extra = lab.engine.params(ask, lab.engine.compile(ask)).extra_args
    fields = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1}
    params = [SamplingParams(**fields | end, extra_args=x) for end in ends for x in (None, extra)]
    lab.engine.reset_cache()
    prompts = [lab.engine.prompt(ask)] * len(params)
    outputs = [output.outputs[0] for output in lab.engine.llm.generate(prompts, params, use_tqdm=False)]
    for mine, theirs, end in zip(outputs[1::2], outputs[::2], ends, strict=True):
        for part in ("token_ids", "text", "finish_reason", "stop_reason"):
            assert getattr(mine, part) == getattr(theirs, part), (end, part)
        assert len(mine.logprobs) == len(mine.token_ids)


def test_of_several_choices_only_the_refused_ones_end(lab: Lab) -> None:
    """Hot enough that the choices part; the limit is set between what they reach."""
    hot = Ask(PROMPT, inspect=inspected((A,)), max_tokens=8, n=4, temperature=1.5, seed=3)
    choices = lab.engine.run_all([hot], cold=True)[0]
    n = len(PROMPT)
    reached = np.stack([activations(lab, hot, choice)[A] for choice in choices])
    own, before = reached[:, n:].max(axis=1), reached[0, 1:n].max(axis=0)
    spread = np.sort(own, axis=0)[2] - np.maximum(np.sort(own, axis=0)[1], before)
    feature = int(spread.argmax())
    assert spread[feature] > 0.05, "the choices are all alike"
    limit = float(np.sort(own[:, feature])[2] - spread[feature] / 2)
    answers = lab.engine.run_all([replace(hot, inspect=None, interventions=_refuse(feature, limit))], cold=True)[0]
    for choice, answer, values in zip(choices, answers, reached[:, :, feature], strict=True):
        over = np.flatnonzero(values[1:] > limit) + 1
        assert answer.journal is not None
        assert answer.journal.refusal == ((0, int(over[0])) if len(over) else None)
        assert answer.token_ids == (choice.token_ids[: int(over[0]) - n] if len(over) else choice.token_ids)
    assert sum(answer.journal.refusal is not None for answer in answers if answer.journal) == 2
