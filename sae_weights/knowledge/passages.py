"""Texts for the label pass, as passages that the model reads: the bundled corpora and chats, or the user's own files."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_weights.training import chats, corpus
from sae_weights.training.activations import windows
from sae_weights.training.own_files import read_file

from .measurement import Passage

SHARES = {"brown": 0.4, "wordnet": 0.1, "factbook": 0.1, "python": 0.1, "chat": 0.3}
"""How the tokens divide between the bundled sources; without chats, the others have their share."""
WINDOW = 256
LONGEST_CHAT = 512
PER_DOCUMENT = 2048
"""Tokens of a long file that count as one document, of which a feature shows at most two contexts."""


@dataclass(frozen=True)
class Texts:
    """What the pass reads.

    Attributes:
        sources: what the text is and whose, for the store: {"name", "package", "licence", "note"} per source.
    """

    passages: list[Passage]
    sources: list[dict[str, str]]


def bundled_texts(
    tokenizer: Any, tokens: int, cache: Path, chat_file: Path | None, report: Callable[[str], None]
) -> Texts:
    """About ``tokens`` tokens of the corpora that the bundled dictionaries were trained on, documents in random order.

    ``chat_file``: conversations, one JSON list of messages per line; without it there are no chats.

    Raises:
        RuntimeError: a corpus could not be fetched.
    """
    documents: dict[str, tuple[corpus.Source, Callable[[], Iterable[str]]]] = {
        "brown": (corpus.BROWN, lambda: (d.text for d in corpus.brown(cache))),
        "wordnet": (corpus.WORDNET, lambda: (d.text for d in corpus.wordnet(cache))),
        "factbook": (corpus.FACTBOOK, lambda: (d.text for d in corpus.factbook(cache))),
        "python": (corpus.PYTHON, lambda: (d.text for d in corpus.python_sources())),
    }
    if chat_file is not None:
        documents["chat"] = (corpus.CHAT, lambda: _conversations(chat_file, tokenizer))
    total = sum(SHARES[name] for name in documents)
    passages: list[Passage] = []
    numbers = itertools.count()
    for name, (_, read) in documents.items():
        report(name)
        texts = list(read())
        random.Random(0).shuffle(texts)
        part = (p for text in texts for p in _passages(text, name, tokenizer, numbers, whole=name == "chat"))
        passages += _capped(part, int(tokens * SHARES[name] / total))
    sources = [
        {"name": source.name, "package": source.package, "licence": source.licence, "note": source.note}
        for source, _ in documents.values()
    ]
    return Texts(passages, sources)


def own_texts(paths: Sequence[Path], tokenizer: Any, tokens: int) -> Texts:
    """The user's own files (:func:`read_file`), in their order, up to ``tokens`` tokens in all.

    Raises:
        ValueError: a line that cannot be read, with file and number.
    """
    numbers = itertools.count()
    part = (
        passage
        for path in paths
        for text, whole in read_file(path, tokenizer)
        for passage in _passages(text, path.name, tokenizer, numbers, whole)
    )
    sources = [{"name": path.name, "package": "", "licence": "", "note": "a file of the user's own"} for path in paths]
    return Texts(list(_capped(part, tokens)), sources)


def _passages(text: str, source: str, tokenizer: Any, numbers: Iterator[int], whole: bool) -> Iterator[Passage]:
    """One conversation from position 0, or consecutive windows of running text."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if whole:
        if len(ids) > 1:
            yield Passage(ids[:LONGEST_CHAT], source, next(numbers))
        return
    for start in range(0, len(ids), PER_DOCUMENT):
        document = next(numbers)
        for window in windows(ids[start : start + PER_DOCUMENT], WINDOW):
            yield Passage(window, source, document)


def _capped(passages: Iterable[Passage], tokens: int) -> Iterator[Passage]:
    seen = 0
    for passage in passages:
        if seen >= tokens:
            return
        seen += len(passage.tokens)
        yield passage


def _conversations(path: Path, tokenizer: Any) -> Iterator[str]:
    for messages in chats.read(path):
        yield tokenizer.apply_chat_template(messages, tokenize=False)
