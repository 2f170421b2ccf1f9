"""One step's plan, made on the device: which token runs which program, and what selects it."""

from __future__ import annotations

import triton
import triton.language as tl

from editserver.engine.triton.codes import ACTIVE, N_ROWS, N_TILES, N_TOKENS, STEP
from editserver.engine.triton.kernel_common import ADD


@triton.jit
def tiles_of(query_start, row_slot, slot_resident, r, counted, TILE: tl.constexpr):
    """How many tiles each of the rows ``r [ROWS]`` has: those of requests with a program, as far as ``counted``."""
    slot = tl.load(row_slot + r, mask=counted, other=0)
    q = tl.load(slot_resident + slot, mask=counted, other=-1)
    first = tl.load(query_start + r, mask=counted, other=0)
    last = tl.load(query_start + r + 1, mask=counted, other=0)
    return tl.where(q >= 0, (last - first + TILE - 1) // TILE, 0)


@triton.jit(do_not_specialize=["n_rows", "n_padded", "number"])
def plan_kernel(
    query_start,
    row_slot,
    slot_resident,
    positions,
    token_ids,
    n_rows,
    n_padded,
    number,
    request_ptr,
    interval_ptr,
    intervals,
    id_ptr,
    ids,
    with_zero,
    mention_ptr,
    mention_start,
    mention_ids,
    history_row,
    history,
    state,
    token_resident,
    token_selected,
    tile_first,
    tile_last,
    row_first,
    row_last,
    row_resident,
    row_position,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HISTORY: tl.constexpr,
):
    """Programs ``(row, block of its tokens)``; row ``n_rows`` is the padding behind the batch. As a plain loop::

        for row r, token t of it:
            resident[t] = q = slot_resident[row_slot[r]]                     -1: no program
            bit s of selected[t] = positions[t] in an interval of q's selector s, or token_ids[t] one of its ids, or one of the
                                   token sequences that it looks for ends at t
        for the padding: resident[t] = -1
        tiles: the tokens of every row with q ≥ 0, TILE at a time; row by row

    Args:
        query_start: int32 ``[n_rows + 1]``, as the runner has it on the device; ``row_slot``: its request slot by row.
        slot_resident: int32, resident index by request slot, -1 for none.
        n_padded: tokens of the batch, or some with its padding: none behind them is edited.
        number: of this plan.
        request_ptr … with_zero: :class:`~editserver.engine.resident.SelectorTable`; ``with_zero``: position 0 counts.
        mention_ptr, mention_start, mention_ids: CSR, selector → token sequences → their tokens.
        history_row, history: by resident, -1 for none; int32 ``[rows, HISTORY]``, tokens by position, to which this step's are
            added. HISTORY 0: nobody has any.
        state, token_resident, token_selected, tile_first, tile_last: outputs, as the edit kernel takes them; row_first,
            row_last, row_resident, row_position: as the gates kernel does.
        ROWS: power of two, at least ``n_rows``.
    """
    row = tl.program_id(0)
    block = tl.program_id(1)
    padding = row == n_rows
    first = tl.load(query_start + row)
    last = tl.load(query_start + row + 1, mask=row < n_rows, other=0)
    last = tl.where(padding, n_padded, last)
    slot = tl.load(row_slot + row, mask=row < n_rows, other=0)
    q = tl.load(slot_resident + slot, mask=row < n_rows, other=-1)

    tokens = first + block * BLOCK + tl.arange(0, BLOCK)
    valid = tokens < last
    selected = tl.full((BLOCK,), 0, tl.int64)
    if q >= 0:
        position = tl.load(positions + tokens, mask=valid, other=-1)
        token = tl.load(token_ids + tokens, mask=valid, other=-1)
        selector = tl.load(request_ptr + q)
        kept = tl.load(history_row + q).to(tl.int64) if HISTORY > 0 else -1
        for s in range(selector, tl.load(request_ptr + q + 1)):
            hit = tl.full((BLOCK,), 0, tl.int32)
            for k in range(tl.load(interval_ptr + s), tl.load(interval_ptr + s + 1)):
                start = tl.load(intervals + 2 * k)
                stop = tl.load(intervals + 2 * k + 1)
                hit = hit | ((position >= start) & (position < stop)).to(tl.int32)
            counts = (position > 0) | (tl.load(with_zero + s) != 0)
            for k in range(tl.load(id_ptr + s), tl.load(id_ptr + s + 1)):
                hit = hit | (counts & (token == tl.load(ids + k))).to(tl.int32)
            if HISTORY > 0:
                for k in range(tl.load(mention_ptr + s), tl.load(mention_ptr + s + 1)):
                    begin = tl.load(mention_start + k)
                    length = tl.load(mention_start + k + 1) - begin
                    met = (valid & counts & (position + 1 >= length)).to(tl.int32)
                    for j in range(length):
                        now = valid & (tokens - j >= first)
                        here = tl.load(token_ids + tokens - j, mask=now, other=-1)
                        earlier = valid & (tokens - j < first) & (position >= j) & (position - j < HISTORY)
                        past = tl.load(history + kept * HISTORY + position - j, mask=earlier, other=-1)
                        wanted = tl.load(mention_ids + begin + length - 1 - j)
                        met = met & (tl.where(now, here, past) == wanted).to(tl.int32)
                    hit = hit | met
            selected = selected | (hit.to(tl.int64) << (s - selector).to(tl.int64))
        if HISTORY > 0:
            tl.store(
                history + kept * HISTORY + position, token, mask=valid & (position < tl.where(kept >= 0, HISTORY, 0))
            )
    tl.store(token_resident + tokens, tl.full((BLOCK,), 0, tl.int32) + q, mask=valid)
    tl.store(token_selected + tokens, selected, mask=valid)

    r = tl.arange(0, ROWS)
    before = tl.reduce(tiles_of(query_start, row_slot, slot_resident, r, r < row, TILE), 0, ADD)
    if padding & (block == 0):
        tl.store(state + ACTIVE, 1)
        tl.store(state + N_TOKENS, n_padded)
        tl.store(state + N_TILES, before)
        tl.store(state + N_ROWS, n_rows)
        tl.store(state + STEP, number)
    if (row < n_rows) & (block == 0):
        tl.store(row_first + row, first)
        tl.store(row_last + row, last)
        tl.store(row_resident + row, tl.where(first < last, q, -1))
        tl.store(row_position + row, tl.load(positions + first, mask=first < last, other=0).to(tl.int32))
    if q >= 0:
        # This block of tokens holds the tiles that begin in it: BLOCK is a multiple of TILE.
        tile = tl.arange(0, BLOCK // TILE)
        start = first + block * BLOCK + tile * TILE
        at = before + block * (BLOCK // TILE) + tile
        tl.store(tile_first + at, start, mask=start < last)
        tl.store(tile_last + at, tl.minimum(start + TILE, last), mask=start < last)
