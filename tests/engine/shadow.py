"""The shadow model: which tokens of a request an intervention had to act on, recomputed from what the client sent.

It knows a position, the prompt's length and the token there, and nothing of the engine's selectors, plans or batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editserver.engine.journal import Journal
from tests.engine.support import Answer, Ask


def selects(tokens: Any, position: int, prompt_len: int, token_id: int) -> bool:
    """Whether the ``tokens`` field of an intervention without ``include_bos`` selects this token."""
    if position == 0:
        return False
    if isinstance(tokens, list):
        return any(selects(part, position, prompt_len, token_id) for part in tokens)
    if isinstance(tokens, Mapping) and "tokens" in tokens:
        return token_id in tokens["tokens"]
    if isinstance(tokens, Mapping):
        start, stop = tokens.get("from", 0), tokens.get("to")
        start = start + prompt_len if start < 0 else start
        stop = stop + prompt_len if stop is not None and stop < 0 else stop
        return start <= position and (stop is None or position < stop)
    return {
        "all": True,
        "prompt": position < prompt_len,
        "generated": position >= prompt_len,
        "last_prompt_token": position == prompt_len - 1,
    }[tokens]


def fired_at(journal: Journal, intervention: int, layer: int, stop: int) -> list[int]:
    """Positions below ``stop`` at which the engine says that the intervention changed something at ``layer``."""
    counts = [journal.stats(intervention, layer, p).fired for p in range(stop + 1)]
    return [p for p in range(stop) if counts[p + 1] > counts[p]]


def assert_edited_where_asked(ask: Ask, answer: Answer, *, preempted: bool = False) -> None:
    """Every computed position is reported, and the edits fired exactly where the shadow says that they must.

    For edits that always change something where they are selected (steering adds, ``set`` to an unusual value). A request
    that may have been ``preempted`` may have computed again what it had first taken from the cache.
    """
    if not ask.interventions:
        assert answer.journal is None or not answer.journal.payload.program
        return
    assert answer.journal is not None, "an edited request came back without a journal"
    assert answer.journal.error is None
    fed = [*ask.prompt, *answer.token_ids[:-1]]
    first = answer.journal.computed_from
    assert answer.journal.covers(first, len(fed)), "not every computed position was reported"
    assert first == answer.cached or (preempted and first < answer.cached), (
        f"computed from {first}, but {answer.cached} tokens came from the cache"
    )
    for i, (spec, entry) in enumerate(zip(ask.interventions, answer.compiled.entries, strict=True)):
        due = [p for p in range(first, len(fed)) if selects(spec.get("tokens", "all"), p, len(ask.prompt), fed[p])]
        for layer in entry.layers:
            fired = fired_at(answer.journal, i, layer, len(fed))
            assert fired == due, f"intervention {i} at layer {layer} fired at {fired}, the shadow model says {due}"
