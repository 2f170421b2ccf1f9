"""The JSON bodies of generation requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .inspection import Inspect
from .interventions import Intervention
from .wire import to_json

Messages = str | Sequence[Mapping[str, Any]]
"""OpenAI's messages; a plain string is one user message."""

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""A text, a list of texts, token ids, or a list of lists of token ids."""

Texts = Sequence[str | Sequence[Mapping[str, Any]]]
"""Texts, and chats as lists of messages."""
LabelledTexts = Sequence[str | Sequence[Mapping[str, Any]] | Mapping[str, Any]]
"""The same, and objects of ``text`` or ``messages`` with ``spans`` (characters, from and to) or token ``positions``."""

Interventions = Sequence[Intervention | Mapping[str, Any]]
InspectLike = Inspect | Mapping[str, Any] | Sequence[Inspect | Mapping[str, Any]]

_NOT_PARAMETERS = {
    "stream": "use chat_stream or complete_stream",
    "extra_body": "pass the fields as keywords, they go into the body as they are",
    "extra_headers": "give headers to the client",
    "extra_query": "the API has no query parameters here",
}


def extra_body(*, interventions: Interventions | None = None, inspect: InspectLike | None = None) -> dict[str, Any]:
    """Our part of a request, for OpenAI's SDK: ``create(..., extra_body=extra_body(interventions=[…]))``.

    Absent and empty arguments leave no trace, so that the request is plain.

    Raises:
        TypeError: one intervention where a list is expected.
    """
    fields: dict[str, Any] = {}
    if isinstance(interventions, (Mapping, str)) or hasattr(interventions, "to_dict"):
        raise TypeError(f"interventions is a list, got one {type(interventions).__name__}")
    if interventions:
        fields["interventions"] = [to_json(one) for one in interventions]
    if isinstance(inspect, (Inspect, Mapping)):
        fields["inspect"] = to_json(inspect)
    elif inspect:
        fields["inspect"] = [to_json(one) for one in inspect]
    return fields


def chat_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages as JSON; a string becomes one user message."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]


def texts(given: Texts) -> list[Any]:
    """Texts and chats as JSON.

    Raises:
        TypeError: one text, or one chat, where a list is expected.
    """
    if isinstance(given, str) or any(isinstance(one, Mapping) for one in given):
        raise TypeError(f"expected a list of texts or chats, got one {'text' if isinstance(given, str) else 'chat'}")
    return [one if isinstance(one, str) else [dict(message) for message in one] for one in given]


def labelled_texts(given: LabelledTexts) -> list[Any]:
    """The same, with objects that label places of a text or chat among them."""
    if isinstance(given, str):
        raise TypeError("expected a list of texts or chats, got one text")
    marked = [dict(one) if isinstance(one, Mapping) and {"spans", "positions"} & set(one) else None for one in given]
    plain = iter(texts([one for one, mark in zip(given, marked, strict=True) if mark is None]))  # type: ignore[misc]
    return [next(plain) if mark is None else mark for mark in marked]


def generation(
    subject: Mapping[str, Any],
    model: str | None,
    interventions: Interventions | None,
    inspect: InspectLike | None,
    params: Mapping[str, Any],
    *,
    stream: bool = False,
) -> dict[str, Any]:
    """The body for `subject` (messages or prompt); `params` are OpenAI's and vLLM's own fields, sent as given.

    A stream asks for the usage unless `stream_options` says otherwise.

    Raises:
        TypeError: a parameter that would be lost or contradict the method, with what to do instead.
    """
    for name, instead in _NOT_PARAMETERS.items():
        if name in params:
            raise TypeError(f"{name} is not a parameter here: {instead}")
    body = dict(subject)
    if model is not None:
        body["model"] = model
    body.update(params)
    if stream:
        body["stream"] = True
        body.setdefault("stream_options", {"include_usage": True})
    body.update(extra_body(interventions=interventions, inspect=inspect))
    return body
