"""Latents that requests asked to see, and evidence that their gates listen to: rows read, nothing written to the stream."""

from __future__ import annotations

import triton
import triton.language as tl

from editserver.engine.triton.kernel_common import all_bits, read_tile, statistics, tile_of


@triton.jit
def read_kernel(
    hidden,
    residual,
    state,
    tile_first,
    tile_last,
    token_resident,
    token_selected,
    read_ptr,
    reads,
    read_bits,
    centred,
    bank_read,
    bank_gate,
    members,
    members_width,
    out,
    out_width,
    memory,
    token_slot,
    D: tl.constexpr,
    T: tl.constexpr,
    LOG_ROWS: tl.constexpr,
    LOG: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    HITS: tl.constexpr,
    REMEMBER: tl.constexpr,
):
    """One tile of the plan per program, as in :func:`~editserver.engine.triton.kernel_edit.edit_kernel`.

    As a plain loop over the tokens t that belong to a request q, and q's reads r_0, r_1, …::

        HITS:  out[t]    = bits of the reads that are active (≠ 0) at t, or-ed
        else:  out[t, j] = value of r_j at t where the selector bit of r_j holds, NaN where it does not

    Args:
        read_ptr, reads: CSR by resident, as the edit's; ``read_bits`` int64: the gate's bit (HITS), or the selector's.
        out: HITS: int64 ``[tokens]``; else fp32 ``[tokens, out_width]``. Tokens without a request are left as they are.
        memory, token_slot: REMEMBER: what HITS writes is also kept at the KV slot of the token, int64 ``[slots]``; slots are
            int64 ``[tokens]``, negative for none.
    """
    q, begin, end = tile_of(state, tile_first, tile_last, token_resident, T)
    if q < 0:
        return
    tokens = begin + tl.arange(0, T)
    valid = tokens < end
    first = tl.load(read_ptr + q)
    last = tl.load(read_ptr + q + 1)
    heard = tl.full((T,), 0, tl.int64)
    if first < last:
        bits = tl.load(token_selected + tokens, mask=valid, other=0)
        norm, mean, deviation = statistics(
            hidden, residual, tokens, valid, tl.load(centred + q), D, T, WIDE, LOG, SPLIT
        )
        for start in range(first, last, 1 << LOG_ROWS):
            r = start + tl.arange(0, 1 << LOG_ROWS)
            asked = r < last
            value = read_tile(
                hidden, residual, tokens, valid, norm, mean, deviation, reads, r, asked, bank_read, bank_gate, members,
                members_width, D, T, LOG_ROWS, LOG, SPLIT, STAGES,
            )  # fmt: skip
            mine = tl.load(read_bits + r, mask=asked, other=0)[None, :]
            if HITS:
                heard = heard | all_bits(tl.where((value != 0) & asked[None, :], mine, 0), T, LOG_ROWS)
            else:
                value = tl.where((bits[:, None] & mine) != 0, value, float("nan"))
                at = tokens[:, None].to(tl.int64) * out_width + (r - first)[None, :]
                tl.store(out + at, value, mask=valid[:, None] & asked[None, :])
    if HITS:
        tl.store(out + tokens, heard, mask=valid)
    if REMEMBER:
        slot = tl.load(token_slot + tokens, mask=valid, other=-1)
        tl.store(memory + slot, heard, mask=valid & (slot >= 0))
