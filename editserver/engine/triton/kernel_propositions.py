"""Where the propositions of one layer's rules hold: scores in fp32, and bits that are kept with the KV
(:mod:`editserver.engine.triton.kernel_rules`)."""

from __future__ import annotations

import triton
import triton.language as tl

from editserver.engine.triton.codes import BRANCH_COLUMNS, POINTER_COLUMNS, PROPOSITION_COLUMNS
from editserver.engine.triton.kernel_common import all_bits, largest, tile_of


@triton.jit
def propositions_kernel(
    state,
    tile_first,
    tile_last,
    token_resident,
    token_slot,
    pointers,
    acts,
    acts_width,
    propositions,
    thresholds,
    terms,
    weights,
    branches,
    branch_values,
    own,
    kept,
    scores,
    scores_width,
    T: tl.constexpr,
    LOG: tl.constexpr,
    WP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Scores of a layer's propositions at the tokens of one tile, and where they hold. As a plain loop::

        for token t of a request q with rules, proposition p of q at this layer:
            scores[t, number(p)] = ((w_0·a_0) + w_1·a_1) + …, or the leaf that the tree comes to
            bit number(p) of kept[slot(t)] = scores >= threshold (or >)

    Args:
        pointers: CSR ``[residents + 1, POINTER_COLUMNS]``, the first column into ``propositions``.
        acts: fp32 ``[tokens, acts_width]``, the activations that q's propositions look at.
        propositions: (number, strict, is a sum, first, last): of ``terms`` and ``weights``, or of ``branches``.
        branches, branch_values: (column or -1, strict, then, other) counted from the root, (threshold, leaf's score).
        own: int64 ``[residents, WORDS]``, the bits of this layer.
        token_slot: int64, KV slot of each token, negative for none.
        LOG: log₂ of the propositions that are looked at together.
    """
    q, begin, end = tile_of(state, tile_first, tile_last, token_resident, T)
    if q < 0:
        return
    first = tl.load(pointers + q * POINTER_COLUMNS)
    last = tl.load(pointers + (q + 1) * POINTER_COLUMNS)
    if first == last:
        return
    tokens = begin + tl.arange(0, T)
    valid = tokens < end
    mine = acts + tokens[:, None].to(tl.int64) * acts_width
    words = tl.arange(0, WP)
    held = tl.full((T, WP), 0, tl.int64)
    for start in range(first, last, 1 << LOG):
        p = start + tl.arange(0, 1 << LOG)
        live = p < last
        asked = valid[:, None] & live[None, :]
        number = tl.load(propositions + p * PROPOSITION_COLUMNS, mask=live, other=0)
        strict = tl.load(propositions + p * PROPOSITION_COLUMNS + 1, mask=live, other=0)
        sums = tl.load(propositions + p * PROPOSITION_COLUMNS + 2, mask=live, other=1) != 0
        at = tl.load(propositions + p * PROPOSITION_COLUMNS + 3, mask=live, other=0)
        count = tl.load(propositions + p * PROPOSITION_COLUMNS + 4, mask=live, other=0) - at
        count = tl.where(sums, count, 0)
        total = tl.full((T, 1 << LOG), 0.0, tl.float32)
        for k in range(largest(count)):
            here = live & (k < count)
            column = tl.load(terms + at + k, mask=here, other=0)
            weight = tl.load(weights + at + k, mask=here, other=0.0)
            a = tl.load(mine + column[None, :], mask=valid[:, None] & here[None, :], other=0.0)
            product = weight[None, :] * a
            total = tl.where(here[None, :], tl.where(k == 0, product, total + product), total)
        # Trees: every (token, proposition) walks down its own until all are at a leaf.
        grows = asked & (sums == 0)[None, :]
        node = tl.broadcast_to(at[None, :], (T, 1 << LOG))
        column = tl.load(branches + node * BRANCH_COLUMNS, mask=grows, other=-1)
        walking = largest(tl.reshape((column >= 0).to(tl.int32), (T * (1 << LOG),)))
        while walking > 0:
            splits = column >= 0
            a = tl.load(mine + column, mask=splits, other=0.0)
            limit = tl.load(branch_values + node * 2, mask=splits, other=0.0)
            above = tl.load(branches + node * BRANCH_COLUMNS + 1, mask=splits, other=0) != 0
            taken = (a > limit) | ((a == limit) & (above == 0))
            then = tl.load(branches + node * BRANCH_COLUMNS + 2, mask=splits, other=0)
            other = tl.load(branches + node * BRANCH_COLUMNS + 3, mask=splits, other=0)
            node = tl.where(splits, at[None, :] + tl.where(taken, then, other), node)
            column = tl.load(branches + node * BRANCH_COLUMNS, mask=splits, other=-1)
            walking = largest(tl.reshape((column >= 0).to(tl.int32), (T * (1 << LOG),)))
        leaf = tl.load(branch_values + node * 2 + 1, mask=grows, other=0.0)
        score = tl.where(sums[None, :], total, leaf)
        tl.store(scores + tokens[:, None].to(tl.int64) * scores_width + number[None, :], score, mask=asked)
        limit = tl.load(thresholds + p, mask=live, other=0.0)[None, :]
        holds = asked & ((score > limit) | ((score == limit) & (strict == 0)[None, :]))
        bit = (tl.full((1 << LOG,), 1, tl.int64) << (number & 63).to(tl.int64))[None, :]
        for w in tl.static_range(WP):
            found = all_bits(tl.where(holds & ((number >> 6) == w)[None, :], bit, 0), T, LOG)
            held = tl.where(words[None, :] == w, held | found[:, None], held)
    slot = tl.load(token_slot + tokens, mask=valid, other=-1)
    there = tl.broadcast_to((valid & (slot >= 0))[:, None], (T, WP))
    place = kept + slot[:, None] * WORDS + words[None, :]
    changes = tl.load(own + q * WORDS + words)[None, :]
    before = tl.load(place, mask=there, other=0)
    tl.store(place, (before & ~changes) | held, mask=there)
