"""TopK SAE: the k largest pre-activations of a token survive. Gao et al. 2024, arXiv:2406.04093, section 2.3."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BiasOnly


def topk_members(pre: Tensor, k: int) -> Tensor:
    """Which of pre [..., n] are among the k largest of their row → bool [..., n], exactly k per row.

    Equal values at the boundary: the lower index wins, on every device (``torch.topk`` leaves that open).
    """
    boundary = pre.topk(k, dim=-1).values[..., -1:]
    above = pre > boundary
    tied = pre == boundary
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= room))


class TopK(BiasOnly):
    """f = relu(p) for the k largest p of a token, 0 for the others; a member with p ≤ 0 is 0 as well.

    Not row-separable: membership needs every pre-activation of the dictionary.
    """

    name = "topk"
    kind = "topk"
    gate_tensors = ("b_enc",)
    row_separable = False
    needs_k = True

    def members(self, pre: Tensor, k: int | None) -> Tensor | None:
        if k is None:
            raise ValueError("a TopK dictionary needs k")
        return topk_members(pre, k)
