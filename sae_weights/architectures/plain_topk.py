"""TopK without a ReLU: the k largest pre-activations survive as they are. circuit-tracer 0.5, activation_functions.py."""

from __future__ import annotations

from torch import Tensor

from .base import Members, Whole
from .topk import topk_members


class PlainTopK(Members):
    """f = p for the k largest p of a token, 0 for the others: a member is negative where fewer than k are positive.

    Trained dictionaries have far more than k positive pre-activations, where it is TopK.
    """

    name = "plain_topk"
    kind = "plain_topk"
    title = "TopK without ReLU"
    reference = "Zhao et al. 2025, arXiv:2510.09312; circuit-tracer"
    needs_k = True
    signed = True

    def members(self, pre: Tensor, whole: Whole) -> Tensor:
        if whole.k is None:
            raise ValueError("a TopK dictionary needs k")
        return topk_members(pre, whole.k)
