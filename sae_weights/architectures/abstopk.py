"""AbsTopK SAE: the k strongest latents survive, of either sign. arXiv:2510.00404."""

from __future__ import annotations

from torch import Tensor

from .base import Whole
from .topk import TopK


class AbsTopK(TopK):
    """f = p for the k largest |p| of a token, 0 for the others: one latent stands for two opposite concepts.

    With ``rank_scale`` m [n] the k largest |p_j| · m_j survive. No threshold of one sign can stand in for that.
    """

    name = "abstopk"
    kind = "abstopk"
    title = "AbsTopK"
    reference = "AbsTopK: Rethinking Sparse Autoencoders for Bidirectional Features, arXiv:2510.00404; sae-lens 6.54"
    signed = True
    thresholdable = False

    def members(self, pre: Tensor, whole: Whole) -> Tensor:
        return super().members(pre.abs(), whole)
