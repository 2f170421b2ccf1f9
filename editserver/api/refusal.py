"""What a client sees of a choice that a rule refused: the rule's message, and ``finish_reason: "content_filter"``.

A whole answer is the message alone. A stream has sent what came before; the message is its last delta. The engine withholds
the tokens from the firing position on, so there is nothing here to hide but what vLLM would add to its last event.
"""

from __future__ import annotations

import json
from typing import Any

FINISH_REASON = "content_filter"
_PREFIX = "data: "


def refuse_whole(choice: Any, message: str) -> None:
    """Make ``message`` the answer of a choice of a whole response, whose own text is blank but for an echoed prompt.

    Tool calls, reasoning, logprobs and token ids of the withheld answer go.
    """
    if hasattr(choice, "message"):
        choice.message.content = (choice.message.content or "") + message
        choice.message.tool_calls = []
        choice.message.reasoning = None
    else:
        choice.text += message
    choice.finish_reason, choice.stop_reason, choice.logprobs = FINISH_REASON, None, None
    if choice.token_ids is not None:
        choice.token_ids = []


def refusal_choice(kind: str, index: int, message: str) -> dict[str, Any]:
    """The ``choices`` entry of a stream's last delta; ``kind`` is the ``object`` of its chunks."""
    said = {"delta": {"content": message}} if kind == "chat.completion.chunk" else {"text": message}
    return {"index": index, **said, "logprobs": None, "finish_reason": FINISH_REASON, "stop_reason": None}


def without_end(event: str, refused: Any) -> str | None:
    """One of vLLM's server-sent events, without the ends of the ``refused`` choices; None if nothing is left.

    A refused choice has not finished when vLLM says so, and calls no tool. Text of tokens before the firing position stays.
    """
    if not refused or not event.startswith(_PREFIX + "{"):
        return event
    chunk = json.loads(event.removeprefix(_PREFIX))
    mine = [choice for choice in chunk.get("choices") or () if choice.get("index") in refused]
    if not mine:
        return event
    for choice in mine:
        choice["finish_reason"] = None
        choice.pop("stop_reason", None)
        (choice.get("delta") or {}).pop("tool_calls", None)
    chunk["choices"] = [choice for choice in chunk["choices"] if choice not in mine or _says_something(choice)]
    if not chunk["choices"]:
        return None
    return f"{_PREFIX}{json.dumps(chunk, ensure_ascii=False)}\n\n"


def _says_something(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    said = (choice.get("text"), delta.get("role"), delta.get("content"), delta.get("reasoning"))
    listed = (choice.get("logprobs") or {}).values()
    return any(said) or any(listed) or any(choice.get(name) for name in ("token_ids", "prompt_token_ids"))
