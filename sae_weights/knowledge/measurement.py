"""What one dictionary does on a corpus: every statistic of the label pass, gathered batch by batch.

As a plain loop, for every ordinary token t (not at position 0, ‖h‖ ≤ 10 × median) and every feature j with f_j(t) > 0::

    count[j] += 1;  total[j] += f;  largest[j] = max(largest[j], f);  histogram[j, bin(f)] += 1
    tokens[j, token(t)] += f;  words[j, word(t)] += f;  sources[j, source(t)] += f;  early[j] += f if position(t) < 4
    if f is the largest of j within RADIUS tokens of the same sequence:  offer t to j's pools of places

but the last two lines only if ‖h‖ ≤ STRANGE × median: a token between that and a sink fires hundreds of features strongly
and says nothing about any of them.

The batch is handled as a list of (row, feature, value) triples, about L0 of them per token; only the encoder sees the
dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_weights.sae import SAE
from sae_weights.training.activations import OUTLIER

from .facts import AFTER, BEFORE
from .pool import Places, Pool
from .tally import Floats, Ints, Moments, PairTally
from .words import TokenTexts, Words

RADIUS = BEFORE
STRANGE = 3.0
"""Multiple of the median norm beyond which a token is counted, but neither shown nor used for a label."""
EARLY = 4
TOP, SAMPLE = 20, 20
"""Places per feature that are kept: the strongest, and random ones."""
_ELEMENTS = 1 << 25
_GRAM = 3


@dataclass(frozen=True)
class Passage:
    """A stretch of tokens that the model reads by itself, from position 0 on; ``document`` tells texts apart."""

    tokens: Sequence[int]
    source: str
    document: int


class Corpus:
    """All passages, flat.

    Attributes:
        tokens, words: token ids and word ids of all passages one after another, [N].
        start: where each passage starts, [passages + 1].
        gram: hash of the tokens within ``_GRAM`` of each token, [N].
        sources: their names; ``source`` and ``document`` are numbers per passage.
    """

    def __init__(self, passages: Sequence[Passage], texts: TokenTexts) -> None:
        self.texts = texts
        self.vocabulary = Words(texts)
        self.passages = passages
        self.start = np.cumsum([0, *(len(p.tokens) for p in passages)])
        self.tokens: Ints = np.fromiter((t for p in passages for t in p.tokens), np.int64, int(self.start[-1]))
        words = (w for p in passages for w in self.vocabulary.read(p.tokens))
        self.words: Ints = np.fromiter(words, np.int64, len(self.tokens))
        self.sources = list(dict.fromkeys(p.source for p in passages))
        self.source: Ints = np.array([self.sources.index(p.source) for p in passages], np.int64)
        self.document: Ints = np.array([p.document for p in passages], np.int64)
        self.gram = _grams(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, token: int) -> tuple[int, int]:
        """First and last + 1 of the tokens of the context around ``token``, within its passage."""
        passage = int(np.searchsorted(self.start, token, "right")) - 1
        return max(int(self.start[passage]), token - BEFORE), min(int(self.start[passage + 1]), token + AFTER + 1)

    def source_name(self, token: int) -> str:
        """The source of the passage that ``token`` is in."""
        passage = int(np.searchsorted(self.start, token, "right")) - 1
        return self.sources[int(self.source[passage])]


class Measurement:
    """Statistics of one SAE over a corpus."""

    def __init__(self, sae: SAE, corpus: Corpus) -> None:
        n = sae.n_features
        self.sae = sae
        self._corpus = corpus
        median = sae.metadata.get("median_norm")
        self.median_norm: float | None = float(median) if isinstance(median, int | float) and median > 0 else None
        self.judged = 0
        self.outliers = 0
        self.moments = Moments(n)
        self.tokens = PairTally(n, int(corpus.tokens.max(initial=0)) + 1)
        self.words = PairTally(n, len(corpus.vocabulary.texts))
        self.sources = np.zeros((n, len(corpus.sources)))
        self.judged_of_source = np.zeros(len(corpus.sources), np.int64)
        self.early = np.zeros(n)
        self.mass = np.zeros(n)
        """Σ f over the tokens that labels are made from."""
        self.top = Pool(n, TOP)
        self.sample = Pool(n, SAMPLE)

    def add(self, members: Sequence[int], h: Tensor) -> None:
        """Count the passages ``members``, whose residual stream is ``h`` [Σ lengths, d], in this order."""
        if self.median_norm is None:
            first = np.cumsum([0, *(len(self._corpus.passages[i].tokens) for i in members[:-1])])
            rest = torch.ones(len(h), dtype=torch.bool)
            rest[torch.from_numpy(first)] = False
            self.median_norm = float(h[rest].float().norm(dim=1).median())
        rows_at_once = max(1, _ELEMENTS // self.sae.n_features)
        start = taken = 0
        part: list[int] = []
        for i in members:
            length = len(self._corpus.passages[i].tokens)
            if part and taken + length > rows_at_once:
                self._add(part, h[start : start + taken])
                start, taken, part = start + taken, 0, []
            part.append(i)
            taken += length
        if part:
            self._add(part, h[start : start + taken])

    @torch.inference_mode()
    def _add(self, members: Sequence[int], h: Tensor) -> None:
        corpus = self._corpus
        lengths = [len(corpus.passages[i].tokens) for i in members]
        passage = np.repeat(np.array(members, np.int64), lengths)
        first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        position = np.arange(len(h)) - first
        token = corpus.start[passage] + position
        x = h.float()
        assert self.median_norm is not None
        norm = x.norm(dim=1).numpy() / self.median_norm
        sinks = norm > OUTLIER
        self.outliers += int((sinks & (position > 0)).sum())
        evidence = ~sinks & (position > 0)
        self.judged += int(evidence.sum())
        self.judged_of_source += np.bincount(corpus.source[passage][evidence], minlength=len(corpus.sources))
        # Sinks have norms that overflow what follows: they are not encoded at all.
        f = torch.zeros(len(x), self.sae.n_features)
        f[torch.from_numpy(evidence)] = self.sae.encode(x[torch.from_numpy(evidence)])
        row, feature = (index.numpy() for index in (f > 0).nonzero(as_tuple=True))
        order = np.argsort(feature, kind="stable")
        row, feature = row[order], feature[order]
        dense = f.numpy()
        value = dense[row, feature].astype(np.float64)
        self.moments.add(feature, value)
        telling = norm[row] <= STRANGE
        row, feature, value = row[telling], feature[telling], value[telling]
        self.mass += np.bincount(feature, value, minlength=self.sae.n_features)
        self.tokens.add(feature, corpus.tokens[token[row]], value)
        self.words.add(feature, corpus.words[token[row]], value)
        cells = feature * len(corpus.sources) + corpus.source[passage[row]]
        self.sources += np.bincount(cells, value, minlength=self.sources.size).reshape(self.sources.shape)
        early = position[row] < EARLY
        self.early += np.bincount(feature[early], value[early], minlength=self.sae.n_features)
        peak = local_peaks(feature, passage[row], row, value)
        self._offer(dense, row[peak], feature[peak], value[peak], passage, token)

    def _offer(
        self, dense: NDArray[np.float32], row: Ints, feature: Ints, value: Floats, passage: Ints, token: Ints
    ) -> None:
        at = token[row]
        for pool, key in ((self.top, -value), (self.sample, _shuffled(at, feature))):
            # Most places are below the bar: windows are cut out for the others only.
            chosen = key < pool.bar[feature]
            rows = row[chosen]
            around = (rows[:, None] + np.arange(-BEFORE, AFTER + 1)).clip(0, len(dense) - 1)
            inside = passage[around] == passage[rows][:, None]
            inside &= around - rows[:, None] == np.arange(-BEFORE, AFTER + 1)
            window = dense[around, feature[chosen][:, None]] * inside
            where = at[chosen]
            document = self._corpus.document[passage[rows]]
            gram = self._corpus.gram[where]
            pool.add(Places(feature[chosen], key[chosen], value[chosen], where, document, gram, window))


def local_peaks(feature: Ints, passage: Ints, row: Ints, value: Floats) -> NDArray[np.bool_]:
    """Which entries, sorted by feature and row, are the largest of their feature within RADIUS rows of their passage.

    Of equal neighbours the first counts.
    """
    peak = np.ones(len(row), bool)
    for step in range(1, RADIUS + 1):
        a, b = slice(None, -step), slice(step, None)
        near = (feature[a] == feature[b]) & (passage[a] == passage[b]) & (row[b] - row[a] <= RADIUS)
        if not near.any():
            break
        larger = value[b] > value[a]
        peak[a] &= ~(near & larger)
        peak[b] &= ~(near & ~larger)
    return peak


def _grams(tokens: Ints) -> NDArray[np.uint64]:
    """A polynomial hash of the 2·_GRAM + 1 tokens around each token."""
    padded = np.pad(tokens + 1, _GRAM).astype(np.uint64)
    gram = np.zeros(len(tokens), np.uint64)
    for offset in range(2 * _GRAM + 1):
        gram = _mix(gram * np.uint64(0x100000001B3) + padded[offset : offset + len(tokens)])
    return gram


def _shuffled(token: Ints, feature: Ints) -> Floats:
    """A number in [0, 1) per (token, feature), the same in every run: the smallest are a fair sample."""
    mixed = _mix(_mix(token.astype(np.uint64)) + feature.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser; arithmetic wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
