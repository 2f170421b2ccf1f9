"""What distinguishes one SAE architecture from another, once its checkpoint is canonical."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Gate = Mapping[str, Tensor]
"""The 1-D tensors [n] of the encoder besides W_enc, under the checkpoint's names: b_enc, threshold, b_gate …"""


class RowForm(NamedTuple):
    """The vectors [m] of ``FeatureRows`` that follow from a gate."""

    gate_bias: Tensor
    threshold: Tensor
    mag_scale: Tensor
    mag_bias: Tensor


class Architecture(ABC):
    """One encoder non-linearity: which vectors it has, how they fold, and what it computes.

    ``row_separable``: f_j depends on row j alone. Where it is False, ``members`` says which features survive.
    ``kind`` enters the content digest; architectures that compute the same function from the same tensors share it.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    gate_tensors: ClassVar[tuple[str, ...]]
    row_separable: ClassVar[bool] = True
    needs_k: ClassVar[bool] = False

    @abstractmethod
    def shift_input(self, gate: Gate, projection: Tensor) -> dict[str, Tensor]:
        """The gate after folding ``x − b`` into it, where projection [m] = W_enc · b."""

    @abstractmethod
    def scale_rows(self, gate: Gate, scale: Tensor) -> dict[str, Tensor]:
        """The gate when each p_j becomes scale_j · p_j (scale [m] > 0), so that f_j becomes scale_j · f_j."""

    @abstractmethod
    def row_form(self, gate: Gate) -> RowForm:
        """The gate as the vectors of ``FeatureRows``."""

    def members(self, pre: Tensor, k: int | None) -> Tensor | None:
        """Boolean mask of the features that survive, from pre-activations [N, n]; None where all do."""
        return None


class BiasOnly(Architecture):
    """Encoders whose only bias is ``b_enc``: p = W_enc · x̃ + b_enc."""

    def shift_input(self, gate: Gate, projection: Tensor) -> dict[str, Tensor]:
        return {**gate, "b_enc": gate["b_enc"] - projection}

    def scale_rows(self, gate: Gate, scale: Tensor) -> dict[str, Tensor]:
        return {name: vector * scale for name, vector in gate.items()}

    def row_form(self, gate: Gate) -> RowForm:
        bias = gate["b_enc"]
        threshold = gate.get("threshold", torch.zeros_like(bias))
        return RowForm(gate_bias=bias, threshold=threshold, mag_scale=torch.ones_like(bias), mag_bias=bias)
