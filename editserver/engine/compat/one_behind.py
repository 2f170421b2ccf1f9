"""Requests whose rules may refuse run one token behind: an output is delivered when its tokens were fed and judged.

A sampled token is fed in the step after the one that sampled it, so the verdict on it comes with the next output. Outputs
are held back whole, with their log-probabilities and statistics, so that nothing in them can fall apart; the last token of
a request that ends by itself is never fed, and goes out with it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from editserver.engine.journal import Journal

HELD = "editserver_held"
"""Attribute of vLLM's ``RequestState`` (vllm/v1/engine/output_processor.py:139): the output that waits."""


def judged(state: Any, journal: Journal, output: Any) -> list[Any]:
    """What is delivered, in this order, now that ``output`` (an ``EngineCoreOutput``) has come; its records are noted.

    After a refusal (or an error) that is one output without tokens that ends the request.
    """
    held = state.__dict__.pop(HELD, None)
    if journal.refusal is not None or journal.error is not None:
        return [_ended(held or output)]
    if output.finish_reason is None:
        setattr(state, HELD, output)
        return [] if held is None else [held]
    if held is None:
        return [output]
    start = state.prompt_len + state.detokenizer.num_output_tokens()
    fed = journal.covers(start, start + len(held.new_token_ids))
    return [held, output] if fed else [output]  # an abort from outside comes without a verdict


def _ended(output: Any) -> Any:
    """The request's last output, without its tokens. ``output`` may be its first: statistics and prompt are kept."""
    from vllm.v1.engine import FinishReason

    return msgspec.structs.replace(
        output,
        new_token_ids=[],
        new_logprobs=None,
        new_sampling_mask=None,
        routed_experts=None,
        finish_reason=FinishReason.ABORT,
        stop_reason=None,
    )
