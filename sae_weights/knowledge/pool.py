"""The best few places per feature out of a stream of many, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .tally import Floats, Ints, rank_in_group


@dataclass(frozen=True)
class Places:
    """Places where features peak, one a row.

    Attributes:
        feature: which feature.
        key: what they are ranked by; smaller is better.
        value: the activation there.
        token: position in the corpus, counted over all its tokens.
        document: which document it is in.
        gram: hash of the tokens around it: places with the same are near-identical.
        window: activations around it, [m, width].
    """

    feature: Ints
    key: Floats
    value: Floats
    token: Ints
    document: Ints
    gram: NDArray[np.uint64]
    window: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.feature)

    def __getitem__(self, rows: Ints | NDArray[np.bool_] | slice) -> Places:
        return Places(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def empty(cls) -> Places:
        """No places."""
        whole, real = np.zeros(0, np.int64), np.zeros(0)
        return cls(whole, real, real, whole, whole, np.zeros(0, np.uint64), np.zeros((0, 0), np.float32))

    @classmethod
    def concatenate(cls, parts: list[Places]) -> Places:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Pool:
    """Keeps per feature the ``size`` places with the smallest key; one per gram, ``per_document`` per document."""

    LIMIT = 200_000
    """Places that are kept before the pool is sorted out (more where there are many features)."""

    def __init__(self, n_features: int, size: int, per_document: int = 2) -> None:
        self._size = size
        self._per_document = per_document
        self._kept: list[Places] = []
        self._count = 0
        self._limit = max(self.LIMIT, 2 * size * n_features)
        self.bar = np.full(n_features, np.inf)
        """Per feature the key that a place must be below to get in, [n]."""

    def add(self, places: Places) -> None:
        """Offer places; those not below the bar are dropped."""
        places = places[places.key < self.bar[places.feature]]
        if not len(places):
            return
        self._kept.append(places)
        self._count += len(places)
        if self._count > self._limit:
            self._compact()

    def _compact(self) -> Places:
        if not self._kept:
            raise ValueError("the pool is empty")
        all_ = Places.concatenate(self._kept)
        for name, most in (("gram", 1), ("document", self._per_document)):
            group = getattr(all_, name)
            order = np.lexsort((all_.token, all_.key, group, all_.feature))
            # Runs of the same (feature, group), found without building a joint key.
            feature, group = all_.feature[order], group[order]
            new = np.r_[True, (feature[1:] != feature[:-1]) | (group[1:] != group[:-1])]
            all_ = all_[order[rank_in_group(np.cumsum(new)) < most]]
        order = np.lexsort((all_.token, all_.key, all_.feature))
        rank = rank_in_group(all_.feature[order])
        last = order[rank == self._size - 1]
        self.bar[all_.feature[last]] = all_.key[last]
        kept = all_[order[rank < self._size]]
        self._kept, self._count = [kept], len(kept)
        return kept

    def places(self) -> Places | None:
        """What was kept, by feature and then by key; None if nothing ever came."""
        return self._compact() if self._kept else None
