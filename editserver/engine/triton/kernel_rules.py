"""Rules at one layer: what follows at each token from the propositions that hold, with state that stays on the device.

What is computed is defined by :mod:`interventions.rules.code`. Bits of propositions, conclusions, actions and memories are kept
by KV slot in 64-bit words, numbered by the request's program over all layers::

    kept[slot] = [held × WP | concluded × WC | active × WA | remembered × WM]

Every layer replaces the bits of its own numbers and reads those of earlier layers. What else a request's tokens leave behind
(counts, parts met, latches, when actions were last due) lies in its seat, in integers: as it is after the latest step, and as
it was before it. Everything here is integers, or fp32 with every product and every sum rounded, so the size of a block and
the chunks of a prompt change no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from editserver.engine.triton.codes import (
    AND,
    CLOSED_CONCLUSION,
    ENDED,
    MEMORY,
    MEMORY_COLUMNS,
    NOT,
    OR,
    ORDER,
    POINTER_COLUMNS,
    PPM,
    PROMPT_MEMORY,
    PROPOSITION,
    RULE_COLUMNS,
    RULE_WINDOW,
    XOR,
)
from editserver.engine.triton.kernel_common import ADD, LARGER, SMALLER, larger, largest, row_of, slots_of

NEVER = tl.constexpr(2147483647)


@triton.jit
def bit_of(words, number, W: tl.constexpr):
    """Bit ``number`` of each row of ``words [B, W]``: int64 0 or 1, ``[B]``."""
    mine = tl.arange(0, W)[None, :] == number >> 6
    word = tl.reduce(tl.where(mine, words, 0), 1, ADD)
    return (word >> (number & 63).to(tl.int64)) & 1


@triton.jit
def with_bit(words, number, value, W: tl.constexpr):
    """``words [B, W]``, bit ``number`` of each row being set where ``value [B]`` (int64, 0 or 1) says so."""
    mine = tl.arange(0, W)[None, :] == number >> 6
    return tl.where(mine, words | (value << (number & 63).to(tl.int64))[:, None], words)


@triton.jit
def truth(
    codes, first, last, held, past, known, ended, B: tl.constexpr, WP: tl.constexpr, WM: tl.constexpr, WC: tl.constexpr
):
    """Whether the postfix code ``first … last`` is true at each of a block's tokens: int64 0 or 1, ``[B]``.

    A value is two bits (true, false), undecided where neither is set; each token has two stacks of them in two integers.

    Args:
        held, past, known: bits of propositions, memories, conclusions, int64 ``[B, W…]``.
        ended: int64 ``[B]``, whether the token is the last one of the prompt, or behind it.
    """
    yes = tl.full((B,), 0, tl.int64)
    no = tl.full((B,), 0, tl.int64)
    for k in range(first, last):
        op = tl.load(codes + 2 * k)
        number = tl.load(codes + 2 * k + 1)
        if op == NOT:
            turned = yes & 1
            yes = (yes & -2) | (no & 1)
            no = (no & -2) | turned
        else:
            if (op == AND) | (op == OR) | (op == XOR):
                y = yes & 1
                n = no & 1
                yes = yes >> 1
                no = no >> 1
                left_y = yes & 1
                left_n = no & 1
                is_so = tl.where(op == AND, left_y & y, left_y | y)
                is_not = tl.where(op == AND, left_n | n, left_n & n)
                is_so = tl.where(op == XOR, (left_y & n) | (left_n & y), is_so)
                is_not = tl.where(op == XOR, (left_y & y) | (left_n & n), is_not)
                yes = (yes & -2) | is_so
                no = (no & -2) | is_not
            else:
                is_so = ended
                if op == PROPOSITION:
                    is_so = bit_of(held, number, WP)
                elif (op == MEMORY) | (op == PROMPT_MEMORY):
                    is_so = bit_of(past, number, WM)
                elif op != ENDED:
                    is_so = bit_of(known, number, WC)
                waits = (op == PROMPT_MEMORY) | (op == CLOSED_CONCLUSION)
                decided = tl.where(waits, ended, 1)
                yes = (yes << 1) | (is_so & decided)
                no = (no << 1) | ((1 - is_so) & decided)
    return yes & 1


@triton.jit
def words_at(kept, slots, inside, offset, WORDS: tl.constexpr, W: tl.constexpr):
    """``W`` of the words that are kept at ``slots [B]``, from number ``offset`` on: int64 ``[B, W]``."""
    at = kept + slots[:, None] * WORDS + offset + tl.arange(0, W)[None, :]
    return tl.load(at, mask=tl.broadcast_to(inside[:, None], (slots.shape[0], W)), other=0)


@triton.jit
def remember(
    memory, parts, codes, kept, blocks, p, inside, ended, prompt_length, held, past, known, cells, BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr, B: tl.constexpr, WP: tl.constexpr, WM: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """Take a block's tokens into one memory: what it says at each of them, int64 0 or 1 ``[B]``. Its cell is brought up to date.

    ``memory`` points to (number, kind, over_prompt, least, share, window, cell, first part, last part). Cells: COUNT and WINDOW
    how many, ORDER how many parts were met.
    """
    kind = tl.load(memory + 1)
    over_prompt = tl.load(memory + 2)
    least = tl.load(memory + 3)
    share = tl.load(memory + 4)
    window = tl.load(memory + 5)
    cell = cells + tl.load(memory + 6)
    first = tl.load(memory + 7)
    last = tl.load(memory + 8)
    before = tl.load(cell)
    counts_to = tl.where(over_prompt != 0, prompt_length, NEVER)
    counts = inside & (p < counts_to)
    said = tl.full((B,), 0, tl.int64)
    after = before
    if kind == ORDER:
        count = tl.full((B,), 0, tl.int64) + before
        since = -1
        met = before.to(tl.int32)
        more = (met < last - first).to(tl.int32)
        while more > 0:
            stage = parts + first + met
            holds = truth(codes, tl.load(stage), tl.load(stage + 1), held, past, known, ended, B, WP, WM, WC)
            found = tl.reduce(tl.where((holds != 0) & counts & (p > since), p, NEVER), 0, SMALLER)
            step = (found != NEVER).to(tl.int32)
            count += ((p >= found) & inside).to(tl.int64)
            met += step
            since = found
            more = step & (met < last - first).to(tl.int32)
        said = (count == (last - first)).to(tl.int64)
        after = met.to(tl.int64)
    else:
        begin = tl.load(parts + first)
        end = tl.load(parts + first + 1)
        change = tl.where(counts, truth(codes, begin, end, held, past, known, ended, B, WP, WM, WC), 0)
        if kind == RULE_WINDOW:
            old = p - window
            falls = inside & (old > 0) & (old < counts_to)
            slots = slots_of(blocks, tl.where(falls, old, 0), falls, BLOCK_SIZE)
            earlier = words_at(kept, slots, falls, 0, WORDS, WP)
            gone = truth(codes, begin, end, earlier, past, known, ended, B, WP, WM, WC)
            change -= tl.where(falls, gone, 0)
        count = before + tl.associative_scan(change, 0, ADD)
        scope = tl.where(over_prompt != 0, prompt_length - 1, p).to(tl.int64)
        shared = (scope > 0) & (count * PPM >= share * scope)
        said = tl.where(share != 0, shared, count >= least).to(tl.int64)
        after = before + tl.reduce(change, 0, ADD)
    tl.debug_barrier()
    tl.store(cell, after)
    return tl.where(inside, said, 0)


@triton.jit
def conclude(
    group_first, group_last, groups, rules, codes, held, past, known, ended, inside,
    B: tl.constexpr, WP: tl.constexpr, WM: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """``known [B, WC]`` after the rules of a layer, group after group, each until nothing more is concluded at any token.

    A token at which a whole round concludes nothing stays as it is in every further one.
    """
    for g in range(group_first, group_last):
        begin = tl.load(groups + 3 * g)
        end = tl.load(groups + 3 * g + 1)
        again = tl.load(groups + 3 * g + 2)
        grown = 1
        while grown > 0:
            grown = 0
            for r in range(begin, end):
                head = tl.load(rules + r * RULE_COLUMNS)
                first = tl.load(rules + r * RULE_COLUMNS + 1)
                last = tl.load(rules + r * RULE_COLUMNS + 2)
                is_so = truth(codes, first, last, held, past, known, ended, B, WP, WM, WC)
                is_so = tl.where(inside & (bit_of(known, head, WC) == 0), is_so, 0)
                known = with_bit(known, head, is_so, WC)
                grown = grown | largest(is_so.to(tl.int32))
            grown = grown & again
    return known


@triton.jit
def block_of_tokens(
    q, begin, stop, start, token, blocks, pointers, memories, parts, codes, group_ptr, groups, rules, conclusions, actions, gates,
    own, kept, cells, prompt_length, opened, BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr, B: tl.constexpr, WP: tl.constexpr,
    WC: tl.constexpr, WA: tl.constexpr, WM: tl.constexpr,
):  # fmt: skip
    """The positions ``begin … begin + B − 1``, as far as they are before ``stop``; ``token`` is that of position ``start``.

    Positions before ``start`` are gone through again: they open nothing.
    """
    p = begin + tl.arange(0, B)
    there = p < stop
    inside = there & (p > 0)  # position 0 is evidence of nothing
    slots = slots_of(blocks, p, there, BLOCK_SIZE)
    at = pointers + q * POINTER_COLUMNS
    ended = (p >= prompt_length - 1).to(tl.int64)
    mine = own + q * WORDS
    held = words_at(kept, slots, inside, 0, WORDS, WP)
    known = words_at(kept, slots, inside, WP, WORDS, WC) & ~tl.load(mine + WP + tl.arange(0, WC))[None, :]
    active = words_at(kept, slots, inside, WP + WC, WORDS, WA) & ~tl.load(mine + WP + WC + tl.arange(0, WA))[None, :]
    past = words_at(kept, slots, inside, WP + WC + WA, WORDS, WM)
    past = past & ~tl.load(mine + WP + WC + WA + tl.arange(0, WM))[None, :]

    for m in range(tl.load(at + 1), tl.load(at + POINTER_COLUMNS + 1)):
        said = remember(
            memories + m * MEMORY_COLUMNS, parts, codes, kept, blocks, p, inside, ended, prompt_length, held, past, known, cells,
            BLOCK_SIZE, WORDS, B, WP, WM, WC,
        )  # fmt: skip
        past = with_bit(past, tl.load(memories + m * MEMORY_COLUMNS), said, WM)

    # A latch that shuts at a token of this block holds at the later ones, where rules may look at it: again until nothing new
    # shuts. Each round is right up to one more of them.
    first = tl.load(at + 2)
    last = tl.load(at + POINTER_COLUMNS + 2)
    latched = tl.full((B, WC), 0, tl.int64)
    for c in range(first, last):
        cell = tl.load(conclusions + 2 * c + 1)
        carried = tl.load(cells + cell, mask=cell >= 0, other=0)
        shut = tl.where(inside & (carried != 0), 1, 0).to(tl.int64)
        latched = with_bit(latched, tl.load(conclusions + 2 * c), shut, WC)
    before = known
    again = 1
    while again > 0:
        known = conclude(
            tl.load(group_ptr + q), tl.load(group_ptr + q + 1), groups, rules, codes, held, past, before | latched, ended,
            inside, B, WP, WM, WC,
        )  # fmt: skip
        wanted = tl.full((B, WC), 0, tl.int64)
        for c in range(first, last):
            number = tl.load(conclusions + 2 * c)
            cell = tl.load(conclusions + 2 * c + 1)
            if cell >= 0:
                carried = tl.load(cells + cell)
                since = tl.reduce(tl.where(inside & (bit_of(known, number, WC) != 0), p, NEVER), 0, SMALLER)
                shut = tl.where(inside & ((carried != 0) | (p > since)), 1, 0).to(tl.int64)
                wanted = with_bit(wanted, number, shut, WC)
        again = largest(tl.reshape((wanted != latched).to(tl.int32), (B * WC,)))
        latched = wanted
    tl.debug_barrier()
    for c in range(first, last):
        cell = tl.load(conclusions + 2 * c + 1)
        shut = tl.reduce(tl.where(inside, bit_of(known, tl.load(conclusions + 2 * c), WC), 0), 0, LARGER)
        tl.store(cells + cell, shut, mask=(cell >= 0) & (shut != 0))

    for a in range(tl.load(at + 3), tl.load(at + POINTER_COLUMNS + 3)):
        lasts = tl.load(actions + 4 * a + 2)
        cell = cells + tl.load(actions + 4 * a + 3)
        carried = tl.load(cell)
        due = tl.where(inside & (bit_of(known, tl.load(actions + 4 * a + 1), WC) != 0), p + 1, 0).to(tl.int64)
        latest = tl.maximum(tl.associative_scan(due, 0, larger), carried)
        goes_on = (lasts == 0) | (p + 1 - latest < lasts)
        active = with_bit(
            active, tl.load(actions + 4 * a), tl.where(inside & (latest > 0) & goes_on, 1, 0).to(tl.int64), WA
        )
        tl.debug_barrier()
        tl.store(cell, tl.maximum(tl.reduce(due, 0, LARGER), carried))

    opens = tl.full((B,), 0, tl.int64)
    for g in range(tl.load(at + 4), tl.load(at + POINTER_COLUMNS + 4)):
        one = bit_of(active, tl.load(gates + 2 * g + 1), WA)
        opens = opens | (one << tl.load(gates + 2 * g).to(tl.int64))
    mine_now = inside & (p >= start)
    gate = opened + token + tl.where(mine_now, p - start, 0)
    tl.store(gate, tl.load(gate, mask=mine_now, other=0) | opens, mask=mine_now)

    row = kept + slots[:, None] * WORDS
    tl.store(row + WP + tl.arange(0, WC)[None, :], known, mask=tl.broadcast_to(there[:, None], (B, WC)))
    tl.store(row + WP + WC + tl.arange(0, WA)[None, :], active, mask=tl.broadcast_to(there[:, None], (B, WA)))
    tl.store(row + WP + WC + WA + tl.arange(0, WM)[None, :], past, mask=tl.broadcast_to(there[:, None], (B, WM)))
    nowhere = tl.broadcast_to((there & (p == 0))[:, None], (B, WP))
    tl.store(row + tl.arange(0, WP)[None, :], tl.full((B, WP), 0, tl.int64), mask=nowhere)


@triton.jit
def copy_cells(rows, column, width: tl.constexpr, first, last, source, target, zero, MANY: tl.constexpr):
    """``target[cell] = source[cell]`` (or 0) for the cells that ``column`` of the rows ``first … last`` names, -1 for none."""
    for start in range(first, last, MANY):
        i = start + tl.arange(0, MANY)
        cell = tl.load(rows + i * width + column, mask=i < last, other=-1)
        value = tl.load(source + cell, mask=cell >= 0, other=0) * (1 - zero)
        tl.store(target + cell, value, mask=cell >= 0)


@triton.jit
def copy_state(q, pointers, memories, conclusions, actions, source, target, zero, MANY: tl.constexpr):
    """The cells of this layer alone: those of other layers are at another token."""
    at = pointers + q * POINTER_COLUMNS
    after = at + POINTER_COLUMNS
    copy_cells(memories, 6, MEMORY_COLUMNS, tl.load(at + 1), tl.load(after + 1), source, target, zero, MANY)
    copy_cells(conclusions, 1, 2, tl.load(at + 2), tl.load(after + 2), source, target, zero, MANY)
    copy_cells(actions, 3, 4, tl.load(at + 3), tl.load(after + 3), source, target, zero, MANY)


@triton.jit
def stage_kernel(
    state,
    row_first,
    row_last,
    row_resident,
    row_position,
    block_table,
    blocks_of_a_row,
    prompt_lengths,
    seats,
    marks,
    cells,
    before,
    cells_width,
    pointers,
    memories,
    parts,
    codes,
    group_ptr,
    groups,
    rules,
    conclusions,
    actions,
    gates,
    own,
    kept,
    opened,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    B: tl.constexpr,
    WP: tl.constexpr,
    WC: tl.constexpr,
    WA: tl.constexpr,
    WM: tl.constexpr,
):
    """One request per program: memories, rules, actions and gates of one layer, at all its tokens of the step, in order.

    Where these do not continue what its seat has seen (rejected drafts, a cached prefix, recomputation after a preemption), the
    positions in between are gone through again, over the bits that lie with their KV.

    Args:
        seats: seat by resident, -1 for none; ``marks`` ``[seats, 2]``: which position continues ``cells`` (-1: none), and which
            ``before``.
        cells, before: int64 ``[seats, cells_width]``.
        pointers: CSR ``[residents + 1, POINTER_COLUMNS]``: propositions, memories, conclusions, actions, gates.
        memories, parts, codes, conclusions, actions: as :mod:`editserver.engine.kernel_rules` has them, cells counted from the
            seat's first.
        group_ptr, groups, rules: CSR by resident; (first rule, last, whether its rules look at its own heads); (head, first
            and last code).
        gates: (bit, action).
        own: int64 ``[residents, WORDS]``, the bits of this layer.
        opened: int64 ``[tokens]``, ORed with the gates that are open.
    """
    q, token, start, stop = row_of(state, row_first, row_last, row_resident, row_position)
    if q < 0:
        return
    seat = tl.load(seats + q).to(tl.int64)
    if seat < 0:
        return
    column = tl.arange(0, 8)
    inside = column < POINTER_COLUMNS
    here = tl.load(pointers + q * POINTER_COLUMNS + column, mask=inside, other=0)
    if largest(tl.load(pointers + (q + 1) * POINTER_COLUMNS + column, mask=inside, other=0) - here) == 0:
        return
    blocks = block_table + tl.program_id(0).to(tl.int64) * blocks_of_a_row
    prompt_length = tl.load(prompt_lengths + q)
    my_cells = cells + seat * cells_width
    my_before = before + seat * cells_width
    follows = tl.load(marks + 2 * seat)
    known_from = tl.load(marks + 2 * seat + 1)
    begin = start
    if (follows != start) | (start == 0):
        nothing = ((follows < 0) | (known_from > start)).to(tl.int32)
        begin = tl.where(nothing != 0, 0, known_from)
        copy_state(q, pointers, memories, conclusions, actions, my_before, my_cells, nothing, 32)
        tl.debug_barrier()
    for at in range(begin, start, B):
        block_of_tokens(
            q, at, start, start, token, blocks, pointers, memories, parts, codes, group_ptr, groups, rules, conclusions, actions,
            gates, own, kept, my_cells, prompt_length, opened, BLOCK_SIZE, WORDS, B, WP, WC, WA, WM,
        )  # fmt: skip
        tl.debug_barrier()
    copy_state(q, pointers, memories, conclusions, actions, my_cells, my_before, 0, 32)
    tl.debug_barrier()
    # Written twice: one loop over both does not fit into registers.
    for at in range(start, stop, B):
        block_of_tokens(
            q, at, stop, start, token, blocks, pointers, memories, parts, codes, group_ptr, groups, rules, conclusions, actions,
            gates, own, kept, my_cells, prompt_length, opened, BLOCK_SIZE, WORDS, B, WP, WC, WA, WM,
        )  # fmt: skip
        tl.debug_barrier()
    tl.store(marks + 2 * seat, stop)
    tl.store(marks + 2 * seat + 1, start)
