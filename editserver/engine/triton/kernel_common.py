"""What the kernels share: whose tokens a program has, sums in a fixed order, the residual stream of a tile of tokens, rows
read against it.

A *tile* is T tokens of one request. Every sum over ``d`` is taken the same way whatever T is, on which thread, in which tile::

    lane_l = fma(x_{l + 2L}, y_{l + 2L}, fma(x_{l + L}, y_{l + L}, x_l·y_l)) …     L = 2^LOG lanes, blocks in order
    sum    = halves added until one number is left: lane_l + lane_{l + L/2}, then over L/4, …

Addition of two numbers commutes, so the bits of a sum do not depend on how the compiler lays a tile out over threads; the
decode variant (T = 1) and the prompt variant give the same ones, and no threshold flips between them. Kernels are launched
with ``enable_fp_fusion=False``: what is fused is written as ``tl.fma``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from editserver.engine.triton.codes import (
    ACTIVE,
    CENTRE,
    LAYER_NORM,
    LAYER_NORM_EPS,
    N_ROWS,
    N_TILES,
    N_TOKENS,
    NORM_RESCALE,
    READ_COLUMNS,
    READ_DOT,
    READ_LATENT,
    READ_MEAN,
    READ_MEMBER,
    UNIT_NORM,
)

ADD = tl.standard._sum_combine
LARGER = tl.standard._elementwise_max
SMALLER = tl.standard._elementwise_min
"""Of reductions; Triton's interpreter knows these, and hands them to NumPy."""


@triton.jit
def smaller(a, b):
    """Of two numbers, for scans."""
    return tl.minimum(a, b)


@triton.jit
def larger(a, b):
    """Of two numbers, for scans."""
    return tl.maximum(a, b)


@triton.jit
def tile_of(state, tile_first, tile_last, token_resident, T: tl.constexpr):
    """Of the plan's tile that this program has: its resident (-1: there is nothing to do), its first token and its end.

    T = 1: a token per program, and the tiles are not looked at.
    """
    pid = tl.program_id(0)
    here = (tl.load(state + ACTIVE) != 0) & (pid < tl.load(state + (N_TOKENS if T == 1 else N_TILES)))
    begin = pid
    end = pid + 1
    if T > 1:
        begin = tl.load(tile_first + pid, mask=here, other=0)
        end = tl.load(tile_last + pid, mask=here, other=0)
    return tl.load(token_resident + begin, mask=here, other=-1), begin, end


@triton.jit
def row_of(state, row_first, row_last, row_resident, row_position):
    """Of the batch's row that this program has: its resident (-1: there is nothing to do), its first token, the positions of
    that and behind its last one."""
    row = tl.program_id(0)
    here = (tl.load(state + ACTIVE) != 0) & (row < tl.load(state + N_ROWS))
    token = tl.load(row_first + row, mask=here, other=0)
    start = tl.load(row_position + row, mask=here, other=0)
    stop = start + tl.load(row_last + row, mask=here, other=0) - token
    return tl.load(row_resident + row, mask=here, other=-1), token, start, stop


