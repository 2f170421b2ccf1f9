"""What is known about the features of one SAE: read from ``features.json`` beside its weights, empty where it is missing.

``features.json`` is ``{"features": [{"index", "label"?, "density"?, "max_activation"?, "contexts"?, "promoted"?,
"suppressed"?, "neighbours"?, "quantiles"?, …}]}``. Nothing is made up: what the file does not say is null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_weights.sae import SAE

FILE = "features.json"
LISTED = ("label", "density", "max_activation")
"""Fields of a feature in a list."""
DETAILS = ("contexts", "promoted", "suppressed", "neighbours", "quantiles")
"""Fields that one feature alone adds."""


@dataclass(frozen=True)
class FeatureKnowledge:
    """Facts about features, by index; statistics per latent from the checkpoint fill what the file leaves out."""

    n_features: int
    facts: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    statistics: Mapping[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, sae: SAE) -> FeatureKnowledge:
        """Read what lies beside the weights in ``folder``.

        Raises:
            ValueError: the file is there but is not what it should be.
        """
        path = Path(folder) / FILE
        facts: dict[int, Mapping[str, Any]] = {}
        if path.is_file():
            raw = json.loads(path.read_text(encoding="utf-8"))
            listed = raw.get("features") if isinstance(raw, dict) else raw
            if not isinstance(listed, list) or not all(
                isinstance(f, dict) and type(f.get("index")) is int for f in listed
            ):
                raise ValueError(f"{path}: expected an object with a list 'features' of objects with an index")
            facts = {f["index"]: f for f in listed}
        statistics = {
            name: values
            for name in LISTED
            if isinstance(values := sae.metadata.get(name), list) and len(values) == sae.n_features
        }
        return cls(sae.n_features, facts, statistics)

    @cached_property
    def labels(self) -> Mapping[int, str]:
        """The labels that are known."""
        return {i: label for i, f in self.facts.items() if isinstance(label := f.get("label"), str)}

    def listing(self, index: int) -> dict[str, Any]:
        """One feature of a list."""
        facts = self.facts.get(index, {})
        shown: dict[str, Any] = {"index": index}
        for name in LISTED:
            known = facts.get(name)
            shown[name] = self.statistics[name][index] if known is None and name in self.statistics else known
        return shown

    def card(self, index: int) -> dict[str, Any]:
        """One feature with everything that is known about it."""
        facts = self.facts.get(index, {})
        return self.listing(index) | {name: facts.get(name) for name in DETAILS}

    def search(self, query: str | None, limit: int) -> list[dict[str, Any]]:
        """The first ``limit`` features; with ``query``, those whose label has its words, best first, with a score.

        The score is the share of the query's words that the label contains.
        """
        if query is None or not query.strip():
            return [self.listing(index) for index in range(min(limit, self.n_features))]
        words = query.lower().split()
        scored = [(sum(w in label.lower() for w in words) / len(words), i) for i, label in self.labels.items()]
        best = sorted((-score, index) for score, index in scored if score > 0)[:limit]
        return [self.listing(index) | {"score": -score} for score, index in best]
