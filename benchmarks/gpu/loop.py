"""A decoder-shaped loop: every matrix product, norm and activation of a model's layers, without attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

POOL = 6
"""Layers with weights of their own; the loop goes round them. They are far larger than the L2 cache at every width."""


@dataclass(frozen=True)
class Shape:
    """A decoder: width, layers, width of the MLP, width of keys and values together."""

    name: str
    d: int
    layers: int
    mlp: int
    kv: int


SHAPES = {
    "8B": Shape("8B", 4096, 32, 14336, 2048),
    "1B": Shape("1B", 2048, 16, 8192, 1024),
    "70B": Shape("70B", 8192, 80, 28672, 2048),
}
"""The goals are those of the first; the last takes longest."""
TINY = Shape("tiny", 48, 4, 96, 16)

_add = tl.standard._sum_combine


@triton.jit
def add_norm_kernel(hidden, residual, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """residual += hidden; out = residual / rms(residual), one row per program."""
    columns = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * D + columns
    inside = columns < D
    x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + at, x.to(residual.dtype.element_ty), mask=inside)
    mean = tl.reduce(x * x, 0, _add) / D
    tl.store(out + at, (x * tl.rsqrt(mean + 1e-6)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(both, out, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out = silu(both[:, :WIDTH]) · both[:, WIDTH:]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = i // WIDTH * 2 * WIDTH + i % WIDTH
    a = tl.load(both + at, mask=i < n, other=0.0).to(tl.float32)
    b = tl.load(both + at + WIDTH, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + i, (a / (1 + tl.exp(-a)) * b).to(out.dtype.element_ty), mask=i < n)


class Loop:
    """One forward pass of so many tokens; ``edit(layer, hidden, residual)`` is called behind the layers ``armed``."""

    def __init__(self, shape: Shape, tokens: int, weights: Sequence[tuple[torch.Tensor, ...]], x: torch.Tensor) -> None:
        self.shape, self.weights = shape, weights
        self.x = x[:tokens]
        self.hidden, self.residual = torch.empty_like(self.x), torch.empty_like(self.x)

    def run(self, armed: Sequence[int] = (), edit: Callable[..., None] | None = None) -> None:
        """In place on ``hidden`` and ``residual``."""
        shape, n = self.shape, len(self.x)
        block = triton.next_power_of_2(shape.d)
        self.hidden.copy_(self.x)
        self.residual.zero_()
        for layer in range(shape.layers):
            qkv, out, up, down = self.weights[layer % len(self.weights)]
            normed = torch.empty_like(self.x)
            add_norm_kernel[(n,)](self.hidden, self.residual, normed, D=shape.d, BLOCK=block)
            mixed = (normed @ qkv)[:, : shape.d] @ out
            add_norm_kernel[(n,)](mixed, self.residual, normed, D=shape.d, BLOCK=block)
            wide = normed @ up
            gated = torch.empty(n, shape.mlp, dtype=self.x.dtype, device=self.x.device)
            gated_kernel[(triton.cdiv(gated.numel(), 1024),)](wide, gated, gated.numel(), WIDTH=shape.mlp, BLOCK=1024)
            torch.mm(gated, down, out=self.hidden)
            if layer in armed and edit is not None:
                edit(layer, self.hidden, self.residual)


def make_weights(shape: Shape, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * rows**-0.5

    one = ((shape.d, shape.d + shape.kv), (shape.d, shape.d), (shape.d, 2 * shape.mlp), (shape.mlp, shape.d))
    return [tuple(matrix(*size) for size in one) for _ in range(min(POOL, shape.layers))]