@triton.jit
def slots_of(blocks, positions, inside, BLOCK_SIZE: tl.constexpr):
    """KV slots of a request's positions, int64."""
    block = tl.load(blocks + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    return block * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def halves(x, M: tl.constexpr, LOG: tl.constexpr):
    """Sum over the last axis of ``x [M, 2^LOG]`` by halves: ``[M]``."""
    for i in tl.static_range(LOG):
        x = tl.reduce(tl.reshape(x, (M, 2, (1 << LOG) >> (i + 1))), 1, ADD)
    return tl.reshape(x, (M,))


INTERPRETED = tl.constexpr(not isinstance(halves, JITFunction))
"""Whether Triton's interpreter runs the kernels."""


@triton.jit
def squares_onto(lanes, x, T: tl.constexpr, WIDE: tl.constexpr, LOG: tl.constexpr):
    """``lanes [T, 2^LOG]`` with the squares of ``x [T, 2^WIDE]`` added, one block of 2^LOG columns after the other."""
    if WIDE == LOG:
        lanes = tl.fma(x, x, lanes)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (T, 2, (1 << WIDE) // 2)), (0, 2, 1)))
        lanes = squares_onto(lanes, left, T, WIDE - 1, LOG)
        lanes = squares_onto(lanes, right, T, WIDE - 1, LOG)
    return lanes


@triton.jit
def all_bits(x, T: tl.constexpr, LOG: tl.constexpr):
    """Bitwise or over the last axis of ``x [T, 2^LOG]``: ``[T]``."""
    for i in tl.static_range(LOG):
        left, right = tl.split(tl.reshape(x, (T, (1 << LOG) >> (i + 1), 2)))
        x = left | right
    return tl.reshape(x, (T,))


@triton.jit
def largest(x):
    """Of a vector of integers."""
    return tl.reduce(x, 0, LARGER)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 ``x`` in ``dtype``, to nearest even. Triton's interpreter cuts bf16 off instead, so there it is done by hand."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        bits = tl.where(x == x, up, 0x7FC00000)
        return bits.to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)


@triton.jit
def stream(hidden, residual, tokens, valid, columns, D: tl.constexpr, SPLIT: tl.constexpr):
    """``dtype(fp32(hidden) + fp32(residual))`` of ``tokens [T]`` at ``columns [LANES]``, as fp32 ``[T, LANES]``; 0 outside."""
    at = tokens[:, None].to(tl.int64) * D + columns[None, :]
    inside = valid[:, None] & (columns < D)[None, :]
    x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if SPLIT:
        x += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        x = rounded(x, hidden.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def statistics(
    hidden,
    residual,
    tokens,
    valid,
    centred,
    D: tl.constexpr,
    T: tl.constexpr,
    WIDE: tl.constexpr,
    LOG: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """‖h‖, mean and unbiased standard deviation of each token of the tile: three fp32 ``[T]``; the last two only if ``centred``.

    2^WIDE columns are on their way at a time.
    """
    squares = tl.full((T, 1 << LOG), 0.0, tl.float32)
    for start in range(0, D, 1 << WIDE):
        x = stream(hidden, residual, tokens, valid, start + tl.arange(0, 1 << WIDE), D, SPLIT)
        squares = squares_onto(squares, x, T, WIDE, LOG)
    norm = tl.sqrt_rn(halves(squares, T, LOG))
    mean = tl.full((T,), 0.0, tl.float32)
    deviation = tl.full((T,), 0.0, tl.float32)
    if centred:
        totals = tl.full((T, 1 << LOG), 0.0, tl.float32)
        for start in range(0, D, 1 << LOG):
            totals += stream(hidden, residual, tokens, valid, start + tl.arange(0, 1 << LOG), D, SPLIT)
        mean = tl.div_rn(halves(totals, T, LOG), tl.full((T,), D, tl.float32))
        squares = tl.full((T, 1 << LOG), 0.0, tl.float32)
        for start in range(0, D, 1 << LOG):
            columns = start + tl.arange(0, 1 << LOG)
            x = stream(hidden, residual, tokens, valid, columns, D, SPLIT) - mean[:, None]
            x = tl.where((columns < D)[None, :], x, 0.0)
            squares = tl.fma(x, x, squares)
        deviation = tl.sqrt_rn(tl.div_rn(halves(squares, T, LOG), tl.full((T,), D - 1, tl.float32)))
    return norm, mean, deviation


@triton.jit
def way_back(kind, norm, deviation, D: tl.constexpr, T: tl.constexpr):
    """What takes a delta from an SAE's own view back to the residual stream, per token and row: fp32 ``[T, R]``.

    ``kind [R]`` are input norms; ``norm``, ``deviation`` ``[T]``.
    """
    rescaled = tl.div_rn(norm, tl.full((T,), D**0.5, tl.float32))
    scale = tl.where((kind == LAYER_NORM)[None, :], deviation[:, None], 1.0)
    scale = tl.where((kind == UNIT_NORM)[None, :], norm[:, None], scale)
    return tl.where((kind == NORM_RESCALE)[None, :], rescaled[:, None], scale)


@triton.jit
def read_tile(
    hidden,
    residual,
    tokens,
    valid,
    norm,
    mean,
    deviation,
    reads,
    r,
    asked,
    bank_read,
    bank_gate,
    members,
    members_width,
    D: tl.constexpr,
    T: tl.constexpr,
    LOG_ROWS: tl.constexpr,
    LOG: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Values of the reads ``r [R]``, as far as ``asked [R]``, at the tokens of a tile: fp32 ``[T, R]``, R = 2^LOG_ROWS.

    u = row · x̃ with x̃ the SAE's view of h; then by kind (see ``codes``).
    """
    slot = tl.load(reads + r * READ_COLUMNS, mask=asked, other=0)
    kind = tl.load(reads + r * READ_COLUMNS + 1, mask=asked, other=0)
    how = tl.load(reads + r * READ_COLUMNS + 2, mask=asked, other=READ_DOT)
    multiplied = asked & (how != READ_MEMBER)
    centred = (kind == LAYER_NORM) | (kind == CENTRE)
    shift = tl.where(centred[None, :], mean[:, None], 0.0)
    length = tl.where(norm > 0, norm, 1.0)
    unit = tl.where(norm > 0, tl.div_rn(tl.full((T,), 1.0, tl.float32), length), 0.0)
    rescale = tl.where(norm > 0, tl.div_rn(tl.full((T,), D**0.5, tl.float32), length), 0.0)
    narrow = tl.div_rn(tl.full((T,), 1.0, tl.float32), deviation + LAYER_NORM_EPS)
    factor = tl.where((kind == UNIT_NORM)[None, :], unit[:, None], 1.0)
    factor = tl.where((kind == NORM_RESCALE)[None, :], rescale[:, None], factor)
    factor = tl.where((kind == LAYER_NORM)[None, :], narrow[:, None], factor)
    lanes = tl.full((T, 1 << LOG_ROWS, 1 << LOG), 0.0, tl.float32)
    for start in tl.range(0, D, 1 << LOG, num_stages=STAGES):
        columns = start + tl.arange(0, 1 << LOG)
        x = stream(hidden, residual, tokens, valid, columns, D, SPLIT)
        at = slot[:, None].to(tl.int64) * D + columns[None, :]
        row = tl.load(bank_read + at, mask=multiplied[:, None] & (columns < D)[None, :], other=0.0)
        view = (x[:, None, :] - shift[:, :, None]) * factor[:, :, None]
        lanes = tl.fma(tl.broadcast_to(row[None, :, :], (T, 1 << LOG_ROWS, 1 << LOG)), view, lanes)
    u = halves(tl.reshape(lanes, (T * (1 << LOG_ROWS), 1 << LOG)), T * (1 << LOG_ROWS), LOG)
    u = tl.reshape(u, (T, 1 << LOG_ROWS))
    gate_bias = tl.load(bank_gate + slot * 4, mask=multiplied, other=0.0)[None, :]
    threshold = tl.load(bank_gate + slot * 4 + 1, mask=multiplied, other=0.0)[None, :]
    mag_scale = tl.load(bank_gate + slot * 4 + 2, mask=multiplied, other=0.0)[None, :]
    mag_bias = tl.load(bank_gate + slot * 4 + 3, mask=multiplied, other=0.0)[None, :]
    active = tl.where(u + gate_bias > threshold, tl.maximum(mag_scale * u + mag_bias, 0.0), 0.0)
    value = tl.where((how == READ_LATENT)[None, :], active, u)
    value = tl.where((how == READ_MEAN)[None, :], tl.abs(u + gate_bias), value)
    given = asked & (how == READ_MEMBER)
    at = tokens[:, None].to(tl.int64) * members_width + slot[None, :]
    whole = tl.load(members + at, mask=valid[:, None] & given[None, :], other=0.0)
    return tl.where(given[None, :], whole, value)


FIXED: dict[str, Any] = {"enable_fp_fusion": False}
"""Launch options of every kernel."""
