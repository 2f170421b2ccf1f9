"""ITDA: a dictionary of chosen activations, decomposed at inference. Leask et al. 2025, arXiv:2505.17769."""

from __future__ import annotations

from torch import Tensor

from .base import Whole
from .matching_pursuit import MatchingPursuit, pursue


class ITDA(MatchingPursuit):
    """r = x̃, f = 0; k times: j = argmax_j |a_j · r|; c = a_j · r, of either sign; f_j += c; r −= c · a_j.

    The atoms a_j (rows of W_dec, norm 1) are activations that training found badly reconstructed. There is no bias:
    b_dec and ``b_enc`` are 0. A latent may be chosen more than once, so a token has at most k active ones.
    """

    name = "itda"
    kind = "itda"
    title = "ITDA"
    reference = "Leask et al. 2025, arXiv:2505.17769; train.py of its repository"
    needs_k = True
    settings = {}  # noqa: RUF012

    def encode(self, x: Tensor, whole: Whole) -> Tensor:
        if whole.k is None:
            raise ValueError("an ITDA dictionary needs k")
        return pursue(x - whole.b_dec, whole.W_enc, whole.W_dec, iterations=whole.k, magnitude=True)
