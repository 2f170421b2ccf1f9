"""Which tokens of a text are of the concept: all of them, those of given words, or those at given places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import PlainValidator

from editserver.api.passes import Prompt, as_text
from interventions.concepts.labelled import IGNORED, NEGATIVE, POSITIVE
from interventions.errors import InterventionError
from interventions.wording import choices, nearest, show
from sae_weights.knowledge.words import token_text

Labels = Literal["sentence", "word", "position"]
Part = Literal["last", "all"]
MAX_WORDS = 256
MAX_SPANS = 1024
"""Of one text."""

TokenLabels = npt.NDArray[np.int8]
_KEYS = ("text", "messages", "spans", "positions")


@dataclass(frozen=True)
class Marked:
    """A text with places in it.

    Attributes:
        text: the text, or the chat.
        spans: characters, from and to (exclusive), of a text.
        positions: token positions, as ``POST /tokenize`` counts them.
    """

    text: Any
    spans: tuple[tuple[int, int], ...] = ()
    positions: tuple[int, ...] = ()

    def as_json(self) -> Any:
        """As it was given."""
        if not self.spans and not self.positions:
            return self.text
        key = "text" if isinstance(self.text, str) else "messages"
        spans, positions = [list(span) for span in self.spans], list(self.positions)
        return {key: self.text, "spans": spans, "positions": positions}


def as_marked(value: Any) -> Marked:
    """A text, a chat, or ``{"text" or "messages", "spans", "positions"}``; else ``ValueError``."""
    if not isinstance(value, dict):
        return Marked(as_text(value))
    for key in value:
        if key not in _KEYS:
            raise ValueError(f"unknown field {show(key)}; known are {choices(_KEYS)}.{nearest(str(key), _KEYS)}")
    if ("text" in value) == ("messages" in value):
        raise ValueError("expected a text, a chat, or an object with exactly one of text and messages")
    text = as_text(value.get("text", value.get("messages")))
    spans, positions = _lists(value, "spans"), _lists(value, "positions")
    if not spans and not positions:
        raise ValueError("needs spans or positions; a text without labels stands as it is")
    if spans and not isinstance(text, str):
        raise ValueError("spans count the characters of a text; a chat is labelled by positions")
    for span in spans:
        if not isinstance(span, list) or len(span) != 2 or not all(type(end) is int for end in span):
            raise ValueError(f"a span is [from, to], in characters; got {show(span)}")
        if not 0 <= span[0] < span[1] <= len(text):
            raise ValueError(f"the span {span} is not within the {len(text)} characters of the text")
    for position in positions:
        if type(position) is not int or not 1 <= position < 2**31:
            raise ValueError(
                f"a position is a token's, from 1 on (the first one is never evidence); got {show(position)}"
            )
    return Marked(text, tuple((span[0], span[1]) for span in spans), tuple(positions))


def _lists(value: dict[str, Any], name: str) -> list[Any]:
    given = value.get(name) or []
    if not isinstance(given, list) or len(given) > MAX_SPANS:
        raise ValueError(f"{name}: expected a list of at most {MAX_SPANS}, got {show(given)}")
    return given


_PLACES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "text": {"type": "string"},
        "messages": {"type": "array", "items": {"type": "object"}},
        "spans": {
            "type": "array",
            "description": "[from, to) in characters of text.",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
        },
        "positions": {
            "type": "array",
            "description": "Token positions, as POST /tokenize counts them.",
            "items": {"type": "integer", "minimum": 1},
        },
    },
}
_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, _PLACES],
}


class _Schema:
    @staticmethod
    def __get_pydantic_json_schema__(_core: Any, _handler: Any) -> dict[str, Any]:
        return _SCHEMA


MarkedText = Annotated[Marked, PlainValidator(as_marked), _Schema()]
"""A text or chat, or an object with places in it."""


@dataclass(frozen=True)
class Labelling:
    """How tokens are labelled.

    Attributes:
        labels: "sentence", "word" or "position".
        words: words and phrases, found whole and whatever their case.
        part: which tokens of a word or span are positives; of "last" the others are neither positive nor negative.
    """

    labels: Labels
    words: tuple[str, ...] = ()
    part: Part = "all"

    @property
    def by_token(self) -> bool:
        """Whether tokens of one text differ."""
        return self.labels != "sentence"

    def of(self, tokenizer: Any, prompt: Prompt, marked: Marked) -> TokenLabels:
        """Labels of the tokens from position 1 on, of one text of the target.

        Raises:
            InterventionError: ``invalid_artifact``: no token is labelled.
        """
        ids = [int(one) for one in prompt.token_ids]
        found = np.full(len(ids), NEGATIVE, np.int8)
        if self.labels == "position" and not marked.spans and not marked.positions:
            message = 'expected {"text", "spans"} or {"text", "positions"}: labels is "position"'
            raise InterventionError("invalid_artifact", f"{prompt.param}: {message}", prompt.param)
        for position in marked.positions if self.labels == "position" else ():
            if position < len(found):
                found[position] = POSITIVE
        if self.labels == "word" or marked.spans:
            text, ends = _ends(tokenizer, prompt, marked.text, ids)
            spans = _occurrences(self.words, text) if self.labels == "word" else list(marked.spans)
            for start, stop in spans:
                self._label(found, ends, start, stop)
        if not (found[1:] == POSITIVE).any():
            where = "none of the words occurs" if self.labels == "word" else "no token is labelled"
            message = f"{where} after the first token and within tokens_per_text"
            raise InterventionError("invalid_artifact", f"{prompt.param}: {message}", prompt.param)
        return found[1:]

    def _label(self, found: TokenLabels, ends: Sequence[tuple[int, int]], start: int, stop: int) -> None:
        inside = [i for i, (low, high) in enumerate(ends) if low < stop and high > start]
        # A phrase that the end of a text cuts off has no last token there.
        if not inside or (self.part == "last" and ends[inside[-1]][1] < stop):
            return
        for i in inside:
            if found[i] != POSITIVE:
                found[i] = IGNORED
        for i in inside if self.part == "all" else inside[-1:]:
            found[i] = POSITIVE


def _occurrences(words: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where the words stand on their own, whatever their case."""
    found = []
    for word in words:
        spaced = r"\s+".join(re.escape(part) for part in word.split())
        pattern = re.compile(rf"(?<!\w){spaced}(?!\w)", re.IGNORECASE)
        found += [match.span() for match in pattern.finditer(text)]
    return found


def _ends(tokenizer: Any, prompt: Prompt, given: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """A text and the characters of each token in it, without the spaces around the token's word."""
    rendered = given if isinstance(given, str) else prompt.engine_input.get("prompt")
    for special in (True, False) if isinstance(rendered, str) and getattr(tokenizer, "is_fast", False) else ():
        coded = tokenizer(rendered, add_special_tokens=special, return_offsets_mapping=True)
        if list(coded["input_ids"][: len(ids)]) == list(ids):
            assert isinstance(rendered, str)
            return rendered, [_trimmed(rendered, *span) for span in coded["offset_mapping"][: len(ids)]]
    if isinstance(given, str):
        message = "its characters cannot be told from its tokens here; label it by positions"
        raise InterventionError("invalid_artifact", f"{prompt.param}: {message}", prompt.param)
    pieces = [token_text(tokenizer, one) for one in ids]
    stops = np.cumsum([len(piece) for piece in pieces]).tolist()
    text = "".join(pieces)
    return text, [_trimmed(text, stop - len(piece), stop) for piece, stop in zip(pieces, stops, strict=True)]


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    piece = text[start:stop]
    left = len(piece) - len(piece.lstrip())
    return (start + left, stop) if left < len(piece) else (start, stop)
