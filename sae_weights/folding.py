"""From a checkpoint's conventions to the canonical form, row by row.

Each step touches row j of the encoder, the gate and the decoder only, so any block of rows can be folded alone. All of
it happens in float64 and is rounded to fp32 once, with sums in a fixed order: the result, and so the digest, does not
depend on the machine or on which rows were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .architectures import Architecture, Gate

# SAELens' floor when it divides by a decoder row's norm.
_MIN_DECODER_NORM = 1e-8


@dataclass(frozen=True)
class Folding:
    """What a checkpoint leaves to its runtime and the canonical form does not.

    - ``input_scale`` s: the dictionary was trained on s·x. W_enc ·= s, and the output is in units of s·x too unless
      ``output_scale`` s' says otherwise (transcoders): W_dec /= s', b_dec /= s'. W_skip ·= s / s'.
    - ``decoder_norm``: pre-activations are multiplied by ‖d_j‖, and activations divided by it before decoding. A
      threshold is already in those units (BatchTopK measures it there).
    - ``unit_decoder``: decoder rows are divided by their norm, and nothing else changes (Apollo's end-to-end SAEs).
    - ``threshold_in_decoder_norm``: the gate compares p_j · ‖d_j‖ with the threshold, the value stays p_j:
      threshold_j /= ‖d_j‖.
    - ``rank_by_decoder_norm``: TopK membership ranks p_j · ‖d_j‖, the value stays p_j: rank_scale_j = ‖d_j‖.
    - ``subtract_b_dec``: the encoder sees x̃ − b_dec. b_enc −= W_enc · b_dec.
    - ``subtract``: the encoder sees x̃ − this vector [d_in] (in units of s·x) instead.

    ‖d_j‖ is always the norm of the row as stored.
    """

    input_scale: float = 1.0
    decoder_norm: bool = False
    subtract_b_dec: bool = False
    output_scale: float | None = None
    unit_decoder: bool = False
    threshold_in_decoder_norm: bool = False
    rank_by_decoder_norm: bool = False
    subtract: Tensor | None = None

    @property
    def scale_out(self) -> float:
        """What the output was scaled by in training."""
        return self.input_scale if self.output_scale is None else self.output_scale

    @property
    def trivial(self) -> bool:
        """Whether nothing has to be folded."""
        return (
            self.input_scale == self.scale_out == 1.0
            and self.subtract is None
            and not (self.decoder_norm or self.unit_decoder or self.subtract_b_dec)
            and not (self.threshold_in_decoder_norm or self.rank_by_decoder_norm)
        )


@dataclass(frozen=True)
class Block:
    """m consecutive or chosen rows: W_enc [m, d_in], W_dec [m, d_out], and the gate's tensors [m] or [m, r]."""

    W_enc: Tensor
    W_dec: Tensor
    gate: Gate


def fixed_order_sum(values: Tensor) -> Tensor:
    """Σ over the last dimension, [m, d] → [m], by halving: elementwise additions, which every machine rounds alike."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = torch.cat([folded, values[..., 2 * half :]], dim=-1) if values.shape[-1] % 2 else folded
    return values.squeeze(-1)


def fold_b_dec(b_dec: Tensor, folding: Folding) -> Tensor:
    """b_dec [d_out] of the checkpoint → canonical, fp32."""
    return (b_dec.double() / folding.scale_out).float()


def fold_extras(extras: Mapping[str, Tensor], folding: Folding, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors that belong to no feature → canonical, fp32. W_skip and ``output_extras`` depend on the scales."""
    factors = dict.fromkeys(architecture.output_extras, 1.0 / folding.scale_out)
    factors["W_skip"] = folding.input_scale / folding.scale_out
    return {
        name: tensor.float() if factors.get(name, 1.0) == 1.0 else (tensor.double() * factors[name]).float()
        for name, tensor in extras.items()
    }


def fold_rows(raw: Block, raw_b_dec: Tensor, folding: Folding, architecture: Architecture) -> Block:
    """A block of checkpoint rows → canonical rows, fp32. The order (scale, decoder norm, b_dec) is SAELens'."""
    if folding.trivial:
        gate = {name: vector.float() for name, vector in raw.gate.items()}
        W_enc = raw.W_enc.float()
        return Block(W_enc, W_enc if raw.W_dec is raw.W_enc else raw.W_dec.float(), gate)
    scale, scale_out = folding.input_scale, folding.scale_out
    W_enc, W_dec = raw.W_enc.double() * scale, raw.W_dec.double() / scale_out
    gate64 = {name: vector.double() for name, vector in raw.gate.items()}
    if folding.decoder_norm:
        norm = fixed_order_sum(W_dec * W_dec).sqrt().clamp(min=_MIN_DECODER_NORM)
        W_enc, W_dec = W_enc * norm[:, None], W_dec / norm[:, None]
        # ‖d‖ has just been divided by the output scale, and with it the unit in which the threshold was measured.
        measured = {"threshold": gate64["threshold"] / scale_out} if "threshold" in gate64 else {}
        gate64 = {**architecture.scale_rows(gate64, norm), **measured}
    elif folding.unit_decoder or folding.threshold_in_decoder_norm or folding.rank_by_decoder_norm:
        stored = raw.W_dec.double()
        norm = fixed_order_sum(stored * stored).sqrt().clamp(min=_MIN_DECODER_NORM)
        if folding.unit_decoder:
            W_dec = W_dec / norm[:, None]
        if folding.threshold_in_decoder_norm:
            gate64 = {**gate64, "threshold": gate64["threshold"] / norm}
        if folding.rank_by_decoder_norm:
            gate64 = {**gate64, "rank_scale": norm}
    subtracted = raw_b_dec if folding.subtract_b_dec else folding.subtract
    if subtracted is not None:
        projection = fixed_order_sum(W_enc * (subtracted.double() / scale))
        gate64 = architecture.shift_input(gate64, projection)
    return Block(W_enc.float(), W_dec.float(), {name: vector.float() for name, vector in gate64.items()})
