"""OpenAI's answers plus the receipt (`interventions`) and the readings (`inspection`).

Both stand at top level when there is one choice, otherwise in each choice, as the server sends them; the properties
`receipt` and `readings` of a choice's answer hide that difference for the first choice.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from .inspection import ANSWER, Inspection
from .receipts import Receipt

Readings = Inspection | list[Inspection] | None
"""One `Inspection`, or a list of them when `inspect` was a list."""


class Usage(BaseModel):
    """Token counts."""

    model_config = ANSWER
    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: dict[str, Any] | None = None


class FunctionCall(BaseModel):
    """`arguments` is JSON text, as the model wrote it."""

    model_config = ANSWER
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model asks for."""

    model_config = ANSWER
    id: str
    type: str = "function"
    function: FunctionCall


class Message(BaseModel):
    """The assistant's message; `content` may be None when it calls tools."""

    model_config = ANSWER
    role: str
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class _Choice(BaseModel):
    model_config = ANSWER
    index: int
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None
    interventions: Receipt | None = None
    inspection: Inspection | list[Inspection] | None = None


class ChatChoice(_Choice):
    """One answer of a chat."""

    message: Message

    @property
    def text(self) -> str:
        """The answer's text, empty when it only calls tools."""
        return self.message.content or ""


class CompletionChoice(_Choice):
    """One continuation of a prompt."""

    text: str


ChoiceT = TypeVar("ChoiceT", ChatChoice, CompletionChoice)


class _Response(BaseModel, Generic[ChoiceT]):
    model_config = ANSWER
    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceT]
    usage: Usage | None = None
    interventions: Receipt | None = None
    inspection: Inspection | list[Inspection] | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended: stop, length, tool_calls …"""
        return self.choices[0].finish_reason

    @property
    def receipt(self) -> Receipt | None:
        """The first choice's receipt, wherever it stands; None for a request without interventions."""
        return self.interventions or self.choices[0].interventions

    @property
    def readings(self) -> Readings:
        """The first choice's inspection, wherever it stands."""
        return self.inspection or self.choices[0].inspection


class ChatResponse(_Response[ChatChoice]):
    """Answer of `Client.chat`."""

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The first choice's tool calls."""
        return self.choices[0].message.tool_calls or []


class CompletionResponse(_Response[CompletionChoice]):
    """Answer of `Client.complete`."""
