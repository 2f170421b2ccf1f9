"""A TopK-like dictionary read as a JumpReLU with one calibrated threshold: the cheap approximation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .digest import derived_digest
from .errors import SAEFormatError
from .folding import Block
from .source import Rows

if TYPE_CHECKING:
    from .sae import SAE


class ThresholdedRows:
    """The canonical rows of ``sae`` with ``threshold`` = θ, or θ / rank_scale_j where it ranks by p_j · rank_scale_j."""

    def __init__(self, sae: SAE, theta: float) -> None:
        if not math.isfinite(theta) or theta < 0:
            raise SAEFormatError(f"threshold: {theta}; expected a number of at least 0")
        self._sae = sae
        self._theta = theta
        self.label = f"{sae!r} at threshold {theta:g}"
        self.d_model, self.d_out, self.n_features = sae.d_model, sae.d_out, sae.n_features
        self.b_dec: Tensor = sae.b_dec
        self.extras: Mapping[str, Tensor] = sae.extras
        self.gate_shapes: Mapping[str, tuple[int, ...]] = {"b_enc": (), "threshold": ()}

    @property
    def recorded_digest(self) -> str | None:
        """Follows from the dictionary's own digest and θ: nothing is read for it."""
        return derived_digest("thresholded", self._sae.digest, float(self._theta).hex())

    def read(self, rows: Rows) -> Block:
        block = self._sae.read(rows)
        bias = block.gate["b_enc"]
        threshold = torch.full_like(bias, self._theta)
        if "rank_scale" in block.gate:
            threshold = threshold / block.gate["rank_scale"]
        return Block(block.W_enc, block.W_dec, {"b_enc": bias, "threshold": threshold})

    def release(self) -> None:
        pass
