"""Top-AFA SAE: as many latents as explain the norm of the input. Lee et al. 2025, SewoongLee/top-afa-sae, training/sae.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BiasOnly, Whole
from .largest import first_largest

# The authors' stand-in for the sum over all n latents, "large enough": it keeps k(x) = n out of reach of ordinary norms.
_WHOLE_SUM = 1e8


class TopAFA(BiasOnly):
    """a = relu(W_enc · (x̃ − b_dec)); f keeps the first k(x) of a in the order of e_j = (a_j · ‖d_j‖)², largest first::

        k(x) = argmin_k | sqrt(e_1 + … + e_k) − ‖x̃ − b_dec‖ |

    where for k = n the sum counts as 1e8. There is no number of latents to choose: it follows from the input. x̃ is the
    layer-normalised input in the authors' configuration. ``b_enc`` is 0 in every checkpoint (present, unused) and
    becomes −W_enc · b_dec by folding ``subtract_b_dec``. Equal e: the lower index first; equally close: fewer latents.
    """

    name = "top_afa"
    kind = "top_afa"
    title = "Top-AFA"
    reference = "Lee et al. 2025, arXiv:2503.24277; top-afa-sae, training/sae.py"
    execution = "dictionary"
    gate_tensors = ("b_enc",)

    def encode(self, x: Tensor, whole: Whole) -> Tensor:
        centred = x - whole.b_dec
        a = torch.relu(centred @ whole.W_enc.T)
        energy = (a * whole.W_dec.norm(dim=-1)).square()
        order = energy.argsort(dim=-1, descending=True, stable=True)
        # Summed in float64, so that thousands of terms come out alike on every device, and compared in fp32 as by the
        # authors: where all of a explain less than the norm, latents too small to change the fp32 sum stay out.
        explained = energy.gather(-1, order).double().cumsum(dim=-1).float()
        explained[..., -1] = _WHOLE_SUM
        norm = centred.double().norm(dim=-1, keepdim=True).float()
        last = first_largest(-(explained.sqrt() - norm).abs())
        kept = torch.arange(a.shape[-1], device=a.device) <= last
        return a * torch.zeros_like(a, dtype=torch.bool).scatter_(-1, order, kept)

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        raise ValueError(f"how many latents {self.title} keeps follows from the input's norm: encode the input")
