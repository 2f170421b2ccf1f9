"""What can be known about one feature: immutable values, checked when they are made from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BEFORE, AFTER = 10, 5
"""Tokens of a context before and after its peak."""
MAX_LABEL = 600
"""Characters of a label at most; published explanations are sentences."""


class KnowledgeError(ValueError):
    """A file of feature knowledge, or an export of one, that cannot be used; the message names file and place."""


@dataclass(frozen=True)
class Context:
    """A stretch of text on which a feature fires.

    Attributes:
        tokens: their texts, leading spaces included; joined they are the text.
        activations: one per token; 0 where the feature is silent and at tokens that are no evidence (sinks).
        peak: index of the token with the largest activation.
        source: the corpus it is from.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int
    source: str


@dataclass(frozen=True)
class Feature:
    """Everything known about one feature; ``None`` and empty mean not known.

    Attributes:
        label_source: "automatic", "hand", "neuronpedia:<method>" or "delphi".
        density: share of ordinary tokens on which it fires.
        mean_activation: over the tokens on which it fires.
        quantiles: of its non-zero activations, keys like "0.5", "0.99".
        contexts: largest activation first.
        promoted, suppressed: (token, logit weight): see ``lens.py`` for the formula.
        neighbours: (feature, cosine of the decoder rows), nearest first.
        words: what it fires on, most characteristic first; searched, as labels are.
        topics: WordNet classes that cover many of those words; searched.
    """

    index: int
    label: str | None = None
    label_source: str | None = None
    density: float | None = None
    max_activation: float | None = None
    mean_activation: float | None = None
    quantiles: Mapping[str, float] = field(default_factory=dict)
    contexts: tuple[Context, ...] = ()
    promoted: tuple[tuple[str, float], ...] = ()
    suppressed: tuple[tuple[str, float], ...] = ()
    neighbours: tuple[tuple[int, float], ...] = ()
    words: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()

    def details(self, labels: Mapping[int, str]) -> dict[str, Any]:
        """What one feature alone shows beyond a list's fields, in plain types; ``labels`` name its neighbours."""
        return {
            "label_source": self.label_source,
            "mean_activation": self.mean_activation,
            "contexts": [
                {
                    "tokens": list(context.tokens),
                    "activations": list(context.activations),
                    "peak": context.peak,
                    "source": context.source,
                }
                for context in self.contexts
            ],
            "promoted": [{"token": token, "weight": weight} for token, weight in self.promoted],
            "suppressed": [{"token": token, "weight": weight} for token, weight in self.suppressed],
            "neighbours": [
                {"index": near, "label": labels.get(near), "cosine": cosine} for near, cosine in self.neighbours
            ],
            "quantiles": dict(self.quantiles),
        }


def shorten(label: str, longest: int = MAX_LABEL) -> str:
    """One line of at most ``longest`` characters, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"
