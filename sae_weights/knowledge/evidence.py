"""From a measurement to the evidence that a label is made from, one feature at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .lens import Lens
from .measurement import Corpus, Measurement
from .naming import Evidence, Use
from .pool import Places
from .topics import Topic, Topics

HEAVIEST = 100
"""Words of a feature that are looked at, by activation mass."""
KEPT_WORDS = 12
CODE_SOURCES = frozenset(("python", "code"))
_NEARBY_WINDOW = 20


class Witness:
    """Knows the corpus; answers for each feature of one measured SAE."""

    def __init__(self, measurement: Measurement, corpus: Corpus, lens: Lens, topics: Topics | None) -> None:
        self._measured = measurement
        self._corpus = corpus
        self._lens = lens
        self._topics = topics
        vocabulary = corpus.vocabulary
        self._words = len(corpus)
        self._starts = frozenset(corpus.start.tolist())
        self._token_counts = np.bincount(corpus.tokens)
        counts = dict(zip(vocabulary.texts, vocabulary.counts, strict=True))
        self._proper = {
            text
            for text, n in counts.items()
            if text[:1].isupper() and n > counts.get(text.lower(), 0) and text.isalpha()
        }
        self._word_counts = np.bincount(corpus.words, minlength=len(vocabulary.texts))
        self._special = frozenset(corpus.texts[t] for t in corpus.texts.special)
        if topics is not None:
            topics.calibrate((text, int(n)) for text, n in zip(vocabulary.texts, self._word_counts, strict=True))
        judged = max(1, measurement.judged)
        self._source_share = measurement.judged_of_source / judged

    def evidence(self, feature: int, strongest: Places) -> Evidence:
        """Evidence about one feature; ``strongest`` are its strongest places."""
        measured = self._measured
        mass = max(float(measured.mass[feature]), 1e-12)
        fires = int(measured.moments.count[feature])
        words = self._used_words(feature, mass)
        sources = measured.sources[feature] / mass
        code = sum(s for s, name in zip(sources, self._corpus.sources, strict=True) if name in CODE_SOURCES)
        base = sum(s for s, name in zip(self._source_share, self._corpus.sources, strict=True) if name in CODE_SOURCES)
        return Evidence(
            fires=fires,
            density=fires / max(1, measured.judged),
            tokens=self._used_tokens(feature, mass),
            words=words,
            before=self._before(strongest),
            nearby=self._nearby(strongest),
            early=float(measured.early[feature]) / mass,
            code=code >= 0.8 and base <= 0.4,
            special=self._special,
            promoted=self._promoted(feature),
            topics=self.topics(words, 0.4),
        )

    def topics(self, words: Sequence[Use], least: float) -> list[Topic]:
        """WordNet classes of a feature's words."""
        if self._topics is None:
            return []
        return self._topics.fit(((use.text, use.share) for use in words if use.text.isalpha()), least)

    def _used_tokens(self, feature: int, mass: float) -> list[Use]:
        items, masses, _ = self._measured.tokens.of(feature)
        pairs = zip(items[:HEAVIEST].tolist(), masses[:HEAVIEST].tolist(), strict=True)
        return [Use(self._corpus.texts[t], m / mass, self._token_counts[t] / self._words) for t, m in pairs]

    def _used_words(self, feature: int, mass: float) -> list[Use]:
        """Most characteristic first: share of the mass × log of the lift over the corpus."""
        items, masses, _ = self._measured.words.of(feature)
        texts = self._corpus.vocabulary.texts
        uses = [
            Use(texts[w], m / mass, float(self._word_counts[w]) / self._words, texts[w] in self._proper)
            for w, m in zip(items[:HEAVIEST].tolist(), masses[:HEAVIEST].tolist(), strict=True)
        ]
        return sorted(uses, key=lambda use: -use.weight)

    def _before(self, places: Places) -> list[tuple[str, float]]:
        tokens = [int(self._corpus.tokens[t - 1]) for t in places.token.tolist() if t not in self._starts]
        counts = Counter(tokens).most_common(3)
        return [(self._corpus.texts[t], n / len(places)) for t, n in counts]

    def _nearby(self, places: Places) -> list[str]:
        """Words that stand in many of these windows and in few of the corpus's."""
        if len(places) < 3:
            return []
        counts: Counter[int] = Counter()
        for token in places.token.tolist():
            first, last = self._corpus.window(token)
            around = set(self._corpus.words[first:last].tolist()) - {int(self._corpus.words[token])}
            counts.update(around)
        found = []
        for word, n in counts.items():
            text, share = self._corpus.vocabulary.texts[word], n / len(places)
            chance = min(1.0, _NEARBY_WINDOW * float(self._word_counts[word]) / self._words)
            if n >= 3 and share >= 0.2 and share > 4 * chance and len(text) > 2 and text.isalpha():
                found.append((-share * math.log(share / chance), text))
        return [text for _, text in sorted(found)[:4]]

    def _promoted(self, feature: int) -> list[tuple[str, float]]:
        spread = max(float(self._lens.spread[feature]), 1e-12)
        ids, weights = self._lens.promoted[feature].tolist(), self._lens.promoted_weights[feature].tolist()
        return [(self._corpus.texts[t], w / spread) for t, w in zip(ids, weights, strict=True)]
