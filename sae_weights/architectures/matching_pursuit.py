"""Matching-pursuit SAE: latents are chosen one after another, by what is still unexplained. arXiv:2506.03093."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError

from .base import BiasOnly, Gate, Whole
from .largest import first_largest


class MatchingPursuit(BiasOnly):
    """r = x̃ − b_dec, f = 0; then, again and again::

        j = argmax_j W_enc[j] · r;  c = W_enc[j] · r, not below 0 with ``rectify``;  f_j += c;  r −= c · W_dec[j]

    until ``max_iterations`` (0: as many as x has values), or, per token, until the norm of r is below
    ``residual_threshold`` (0: never), or until an iteration left the set of active latents as it was, with
    ``stop_on_duplicate_support``. What is missing of a token's reconstruction is then r, whose norm never grew where
    decoder rows have norm 1.

    The defaults are sae-lens'. overcomplete's MpSAE with k: ``max_iterations`` k, the other three off, b_dec 0; its
    coefficients may be negative. What is subtracted from the input is what the decoder adds, so a checkpoint that
    does neither (sae-lens without ``apply_b_dec_to_input``) has b_dec 0 here.

    The dictionary has one matrix; W_enc differs from it by a constant input scale s (W_enc ·= s, W_dec /= s; a
    ``residual_threshold`` in units of s·x must then be given divided by s). ``b_enc`` is 0 in every checkpoint and
    becomes −W_enc · b_dec by folding ``subtract_b_dec``: the first iteration's correlations are the pre-activations.
    """

    name = "matching_pursuit"
    kind = "matching_pursuit"
    title = "Matching pursuit (MP-SAE)"
    reference = "Costa et al. 2025, arXiv:2506.03093; sae-lens 6.54; overcomplete 0.3"
    execution = "dictionary"
    gate_tensors = ("b_enc",)
    settings = {  # noqa: RUF012
        "max_iterations": 0,
        "residual_threshold": 0.01,
        "stop_on_duplicate_support": True,
        "rectify": True,
    }
    tied = True
    signed = True

    def check(
        self,
        n_features: int,
        k: int | None,
        gate: Mapping[str, tuple[int, ...]],
        extras: Mapping[str, Tensor],
        settings: Mapping[str, Any],
    ) -> None:
        for name in ("max_iterations", "residual_threshold"):
            if settings.get(name, 0) < 0:
                raise SAEFormatError(f"settings: {name} is {settings[name]}; expected at least 0")

    def scale_rows(self, gate: Gate, scale: Tensor) -> dict[str, Tensor]:
        raise SAEFormatError(
            f"architecture {self.name!r} takes no decoder norm: it would change which latents are chosen"
        )

    def encode(self, x: Tensor, whole: Whole) -> Tensor:
        settings = whole.settings
        return pursue(
            x - whole.b_dec,
            whole.W_enc,
            whole.W_dec,
            iterations=int(settings["max_iterations"]) or x.shape[-1],
            rectify=bool(settings["rectify"]),
            residual_threshold=float(settings["residual_threshold"]),
            stop_on_duplicate_support=bool(settings["stop_on_duplicate_support"]),
        )

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        raise ValueError(f"the latents of {self.title} do not follow from its first correlations: encode the input")


def pursue(
    residual: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    *,
    iterations: int,
    magnitude: bool = False,
    rectify: bool = False,
    residual_threshold: float = 0.0,
    stop_on_duplicate_support: bool = False,
) -> Tensor:
    """Matching pursuit of residual [N, d] in the rows of W_dec [n, d] → coefficients [N, n].

    ``magnitude`` ranks correlations by |·| instead. Equal ones: the lower index wins. A token that has stopped is not
    touched by the iterations that others still need.
    """
    f = residual.new_zeros(residual.shape[0], W_dec.shape[0])
    going = torch.ones(residual.shape[0], 1, dtype=torch.bool, device=residual.device)
    stops = stop_on_duplicate_support or residual_threshold > 0
    for _ in range(iterations):
        correlation = residual @ W_enc.T
        chosen = first_largest(correlation.abs() if magnitude else correlation)
        row = chosen.squeeze(-1)
        # Summed per token, not taken from the product: its value must not depend on the other tokens.
        coefficient = (residual * W_enc[row]).sum(dim=-1, keepdim=True)
        if rectify:
            coefficient = coefficient.relu()
        coefficient = torch.where(going, coefficient, 0.0)
        before = f.gather(1, chosen)
        after = before + coefficient
        f.scatter_(1, chosen, after)
        residual = residual - coefficient * W_dec[row]
        if not stops:
            continue
        if stop_on_duplicate_support:
            going = going & ((before != 0) != (after != 0))
        if residual_threshold > 0:
            going = going & ~(residual.norm(dim=-1, keepdim=True) < residual_threshold)
        if not bool(going.any()):
            break
    return f
