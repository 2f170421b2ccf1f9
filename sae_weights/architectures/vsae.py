"""Variational TopK SAE at inference: the mean, without sampling. Baker and Li 2025, arXiv:2509.22994."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Whole
from .topk import TopK


class VariationalTopK(TopK):
    """μ = W_enc · x̃ + b_enc; f = relu(μ) for the k largest μ, or with ``signed`` μ itself for the k largest |μ|.

    In training z = μ + ε · exp(½ log σ²) is sampled before the selection; an encoder for the variance, where there is
    one, has no part in inference. The two public implementations differ in the selection, hence the setting: the first
    rectifies before it selects, the second selects by magnitude and keeps the sign.
    """

    name = "vsae"
    kind = "vsae"
    title = "Variational TopK (vSAE)"
    reference = "Baker and Li 2025, arXiv:2509.22994; VSAETopK in two forks of dictionary_learning"
    settings = {"signed": False}  # noqa: RUF012
    signed = True
    thresholdable = False

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        if whole.settings["signed"]:
            return pre * self.members(pre.abs(), whole)
        return torch.relu(pre) * self.members(pre, whole)
