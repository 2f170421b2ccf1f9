"""GroupMax SAE: one latent per group survives. EleutherAI sparsify 1.3, ``activation="groupmax"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError

from .base import Members, Whole
from .largest import first_largest


class GroupMax(Members):
    """The n features are k consecutive groups of n / k; f = relu(p) for the largest p of each group, 0 for the others.

    A token has at most k active latents: a group whose largest p is not positive has none. Equal values: the lower
    index wins. k divides n.
    """

    name = "groupmax"
    kind = "groupmax"
    title = "GroupMax"
    reference = "EleutherAI sparsify 1.3.3, fused_encoder.py"
    needs_k = True

    def check(
        self,
        n_features: int,
        k: int | None,
        gate: Mapping[str, tuple[int, ...]],
        extras: Mapping[str, Tensor],
        settings: Mapping[str, Any],
    ) -> None:
        if k is None or n_features % k:
            raise SAEFormatError(f"k: {k}; expected a divisor of {n_features}: one latent of each of k equal groups")

    def members(self, pre: Tensor, whole: Whole) -> Tensor:
        if whole.k is None:
            raise ValueError("a GroupMax dictionary needs k")
        groups = pre.unflatten(-1, (whole.k, -1))
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first_largest(groups), True).flatten(-2)
