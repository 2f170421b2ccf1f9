"""Whole dictionaries: all activations of one SAE for the tokens that somebody needs them of, and what is taken from them.

Tokens that nothing asks for are not encoded, and where nothing is asked for every kernel returns at once: which tokens there
are is decided on the device, and the grids do not depend on it. A token's activations are the same bits in any company: its
products are added up feature by feature in one order, whatever row of a tile it is in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from editserver.engine.triton.codes import (
    ACTIVE,
    LAYER_NORM,
    LAYER_NORM_EPS,
    N_TOKENS,
    NORM_RESCALE,
    SIGNED_MEMBERS,
    SINGLE_ROWS,
    UNIT_NORM,
)
from editserver.engine.triton.kernel_common import ADD, largest, statistics, stream


@triton.jit
def tokens_kernel(state, token_resident, token_selected, anyone, always, wants, tokens, count, BLOCK: tl.constexpr):
    """The tokens that need one SAE, ascending, and how many. One program.

    Args:
        anyone: int32 ``[1]``, whether any resident ever asks.
        always, wants: by resident: whether it needs every token, int32; those that one of these selectors holds at, int64.
        tokens, count: outputs, int32 ``[tokens]`` and ``[1]``.
    """
    found = tl.load(anyone) * 0
    if (tl.load(state + ACTIVE) != 0) & (tl.load(anyone) != 0):
        n = tl.load(state + N_TOKENS)
        for begin in range(0, n, BLOCK):
            t = begin + tl.arange(0, BLOCK)
            q = tl.load(token_resident + t, mask=t < n, other=-1)
            bits = tl.load(token_selected + t, mask=q >= 0, other=0)
            mine = tl.load(wants + q, mask=q >= 0, other=0)
            every = tl.load(always + q, mask=q >= 0, other=0)
            asks = ((every != 0) | ((bits & mine) != 0)).to(tl.int32)
            tl.store(tokens + found + tl.associative_scan(asks, 0, ADD) - 1, t, mask=asks != 0)
            found += tl.reduce(asks, 0, ADD)
    tl.store(count, found)


@triton.jit(do_not_specialize=["begin"])
def views_kernel(
    hidden,
    residual,
    tokens,
    count,
    begin,
    views,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    LOG: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One SAE's view of the tokens from number ``begin`` on, one per program: fp32 ``[rows, D]``. CENTRED: it subtracts a mean."""
    pid = tl.program_id(0)
    if begin + pid >= tl.load(count):
        return
    token = tl.load(tokens + begin + pid) + tl.arange(0, 1)
    valid = token >= 0
    norm, mean, deviation = statistics(hidden, residual, token, valid, CENTRED, D, 1, WIDE, LOG, SPLIT)
    factor = tl.full((1,), 1.0, tl.float32)
    length = tl.where(norm > 0, norm, 1.0)
    if NORM == UNIT_NORM:
        factor = tl.where(norm > 0, tl.div_rn(factor, length), 0.0)
    if NORM == NORM_RESCALE:
        factor = tl.where(norm > 0, tl.div_rn(tl.full((1,), D**0.5, tl.float32), length), 0.0)
    if NORM == LAYER_NORM:
        factor = tl.div_rn(factor, deviation + LAYER_NORM_EPS)
    shift = tl.full((1,), 0.0, tl.float32)
    if CENTRED:
        shift = mean
    for start in range(0, D, 1 << WIDE):
        columns = start + tl.arange(0, 1 << WIDE)
        x = stream(hidden, residual, token, valid, columns, D, SPLIT)
        at = pid.to(tl.int64) * D + columns[None, :]
        tl.store(views + at, (x - shift[:, None]) * factor[:, None], mask=(columns < D)[None, :])


