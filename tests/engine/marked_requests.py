"""Requests of made-up steps: each adds a number of its own to the tokens it selects, so a row says whose edit it got."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from editserver.engine.journal import Journal
from interventions.program import Channel, LayerProgram, Op, Payload, Program, ReadKind, vector_key
from interventions.selectors import ALL, GENERATED, LAST_PROMPT_TOKEN, PROMPT, Selector
from tests.engine.shadow import selects

D, LAYER, BLOCK, VOCAB = 4, 1, 4, 12
MAX_ROWS, MAX_TOKENS = 6, 48
MENTION = (3, 5)
KINDS: dict[str, tuple[Selector, Any]] = {
    "all": (ALL, "all"),
    "prompt": (PROMPT, "prompt"),
    "generated": (GENERATED, "generated"),
    "last": (LAST_PROMPT_TOKEN, "last_prompt_token"),
    "tokens": (Selector(token_ids=(2, 7)), {"tokens": [2, 7]}),
    "mention": (Selector(ends=(MENTION,)), None),
}
"""What a request selects: as the engine is told, and as a client says it (None: the mention, see :func:`due`)."""


def payload_of(number: int, selector: Selector) -> Payload:
    """Adds ``number + 1`` to the first coordinate."""
    values = np.array([number + 1, 0, 0, 0], "<f4").tobytes()
    add = Op(1.0, 1.0, -np.inf, np.inf, False, 0, 0)
    channel = Channel(ReadKind.NONE, vector_key(values), (add,))
    program = Program((LayerProgram(LAYER, (channel,)),), (selector,), {channel.row: values})
    return Payload(program, (), None)


@dataclass
class Request:
    """A request and the tokens that its model will say. ``computed``: tokens whose KV is there, as the device knows."""

    number: int
    kind: str | None
    prompt_len: int
    tokens: list[int]
    payload: Payload | None
    journal: Journal | None
    computed: int = 0
    known: int = 0
    """Tokens that vLLM has: the prompt, and what was sampled."""
    computed_from: int = 0
    sent: bool = False
    slot: int | None = None
    slots: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"r{self.number}"

    def due(self, position: int, token: int) -> bool:
        """Whether ``token`` at ``position``, behind the request's own tokens, has the edit."""
        if self.kind is None:
            return False
        spec = KINDS[self.kind][1]
        if spec is None:
            return position > 0 and (self.tokens[position - 1], token) == MENTION
        return selects(spec, position, self.prompt_len, token)


@dataclass
class Row:
    """One request's part of a batch: ``tokens`` from ``start`` on, of which the host takes ``forecast`` to be there."""

    request: Request
    start: int
    tokens: list[int]
    forecast: int
    drafts: int
