"""Random tensors and inputs for checkpoints that tests write."""

from __future__ import annotations

import torch


class Draws:
    """Random numbers that a seed decides."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, spread: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * spread

    def uneven(self, n: int, d: int, *, spread: float = 1.0) -> torch.Tensor:
        """[n, d] with rows of different norm, so that a norm that is left out or put in shows."""
        return self.normal(n, d, spread=spread) * (0.3 + torch.rand(n, 1, generator=self._generator))

    def tokens(self, n: int, d: int) -> torch.Tensor:
        """[n, d] of different size and mean, so that a per-token norm that is left out shows."""
        size = torch.rand(n, 1, generator=self._generator) * 3 + 0.2
        return (torch.randn(n, d, generator=self._generator) + 0.7) * size
