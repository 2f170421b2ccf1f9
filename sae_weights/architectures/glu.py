"""Gated-linear-unit encoder: a second encoder scales the first. Language-Model-SAEs (llamascopium), ``use_glu_encoder``."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError

from .base import BiasOnly, Gate, Whole
from .topk import topk_members


class GLU(BiasOnly):
    """p = (W_enc · x̃ + b_enc) · sigmoid(W_glu · x̃ + b_glu); f = relu(p) · 1[p > θ], or relu(p) for the k largest p · m.

    ``W_glu`` [n, d_in] and ``b_glu`` [n] are a second encoder; ``threshold`` θ [n] (0 without it) and, with the setting
    ``k`` > 0, ``rank_scale`` m [n] (1 without it) are as for JumpReLU and TopK.

    f_j needs two encoder rows of feature j, which the row form has no place for: it is computed for the whole
    dictionary instead.
    """

    name = "glu"
    kind = "glu"
    title = "GLU encoder"
    reference = "llamascopium (Language-Model-SAEs), models/sae.py"
    execution = "dictionary"
    gate_tensors = ("b_enc", "W_glu", "b_glu")
    optional_gate = ("threshold", "rank_scale")
    gate_matrices = ("W_glu",)
    settings = {"k": 0}  # noqa: RUF012

    def shift_input(self, gate: Gate, projection: Tensor) -> dict[str, Tensor]:
        raise SAEFormatError("architecture 'glu' has two encoders: subtract the decoder's bias from both biases first")

    def encode(self, x: Tensor, whole: Whole) -> Tensor:
        openness = torch.sigmoid(x @ whole.gate["W_glu"].T + whole.gate["b_glu"])
        return self.activate((x @ whole.W_enc.T + whole.gate["b_enc"]) * openness, whole)

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        f = super().activate(pre, whole)
        k = int(whole.settings.get("k", 0))
        if not k:
            return f
        return f * topk_members(pre * whole.gate["rank_scale"] if "rank_scale" in whole.gate else pre, k)
