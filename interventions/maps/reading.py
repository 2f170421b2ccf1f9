"""What an SAE saw in one sequence, as fitting needs it: the non-zero activations, and where they stood.

A latent is silent on most tokens, so a sequence of thousands of latents is a few dozen numbers a token; a set of texts of
any size fits in memory, and is made dense one sequence at a time. Position 0 holds nothing: its activations are those of an
outlier token, and no map acts there unless it is asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from interventions.maps.topics import TopicStatistics

Bits = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

OUTLIER = 10.0
"""A token whose Σ|a| is beyond this multiple of the median one's is left out of statistics, as position 0 is."""


class FitError(ValueError):
    """Texts or entities from which no map can be fitted; the message says what is missing and what to change."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One sequence: activation ``values[i]`` of ``latents[i]`` at absolute position ``positions[i]``.

    Attributes:
        token_ids: all of them, position 0 included.
        positions, latents: int64 ``[nnz]``, positions ≥ 1, each pair once.
        values: float32 ``[nnz]``, none of them 0.

    Raises:
        ValueError: shapes that do not match, a position outside the sequence, a value that is not finite.
    """

    token_ids: tuple[int, ...]
    positions: Integers
    latents: Integers
    values: Floats

    def __post_init__(self) -> None:
        if not self.positions.shape == self.latents.shape == self.values.shape == (len(self.values),):
            raise ValueError("positions, latents and values must be of one length")
        if len(self.values) and not 0 < int(self.positions.min()) <= int(self.positions.max()) < self.n_tokens:
            raise ValueError(f"a position is outside 1..{self.n_tokens - 1}")
        if not bool(np.isfinite(self.values).all()):
            raise ValueError("an activation is not a finite number")

    @staticmethod
    def of(activations: Tensor, token_ids: Sequence[int]) -> Reading:
        """From dense activations ``[tokens, S]``; position 0 is dropped."""
        if activations.ndim != 2 or len(activations) != len(token_ids):
            raise ValueError(f"expected [{len(token_ids)}, S] activations, got shape {list(activations.shape)}")
        kept = activations.detach().float().cpu()
        at = kept[1:].nonzero()
        values = kept[1:][at[:, 0], at[:, 1]].numpy()
        return Reading(tuple(int(t) for t in token_ids), at[:, 0].numpy() + 1, at[:, 1].numpy(), values)

    @property
    def n_tokens(self) -> int:
        """Position 0 included."""
        return len(self.token_ids)

    def hits(self, latents: Sequence[int]) -> Bits:
        """bool ``[n_tokens]``: where any of the latents is active."""
        bits = np.zeros(self.n_tokens, np.bool_)
        bits[self.positions[np.isin(self.latents, np.asarray(latents, np.int64))]] = True
        return bits

    def at(self, position: int, n_features: int) -> Floats:
        """float32 ``[n_features]``: all activations of one token."""
        row = np.zeros(n_features, np.float32)
        here = self.positions == position
        row[self.latents[here]] = self.values[here]
        return row

    def dense(self, n_features: int) -> Tensor:
        """float32 ``[n_tokens, n_features]``; row 0 is zero."""
        rows = torch.zeros(self.n_tokens, n_features)
        rows[torch.from_numpy(self.positions), torch.from_numpy(self.latents)] = torch.from_numpy(self.values)
        return rows

    def mass(self) -> npt.NDArray[np.float64]:
        """Σ|a| of every token ``[n_tokens]``."""
        mass = np.zeros(self.n_tokens)
        np.add.at(mass, self.positions, np.abs(self.values))
        return mass


def median_mass(readings: Sequence[Reading]) -> float:
    """Median Σ|a| of a token, position 0 left out; 0 without tokens."""
    masses = [reading.mass()[1:] for reading in readings]
    return float(np.median(np.concatenate(masses))) if sum(map(len, masses)) else 0.0


def statistics(readings: Sequence[Reading], n_features: int, median: float) -> tuple[TopicStatistics, int]:
    """Statistics of the ordinary tokens, and how many were left out (Σ|a| > :data:`OUTLIER` × ``median``).

    Raises:
        TopicError: as :meth:`~interventions.maps.topics.TopicStatistics.add`.
    """
    found, outliers = TopicStatistics.empty(n_features), 0
    for reading in readings:
        keep = reading.mass() <= OUTLIER * median
        keep[0] = False
        outliers += reading.n_tokens - 1 - int(keep.sum())
        found = found.add(reading.dense(n_features), torch.from_numpy(keep))
    return found, outliers
