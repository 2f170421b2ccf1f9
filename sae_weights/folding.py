"""From a checkpoint's conventions to the canonical form, row by row.

Each step touches row j of the encoder, the gate and the decoder only, so any block of rows can be folded alone. All of
it happens in float64 and is rounded to fp32 once, with sums in a fixed order: the result, and so the digest, does not
depend on the machine or on which rows were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .architectures import Architecture, Gate

# SAELens' floor when it divides by a decoder row's norm.
_MIN_DECODER_NORM = 1e-8


@dataclass(frozen=True)
class Folding:
    """What a checkpoint leaves to its runtime and the canonical form does not.

    - ``input_scale`` s: the SAE was trained on s·x. W_enc ·= s, W_dec /= s, b_dec /= s.
    - ``decoder_norm``: pre-activations are multiplied by ‖d_j‖, and activations divided by it before decoding. A
      threshold is already in those units (BatchTopK measures it there).
    - ``subtract_b_dec``: the encoder sees x̃ − b_dec. b_enc −= W_enc · b_dec.
    """

    input_scale: float = 1.0
    decoder_norm: bool = False
    subtract_b_dec: bool = False


@dataclass(frozen=True)
class Block:
    """m consecutive or chosen rows: W_enc [m, d], W_dec [m, d], and the gate's vectors [m]."""

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
    """b_dec [d] of the checkpoint → canonical, fp32."""
    return (b_dec.double() / folding.input_scale).float()


def fold_rows(raw: Block, raw_b_dec: Tensor, folding: Folding, architecture: Architecture) -> Block:
    """A block of checkpoint rows → canonical rows, fp32. The order (scale, decoder norm, b_dec) is SAELens'."""
    if folding == Folding():
        gate = {name: vector.float() for name, vector in raw.gate.items()}
        return Block(raw.W_enc.float(), raw.W_dec.float(), gate)
    scale = folding.input_scale
    W_enc, W_dec = raw.W_enc.double() * scale, raw.W_dec.double() / scale
    gate64 = {name: vector.double() for name, vector in raw.gate.items()}
    if folding.decoder_norm:
        norm = fixed_order_sum(W_dec * W_dec).sqrt().clamp(min=_MIN_DECODER_NORM)
        W_enc, W_dec = W_enc * norm[:, None], W_dec / norm[:, None]
        # ‖d‖ has just been divided by the input scale, and with it the unit in which the threshold was measured.
        measured = {"threshold": gate64["threshold"] / scale} if "threshold" in gate64 else {}
        gate64 = {**architecture.scale_rows(gate64, norm), **measured}
    if folding.subtract_b_dec:
        projection = fixed_order_sum(W_enc * (raw_b_dec.double() / scale))
        gate64 = architecture.shift_input(gate64, projection)
    return Block(W_enc.float(), W_dec.float(), {name: vector.float() for name, vector in gate64.items()})
