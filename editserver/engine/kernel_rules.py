"""Rules on a CPU: one layer's stage for all ruled requests of a step, compiled with numba.

What is computed is defined by :mod:`interventions.rules.code`. Scores are float32 with every product and every sum
rounded: nothing here may be contracted or reordered, so no function has a fastmath flag (activations come from
:mod:`editserver.engine.kernel_cpu`, ready made). One file, like there: numba renews what it keeps on disk of a function when
that function's own file changes.

Tables are CSR over the resident requests, see :class:`editserver.engine.rule_table.RuleTable`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from interventions.rules.code import MemoryKind, OpCode

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

PROPOSITION, MEMORY, CONCLUSION, ENDED, NOT, AND, OR, XOR = (int(op) for op in OpCode)
PROMPT_MEMORY, CLOSED_CONCLUSION = len(OpCode), len(OpCode) + 1
"""As MEMORY and CONCLUSION, but undecided before the last prompt token."""
COUNT, WINDOW, ORDER = (int(kind) for kind in MemoryKind)
PPM = 1_000_000
YES, NO = 1, 2
"""A value has bit YES where it is true, and bit NO where it is false; neither: undecided."""

AT_PROPOSITIONS, AT_MEMORIES, AT_RULES, AT_CONCLUSIONS, AT_ACTIONS, AT_GATES = range(6)
"""Columns of ``pointers``."""
RESIDENT, TOKEN, N_TOKENS, START, BACK, ROW, BATCH_ROW = range(7)
"""Columns of ``segments``: resident index; first planned token and how many; its position; how many tokens before it are
gone through again; the first of the segment's rows, which belong to these and then to its own tokens; row of the batch."""

_jit = numba.njit(cache=True, nogil=True)


@_jit
def _bit(words: U64, number: int) -> bool:
    found: bool = (words[number >> 6] >> np.uint64(number & 63)) & np.uint64(1) != 0
    return found


@_jit
def _set(words: U64, number: int) -> None:
    words[number >> 6] |= np.uint64(1) << np.uint64(number & 63)


@_jit
def _score(
    acts: F32, sums: bool, first: int, last: int, terms: I64, weights: F32, branches: I64, branch_values: F32
) -> np.float32:
    """The weighted sum of the terms ``first … last``, or the leaf of the tree that begins at branch ``first``."""
    score: np.float32
    if not sums:
        at = first
        while branches[at, 0] >= 0:
            a, limit = acts[branches[at, 0]], branch_values[at, 0]
            taken = a > limit if branches[at, 1] else a >= limit
            at = first + (branches[at, 2] if taken else branches[at, 3])
        score = branch_values[at, 1]
        return score
    score = weights[first] * acts[terms[first]]
    for k in range(first + 1, last):
        product = weights[k] * acts[terms[k]]
        score = score + product
    return score


@_jit
def _truth(
    codes: I64, first: int, last: int, held: U64, remembered: U64, concluded: U64, ended: bool, stack: I64
) -> int:
    """The value of the postfix code ``first … last`` at one token."""
    top = -1
    for k in range(first, last):
        op, argument = codes[k, 0], codes[k, 1]
        if op == NOT:
            a = stack[top]
            stack[top] = (a & YES) << 1 | (a & NO) >> 1
            continue
        if AND <= op <= XOR:
            b = stack[top]
            top -= 1
            a = stack[top]
            if op == AND:
                stack[top] = (a & b & YES) | ((a | b) & NO)
            elif op == OR:
                stack[top] = ((a | b) & YES) | (a & b & NO)
            elif a == 0 or b == 0:
                stack[top] = 0
            else:
                stack[top] = YES if a != b else NO
            continue
        top += 1
        if op == PROPOSITION:
            holds = _bit(held, argument)
        elif op == ENDED:
            holds = ended
        elif op in (MEMORY, PROMPT_MEMORY):
            holds = _bit(remembered, argument)
        else:
            holds = _bit(concluded, argument)
        if not ended and op in (PROMPT_MEMORY, CLOSED_CONCLUSION):
            stack[top] = 0
        else:
            stack[top] = YES if holds else NO
    value: int = stack[0]
    return value


