"""The label pass: one reading of a corpus gives every feature of several dictionaries its statistics, contexts and label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sae_weights.sae import SAE
from sae_weights.training.activations import batches

from .contexts import choose
from .evidence import KEPT_WORDS, Witness
from .facts import Feature, shorten
from .forward import ResidualReader
from .lens import Lens, logit_lens, neighbours
from .measurement import Corpus, Measurement, Passage
from .naming import label as name
from .pool import Places, Pool
from .topics import Topics
from .words import TokenTexts

QUANTILES = ("0.25", "0.5", "0.75", "0.9", "0.99", "0.999")
PROMOTED, SUPPRESSED = 8, 5
NEIGHBOURS = 5
_LENS_DEPTH = 12
TOKENS_PER_BATCH = 8192

Report = Callable[[str, int, int], None]
"""(stage, done, total)"""


@dataclass(frozen=True)
class Labelling:
    """What the pass found about one dictionary.

    Attributes:
        tokens: ordinary tokens judged. outliers: sinks left out. median_norm: what sinks were told by.
        sources: tokens judged per source.
    """

    sae: SAE
    tokens: int
    outliers: int
    median_norm: float
    sources: dict[str, int]
    _measured: Measurement
    _corpus: Corpus
    _lens: Lens
    _topics: Topics | None

    def features(self, report: Report = lambda stage, done, total: None) -> Iterator[Feature]:
        """All features in order, those that never fired included."""
        n = self.sae.n_features
        measured, moments, lens, corpus = self._measured, self._measured.moments, self._lens, self._corpus
        witness = Witness(measured, corpus, lens, self._topics)
        quantiles = {q: moments.quantile(float(q)) for q in QUANTILES}
        mean = moments.total / np.maximum(moments.count, 1)
        top, sample = _ByFeature(measured.top, n), _ByFeature(measured.sample, n)
        for j, near in enumerate(neighbours(self.sae.W_dec, NEIGHBOURS)):
            fired = bool(moments.count[j])
            strongest = top[j]
            evidence = witness.evidence(j, strongest)
            own = {q: float(values[j]) for q, values in quantiles.items()} if fired else {}
            text = name(evidence)
            topics = witness.topics(evidence.words, 0.25)
            yield Feature(
                j,
                None if text is None else shorten(text),
                None if text is None else "automatic",
                density=float(f"{evidence.density:.4g}"),
                max_activation=float(f"{moments.largest[j]:.5g}"),
                mean_activation=float(f"{mean[j]:.5g}") if fired else None,
                quantiles=own,
                contexts=choose(strongest, sample[j], own, corpus) if fired else (),
                promoted=_tokens(lens.promoted[j], lens.promoted_weights[j], PROMOTED, corpus),
                suppressed=_tokens(lens.suppressed[j], lens.suppressed_weights[j], SUPPRESSED, corpus),
                neighbours=near,
                words=tuple(use.text[:60] for use in evidence.words[:KEPT_WORDS]),
                topics=tuple(topic.name for topic in topics[:4]),
            )
            if j % 256 == 0 or j == n - 1:
                report("labels", j + 1, n)


def label(
    model: Any,
    tokenizer: Any,
    saes: Sequence[SAE],
    passages: Sequence[Passage],
    *,
    topics: Topics | None = None,
    report: Report = lambda stage, done, total: None,
) -> list[Labelling]:
    """Run ``model`` (a ``transformers`` causal LM) once over ``passages`` and measure every SAE on the way.

    Every SAE must read the residual stream (``resid_post(L)``, or ``resid_pre(L)`` with L > 0); the forward pass stops
    behind the deepest. Memory: the corpus's tokens, and per feature some twenty strongest and twenty random places, a
    histogram and at most 256 tokens and words. The result does not depend on the machine's speed or memory.

    Raises:
        ValueError: an SAE whose hook is elsewhere, of another width, or beyond the model's layers; an empty corpus.
    """
    layers = [_layer(sae, model) for sae in saes]
    texts = TokenTexts(tokenizer)
    report("reading the corpus", 0, 1)
    corpus = Corpus(passages, texts)
    if not any(len(p.tokens) > 1 for p in passages):
        raise ValueError("the corpus has no passage of two tokens or more")
    report("reading the corpus", 1, 1)
    lenses = [logit_lens(model, sae.W_dec, _LENS_DEPTH, len(tokenizer)) for sae in saes]
    measured = [Measurement(sae, corpus) for sae in saes]
    done = 0
    with ResidualReader(model, layers) as reader:
        for members in batches([p.tokens for p in passages], TOKENS_PER_BATCH):
            hidden = reader([passages[i].tokens for i in members])
            for layer, measurement in zip(layers, measured, strict=True):
                measurement.add(members, hidden[layer])
            done += sum(len(passages[i].tokens) for i in members)
            report("tokens", done, len(corpus))
    return [
        Labelling(
            m.sae,
            m.judged,
            m.outliers,
            float(m.median_norm or 0.0),
            dict(zip(corpus.sources, m.judged_of_source.tolist(), strict=True)),
            m,
            corpus,
            lens,
            topics,
        )
        for m, lens in zip(measured, lenses, strict=True)
    ]


def with_labels(features: Iterable[Feature], labels: Mapping[int, tuple[str, str]]) -> Iterator[Feature]:
    """The features with these (label, source) in place of automatic ones."""
    for feature in features:
        text, source = labels.get(feature.index, (feature.label, feature.label_source))
        yield replace(feature, label=None if text is None else shorten(text), label_source=source)


def _layer(sae: SAE, model: Any) -> int:
    layer = sae.hook.edit_layer
    if layer is None:
        raise ValueError(f"hook {sae.hook}: only dictionaries of the residual stream between layers can be labelled")
    width = model.config.get_text_config().hidden_size
    if sae.d_model != width:
        raise ValueError(f"the dictionary reads {sae.d_model} values per token; the model has {width}")
    return layer


def _tokens(ids: Any, weights: Any, count: int, corpus: Corpus) -> tuple[tuple[str, float], ...]:
    pairs = zip(ids[:count].tolist(), weights[:count].tolist(), strict=True)
    return tuple((corpus.texts[token], weight) for token, weight in pairs)


class _ByFeature:
    """A pool's places, looked up by feature."""

    def __init__(self, pool: Pool, n_features: int) -> None:
        self._places = pool.places()
        self._bounds = (
            None if self._places is None else np.searchsorted(self._places.feature, np.arange(n_features + 1))
        )

    def __getitem__(self, feature: int) -> Places:
        if self._places is None or self._bounds is None:
            return Places.empty()
        return self._places[slice(int(self._bounds[feature]), int(self._bounds[feature + 1]))]
