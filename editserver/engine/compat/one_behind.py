"""What of an output is delivered: up to where a rule or a dose ended the request, and only tokens that were judged.

A sampled token is fed in the step after the one that sampled it, so the verdict on it comes with the next output; with
speculation, accepted drafts are fed in the step that accepts them, and come with theirs. Requests whose rules may refuse run
one token behind: the last token of every output waits for the next one. The last token of a request that ends by itself is
never fed, and goes out with it.

Log-probabilities go with their tokens; statistics and the prompt's log-probabilities with the first output.
"""

from __future__ import annotations

from typing import Any

import msgspec

from editserver.engine.journal import Journal

HELD = "editserver_held"
"""Attribute of vLLM's ``RequestState`` (vllm/v1/engine/output_processor.py:139): the output that waits."""


def judged(state: Any, journal: Journal, output: Any) -> list[Any]:
    """What is delivered, in this order, now that ``output`` (an ``EngineCoreOutput``) has come; its records are noted.

    After a refusal or an error its last one has no tokens and ends the request.
    """
    end = journal.ends_at
    if end is None and not journal.may_refuse:
        return [output]
    held = state.__dict__.pop(HELD, None)
    due = [output] if held is None else [held, output]
    start = state.prompt_len + state.detokenizer.num_output_tokens()
    if end is not None:
        return _ended(due, end - start if journal.may_refuse else end - start + 1)
    if output.finish_reason is None:
        ready, waits = _parted(output, len(output.new_token_ids) - 1)
        setattr(state, HELD, waits)
        return [*due[:-1], *([] if ready is None else [ready])]
    if held is None:
        return due
    fed = journal.covers(start, start + len(held.new_token_ids))
    return due if fed else [output]  # an abort from outside comes without a verdict


def _ended(due: list[Any], n: int) -> list[Any]:
    """The first ``n`` tokens of ``due``, and an output without tokens that ends the request."""
    from vllm.v1.engine import FinishReason

    delivered = []
    rest = due[0]
    for output in due:
        first, rest = _parted(output, min(max(n, 0), len(output.new_token_ids)))
        n -= len(output.new_token_ids)
        if first is not None:
            delivered.append(first)
        if n < 0:
            break
    last = msgspec.structs.replace(
        rest,
        new_token_ids=[],
        new_logprobs=None,
        new_sampling_mask=None,
        routed_experts=None,
        finish_reason=FinishReason.ABORT,
        stop_reason=None,
    )
    return [*delivered, last]


def _parted(output: Any, n: int) -> tuple[Any | None, Any]:
    """``output`` as two: its first ``n`` tokens, None for no tokens; and the others, with whatever ends the request."""
    if n <= 0:
        return None, output
    more = len(output.new_token_ids) - n
    first = msgspec.structs.replace(
        output,
        new_token_ids=output.new_token_ids[:n],
        new_logprobs=_rows(output.new_logprobs, 0, n),
        new_sampling_mask=_rows(output.new_sampling_mask, 0, n) if more else output.new_sampling_mask,
        finish_reason=None,
        stop_reason=None,
        spec_decode_metrics=None,
    )
    rest = msgspec.structs.replace(
        output,
        new_token_ids=output.new_token_ids[n:],
        new_logprobs=_rows(output.new_logprobs, n, more),
        new_sampling_mask=_rows(output.new_sampling_mask, n, more) if more else None,
        new_prompt_logprobs_tensors=None,
        prompt_token_id_logprobs=None,
        routed_experts=None,
        prefill_stats=None,
        events=None,
    )
    return first, rest


def _rows(parts: Any, start: int, n: int) -> Any:
    """``n`` tokens of log-probabilities or sampling masks, from ``start`` on."""
    return None if parts is None else parts.slice_request(start, n)