@_jit
def _remember(
    memory: I64,
    parts: I64,
    codes: I64,
    position: int,
    prompt_len: int,
    held: U64,
    remembered: U64,
    cells: I64,
    stack: I64,
) -> bool:
    """Take one token into a memory; whether what it says is so there.

    ``memory`` is (number, kind, over_prompt, least, share, window, cell, first part, last part). Cells: COUNT how many;
    WINDOW how many, then a ring of bits; ORDER how many parts were met.
    """
    kind, cell, first, last = memory[1], memory[6], memory[7], memory[8]
    counts = not memory[2] or position < prompt_len
    if kind == ORDER:
        stage = first + cells[cell]
        if counts and stage < last:
            value = _truth(codes, parts[stage], parts[stage + 1], held, remembered, remembered, False, stack)
            if value & YES:
                cells[cell] += 1
        met: bool = cells[cell] == last - first
        return met
    here = np.int64(0)
    if counts:
        value = _truth(codes, parts[first], parts[first + 1], held, remembered, remembered, False, stack)
        here = np.int64(value & YES)
    if kind == WINDOW:
        place = position % memory[5]
        ring, bit = cell + 1 + (place >> 6), np.int64(1) << np.int64(place & 63)
        if cells[ring] & bit:
            cells[cell] -= 1
            cells[ring] &= ~bit
        if here:
            cells[ring] |= bit
    cells[cell] += here
    scope = prompt_len - 1 if memory[2] else position
    enough: bool = cells[cell] >= memory[3]
    if memory[4]:
        enough = scope > 0 and cells[cell] * PPM >= memory[4] * scope
    return enough


