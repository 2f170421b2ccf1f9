"""What is known about the features of one SAE: ``features.sqlite`` beside its weights, in the forms of the HTTP contract.

Nothing is made up: what no file says is null. Without the file, or with one that cannot be used, statistics per latent from
the checkpoint's sidecar are all that is known, and the server serves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sae_weights.knowledge import FILE, Feature, Found, KnowledgeError, KnowledgeStore
from sae_weights.sae import SAE

log = logging.getLogger(__name__)

LISTED = ("label", "density", "max_activation")
"""Fields of a feature in a list."""
DETAILS = (
    "label_source", "mean_activation", "contexts", "promoted", "suppressed", "neighbours", "quantiles",
)  # fmt: skip
"""Fields that one feature alone adds."""

Answer = TypeVar("Answer")


@dataclass
class FeatureKnowledge:
    """Facts about features: a store (or none), and statistics per latent that fill what it leaves out."""

    n_features: int
    store: KnowledgeStore | None = None
    statistics: Mapping[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, sae: SAE) -> FeatureKnowledge:
        """Open what lies beside the weights in ``folder``; a file that cannot be used is logged and left aside."""
        folder = Path(folder)
        path, store = (folder.parent if folder.is_file() else folder) / FILE, None
        if path.is_file():
            try:
                store = KnowledgeStore.open(path, sae_digest=_known_by(sae))
            except KnowledgeError as error:
                log.warning("features are served without labels: %s", error)
        statistics = {
            name: values
            for name in LISTED
            if isinstance(values := sae.metadata.get(name), list) and len(values) == sae.n_features
        }
        return cls(sae.n_features, store, statistics)

    @property
    def labels(self) -> Mapping[int, str]:
        """The labels that are known."""
        none: Mapping[int, str] = {}
        return self._ask(lambda store: store.labels(), none)

    def listing(self, index: int) -> dict[str, Any]:
        """One feature of a list."""
        return self._listed(self._ask(lambda store: store.listing(index, 1)[0], Feature(index)))

    def card(self, index: int) -> dict[str, Any]:
        """One feature with everything that is known about it."""
        feature = self._ask(lambda store: store.feature(index), None)
        shown = self._listed(feature or Feature(index))
        if feature is None:
            return shown | dict.fromkeys(DETAILS)
        return shown | feature.details(self.labels)

    def search(self, query: str | None, limit: int) -> list[dict[str, Any]]:
        """The first ``limit`` features; with ``query``, those that its words find, best first, with a score in (0, 1]."""
        if query is None or not query.strip():
            count = min(limit, self.n_features)
            listed = self._ask(lambda store: store.listing(0, count), [Feature(index) for index in range(count)])
            return [self._listed(feature) for feature in listed]
        none: list[Found] = []
        found = self._ask(lambda store: store.search(query, limit), none)
        return [self._listed(hit.feature) | {"score": round(hit.score, 6)} for hit in found]

    def _listed(self, feature: Feature) -> dict[str, Any]:
        shown: dict[str, Any] = {"index": feature.index}
        for name in LISTED:
            known = getattr(feature, name)
            shown[name] = self.statistics[name][feature.index] if known is None and name in self.statistics else known
        return shown

    def _ask(self, question: Callable[[KnowledgeStore], Answer], unknown: Answer) -> Answer:
        """The store's answer; ``unknown`` without one, or from the moment on that it proves to be damaged."""
        store = self.store
        if store is None:
            return unknown
        try:
            return question(store)
        except KnowledgeError as error:
            log.warning("features are served without labels from now on: %s", error)
            self.store = None
            return unknown


def _known_by(sae: SAE) -> str:
    """The digest that knowledge of its features names: a thresholded stand-in has those of the dictionary itself."""
    if sae.approximates is None or sae.origin is None:
        return sae.digest
    return replace(sae.origin, hints=replace(sae.origin.hints, threshold=None)).open().digest
