"""Activations read from the model as training needs them, mixed in a buffer: nothing is kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sae_weights.training.activations import Truncated, batches, ordinary, read

BUFFER = 262_144
"""Tokens in the buffer; half of it is refilled at a time."""


class Streamed:
    """A shuffled buffer over a model's activations at one layer.

    The buffer is filled from batches of sequences in a fixed random order, mixed, and drained to one half before more
    is read, so that a training batch holds tokens of hundreds of texts.
    """

    def __init__(self, model: Truncated, sequences: Sequence[Sequence[int]], seed: int = 0, buffer: int = BUFFER):
        if len(model.layers) != 1:
            raise ValueError(f"a stream reads one layer; the model is cut for {list(model.layers)}")
        self._model = model
        self._sequences = sequences
        self._order = batches(sequences)
        self._seed = seed
        self._buffer = buffer
        self._first: list[Tensor] = []
        self.dropped = 0
        while sum(map(len, self._first)) < min(20_000, sum(len(s) - 1 for s in sequences)):
            self._first.append(self._read(len(self._first)))
        self.median_norm = float(torch.cat(self._first).float().norm(dim=1).median())

    def _read(self, number: int) -> Tensor:
        part = [self._sequences[i] for i in self._order[number % len(self._order)]]
        return read(self._model, part)[0].cpu()

    def sample(self, tokens: int) -> Tensor:
        """The first ordinary tokens, raw ``[≤ tokens, d]``."""
        first = torch.cat(self._first)
        return first[ordinary(first, self.median_norm)][:tokens]

    def batches(self, batch: int, start: int) -> Iterator[Tensor]:
        """Raw activations ``[batch, d]`` from step ``start`` on, without end.

        A resumed run goes on at the same place in the text; its buffer starts anew.
        """
        generator = torch.Generator().manual_seed(self._seed + start)
        number = self._number_after(start * batch)
        pool = torch.empty(0)
        while True:
            fresh = [pool] if len(pool) else []
            have = len(pool)
            while have < max(self._buffer, 2 * batch):
                values = self._read(number)
                number += 1
                keep = ordinary(values, self.median_norm)
                self.dropped += int((~keep).sum())
                fresh.append(values[keep])
                have += len(fresh[-1])
            pool = torch.cat(fresh)
            pool = pool[torch.randperm(len(pool), generator=generator)]
            while len(pool) - batch >= max(self._buffer, 2 * batch) // 2:
                yield pool[:batch]
                pool = pool[batch:]

    def _number_after(self, tokens: int) -> int:
        """Which batch of sequences follows ``tokens`` tokens of the text."""
        sizes = [sum(len(self._sequences[i]) - 1 for i in members) for members in self._order]
        passes, left = divmod(tokens, max(1, sum(sizes)))
        for number, size in enumerate(sizes):
            if left < size:
                return passes * len(sizes) + number
            left -= size
        return passes * len(sizes)