@_jit
def _copy_cells(memories: I64, conclusions: I64, actions: I64, cells: I64, into: I64) -> None:
    """The cells of these alone: those of other layers are at another token."""
    for m in range(memories.shape[0]):
        cell = memories[m, 6]
        into[cell] = cells[cell]
        if memories[m, 1] == WINDOW:
            for k in range((memories[m, 5] + 63) // 64):
                into[cell + 1 + k] = cells[cell + 1 + k]
    for c in range(conclusions.shape[0]):
        if conclusions[c, 1] >= 0:
            into[conclusions[c, 1]] = cells[conclusions[c, 1]]
    for a in range(actions.shape[0]):
        into[actions[a, 3]] = cells[actions[a, 3]]


@_jit
def run_stage(
    segments: I64,
    pointers: I64,
    prompt_len: I64,
    acts: F32,
    propositions: I64,
    thresholds: F32,
    terms: I64,
    weights: F32,
    branches: I64,
    branch_values: F32,
    memories: I64,
    parts: I64,
    codes: I64,
    rules: I64,
    conclusions: I64,
    actions: I64,
    gates: I64,
    depth: int,
    blocks: npt.NDArray[np.int32],
    block_size: int,
    kept: U64,
    cells: I64,
    before: I64,
    held: U64,
    remembered: U64,
    concluded: U64,
    active: U64,
    scores: F32,
    opened: U64,
) -> None:
    """The stage of one layer: propositions, memories, rules, actions, gates, for every ruled request of the step.

    Args:
        segments: ``[s, 7]``, columns above.
        pointers: CSR ``[residents + 1, 6]``, columns above.
        prompt_len: ``[residents]``.
        acts: activations of the layer's features, ``[tokens, columns]``, columns counted per request.
        propositions: ``[p, 5]``: (number, strict, is a sum, first, last), of terms or branches; ``thresholds [p]``.
        terms, weights: column of ``acts`` and factor, ``[t]``.
        branches, branch_values: (column or -1, strict, then, other) counted from the root, (threshold, leaf's score).
        memories: ``[m, 9]``, as :func:`_remember` takes them; ``parts`` points into ``codes``, as do the rules.
        codes: ``[c, 2]``: (operation, argument).
        rules: ``[r, 4]``: (group, head, first, last).
        conclusions: ``[k, 2]``: (number, cell of a latch or -1).
        actions: ``[a, 4]``: (number, conclusion, tokens, cell: last position + 1 at which the conclusion held).
        gates: ``[g, 2]``: (number of the gate, action).
        depth: of the stack that the codes need.
        blocks, block_size: KV blocks by batch row; 0 where nothing is kept with the KV.
        kept: proposition bits by KV slot, ``[slots, words]``: bit i is proposition i of the layer.
        cells: state of all resident requests.
        before: output, likewise: as it is before the first of the segments' own tokens.
        held, remembered, concluded, active: bits by row ``[rows, words]``, set here as far as they are this layer's.
        scores: by planned token and proposition number.
        opened: by planned token, ORed with the gates that are open.
    """
    stack = np.empty(depth, np.int64)
    # First all, then who reads: a prefix may be computed in the very step that shares it.
    for s in range(segments.shape[0]):
        q, back, start = segments[s, RESIDENT], segments[s, BACK], segments[s, START]
        first, last = pointers[q, AT_PROPOSITIONS], pointers[q + 1, AT_PROPOSITIONS]
        if first == last:
            continue
        for i in range(segments[s, N_TOKENS]):
            token, row, position = segments[s, TOKEN] + i, segments[s, ROW] + back + i, start + i
            slot = -1
            if block_size:
                block = np.int64(blocks[segments[s, BATCH_ROW], position // block_size])
                slot = block * block_size + position % block_size
                kept[slot, :] = np.uint64(0)
            for p in range(first, last):
                score = _score(
                    acts[token],
                    propositions[p, 2] != 0,
                    propositions[p, 3],
                    propositions[p, 4],
                    terms,
                    weights,
                    branches,
                    branch_values,
                )
                scores[token, propositions[p, 0]] = score
                limit = thresholds[p]
                holds = score > limit if propositions[p, 1] else score >= limit
                if holds and position > 0:
                    _set(held[row], propositions[p, 0])
                    if slot >= 0:
                        _set(kept[slot], p - first)
    for s in range(segments.shape[0]):
        q, back, start = segments[s, RESIDENT], segments[s, BACK], segments[s, START]
        first, last = pointers[q, AT_PROPOSITIONS], pointers[q + 1, AT_PROPOSITIONS]
        if back and first < last:
            for i in range(back):
                position = start - back + i
                block = np.int64(blocks[segments[s, BATCH_ROW], position // block_size])
                slot = block * block_size + position % block_size
                for p in range(first, last):
                    if _bit(kept[slot], p - first):
                        _set(held[segments[s, ROW] + i], propositions[p, 0])
        for i in range(back + segments[s, N_TOKENS]):
            position, row = start - back + i, segments[s, ROW] + i
            if i == back:
                _copy_cells(
                    memories[pointers[q, AT_MEMORIES] : pointers[q + 1, AT_MEMORIES]],
                    conclusions[pointers[q, AT_CONCLUSIONS] : pointers[q + 1, AT_CONCLUSIONS]],
                    actions[pointers[q, AT_ACTIONS] : pointers[q + 1, AT_ACTIONS]],
                    cells,
                    before,
                )
            if position == 0:
                continue
            ended = position >= prompt_len[q] - 1
            here, past, known = held[row], remembered[row], concluded[row]
            for m in range(pointers[q, AT_MEMORIES], pointers[q + 1, AT_MEMORIES]):
                if _remember(memories[m], parts, codes, position, prompt_len[q], here, past, cells, stack):
                    _set(past, memories[m, 0])
            for c in range(pointers[q, AT_CONCLUSIONS], pointers[q + 1, AT_CONCLUSIONS]):
                if conclusions[c, 1] >= 0 and cells[conclusions[c, 1]]:
                    _set(known, conclusions[c, 0])
            begin = pointers[q, AT_RULES]
            while begin < pointers[q + 1, AT_RULES]:
                end, grown = begin, True
                while grown:
                    grown = False
                    end = begin
                    while end < pointers[q + 1, AT_RULES] and rules[end, 0] == rules[begin, 0]:
                        head = rules[end, 1]
                        if not _bit(known, head) and (
                            _truth(codes, rules[end, 2], rules[end, 3], here, past, known, ended, stack) & YES
                        ):
                            _set(known, head)
                            grown = True
                        end += 1
                begin = end
            for c in range(pointers[q, AT_CONCLUSIONS], pointers[q + 1, AT_CONCLUSIONS]):
                if conclusions[c, 1] >= 0 and _bit(known, conclusions[c, 0]):
                    cells[conclusions[c, 1]] = 1
            for a in range(pointers[q, AT_ACTIONS], pointers[q + 1, AT_ACTIONS]):
                cell = actions[a, 3]
                if _bit(known, actions[a, 1]):
                    cells[cell] = position + 1
                if cells[cell] and (actions[a, 2] == 0 or position + 1 - cells[cell] < actions[a, 2]):
                    _set(active[row], actions[a, 0])
        for i in range(segments[s, N_TOKENS]):
            token, row = segments[s, TOKEN] + i, segments[s, ROW] + back + i
            for g in range(pointers[q, AT_GATES], pointers[q + 1, AT_GATES]):
                if _bit(active[row], gates[g, 1]):
                    opened[token] |= np.uint64(1) << np.uint64(gates[g, 0])


@_jit
def pack_scores(segments: I64, n_propositions: I64, held: U64, scores: F32, packed: F32, ends: I64) -> None:
    """The scores of what holds, segment after segment, position after position, by number of the proposition.

    Args:
        n_propositions: of each resident request.
        packed: output, as many as there are set bits in the rows of the segments' own tokens.
        ends: output ``[s]``, where each segment's scores end.
    """
    n = 0
    for s in range(segments.shape[0]):
        row = segments[s, ROW] + segments[s, BACK]
        for i in range(segments[s, N_TOKENS]):
            words = held[row + i]
            for number in range(n_propositions[segments[s, RESIDENT]]):
                if _bit(words, number):
                    packed[n] = scores[segments[s, TOKEN] + i, number]
                    n += 1
        ends[s] = n
