"""The sparse half of a training step: only latents that fire cost anything, forward and backward.

A batch of B tokens with n latents has B·n pre-activations but only B·k values that count. The encoder's dense product
runs in bf16 without a gradient; its gradient is summed over the pairs (token, latent) that fired.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Fired:
    """Pairs (token, latent), ordered by token.

    Attributes:
        row, feature: int64 ``[pairs]``.
        offsets: first pair of each token, int64 ``[B]``.
        pre: their pre-activations, fp32 ``[pairs]``, without gradient.
    """

    row: Tensor
    feature: Tensor
    offsets: Tensor
    pre: Tensor


def pairs(mask: Tensor, pre: Tensor) -> Fired:
    """The pairs where ``mask [B, n]`` holds."""
    flat = mask.reshape(-1).nonzero().squeeze(1)
    return _fired(flat, pre)


def _fired(flat: Tensor, pre: Tensor) -> Fired:
    row = torch.div(flat, pre.shape[1], rounding_mode="floor")
    counts = torch.bincount(row, minlength=len(pre))
    return Fired(row, flat - row * pre.shape[1], counts.cumsum(0) - counts, pre.reshape(-1)[flat].float())


def largest(pre: Tensor, count: int, floor: float) -> tuple[Fired, float]:
    """The ``count`` largest positive entries of ``pre [B, n]``, and the smallest of them.

    ``floor`` is a guess below that smallest one: only entries above it are looked at, and it is lowered until enough
    of them are. The answer does not depend on it.
    """
    while True:
        flat = (pre > floor).reshape(-1).nonzero().squeeze(1)
        if len(flat) >= count or floor <= 0:
            break
        floor = floor / 2 if floor > 1e-3 else 0.0
    values = pre.reshape(-1)[flat]
    if len(flat) <= count:
        return _fired(flat, pre), float(values.min()) if len(flat) else 0.0
    bound = values.float().kthvalue(len(flat) - count + 1).values
    return _fired(flat[values >= bound], pre), float(bound)


class _Encode(torch.autograd.Function):
    """value = pre[row, feature], differentiable in the encoder: d value = ``x̃[row] · dW_enc[feature] + db_enc``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, row: Tensor, feature: Tensor, pre: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, row, feature)
        return pre.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec, row, feature = ctx.saved_tensors
        n = len(W_enc)
        order = feature.argsort()
        counts = torch.bincount(feature, minlength=n)
        starts = counts.cumsum(0) - counts
        # W_enc[j] gets Σ grad · (x − b_dec) over the tokens where j fired: a bag of tokens per latent.
        weights = grad[order].contiguous()
        dW = F.embedding_bag(row[order], x - b_dec, starts, mode="sum", per_sample_weights=weights)
        db = torch.zeros(n, dtype=grad.dtype, device=grad.device).index_add_(0, feature, grad)
        return None, dW, db, -(db @ W_enc), None, None, None


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, fired: Fired) -> Tensor:
    """Pre-activations of the pairs, ``[pairs]``, with gradients to W_enc ``[n, d]``, b_enc ``[n]`` and b_dec ``[d]``."""
    value: Tensor = _Encode.apply(x, W_enc, b_enc, b_dec, fired.row, fired.feature, fired.pre)  # type: ignore[no-untyped-call]
    return value


def decode(values: Tensor, fired: Fired, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``Σ value · W_dec[feature]`` per token plus b_dec, ``[B, d]``."""
    return F.embedding_bag(fired.feature, W_dec, fired.offsets, mode="sum", per_sample_weights=values) + b_dec


class _Jump(torch.autograd.Function):
    """Values and the active share of JumpReLU with straight-through gradients to the threshold (arXiv 2407.14435).

    f = pre·H(pre − θ). With the rectangle kernel K of width ε: ∂f/∂θ = −(θ/ε)·K((pre − θ)/ε) and
    ∂H/∂θ = −(1/ε)·K((pre − θ)/ε).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
        on = pre > theta
        ctx.save_for_backward(pre, theta, on)
        ctx.width = width
        return pre * on, on.to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad_f: Tensor, grad_on: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, theta, on = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.width / 2).to(pre.dtype) / ctx.width
        return grad_f * on, -near * (theta * grad_f + grad_on), None


def jump(pre: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """``(f, H(pre − θ))`` of pairs; ``theta`` is given per pair, ``width`` is the kernel's."""
    f, on = _Jump.apply(pre, theta, width)  # type: ignore[no-untyped-call]
    return f, on
