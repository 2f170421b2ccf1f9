"""Per-token normalisation of an SAE's input, and its inverse on the output.

Constants (one scale for the whole data set) are no business of this file: they are folded into the weights.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

InputNorm = Literal["none", "constant_norm_rescale", "layer_norm", "unit_norm", "centre"]
INPUT_NORMS: tuple[InputNorm, ...] = get_args(InputNorm)

LAYER_NORM_EPS = 1e-5


class NormalisedInput(NamedTuple):
    """x̃, and what turns an output in normalised space back: ``x̂ = ŷ · scale + shift``."""

    x: Tensor  # [..., d]
    scale: Tensor  # [..., 1]
    shift: Tensor  # [..., 1]


def normalise(x: Tensor, kind: InputNorm) -> NormalisedInput:
    """Normalise each token of x [..., d] (floating point), as SAELens 6.54 does at run time.

    - ``none``: x̃ = x.
    - ``constant_norm_rescale``: x̃ = x·√d / ‖x‖, so every token has norm √d; scale = ‖x‖ / √d. A zero vector stays zero.
    - ``layer_norm``: x̃ = (x − μ) / (σ + 1e-5) with σ the unbiased standard deviation over d; scale = σ (without the
      epsilon, as in SAELens and OpenAI's GPT-2 SAEs), shift = μ.
    - ``unit_norm``: x̃ = x / ‖x‖; scale = ‖x‖. A zero vector stays zero.
    - ``centre``: x̃ = x − μ with μ the mean over d; shift = μ. For dictionaries trained on a residual stream whose
      writers were centred (TransformerLens' ``center_writing_weights``).
    """
    if kind == "none":
        one = x.new_ones((*x.shape[:-1], 1))
        return NormalisedInput(x, one, one.new_zeros(one.shape))
    if kind in ("constant_norm_rescale", "unit_norm"):
        norm = x.norm(dim=-1, keepdim=True)
        target = x.shape[-1] ** 0.5 if kind == "constant_norm_rescale" else 1.0
        # SAELens divides by zero here; a zero vector has no direction to rescale, so it stays where it is.
        coefficient = (target / norm).where(norm > 0, norm)
        return NormalisedInput(x * coefficient, norm / target, norm.new_zeros(norm.shape))
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    if kind == "centre":
        return NormalisedInput(centred, mean.new_ones(mean.shape), mean)
    std = centred.std(dim=-1, keepdim=True)
    return NormalisedInput(centred / (std + LAYER_NORM_EPS), std, mean)
