"""The edit of one layer: read, map, write, for every token that runs a program, in one launch.

Semantics (:mod:`interventions.program` has the definitions), as a plain loop over the tiles of the plan::

    for token t of the tile, with q its request and bits its selectors:
        value_r = read_r(h[t])                        for the rows that q's channels and remaps look at
        for channel c of q at this layer:
            x = a = value[read(c)]  (0 where it reads nothing)
            for op in ops(c), in order: if acts(op, t): x = op(x)
            coefficient_c = scale_c(t)·(x − a)
        delta = Σ_c coefficient_c·write_c             channels in order
        residual'[t] = dtype(h[t] + delta), hidden'[t] = 0     only where ‖delta‖ > 0; the dose clamps or is reported

A token's bits depend on its own h and its own program only: neighbours, tiles and slots of the bank change nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from editserver.engine.triton.codes import (
    ABSOLUTE,
    ACTIVE,
    AFFINE,
    CHANNEL_COLUMNS,
    CLAMPED,
    GAIN,
    LATENT,
    N_TOKENS,
    NORM,
    OP_COLUMNS,
    OP_MASKS,
    OP_VALUES,
    OVER,
    POSTERIORS,
    PREACT_MEAN,
    RANGE,
    REMAP,
    RESIDUAL_NORM,
    STEP,
)
from editserver.engine.triton.kernel_common import (
    all_bits,
    halves,
    largest,
    read_tile,
    rounded,
    squares_onto,
    statistics,
    stream,
    tile_of,
    way_back,
)

UNROLLED = tl.constexpr(8)
"""Rows that are on their way from memory at the same time while a delta is summed."""


@triton.jit
def anything_acts(op_masks, first, last, bits, opened, T: tl.constexpr, CHUNK: tl.constexpr):
    """How many (token, op) pairs of the tile may act, as far as selectors and gates say, in the busiest place."""
    found = tl.full((T * CHUNK,), 0, tl.int32)
    for start in range(first, last, CHUNK):
        o = start + tl.arange(0, CHUNK)
        need = tl.load(op_masks + o * OP_MASKS, mask=o < last, other=0)[None, :]
        gates = tl.load(op_masks + o * OP_MASKS + 1, mask=o < last, other=0)[None, :]
        acts = ((bits[:, None] & need) == need) & ((opened[:, None] & gates) == gates) & (o < last)[None, :]
        found += tl.reshape((acts & (bits != 0)[:, None]).to(tl.int32), (T * CHUNK,))
    return largest(found)


@triton.jit
def map_ops(
    x,
    a,
    k,
    first,
    count,
    live,
    bits,
    opened,
    norm,
    scale,
    values,
    op_ints,
    op_values,
    op_masks,
    bank_read,
    D: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The k-th op of each channel of a tile, on the values ``x [T, R]`` (originals ``a``): the new ones, and who changed them.

    Args:
        first, count: each channel's first op and how many, ``[R]``; ``live``: which channels there are.
        bits, opened: selectors and gates per token, ``[T]``.
        norm: ‖h‖ ``[T]``; ``scale``: the SAE's scale of what it writes, ``[T, R]``.
        values: pointers ``[T, 1]`` to the values read for each token.
    """
    here = live & (k < count)
    o = first + k
    kind = tl.load(op_ints + o * OP_COLUMNS, mask=here, other=AFFINE)[None, :]
    table = tl.load(op_ints + o * OP_COLUMNS + 1, mask=here, other=-1)
    source = tl.load(op_ints + o * OP_COLUMNS + 2, mask=here, other=-1)[None, :]
    average = tl.load(op_ints + o * OP_COLUMNS + 3, mask=here, other=-1)[None, :]
    unit = tl.load(op_ints + o * OP_COLUMNS + 4, mask=here, other=ABSOLUTE)[None, :]
    active = tl.load(op_ints + o * OP_COLUMNS + 5, mask=here, other=0)[None, :]
    alpha = tl.load(op_values + o * OP_VALUES, mask=here, other=1.0)[None, :]
    beta = tl.load(op_values + o * OP_VALUES + 1, mask=here, other=0.0)[None, :]
    low = tl.load(op_values + o * OP_VALUES + 2, mask=here, other=-float("inf"))[None, :]
    high = tl.load(op_values + o * OP_VALUES + 3, mask=here, other=float("inf"))[None, :]
    strength = tl.load(op_values + o * OP_VALUES + 4, mask=here, other=0.0)[None, :]
    gamma = tl.load(op_values + o * OP_VALUES + 5, mask=here, other=0.0)[None, :]
    need = tl.load(op_masks + o * OP_MASKS, mask=here, other=0)[None, :]
    gates = tl.load(op_masks + o * OP_MASKS + 1, mask=here, other=0)[None, :]
    who = tl.load(op_masks + o * OP_MASKS + 2, mask=here, other=0)[None, :]
    acts = here[None, :] & ((bits[:, None] & need) == need) & ((opened[:, None] & gates) == gates)
    acts = acts & ((active == 0) | (a != 0))

    # What a remap adds: beta in its unit, and a share of its source.
    remaps = acts & (kind == REMAP)
    lengths = tl.broadcast_to(norm[:, None], (T, ROWS))
    in_norms = tl.where(scale != 0, tl.div_rn(lengths, tl.where(scale != 0, scale, 1.0)), 0.0)
    mean = tl.load(values + average, mask=remaps & (average >= 0), other=0.0)
    amount = tl.where(unit == RESIDUAL_NORM, in_norms, 1.0)
    amount = tl.where(unit == PREACT_MEAN, mean, amount)
    taken = tl.load(values + source, mask=remaps & (source >= 0), other=0.0)
    term = tl.where(remaps & (beta != 0), beta * amount, 0.0)
    term = tl.where(source >= 0, tl.fma(tl.broadcast_to(gamma, (T, ROWS)), taken, term), term)
    term = tl.where(kind == REMAP, term, beta)
    affine = tl.minimum(tl.maximum(tl.fma(tl.broadcast_to(alpha, (T, ROWS)), x, term), low), high)

    looks_up = here & (table >= 0)
    row = bank_read + tl.where(looks_up, table, 0)[None, :].to(tl.int64) * D
    lowest = tl.load(row, mask=looks_up[None, :], other=0.0)
    per_bin = tl.load(row + 1, mask=looks_up[None, :], other=0.0)
    bins = tl.load(row + 2, mask=looks_up[None, :], other=1.0)
    place = (x - lowest) * per_bin  # as a float first: far outside the table it is no integer
    place = tl.where(place > 0, place, 0.0)
    place = tl.where(place >= bins, bins - 1, place).to(tl.int32)
    share = tl.load(row + (POSTERIORS + place), mask=acts & (kind == GAIN), other=0.0)
    gain = x * (1.0 - strength * share)

    new = tl.where(kind == RANGE, tl.where((x > 0) & (low <= x) & (x <= high), 0.0, x), affine)
    new = tl.where(kind == GAIN, gain, new)
    return tl.where(acts, new, x), tl.where(acts & (new != x), who, 0)


