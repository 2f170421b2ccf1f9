"""Gates over sequences: what they conclude at each token from the hit bits of all tokens up to it."""

from __future__ import annotations

import triton
import triton.language as tl

from editserver.engine.triton.codes import (
    CUSUM,
    GATE_COLUMNS,
    LATCHES,
    SHARE_PROMPT,
    SHARE_SEEN,
    WINDOW,
    WITH_BOS,
)
from editserver.engine.triton.kernel_common import ADD, LARGER, SMALLER, larger, row_of, slots_of, smaller

STEPS = tl.constexpr(1 << 20)
"""Of a CUSUM to one hit."""


@triton.jit
def hits_at(memory, blocks, positions, inside, bit, BLOCK_SIZE: tl.constexpr):
    """int64 0 or 1: the bit that is kept with the KV of each of a request's ``positions``."""
    bits = tl.load(memory + slots_of(blocks, positions, inside, BLOCK_SIZE), mask=inside, other=0)
    return ((bits & bit) != 0).to(tl.int64)


@triton.jit
def gates_kernel(
    state,
    row_first,
    row_last,
    row_resident,
    row_position,
    block_table,
    blocks_of_a_row,
    memory,
    gate_ptr,
    gate_ints,
    gate_limits,
    prompt_lengths,
    opened,
    open_from,
    largest,
    widest,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    FACTS: tl.constexpr,
):
    """One row of the batch per program. As a plain loop (:mod:`interventions.maps.gates` has the statistics)::

        for gate g of the row's request, for position p = 0 … last of this step:
            s_p = the gate's statistic of the hit bits at the KV slots of 0 … p
            open = s_p > threshold, with a latch ever after
            bit g of opened[token at p] = open, for the tokens of this step

    Nothing is carried from step to step but the bits that lie with the KV: a rejected draft token, a cached prefix or a request
    that is computed again leaves nothing behind that could be wrong. The price is one bit word read per position and step.

    Args:
        row_first, row_last, row_resident, row_position: the plan's rows: tokens, request (-1: none), position of the first.
        block_table: int32 ``[rows, blocks]``, rows ``blocks_of_a_row`` apart; position p lies in
            ``block_table[row, p // BLOCK_SIZE]``.
        memory: int64 ``[slots]``, the layer's hit bits, those of this step's tokens stored already.
        gate_ptr, gate_ints, gate_limits: CSR by resident; columns in ``codes``; float64, what the statistic must exceed
            (CUSUM: in steps).
        prompt_lengths: by resident.
        opened: int64 ``[tokens]``; the sequence gates' bits are set or cleared in it, the others are left.
        open_from, largest: outputs ``[rows, widest, FACTS]``, int32 and float64, for the last FACTS tokens of the row, the
            last one last: the first position at which the gate was open so far (-1: none), and the largest statistic so far.
    """
    q, first, start, stop = row_of(state, row_first, row_last, row_resident, row_position)
    if q < 0:
        return
    row = tl.program_id(0)
    prompt_length = tl.load(prompt_lengths + q)
    blocks = block_table + row.to(tl.int64) * blocks_of_a_row
    first_gate = tl.load(gate_ptr + q)
    for g in range(first_gate, tl.load(gate_ptr + q + 1)):
        kind = tl.load(gate_ints + g * GATE_COLUMNS)
        bit = tl.load(gate_ints + g * GATE_COLUMNS + 1)
        window = tl.load(gate_ints + g * GATE_COLUMNS + 2)
        least = tl.load(gate_ints + g * GATE_COLUMNS + 3)
        drift = tl.load(gate_ints + g * GATE_COLUMNS + 4)
        flags = tl.load(gate_ints + g * GATE_COLUMNS + 5)
        limit = tl.load(gate_limits + g)
        # Which positions are evidence, which fall out of a window, and from where on the statistic says something.
        skipped = tl.where((flags & WITH_BOS) != 0, 0, 1)
        counts_to = tl.where(kind == SHARE_PROMPT, tl.minimum(stop, prompt_length), stop)
        falls_from = tl.where(kind == WINDOW, skipped, 1 << 30)
        speaks_from = tl.where(kind == SHARE_PROMPT, prompt_length - 1, 0)
        needs = tl.where((kind == SHARE_SEEN) | (kind == WINDOW), least, -1)
        counted = tl.full((BLOCK,), 0, tl.int64)
        level = tl.full((BLOCK,), 0, tl.int64)
        latched = tl.full((BLOCK,), 0, tl.int32)
        most = tl.full((BLOCK,), 0.0, tl.float64)
        earliest = tl.full((BLOCK,), 2147483647, tl.int32)
        for begin in range(0, stop, BLOCK):
            p = begin + tl.arange(0, BLOCK)
            evidence = (p >= skipped) & (p < counts_to)
            hit = hits_at(memory, blocks, p, evidence, bit, BLOCK_SIZE)
            old = p - window
            falls = (old >= falls_from) & (p < stop)
            change = hit - hits_at(memory, blocks, tl.where(falls, old, 0), falls, bit, BLOCK_SIZE)
            counts = counted + tl.associative_scan(change, 0, ADD)
            steps = tl.where(evidence, hit * STEPS - drift, 0)
            walk = tl.associative_scan(steps, 0, ADD)
            levels = walk - tl.minimum(tl.associative_scan(walk, 0, smaller), -level)
            seen = tl.where(kind == SHARE_PROMPT, tl.minimum(p + 1, prompt_length), p + 1).to(tl.int64) - skipped
            share = tl.where(kind == WINDOW, tl.minimum(seen, window), seen)
            share = counts.to(tl.float64) / tl.where(share > 0, share, 1).to(tl.float64)
            speaks = (p >= speaks_from) & (seen >= needs) & (p < stop)
            statistic = tl.where(speaks, tl.where(kind == CUSUM, levels.to(tl.float64), share), 0.0)
            is_open = ((statistic > limit) & (p < stop)).to(tl.int32)
            ever = latched + tl.associative_scan(is_open, 0, ADD)
            is_open = tl.where((flags & LATCHES) != 0, (ever > 0).to(tl.int32), is_open)
            mine = (p >= start) & (p < stop)
            at = opened + first + tl.where(mine, p - start, 0)
            before = tl.load(at, mask=mine, other=0)
            tl.store(at, tl.where(is_open != 0, before | bit, before & ~bit), mask=mine)
            most = tl.maximum(tl.associative_scan(statistic, 0, larger), most)
            opening = tl.where((is_open != 0) & (p < stop), p, 2147483647)
            earliest = tl.minimum(tl.associative_scan(opening, 0, smaller), earliest)
            told = mine & (p >= stop - FACTS)
            place = (row * widest + g - first_gate) * FACTS + tl.where(told, p - (stop - FACTS), 0)
            tl.store(open_from + place, tl.where(earliest == 2147483647, -1, earliest), mask=told)
            tl.store(largest + place, most, mask=told)
            ends = tl.arange(0, BLOCK) == BLOCK - 1
            counted = tl.full((BLOCK,), 0, tl.int64) + tl.reduce(tl.where(ends, counts, 0), 0, ADD)
            level = tl.full((BLOCK,), 0, tl.int64) + tl.reduce(tl.where(ends, levels, 0), 0, ADD)
            latched = tl.full((BLOCK,), 0, tl.int32) + tl.reduce(tl.where(ends, ever, 0), 0, ADD)
            most = tl.full((BLOCK,), 0.0, tl.float64) + tl.reduce(most, 0, LARGER)
            earliest = tl.full((BLOCK,), 0, tl.int32) + tl.reduce(earliest, 0, SMALLER)
