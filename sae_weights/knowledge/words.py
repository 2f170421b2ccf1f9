"""Texts of tokens, and the words that tokens make up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

LONGEST_WORD = 40
"""Characters; scripts without spaces make endless words."""

_CONTINUES = re.compile(r"[^\W_]|['’][^\W_]")


def token_text(tokenizer: Any, token_id: int) -> str:
    """Text of one token. SentencePiece tokenizers drop the leading space when they decode; it is put back."""
    text = str(tokenizer.decode([token_id]))
    piece = tokenizer.convert_ids_to_tokens([token_id])[0]
    if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
        return f" {text}"
    return text


class TokenTexts:
    """Texts of tokens, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self.special = frozenset(int(i) for i in tokenizer.all_special_ids)

    def __getitem__(self, token_id: int) -> str:
        text = self._known.get(token_id)
        if text is None:
            text = self._known[token_id] = token_text(self._tokenizer, token_id)
        return text


class Words:
    """Which word each token of a text belongs to.

    A word begins at a token unless that token starts with a letter or digit (or with an apostrophe and one) and the token
    before it ends with one: " viol" + "in" is a word of two tokens, "don" + "'t" too, " " and "," are words of their own.

    Attributes:
        texts: the word's text by its id, without surrounding spaces.
        counts: how often each occurs.
    """

    def __init__(self, tokens: TokenTexts) -> None:
        self._tokens = tokens
        self._ids: dict[str, int] = {}
        self._edges: dict[int, tuple[bool, bool]] = {}
        self.texts: list[str] = []
        self.counts: list[int] = []

    def read(self, sequence: Sequence[int]) -> list[int]:
        """The id of the word that each token belongs to; counts the words."""
        ids: list[int] = []
        parts: list[str] = []
        length, ends_open = 0, False
        for token in sequence:
            continues, open_end = self._edge(token)
            text = self._tokens[token]
            if parts and not (ends_open and continues and length + len(text) <= LONGEST_WORD):
                ids += [self._id("".join(parts))] * len(parts)
                parts, length = [], 0
            parts.append(text)
            length += len(text)
            ends_open = open_end
        if parts:
            ids += [self._id("".join(parts))] * len(parts)
        return ids

    def _edge(self, token: int) -> tuple[bool, bool]:
        edge = self._edges.get(token)
        if edge is None:
            text = self._tokens[token]
            plain = token not in self._tokens.special and bool(text)
            edge = self._edges[token] = (
                plain and _CONTINUES.match(text) is not None,
                plain and text[-1].isalnum(),
            )
        return edge

    def _id(self, text: str) -> int:
        text = text.strip() or text
        known = self._ids.setdefault(text, len(self.texts))
        if known == len(self.texts):
            self.texts.append(text)
            self.counts.append(0)
        self.counts[known] += 1
        return known
