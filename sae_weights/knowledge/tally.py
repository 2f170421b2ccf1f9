"""Streaming statistics of sparse activations, per feature: all of them are sums, so the order of the text does not matter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

PER_OCTAVE = 16
"""Bins of the histogram per factor of two: a quantile is right within 2.2 %."""
_LOWEST, _OCTAVES = -10, 26


class Moments:
    """Count, sum and maximum of non-zero activations per feature, and their histogram over logarithmic bins."""

    def __init__(self, n_features: int) -> None:
        self.n = n_features
        self.count = np.zeros(n_features, np.int64)
        self.total = np.zeros(n_features)
        self.largest = np.zeros(n_features)
        self._bins = PER_OCTAVE * _OCTAVES
        self._histogram = np.zeros((n_features, self._bins), np.int32)

    def add(self, features: Ints, values: Floats) -> None:
        """Add activations: ``features`` [m], ``values`` [m] > 0."""
        self.count += np.bincount(features, minlength=self.n)
        self.total += np.bincount(features, values, minlength=self.n)
        np.maximum.at(self.largest, features, values)
        bins = np.floor((np.log2(values) - _LOWEST) * PER_OCTAVE).astype(np.int64).clip(0, self._bins - 1)
        cells, counts = np.unique(features * self._bins + bins, return_counts=True)
        self._histogram.reshape(-1)[cells] += counts.astype(np.int32)

    def quantile(self, q: float) -> Floats:
        """The q-quantile of each feature's non-zero activations, [n]; 0 where it never fired; never above the maximum."""
        below = self._histogram.cumsum(axis=1, dtype=np.int64)
        rank = np.maximum(1, np.ceil(q * self.count))
        bin_ = (below >= rank[:, None]).argmax(axis=1)
        middle = 2.0 ** ((bin_ + 0.5) / PER_OCTAVE + _LOWEST)
        return np.where(self.count > 0, np.minimum(middle, self.largest), 0.0)


class PairTally:
    """Activation mass and count per (feature, item), for items such as words, in bounded memory.

    When more than ``room`` pairs are kept, each feature keeps its ``keep`` heaviest: mass that came before is lost for
    the others, so rare items of a feature may be undercounted in a very large corpus; heavy ones are not.
    """

    def __init__(self, n_features: int, n_items: int, keep: int = 256) -> None:
        self._n_items = max(1, n_items)
        self._keep = keep
        self._room = max(4_000_000, 2 * keep * n_features)
        self._keys = np.zeros(0, np.int64)
        self._mass = np.zeros(0)
        self._count = np.zeros(0, np.int64)
        self._pending: list[tuple[Ints, Floats, Ints]] = []
        self._pending_size = 0

    def add(self, features: Ints, items: Ints, values: Floats) -> None:
        """Add activations ``values`` [m] of ``features`` [m] at ``items`` [m]."""
        keys, inverse, count = np.unique(features * self._n_items + items, return_inverse=True, return_counts=True)
        self._pending.append((keys, np.bincount(inverse, values).astype(np.float64), count))
        self._pending_size += len(keys)
        if self._pending_size > max(1_000_000, len(self._keys)):
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        parts = [(self._keys, self._mass, self._count), *self._pending]
        keys = np.concatenate([part[0] for part in parts])
        self._keys, inverse = np.unique(keys, return_inverse=True)
        self._mass = np.bincount(inverse, np.concatenate([part[1] for part in parts])).astype(np.float64)
        # Counts are far below 2⁵³, where float64 is exact.
        self._count = np.bincount(inverse, np.concatenate([part[2] for part in parts])).astype(np.int64)
        self._pending, self._pending_size = [], 0
        if len(self._keys) > self._room:
            features = self._keys // self._n_items
            order = np.lexsort((-self._mass, features))
            kept = np.sort(order[rank_in_group(features[order]) < self._keep])
            self._keys, self._mass, self._count = self._keys[kept], self._mass[kept], self._count[kept]

    def of(self, feature: int) -> tuple[Ints, Floats, Ints]:
        """Items, their mass and count for one feature, heaviest first."""
        self._merge()
        start, stop = np.searchsorted(self._keys, (feature * self._n_items, (feature + 1) * self._n_items))
        order = np.argsort(-self._mass[start:stop], kind="stable") + start
        return self._keys[order] % self._n_items, self._mass[order], self._count[order]


def rank_in_group(groups: Ints) -> Ints:
    """For sorted ``groups`` [m]: 0, 1, 2, … within each run of equal values."""
    if not len(groups):
        return np.zeros(0, np.int64)
    first = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    lengths = np.diff(np.r_[first, len(groups)])
    return np.arange(len(groups)) - np.repeat(first, lengths)
