"""The tokens that a request has fed so far, for selectors that look back: mentions of names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from interventions.selectors import Selector

Array = npt.NDArray[Any]


class History:
    """Token ids by position, and the selectors whose ``ends`` are looked for in them.

    The prompt is known from the start, so a chunk behind a cached prefix can look back into it; later tokens come with the
    steps that feed them. Tokens that are computed again (preemption) are the same tokens.
    """

    def __init__(self, selectors: Sequence[Selector], prompt: Sequence[int]) -> None:
        self._ids = list(prompt)
        self._wanted: dict[int, list[tuple[tuple[int, ...], np.uint64]]] = {}
        self._at_zero = np.uint64(0)
        for number, selector in enumerate(selectors):
            bit = np.uint64(1 << number)
            if selector.ends and selector.include_bos:
                self._at_zero |= bit
            for sequence in selector.ends:
                self._wanted.setdefault(sequence[-1], []).append((sequence, bit))

    @classmethod
    def of(cls, selectors: Sequence[Selector], prompt: Sequence[int]) -> History | None:
        """None where no selector looks back."""
        return cls(selectors, prompt) if any(s.ends for s in selectors) else None

    def take(self, first: int, token_ids: Array) -> Array:
        """The tokens at ``first, first + 1, …`` are fed now: uint64 ``[n]``, the selectors that a mention ends in there.

        Raises:
            RuntimeError: tokens before ``first`` are not known.
        """
        ids: list[int] = token_ids.tolist()
        if first > len(self._ids):
            raise RuntimeError(
                f"tokens {len(self._ids)} to {first - 1} of a request that looks for mentions are not known"
            )
        self._ids[first : first + len(ids)] = ids
        found = np.zeros(len(ids), np.uint64)
        for i, token in enumerate(ids):
            for sequence, bit in self._wanted.get(token, ()):
                stop = first + i + 1
                start = stop - len(sequence)
                if start >= 0 and tuple(self._ids[start:stop]) == sequence:
                    found[i] |= bit if stop > 1 else bit & self._at_zero
        return found
