"""TopK SAE: the k largest pre-activations of a token survive. Gao et al. 2024, arXiv:2406.04093, section 2.3."""

from __future__ import annotations

from torch import Tensor

from .base import Gate, Members, Whole


def topk_members(pre: Tensor, k: int) -> Tensor:
    """Which of pre [..., n] are among the k largest of their row → bool [..., n], exactly k per row.

    Equal values at the boundary: the lower index wins, on every device (``torch.topk`` leaves that open).
    """
    boundary = pre.topk(k, dim=-1).values[..., -1:]
    above = pre > boundary
    tied = pre == boundary
    room = k - above.sum(dim=-1, keepdim=True)
    # int64 sums: an index never overflows them, and integers add up alike on every device.
    return above | (tied & (tied.cumsum(dim=-1) <= room))


class TopK(Members):
    """f = relu(p) for the k largest p of a token, 0 for the others; a member with p ≤ 0 is 0 as well.

    With ``rank_scale`` m [n] the k largest p_j · m_j survive, and keep the value p_j (llamascopium ranks by
    p_j · ‖d_j‖). Not row-separable: membership needs every pre-activation of the dictionary.
    """

    name = "topk"
    kind = "topk"
    title = "TopK"
    reference = "Gao et al. 2024, arXiv:2406.04093"
    optional_gate = ("rank_scale",)
    needs_k = True
    thresholdable = True

    def scale_rows(self, gate: Gate, scale: Tensor) -> dict[str, Tensor]:
        scaled = super().scale_rows(gate, scale)
        return scaled | {"rank_scale": gate["rank_scale"] / scale} if "rank_scale" in gate else scaled

    def members(self, pre: Tensor, whole: Whole) -> Tensor:
        if whole.k is None:
            raise ValueError("a TopK dictionary needs k")
        ranked = pre * whole.gate["rank_scale"] if "rank_scale" in whole.gate else pre
        return topk_members(ranked, whole.k)
