"""PolySAE: a decoder with products of latents. Koromilas et al. 2026, arXiv:2602.01322; pakoromilas/PolySAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError

from .base import BiasOnly, Gate, Whole
from .topk import topk_members


class PolySAE(BiasOnly):
    """A plain encoder, and a polynomial decoder of low rank::

        f = relu(p) · 1[p > θ], p = W_enc · x̃ + b_enc;   with k > 0: only the k largest p of the token
        a_i = f · U_i                                                                      [R_i]
        x̂ = b_dec + a_1 · C_1ᵀ + λ_2 (a_1 ⊙ a_2) · C_2ᵀ + λ_3 (a_1 ⊙ a_2 ⊙ a_3) · C_3ᵀ

    A factor of higher rank is cut to the rank of the product (R_1 ≥ R_2 ≥ R_3). ``C2`` and ``C3`` [d_out, R_i] exist
    for the terms that exist. Without ``U2`` and ``U3`` the powers of a_1 take their place: the shared-U variant, where
    R_2 and R_3 are at most R_1. ``threshold`` θ [n] is 0 where absent, ``k`` is a setting (0: no TopK): TopK, JumpReLU
    (BatchTopK and Matryoshka are saved as it) and ReLU encoders are one class.

    What a latent does depends on the others, so an edit is one difference of two decodings. Row j of W_dec is the
    direction in which it acts alone to first order, U_1[j] · C_1ᵀ (``linear_directions``); decoding does not read it.
    """

    name = "polysae"
    kind = "polysae"
    title = "PolySAE"
    reference = "Koromilas et al. 2026, arXiv:2602.01322; PolySAE, sae_lens/saes/polysae.py"
    execution = "dictionary"
    gate_tensors = ("b_enc", "U1")
    optional_gate = ("threshold", "U2", "U3")
    gate_matrices = ("U1", "U2", "U3")
    extra_tensors = ("C1",)
    optional_extras = ("C2", "C3")
    output_extras = ("C1", "C2", "C3")
    settings = {"k": 0, "lambda2": 0.0, "lambda3": 0.0}  # noqa: RUF012
    additive = False

    def check(
        self,
        n_features: int,
        k: int | None,
        gate: Mapping[str, tuple[int, ...]],
        extras: Mapping[str, Tensor],
        settings: Mapping[str, Any],
    ) -> None:
        if not 0 <= settings["k"] <= n_features:
            raise SAEFormatError(f"settings: k is {settings['k']}; expected 0 (no TopK) to {n_features}")
        shared = "U2" not in gate and "U3" not in gate
        if "C3" in extras and "C2" not in extras:
            raise SAEFormatError("extras: C3 without C2; expected C1, C1 and C2, or all three")
        highest = gate["U1"][0]
        for order in (1, 2, 3):
            core, factor = f"C{order}", f"U{order}"
            if core not in extras:
                continue
            if order > 1 and not shared and factor not in gate:
                raise SAEFormatError(f"gate: no {factor}, which {core} multiplies; expected U1..U{order}, or U1 alone")
            shape = list(extras[core].shape)
            own = gate[factor][0] if factor in gate else shape[-1]
            if shape != [extras["C1"].shape[0], own] or own > highest:
                raise SAEFormatError(
                    f"{core}: shape {shape}, and {factor} has rank {own}; expected [d_model, that rank], at most {highest}"
                )
            highest = highest if shared else own

    def scale_rows(self, gate: Gate, scale: Tensor) -> dict[str, Tensor]:
        scaled = super().scale_rows(gate, scale)
        return scaled | {name: gate[name] / scale[:, None] for name in self.gate_matrices if name in gate}

    def encode(self, x: Tensor, whole: Whole) -> Tensor:
        return self.activate(x @ whole.W_enc.T + whole.gate["b_enc"], whole)

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        f = super().activate(pre, whole)
        k = int(whole.settings["k"])
        return f * topk_members(pre, k) if k else f

    def decode(self, f: Tensor, whole: Whole) -> Tensor:
        return self._compose(self._products(f, whole), whole) + whole.b_dec

    def effect(self, f: Tensor, f_new: Tensor, whole: Whole) -> Tensor:
        # The difference is taken at rank R, before the common part of both decodings could round it away.
        old, new = self._products(f, whole), self._products(f_new, whole)
        changed = (f_new != f).any(dim=-1, keepdim=True)
        linear = (f_new - f) @ whole.gate["U1"]
        products = [linear, *(b - a for a, b in zip(old[1:], new[1:], strict=True))]
        return torch.where(changed, self._compose(products, whole), 0.0)

    def _products(self, f: Tensor, whole: Whole) -> list[Tensor]:
        """a_1, a_1 ⊙ a_2 and a_1 ⊙ a_2 ⊙ a_3 for f [N, n], as far as they exist, each [N, R_i]."""
        gate, extras = whole.gate, whole.extras
        shared = "U2" not in gate and "U3" not in gate
        first = f @ gate["U1"]
        products = [first]
        factors = [first]
        for name, core in (("U2", "C2"), ("U3", "C3")):
            if core not in extras:
                break
            factors.append(first if shared else f @ gate[name])
            rank = extras[core].shape[1]
            product = factors[0][:, :rank]
            for factor in factors[1:]:
                product = product * factor[:, :rank]
            products.append(product)
        return products

    def _compose(self, products: list[Tensor], whole: Whole) -> Tensor:
        """Σ λ_i · product_i · C_iᵀ, [N, d_out], with λ_1 = 1."""
        total = products[0] @ whole.extras["C1"].T
        for order, product in enumerate(products[1:], start=2):
            total = total + float(whole.settings[f"lambda{order}"]) * (product @ whole.extras[f"C{order}"].T)
        return total


def linear_directions(U1: Tensor, C1: Tensor) -> Tensor:
    """W_dec [n, d_out] of a PolySAE: U1 [n, R] · C1ᵀ, C1 [d_out, R]."""
    return U1 @ C1.T
