"""The running sum of a stream: events as they come, and the whole response at the end."""

from __future__ import annotations

import json
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, Field, ValidationError

from .events import (
    ActionEvent,
    Event,
    FinishEvent,
    InspectionEvent,
    ReasoningDelta,
    ReceiptEvent,
    RuleEvent,
    TextDelta,
    ToolCallDelta,
    UsageEvent,
)
from .exceptions import StreamError, UnexpectedResponse, error_from_stream
from .inspection import Inspection
from .receipts import Receipt
from .responses import ChatResponse, FunctionCall, Readings, ToolCall, Usage

ResponseT = TypeVar("ResponseT", bound=BaseModel)


class _FunctionPiece(BaseModel):
    name: str | None = None
    arguments: str | None = None


class _ToolCallPiece(BaseModel):
    index: int
    id: str | None = None
    function: _FunctionPiece | None = None


class _Delta(BaseModel):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCallPiece] | None = None


class _ChunkChoice(BaseModel):
    index: int
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None


class _Happening(BaseModel):
    id: str
    conclusion: str
    position: int
    rule: str | None = None
    action: str | None = None


class _Happenings(BaseModel):
    events: list[_Happening]


class _Chunk(BaseModel):
    id: str | None = None
    created: int | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    choices: list[_ChunkChoice] = Field(default_factory=list)
    usage: Usage | None = None
    choice: int = 0
    interventions: Receipt | _Happenings | None = None
    inspection: Inspection | list[Inspection] | None = None


