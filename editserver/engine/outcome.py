"""What a step did to its tokens, layer by layer, and the bytes that tell one request's share of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = tuple[bytes, bytes, bytes]


class Outcomes:
    """Arrays by armed layer and planned token, written by the kernel at each layer that has programs.

    Attributes:
        arrays: fired (uint64), dose (float32) and flags (uint8), each ``[armed, tokens]``.
        place: layer → its row there.
        layers: layer → its rows, each ``[tokens]``.
    """

    def __init__(self, armed: Sequence[int], max_tokens: int) -> None:
        shape = (len(armed), max_tokens)
        self.arrays = np.zeros(shape, np.uint64), np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
        self._armed = tuple(armed)
        self.place = {layer: i for i, layer in enumerate(armed)}
        self.layers = {layer: tuple(array[i] for array in self.arrays) for layer, i in self.place.items()}
        self._by_token: Bytes | None = None

    def begin(self) -> None:
        """A new step: what was said of the latest one is gone."""
        self._by_token = None

    def tell(self, edited: tuple[int, ...], tokens: slice, n: int) -> Bytes:
        """Fired, dose and flags at the layers ``edited`` of a request's ``tokens``, ``[layers, tokens]`` each.

        ``n``: planned tokens in all.
        """
        first, last = tokens.start, tokens.stop
        if last - first == 1 and edited == self._armed:
            # of one token, [layers, 1] are the bytes of [1, layers], and those of all tokens are made at once
            fired, dose, flags = self._by_token or self._turned(n)
            a, b = first * len(edited), last * len(edited)
            return fired[8 * a : 8 * b], dose[4 * a : 4 * b], flags[a:b]
        rows: Any = slice(None) if edited == self._armed else [self.place[layer] for layer in edited]
        fired, dose, flags = (array[rows, tokens].tobytes() for array in self.arrays)
        return fired, dose, flags

    def _turned(self, n: int) -> Bytes:
        fired, dose, flags = (array[:, :n].T.tobytes() for array in self.arrays)
        self._by_token = fired, dose, flags
        return self._by_token