@triton.jit
def delta_block(
    channels,
    first,
    last,
    coefficients,
    bank_write,
    columns,
    D: tl.constexpr,
    T: tl.constexpr,
    LOG: tl.constexpr,
):
    """Σ_c coefficient_c·write_c at ``columns [LANES]``, channels in order: fp32 ``[T, LANES]``; 0 outside.

    ``coefficients`` are pointers ``[T]``.
    Rows whose coefficient is zero at every token of the tile are not loaded.
    """
    delta = tl.full((T, 1 << LOG), 0.0, tl.float32)
    for start in range(first, last, UNROLLED):
        # One after the other, but with all their rows on the way at once; no thread waits for another.
        for j in tl.static_range(UNROLLED):
            c = start + j
            amount = tl.load(coefficients + (c - first), mask=c + 0 * tl.arange(0, T) < last, other=0.0)
            used = largest((amount != 0).to(tl.int32))
            slot = tl.load(channels + c * CHANNEL_COLUMNS + 1, mask=used > 0, other=0).to(tl.int64)
            row = tl.load(bank_write + slot * D + columns, mask=columns < used * D, other=0.0)
            row = tl.broadcast_to(row[None, :], (T, 1 << LOG))
            several = tl.broadcast_to(amount[:, None], (T, 1 << LOG))
            # An infinite entry of a row must not turn "no change" into NaN.
            delta = tl.where(several != 0, tl.fma(several, row, delta), delta)
    return tl.where((columns < D)[None, :], delta, 0.0)  # an infinite coefficient times nothing is NaN