class StreamedChoice:
    """One choice as far as it has come."""

    def __init__(self) -> None:
        self.role = "assistant"
        self.text = ""
        self.reasoning = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: dict[str, Any] | None = None
        self.receipt: Receipt | None = None
        self.inspection: Readings = None
        self.rule_events: list[RuleEvent | ActionEvent] = []
        self._tool_calls: dict[int, ToolCall] = {}

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The tool calls so far; `arguments` of the last one may be incomplete. A refused answer calls none."""
        if self.finish_reason == "content_filter":
            return []
        return [self._tool_calls[index] for index in sorted(self._tool_calls)]

    def _add_tool_call(self, piece: _ToolCallPiece) -> None:
        function = piece.function or _FunctionPiece()
        so_far = self._tool_calls.get(piece.index)
        self._tool_calls[piece.index] = ToolCall(
            id=piece.id or (so_far.id if so_far else ""),
            function=FunctionCall(
                name=function.name or (so_far.function.name if so_far else ""),
                arguments=(so_far.function.arguments if so_far else "") + (function.arguments or ""),
            ),
        )

    def _add_logprobs(self, piece: dict[str, Any]) -> None:
        if self.logprobs is None:
            self.logprobs = {}
        for key, value in piece.items():
            so_far = self.logprobs.get(key)
            both = isinstance(so_far, list) and isinstance(value, list)
            self.logprobs[key] = so_far + value if both else value if value is not None else so_far

    def _add_inspection(self, given: Inspection | list[Inspection]) -> list[Inspection]:
        """Join readings to those of the same request entry: by place in a list, by SAE for a single object."""
        pieces = given if isinstance(given, list) else [given]
        so_far = self.inspection if isinstance(self.inspection, list) else [self.inspection] if self.inspection else []
        joined = list(so_far)
        for place, piece in enumerate(pieces):
            if not isinstance(given, list):
                place = next((i for i, one in enumerate(joined) if one.sae == piece.sae), len(joined))
            if place >= len(joined):
                joined.append(piece)
            elif joined[place].sae != piece.sae:
                raise UnexpectedResponse(
                    f"readings of {piece.sae!r} came in the place of {joined[place].sae!r} in the stream"
                )
            else:
                joined[place] = joined[place].model_copy(update={"tokens": joined[place].tokens + piece.tokens})
        self.inspection = joined if isinstance(given, list) or len(joined) > 1 else joined[0]
        return pieces


def _happened(choice: int, one: _Happening) -> RuleEvent | ActionEvent:
    if one.rule is not None:
        return RuleEvent(choice, one.id, one.rule, one.conclusion, one.position)
    return ActionEvent(choice, one.id, one.action or "", one.conclusion, one.position)


class Transcript(Generic[ResponseT]):
    """Turns the data of server-sent events into typed events and adds them up."""

    def __init__(self, response_type: type[ResponseT]) -> None:
        self._response_type = response_type
        self._head: dict[str, Any] = {}
        self._choices: dict[int, StreamedChoice] = {}
        self.usage: Usage | None = None
        self.done = False

    def choice(self, index: int) -> StreamedChoice:
        """The choice `index`; empty before its first event."""
        return self._choices.get(index) or StreamedChoice()

    @property
    def choices(self) -> list[StreamedChoice]:
        """The choices seen so far, by index."""
        return [self._choices[index] for index in sorted(self._choices)]

    def feed(self, data: str) -> list[Event]:
        """The events in one server-sent event.

        Raises:
            APIStatusError, StreamError: the event is an error.
            UnexpectedResponse: not a chunk of the contract.
        """
        if data.strip() == "[DONE]":
            self.done = True
            return []
        try:
            decoded = json.loads(data)
        except ValueError:
            raise StreamError(f"not JSON in the stream: {data[:200]!r}") from None
        if isinstance(decoded, dict) and decoded.get("error"):
            raise error_from_stream(decoded)
        try:
            chunk = _Chunk.model_validate(decoded)
        except ValidationError as error:
            raise UnexpectedResponse(f"not a chunk of a completion: {error}") from error
        return self._take(chunk)

    def _growing(self, index: int) -> StreamedChoice:
        return self._choices.setdefault(index, StreamedChoice())

    def _take(self, chunk: _Chunk) -> list[Event]:
        for name in ("id", "created", "model", "system_fingerprint"):
            value = getattr(chunk, name)
            if value is not None:
                self._head.setdefault(name, value)
        events: list[Event] = []
        for piece in chunk.choices:
            self._take_choice(piece, events)
        if chunk.inspection is not None:
            for reading in self._growing(chunk.choice)._add_inspection(chunk.inspection):
                events.append(InspectionEvent(chunk.choice, reading.tokens, reading.sae))
        if isinstance(chunk.interventions, _Happenings):
            growing = self._growing(chunk.choice)
            for one in chunk.interventions.events:
                growing.rule_events.append(_happened(chunk.choice, one))
                events.append(growing.rule_events[-1])
        elif chunk.interventions is not None:
            self._growing(chunk.choice).receipt = chunk.interventions
            events.append(ReceiptEvent(chunk.choice, chunk.interventions))
        if chunk.usage is not None:  # with continuous_usage_stats every chunk has it: the last one counts
            self.usage = chunk.usage
            if not chunk.choices:
                events.append(UsageEvent(chunk.usage))
        return events

    def _take_choice(self, piece: _ChunkChoice, events: list[Event]) -> None:
        choice, delta = self._growing(piece.index), piece.delta or _Delta()
        choice.role = delta.role or choice.role
        reasoning = delta.reasoning or delta.reasoning_content
        if reasoning:
            choice.reasoning += reasoning
            events.append(ReasoningDelta(piece.index, reasoning))
        text = (piece.text if piece.text is not None else delta.content) or ""
        if piece.logprobs:
            choice._add_logprobs(piece.logprobs)
        if text or piece.logprobs:  # a token may have no text yet (half a character) and a logprob all the same
            choice.text += text
            events.append(TextDelta(piece.index, text, piece.logprobs))
        for call in delta.tool_calls or ():
            choice._add_tool_call(call)
            function = call.function or _FunctionPiece()
            events.append(ToolCallDelta(piece.index, call.index, call.id, function.name, function.arguments or ""))
        if piece.stop_reason is not None:
            choice.stop_reason = piece.stop_reason
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason
            events.append(FinishEvent(piece.index, piece.finish_reason))

    def response(self) -> ResponseT:
        """Everything so far, in the form of the whole answer."""
        if not self._choices:
            raise StreamError("the stream had no choice")
        chat = issubclass(self._response_type, ChatResponse)
        alone = len(self._choices) == 1
        body: dict[str, Any] = {"id": "", "created": 0, "model": "", **self._head}
        body["object"] = "chat.completion" if chat else "text_completion"
        body["usage"] = self.usage
        body["choices"] = []
        for index in sorted(self._choices):
            choice = self._choices[index]
            entry: dict[str, Any] = {"index": index, "logprobs": choice.logprobs}
            entry |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            if chat:
                calls = choice.tool_calls or None
                content = choice.text or (None if calls else "")
                entry["message"] = {"role": choice.role, "content": content, "tool_calls": calls}
                entry["message"]["reasoning"] = choice.reasoning or None
            else:
                entry["text"] = choice.text
            ours = body if alone else entry
            ours["interventions"], ours["inspection"] = choice.receipt, choice.inspection
            body["choices"].append(entry)
        return self._response_type.model_validate(body)
