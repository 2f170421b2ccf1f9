"""The text of a run as token sequences, split into training and held-out *documents*.

A document (a Brown sample, a country's profile, a source file, a conversation) is on one side only. A conversation that
quotes a passage is on the side of the document the passage is from.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_weights.training import chats, corpus
from sae_weights.training.activations import windows
from sae_weights.training.own_files import read_file

HELD_OUT = 0.04
"""Share of the documents of every source that is never trained on."""

SHARES = {"prose": 0.52, "glosses": 0.10, "factbook": 0.10, "code": 0.06, "chat": 0.22}
"""How the distinct tokens divide between the sources; what a source lacks, the others do not make up for."""

WINDOWS = (128, 256, 256, 512, 1024)
"""Lengths of the windows that running text is cut into, one after the other: serving sees late positions too."""

LONGEST_CHAT = 1024


@dataclass
class Text:
    """Token sequences of one source, in random order."""

    train: list[list[int]] = field(default_factory=list)
    held_out: list[list[int]] = field(default_factory=list)

    def tokens(self) -> int:
        """Training tokens."""
        return sum(map(len, self.train))

    def cap(self, tokens: int) -> None:
        """Keep the first training sequences, up to ``tokens`` in all."""
        seen = 0
        for i, sequence in enumerate(self.train):
            seen += len(sequence)
            if seen > tokens:
                del self.train[i:]
                return


def held_out(key: str, share: float = HELD_OUT) -> bool:
    """Whether the document named ``key`` is held out: by its hash, so the same in every run."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) < share * 2**32


def bundled_sources(
    tokenizer: Any, conversations: Sequence[list[chats.Message]], cache: Path, report: Callable[[str], None]
) -> dict[str, Text]:
    """Prose, glosses, country profiles, code and, if there are any, conversations (licences: :mod:`.corpus`)."""
    prose = list(corpus.brown(cache))
    sources = {}
    for name, documents in (
        ("prose", prose),
        ("glosses", corpus.wordnet(cache)),
        ("factbook", corpus.factbook(cache)),
        ("code", corpus.python_sources()),
    ):
        report(f"tokenising {name}")
        sources[name] = running_text((d.text for d in documents), tokenizer)
    if conversations:
        report("tokenising chat")
        sources["chat"] = chat_text(conversations, prose, tokenizer)
    return sources


def running_text(documents: Iterable[str], tokenizer: Any) -> Text:
    """Documents cut into windows of :data:`WINDOWS` tokens."""
    text = Text()
    for document in documents:
        side = text.held_out if held_out(document[:200]) else text.train
        ids = tokenizer(document, add_special_tokens=False).input_ids
        start = 0
        while start < len(ids):
            length = WINDOWS[len(side) % len(WINDOWS)]
            side.extend(windows(ids[start : start + length], length))
            start += length
    _shuffle(text)
    return text


def chat_text(conversations: Iterable[list[chats.Message]], prose: Sequence[corpus.Document], tokenizer: Any) -> Text:
    """Conversations in the model's template, and passages of prose as a user's message, each from position 0 on.

    Quoted prose teaches the template's positions around ordinary text; there are two such messages per conversation.
    """
    text, origin = Text(), {p: d.text[:200] for d in prose for p in d.text.split("\n")}
    count = 0
    for messages in conversations:
        count += 1
        user = next(m["content"] for m in messages if m["role"] == "user")
        quoted = [origin[p] for p in user.split("\n") if p in origin]
        key = quoted[0] if quoted else json.dumps(messages[:2])
        _add_chat(text, key, tokenizer.apply_chat_template(messages, tokenize=False), tokenizer)
    passages = [p for p in origin if 200 <= len(p) <= 900]
    random.Random(1).shuffle(passages)
    for passage in passages[: 2 * count]:
        messages = [{"role": "user", "content": passage}]
        shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        _add_chat(text, origin[passage], shown, tokenizer)
    _shuffle(text)
    return text


def own_text(paths: Sequence[Path], tokenizer: Any) -> Text:
    """The user's own files (:func:`read_file`).

    Raises:
        ValueError: a line that cannot be read, with file and number.
    """
    text = Text()
    for path in paths:
        for content, conversation in read_file(path, tokenizer):
            if conversation:
                _add_chat(text, content, content, tokenizer)
                continue
            found = running_text([content], tokenizer)
            text.train += found.train
            text.held_out += found.held_out
    _shuffle(text)
    if not text.held_out and len(text.train) > 1:  # one long document: its last windows are the held-out ones
        held = max(1, int(HELD_OUT * len(text.train)))
        text.train, text.held_out = text.train[:-held], text.train[-held:]
    return text


def _add_chat(text: Text, key: str, shown: str, tokenizer: Any) -> None:
    ids = tokenizer(shown, add_special_tokens=False).input_ids[:LONGEST_CHAT]
    (text.held_out if held_out(key) else text.train).append(ids)


def _shuffle(text: Text) -> None:
    for side in (text.train, text.held_out):
        random.Random(0).shuffle(side)


def flattened(sources: dict[str, Text]) -> Iterator[list[int]]:
    """The training sequences of all sources, mixed."""
    mixed = [s for text in sources.values() for s in text.train]
    random.Random(2).shuffle(mixed)
    yield from mixed