@triton.jit
def edit_kernel(
    hidden,
    residual,
    state,
    tile_first,
    tile_last,
    token_resident,
    token_selected,
    token_open,
    programs,
    centred,
    channels,
    channel_ops,
    op_ints,
    op_values,
    op_masks,
    read_ptr,
    reads,
    dose_bound,
    dose_refuses,
    bank_read,
    bank_write,
    bank_gate,
    members,
    members_width,
    values,
    values_width,
    coefficients,
    coefficients_width,
    fired,
    dose,
    flags,
    ran,
    D: tl.constexpr,
    T: tl.constexpr,
    LOG_ROWS: tl.constexpr,
    LOG: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    LOG_CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One tile per program; grid: tokens (T = 1) or the most tiles that a batch of so many tokens and rows can have.
    The first program notes in ``ran`` by which plan it ran.

    Args:
        hidden, residual: ``[tokens, D]`` in the model's dtype, edited in place; without SPLIT ``hidden`` is the stream.
        state: int32, places in ``codes``. Where nothing is planned, and behind the end, programs return.
        tile_first, tile_last: int32, for T > 1: the tokens of each tile.
        token_resident, token_selected, token_open: resident index (-1: none) int32, selector and gate bits int64.
        programs: CSR ``[residents + 1]`` into ``channels``; ``channel_ops`` from there into ops; ``read_ptr`` as
            ``programs``, into ``reads``. ``centred``: whether a read's SAE subtracts a mean.
        dose_bound, dose_refuses: by resident.
        members: ``[tokens, members_width]``, activations that were computed elsewhere.
        values, coefficients: scratch ``[tokens, width]``.
        fired, dose, flags: outputs by token, int64, fp32, int32; written for every token that runs a program.
        LOG_ROWS, LOG, WIDE: log₂ of the rows that are read together, of the lanes of a sum, and of the columns that are
            written together (2^WIDE ≥ D: then the delta stays in registers, else it is computed a second time).
        STAGES: blocks of rows that are on their way while one is multiplied.
        LOG_CHANNELS: log₂ of the channels whose ops are run together.
        AHEAD: ``values`` are there already: :func:`ahead_kernel` has read them.
    """
    if (tl.program_id(0) == 0) & (tl.load(state + ACTIVE) != 0):
        tl.store(ran, tl.load(state + STEP))
    q, begin, end = tile_of(state, tile_first, tile_last, token_resident, T)
    if q < 0:
        return
    tokens = begin + tl.arange(0, T)
    valid = tokens < end
    bits = tl.load(token_selected + tokens, mask=valid, other=0)
    opened = tl.load(token_open + tokens, mask=valid, other=0)
    first = tl.load(programs + q)
    last = tl.load(programs + q + 1)
    tl.store(fired + tokens, tl.full((T,), 0, tl.int64), mask=valid)
    tl.store(dose + tokens, tl.full((T,), 0.0, tl.float32), mask=valid)
    tl.store(flags + tokens, tl.full((T,), 0, tl.int32), mask=valid)
    busy = anything_acts(op_masks, tl.load(channel_ops + first), tl.load(channel_ops + last), bits, opened, T, 32)
    if busy == 0:
        return
    norm, mean, deviation = statistics(hidden, residual, tokens, valid, tl.load(centred + q), D, T, WIDE, LOG, SPLIT)
    my_values = values + tokens[:, None].to(tl.int64) * values_width
    my_coefficients = coefficients + tokens[:, None].to(tl.int64) * coefficients_width

    first_read = tl.load(read_ptr + q)
    last_read = tl.load(read_ptr + q + 1)
    for start in range(first_read, first_read if AHEAD else last_read, 1 << LOG_ROWS):
        r = start + tl.arange(0, 1 << LOG_ROWS)
        asked = r < last_read
        value = read_tile(
            hidden, residual, tokens, valid, norm, mean, deviation, reads, r, asked, bank_read, bank_gate, members,
            members_width, D, T, LOG_ROWS, LOG, SPLIT, STAGES,
        )  # fmt: skip
        tl.store(my_values + (r - first_read)[None, :], value, mask=valid[:, None] & asked[None, :])
    tl.debug_barrier()

    changed = tl.full((T,), 0, tl.int64)
    for start in range(first, last, 1 << LOG_CHANNELS):
        c = start + tl.arange(0, 1 << LOG_CHANNELS)
        live = c < last
        kind = tl.load(channels + c * CHANNEL_COLUMNS, mask=live, other=0)
        how = tl.load(channels + c * CHANNEL_COLUMNS + 2, mask=live, other=0)
        read = tl.load(channels + c * CHANNEL_COLUMNS + 3, mask=live, other=-1)
        op_first = tl.load(channel_ops + c, mask=live, other=0)
        count = tl.load(channel_ops + c + 1, mask=live, other=0) - op_first
        a = tl.load(my_values + read[None, :], mask=valid[:, None] & (live & (read >= 0))[None, :], other=0.0)
        scale = tl.where((kind >= LATENT)[None, :], way_back(how, norm, deviation, D, T), 1.0)
        x = a
        who = tl.full((T, 1 << LOG_CHANNELS), 0, tl.int64)
        for k in range(largest(count)):
            x, by = map_ops(
                x, a, k, op_first, count, live, bits, opened, norm, scale, my_values, op_ints, op_values, op_masks,
                bank_read, D, T, 1 << LOG_CHANNELS,
            )  # fmt: skip
            who = who | by
        scale = tl.where((kind == NORM)[None, :], norm[:, None], scale)
        # Where nothing acts, what was read may be anything: an activation that nobody computed for this token.
        coefficient = tl.where(live[None, :] & valid[:, None] & (who != 0), scale * (x - a), 0.0)
        changed = changed | all_bits(tl.where(coefficient != 0, who, 0), T, LOG_CHANNELS)
        tl.store(my_coefficients + (c - first)[None, :], coefficient, mask=valid[:, None] & live[None, :])
    tl.debug_barrier()
    my_coefficients = coefficients + tl.where(valid, tokens, begin).to(tl.int64) * coefficients_width

    squares = tl.full((T, 1 << LOG), 0.0, tl.float32)
    delta = tl.full((T, 1 << WIDE), 0.0, tl.float32)
    for start in range(0, D, 1 << WIDE):
        columns = start + tl.arange(0, 1 << WIDE)
        delta = delta_block(channels, first, last, my_coefficients, bank_write, columns, D, T, WIDE)
        squares = squares_onto(squares, delta, T, WIDE, LOG)
    size = tl.sqrt_rn(halves(squares, T, LOG))
    written = valid & (size != 0)  # so is what is no number any more
    bound = tl.load(dose_bound + q)
    ratio = tl.where(norm > 0, tl.div_rn(size, tl.where(norm > 0, norm, 1.0)), float("inf"))
    excess = written & (ratio > bound)
    refuses = tl.load(dose_refuses + q)
    clamps = excess & (refuses == 0)
    shrink = tl.where(clamps, tl.div_rn(bound * norm, tl.where(written, size, 1.0)), 1.0)
    flag = tl.where(clamps, CLAMPED, tl.where(excess, OVER, 0))
    tl.store(fired + tokens, tl.where(written, changed, 0), mask=valid)
    tl.store(dose + tokens, tl.where(written, tl.where(clamps, bound, ratio), 0.0), mask=valid)
    tl.store(flags + tokens, flag, mask=valid)
    if largest(written.to(tl.int32)) == 0:
        return
    for start in range(0, D, 1 << WIDE):
        columns = start + tl.arange(0, 1 << WIDE)
        if (1 << WIDE) < D:
            delta = delta_block(channels, first, last, my_coefficients, bank_write, columns, D, T, WIDE)
        x = stream(hidden, residual, tokens, valid, columns, D, SPLIT) + delta * shrink[:, None]
        at = tokens[:, None].to(tl.int64) * D + columns[None, :]
        inside = written[:, None] & (columns < D)[None, :]
        result = rounded(x, hidden.dtype.element_ty)
        if SPLIT:
            tl.store(residual + at, result, mask=inside)
            tl.store(hidden + at, tl.full((T, 1 << WIDE), 0.0, tl.float32).to(hidden.dtype.element_ty), mask=inside)
        else:
            tl.store(hidden + at, result, mask=inside)


@triton.jit
def ahead_kernel(
    hidden,
    residual,
    state,
    token_resident,
    token_selected,
    read_ptr,
    reads,
    centred,
    bank_read,
    bank_gate,
    members,
    members_width,
    values,
    values_width,
    D: tl.constexpr,
    LOG_ROWS: tl.constexpr,
    LOG: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """What the edit's programs would read one tile of rows after the other, read side by side: grid ``(tokens, lanes of work)``.

    For decode, where few tokens leave most of the device idle; the same bits. Arguments as :func:`edit_kernel`'s.
    """
    if tl.load(state + ACTIVE) == 0:
        return
    token = tl.program_id(0)
    if token >= tl.load(state + N_TOKENS):
        return
    q = tl.load(token_resident + token)
    if q < 0:
        return
    first = tl.load(read_ptr + q)
    last = tl.load(read_ptr + q + 1)
    start = first + tl.program_id(1) * (1 << LOG_ROWS)
    if start >= last:
        return
    if tl.load(token_selected + token) == 0:
        return
    tokens = token + tl.arange(0, 1)
    valid = tokens >= 0
    norm, mean, deviation = statistics(hidden, residual, tokens, valid, tl.load(centred + q), D, 1, WIDE, LOG, SPLIT)
    for begin in range(start, last, tl.num_programs(1) * (1 << LOG_ROWS)):
        r = begin + tl.arange(0, 1 << LOG_ROWS)
        asked = r < last
        value = read_tile(
            hidden, residual, tokens, valid, norm, mean, deviation, reads, r, asked, bank_read, bank_gate, members,
            members_width, D, 1, LOG_ROWS, LOG, SPLIT, STAGES,
        )  # fmt: skip
        at = values + tokens[:, None].to(tl.int64) * values_width + (r - first)[None, :]
        tl.store(at, value, mask=valid[:, None] & asked[None, :])
