"""Which contexts of a feature are shown: its strongest, then some from the middle of its range."""

from __future__ import annotations

from collections.abc import Mapping

from .facts import BEFORE, Context
from .measurement import Corpus
from .pool import Places

STRONGEST = 5
BANDS = ("0.9", "0.75", "0.5")
"""Quantiles of the non-zero activations near which one context each is taken."""
_ALIKE = 0.7


def choose(top: Places, sample: Places, quantiles: Mapping[str, float], corpus: Corpus) -> tuple[Context, ...]:
    """The contexts of one feature, strongest first.

    ``STRONGEST`` from the top, then for each of ``BANDS`` the sampled place whose activation is nearest to that
    quantile. A document gives at most two, and no two contexts share more than 70 % of their words.
    """
    chosen: list[tuple[float, int, Context]] = []
    words: list[frozenset[int]] = []
    documents: dict[int, int] = {}

    def take(places: Places, row: int, strict: bool) -> bool:
        token, document = int(places.token[row]), int(places.document[row])
        first, last = corpus.window(token)
        near = frozenset(corpus.tokens[first:last].tolist())
        if documents.get(document, 0) >= 2 or any(token == seen for _, seen, _ in chosen):
            return False
        if strict and any(len(near & other) > _ALIKE * min(len(near), len(other)) for other in words):
            return False
        documents[document] = documents.get(document, 0) + 1
        words.append(near)
        chosen.append((float(places.value[row]), token, _context(places, row, corpus)))
        return True

    for strict in (True, False):  # a feature of a template has nothing but near-identical contexts
        for row in range(len(top)):
            if len(chosen) < (STRONGEST if strict else 2):
                take(top, row, strict)
    for band in BANDS:
        wanted = quantiles[band]
        for row in sorted(range(len(sample)), key=lambda r: (abs(float(sample.value[r]) - wanted), r)):
            if take(sample, row, True):
                break
    return tuple(context for _, _, context in sorted(chosen, key=lambda c: (-c[0], c[1])))


def _context(places: Places, row: int, corpus: Corpus) -> Context:
    token = int(places.token[row])
    first, last = corpus.window(token)
    shift = BEFORE - (token - first)
    window = places.window[row][shift : shift + last - first]
    texts = tuple(corpus.texts[int(t)] for t in corpus.tokens[first:last])
    return Context(texts, tuple(float(a) for a in window), token - first, corpus.source_name(token))
