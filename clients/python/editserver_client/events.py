"""What a stream yields. `choice` is the index of the choice that the event belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .inspection import TokenReading
from .receipts import Receipt
from .responses import Usage


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer."""

    choice: int
    text: str
    logprobs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More text of the model's reasoning, when the server separates it."""

    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the `index`-th tool call: `id` and `name` come once, `arguments` in pieces."""

    choice: int
    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """A choice ended: stop, length, tool_calls …"""

    choice: int
    reason: str


@dataclass(frozen=True, slots=True)
class InspectionEvent:
    """Readings of `sae` at further positions."""

    choice: int
    tokens: list[TokenReading]
    sae: str


@dataclass(frozen=True, slots=True)
class RuleEvent:
    """A rule of intervention `id` made `conclusion` hold from the token at `position` on."""

    choice: int
    id: str
    rule: str
    conclusion: str
    position: int


@dataclass(frozen=True, slots=True)
class ActionEvent:
    """An action on `conclusion` began: flag, log, refuse, or the type of an intervention."""

    choice: int
    id: str
    action: str
    conclusion: str
    position: int


@dataclass(frozen=True, slots=True)
class ReceiptEvent:
    """What was applied; comes after the choice's last delta."""

    choice: int
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """Token counts of the whole request."""

    usage: Usage


Event = (
    TextDelta
    | ReasoningDelta
    | ToolCallDelta
    | FinishEvent
    | InspectionEvent
    | RuleEvent
    | ActionEvent
    | ReceiptEvent
    | UsageEvent
)