@triton.jit(do_not_specialize=["begin"])
def encode_kernel(
    views,
    weights,
    gate,
    count,
    begin,
    pre,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """u = W_enc · x̃ for the rows that there are, fp32 ``[ROWS, N]``; plus the bias but for SINGLE_ROWS. Any number of programs."""
    rows = tl.minimum(tl.load(count) - begin, ROWS)
    if rows <= 0:
        return
    high = (rows + BM - 1) // BM
    for tile in range(tl.program_id(0), high * ((N + BN - 1) // BN), tl.num_programs(0)):
        r = (tile % high) * BM + tl.arange(0, BM)
        f = (tile // high) * BN + tl.arange(0, BN)
        u = tl.full((BM, BN), 0.0, tl.float32)
        for start in range(0, D, BK):
            c = start + tl.arange(0, BK)
            x = tl.load(views + r[:, None] * D + c[None, :], mask=(r < rows)[:, None] & (c < D)[None, :], other=0.0)
            at = f[:, None].to(tl.int64) * D + c[None, :]
            w = tl.load(weights + at, mask=(f < N)[:, None] & (c < D)[None, :], other=0.0)
            u = tl.dot(x, tl.trans(w), u, input_precision="ieee")
        if FORM != SINGLE_ROWS:
            u += tl.load(gate + f * 4, mask=f < N, other=0.0)[None, :]
        at = r[:, None].to(tl.int64) * N + f[None, :]
        tl.store(pre + at, u, mask=(r < rows)[:, None] & (f < N)[None, :])


@triton.jit
def keys_of(values, scale, j, inside, ABS: tl.constexpr, SCALED: tl.constexpr):
    """What the values at ``j`` are ranked by, as integers ≥ 0 in the same order; -1 outside."""
    x = tl.load(values + j, mask=inside, other=0.0)
    if ABS:
        x = tl.abs(x)
    if SCALED:
        x = x * tl.load(scale + j, mask=inside, other=0.0)
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # one zero
    return tl.where(inside, (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648, -1)


@triton.jit
def boundary(values, scale, k, N: tl.constexpr, ABS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest of N values as a key, and the last index that counts among those that are equal to it."""
    found = k.to(tl.int64) * 0
    bit = found + 2147483648
    for _ in range(32):
        more = found | bit
        n = k * 0
        for begin in range(0, N, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            n += tl.reduce((keys_of(values, scale, j, j < N, ABS, SCALED) >= more).to(tl.int32), 0, ADD)
        found = tl.where(n >= k, more, found)
        bit = bit >> 1
    above = k * 0
    for begin in range(0, N, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        above += tl.reduce((keys_of(values, scale, j, j < N, ABS, SCALED) > found).to(tl.int32), 0, ADD)
    last = k * 0 - 1
    seen = above
    for begin in range(0, N, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        tied = (keys_of(values, scale, j, j < N, ABS, SCALED) == found).to(tl.int32)
        order = seen + tl.associative_scan(tied, 0, ADD)
        last = tl.maximum(last, largest(tl.where((tied != 0) & (order <= k), j, -1)))
        seen += tl.reduce(tied, 0, ADD)
    return found, last


@triton.jit(do_not_specialize=["begin"])
def take_kernel(
    tokens,
    count,
    begin,
    pre,
    gate,
    scale,
    token_resident,
    take_ptr,
    takes,
    members,
    members_width,
    top_k,
    top_at,
    top_index,
    top_value,
    top_width,
    N: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    ABS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Activations of one token per program, in place of its ``pre``; those that its request takes; its largest ones.

    Members are the K largest of ``pre`` (ABS: of their magnitudes; SCALED: times ``scale [N]``); equal values: the lower index.

    Args:
        take_ptr, takes: CSR by resident of (latent, column of ``members``), int32.
        top_k, top_at: by resident: how many of the largest magnitudes, 0 for none, and from which column on they go to
            ``top_index`` and ``top_value`` ``[tokens, top_width]``, ascending by index.
    """
    pid = tl.program_id(0)
    if begin + pid >= tl.load(count):
        return
    token = tl.load(tokens + begin + pid).to(tl.int64)
    q = tl.load(token_resident + token)
    mine = pre + pid.to(tl.int64) * N
    if FORM == SINGLE_ROWS:
        for start in range(0, N, BLOCK):
            j = start + tl.arange(0, BLOCK)
            u = tl.load(mine + j, mask=j < N, other=0.0)
            gate_bias = tl.load(gate + 4 * j, mask=j < N, other=0.0)
            threshold = tl.load(gate + 4 * j + 1, mask=j < N, other=0.0)
            mag_scale = tl.load(gate + 4 * j + 2, mask=j < N, other=0.0)
            mag_bias = tl.load(gate + 4 * j + 3, mask=j < N, other=0.0)
            a = tl.where(u + gate_bias > threshold, tl.maximum(mag_scale * u + mag_bias, 0.0), 0.0)
            tl.store(mine + j, a, mask=j < N)
    else:
        least, last = boundary(mine, scale, tl.load(count) * 0 + K, N, ABS, SCALED, BLOCK)
        tl.debug_barrier()
        for start in range(0, N, BLOCK):
            j = start + tl.arange(0, BLOCK)
            key = keys_of(mine, scale, j, j < N, ABS, SCALED)
            member = (key > least) | ((key == least) & (j <= last))
            a = tl.load(mine + j, mask=j < N, other=0.0)
            if FORM != SIGNED_MEMBERS:
                a = tl.maximum(a, 0.0)
            tl.store(mine + j, tl.where(member, a, 0.0), mask=j < N)
    tl.debug_barrier()
    end = tl.load(take_ptr + q + 1)
    for start in range(tl.load(take_ptr + q), end, 32):
        i = start + tl.arange(0, 32)
        latent = tl.load(takes + 2 * i, mask=i < end, other=0)
        column = tl.load(takes + 2 * i + 1, mask=i < end, other=0)
        a = tl.load(mine + latent, mask=i < end, other=0.0)
        tl.store(members + token * members_width + column, a, mask=i < end)
    k = tl.load(top_k + q)
    if k > 0:
        least, last = boundary(mine, scale, k, N, True, False, BLOCK)
        at = token * top_width + tl.load(top_at + q)
        seen = k * 0
        for start in range(0, N, BLOCK):
            j = start + tl.arange(0, BLOCK)
            key = keys_of(mine, scale, j, j < N, True, False)
            chosen = ((key > least) | ((key == least) & (j <= last))).to(tl.int32)
            place = at + seen + tl.associative_scan(chosen, 0, ADD) - 1
            tl.store(top_index + place, j, mask=chosen != 0)
            tl.store(top_value + place, tl.load(mine + j, mask=j < N, other=0.0), mask=chosen != 0)
            seen += tl.reduce(chosen, 0, ADD)
