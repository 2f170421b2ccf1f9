"""Crosscoder that gates each layer's write by itself. Language-Model-SAEs (llamascopium), ``models/crosscoder.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BiasOnly, Whole
from .topk import topk_members


class Crosscoder(BiasOnly):
    """One encoder over the concatenated activations of H places; a latent writes to place h only where its gate there is open.

    ::

        p = W_enc · x̃ + b_enc                                  x̃ [H·d] of all places
        open_hj = p_j · m_jh > max(θ_j, 0), and with k > 0: p_j · m_jh is among the k largest of place h
        f_j = p_j where any open_hj, else 0
        x̂_h = Σ_j f_j · open_hj · d_jh + b_dec_h               W_dec row j = (d_j1, …, d_jH)

    ``head_norm`` m [n, H] is ‖d_jh‖ as trained, ``threshold`` θ [n] (0 without it). Where open, f_j is p_j itself, so the
    gates follow from f again and a decode needs nothing but f: the ranking among the f that survived anywhere is the
    ranking among all p. A latent that crosses a gate when it is edited therefore starts or stops writing there.
    """

    name = "crosscoder"
    kind = "crosscoder"
    title = "Crosscoder, gated per place"
    reference = "Lindsey et al. 2024, Sparse Crosscoders; llamascopium, models/crosscoder.py"
    execution = "dictionary"
    several_places = True
    gate_tensors = ("b_enc", "head_norm")
    optional_gate = ("threshold",)
    gate_matrices = ("head_norm",)
    settings = {"k": 0}  # noqa: RUF012
    additive = False

    def encode(self, x: Tensor, whole: Whole) -> Tensor:
        return self.activate(x @ whole.W_enc.T + whole.gate["b_enc"], whole)

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        return torch.relu(pre) * self._open(pre, whole).any(dim=1)

    def decode(self, f: Tensor, whole: Whole) -> Tensor:
        n, heads = whole.gate["head_norm"].shape
        written = f[:, None, :] * self._open(f, whole)
        per_place = torch.einsum("thn,nhd->thd", written, whole.W_dec.reshape(n, heads, -1))
        return per_place.flatten(1) + whole.b_dec

    def _open(self, p: Tensor, whole: Whole) -> Tensor:
        """p [N, n] → bool [N, H, n]."""
        measured = torch.relu(p)[:, None, :] * whole.gate["head_norm"].T
        threshold = whole.gate.get("threshold")
        above = measured > (0.0 if threshold is None else threshold.clamp(min=0.0))
        k = int(whole.settings.get("k", 0))
        return above & topk_members(measured, k) if k else above
