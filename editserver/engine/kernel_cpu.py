"""The edit arithmetic on a CPU: one pass per token, from the model's tensors and back into them, compiled with numba.

Semantics (``interventions.program`` has the definitions), as a plain loop over the selected tokens::

    for token t, for channel c of t's program at this layer, in order:
        a = read_c(h[t]);  x = a
        for op in ops(c), in order: if acts(op, t) and (a != 0 or not op.only_if_active): x = op(x)
        delta[t] += scale_c(t) * (x - a) * write_c

``acts`` are two masks: every bit of NEED among the token's selectors, every bit of GATES among the gates that are
open there. Before it, :func:`compose_joint` edits the activations of SAEs whose decoder is not additive; their delta
comes as a whole.

A token's result depends on nothing but its own h and its own program: batch composition, chunking and neighbours cannot
change a bit, and prefill and decode run the same instructions in the same order, so a threshold never flips between
them. Nothing here starts a thread, as a second pool would fight with vLLM's pinned OpenMP threads: the op in C++ has PyTorch's
own ones edit a share of the tokens each, where there is enough to do. One file: what numba keeps on disk of a function is renewed
when its own file changes, not when one that it calls from does.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from editserver.engine.kernel_address import pointer
from interventions.program import TABLE_HEADER, OpKind, ReadKind, UnitKind

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

CHANNEL_COLUMNS = READ, SLOT, INPUT_NORM, MEMBER_COLUMN, REMAPS = range(5)
"""Of a channel: ReadKind, bank slot of its row, how its SAE normalises, its column of ``members``, whether an op is a remap."""
OP_COLUMNS = KIND, TABLE, SOURCE, MEAN, UNIT, ACTIVE, INTERVENTION = range(7)
"""Of an op: OpKind; the bank slots of its gain table, a remap's source (MEMBER: column of ``members``) and its mean row (-1:
there is none); UnitKind; whether it leaves zeros alone; its intervention."""
OP_VALUES = ALPHA, BETA, LOW, HIGH, STRENGTH, GAMMA = range(6)
OP_MASKS = NEED, GATES = range(2)
"""Bits of the selectors that must all hold, and of the gates that must all be open."""
READ_COLUMNS = READ_SLOT, READ_NORM = range(2)
"""Of a latent that is read: its bank slot, and how its SAE normalises; of a coordinate of the stream: which one, and STREAM."""
STREAM = -1

PREPARED, FLOAT32, BFLOAT16 = range(3)
"""How :func:`edit_tokens` and :func:`load_tokens` find the stream: ready in ``h``, or in the model's own tensors."""

NONE, NORM, DOT, LATENT, MEMBER, JOINT = (int(k) for k in ReadKind)
AFFINE, RANGE, GAIN, REMAP = (int(k) for k in OpKind)
ABSOLUTE, RESIDUAL_NORM, PREACT_MEAN = (int(k) for k in UnitKind)
POSTERIORS = TABLE_HEADER
PLAIN_INPUT, NORM_RESCALE, LAYER_NORM, UNIT_NORM, CENTRE = range(5)
"""How an SAE normalises its input, per token."""
INPUT_NORMS = {
    "none": PLAIN_INPUT,
    "constant_norm_rescale": NORM_RESCALE,
    "layer_norm": LAYER_NORM,
    "unit_norm": UNIT_NORM,
    "centre": CENTRE,
}
LAYER_NORM_EPS = 1e-5

CLAMPED, OVER = 1, 2
"""Token flags: the dose was scaled down; the dose exceeds a bound that refuses."""

WORD = ir.IntType(32)

_jit = numba.njit(cache=True, nogil=True, fastmath={"contract"})


@intrinsic
def _widen(context: Any, bits: Any) -> Any:
    """bfloat16 to float32."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.shl(builder.zext(args[0], WORD), WORD(16))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrow(context: Any, value: Any) -> Any:
    """float32 to bfloat16, to the nearest, ties to even; what is no number stays none.

    Made of 32-bit instructions, of which a loop takes as many at a time as of floats: numba's integers are 64 bits wide.
    """

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.bitcast(args[0], WORD)
        odd = builder.and_(builder.lshr(word, WORD(16)), WORD(1))
        rounded = builder.lshr(builder.add(word, builder.add(odd, WORD(0x7FFF))), WORD(16))
        quiet = builder.or_(builder.lshr(word, WORD(16)), WORD(0x40))
        is_number = builder.fcmp_ordered("ord", args[0], args[0])
        return builder.trunc(builder.select(is_number, rounded, quiet), ir.IntType(16))

    return types.uint16(types.float32), generate


@_jit
def _load(form: int, hidden_at: int, residual_at: int, row: int, out: F32) -> None:
    """Row ``row`` of the residual stream, in the model's own precision, as fp32; ``residual_at`` 0: hidden is the stream."""
    d = out.shape[0]
    if form == BFLOAT16:
        hidden = numba.carray(pointer(hidden_at), (row + 1, d), np.uint16)[row]
        if residual_at == 0:
            for i in range(d):
                out[i] = _widen(hidden[i])
        else:
            residual = numba.carray(pointer(residual_at), (row + 1, d), np.uint16)[row]
            for i in range(d):
                out[i] = _widen(_narrow(_widen(hidden[i]) + _widen(residual[i])))
    else:
        exact = numba.carray(pointer(hidden_at), (row + 1, d), np.float32)[row]
        if residual_at == 0:
            for i in range(d):
                out[i] = exact[i]
        else:
            rest = numba.carray(pointer(residual_at), (row + 1, d), np.float32)[row]
            for i in range(d):
                out[i] = exact[i] + rest[i]


@_jit
def _store(form: int, hidden_at: int, residual_at: int, row: int, h: F32, delta: F32) -> None:
    """Make row ``row`` of the stream h + delta, and h what it then is; with a residual, hidden becomes zero."""
    d = h.shape[0]
    if form == BFLOAT16:
        hidden = numba.carray(pointer(hidden_at), (row + 1, d), np.uint16)[row]
        target = hidden
        if residual_at != 0:
            hidden[:] = 0
            target = numba.carray(pointer(residual_at), (row + 1, d), np.uint16)[row]
        for i in range(d):
            bits = _narrow(h[i] + delta[i])
            target[i] = bits
            h[i] = _widen(bits)
        return
    for i in range(d):
        h[i] += delta[i]
    if form == FLOAT32:
        exact = numba.carray(pointer(hidden_at), (row + 1, d), np.float32)[row]
        if residual_at == 0:
            exact[:] = h
        else:
            exact[:] = 0
            numba.carray(pointer(residual_at), (row + 1, d), np.float32)[row][:] = h


@_jit
def load_tokens(form: int, hidden_at: int, residual_at: int, index: I64, h: F32) -> None:
    """The stream at the tokens ``index [n]`` (:func:`edit_tokens` has the arguments) into ``h [n, d]``."""
    for t in range(h.shape[0]):
        _load(form, hidden_at, residual_at, index[t], h[t])


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"}, inline="never")
def _dot(a: F32, b: F32) -> np.float32:
    total = np.float32(0.0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@_jit
def _activation(dot: np.float32, gate: F32) -> np.float32:
    """f(u) = relu(mag_scale·u + mag_bias) · 1[u + gate_bias > threshold]; gate = (gate_bias, threshold, scale, bias)."""
    if dot + gate[0] > gate[1]:
        value: np.float32 = max(np.float32(0.0), gate[2] * dot + gate[3])
        return value
    return np.float32(0.0)


@_jit
def _normalise(h: F32, kind: int, out: F32) -> np.float32:
    """Write the SAE's own view of ``h`` into ``out``; return the scale that takes a delta back to the residual stream."""
    d = h.shape[0]
    if kind in (NORM_RESCALE, UNIT_NORM):
        target = math.sqrt(d) if kind == NORM_RESCALE else 1.0
        norm = math.sqrt(_dot(h, h))
        scale = np.float32(target / norm) if norm > 0 else np.float32(0.0)
        for i in range(d):
            out[i] = h[i] * scale
        return np.float32(norm / target)
    mean = np.float32(0.0)
    for i in range(d):
        mean += h[i]
    mean /= np.float32(d)
    for i in range(d):
        out[i] = h[i] - mean
    if kind == CENTRE:
        return np.float32(1.0)
    std = np.float32(math.sqrt(_dot(out, out) / (d - 1)))
    scale = np.float32(1.0) / (std + np.float32(LAYER_NORM_EPS))
    for i in range(d):
        out[i] *= scale
    return std


@_jit
def _gain(x: np.float32, strength: np.float32, table: F32) -> np.float32:
    """x·(1 − strength·P_b) with the row ``[low, 1/width, nb, P_0 …]``; values outside its range are in an outer bin."""
    place = (x - table[0]) * table[1]  # as a float first: far outside it is no integer
    b = POSTERIORS
    if place >= table[2]:
        b += int(table[2]) - 1
    elif place > 0:
        b += int(place)
    value: np.float32 = x * (np.float32(1.0) - strength * table[b])
    return value


@_jit
def _acts(op_masks: U64, o: int, bits: np.uint64, opened: np.uint64) -> bool:
    """Whether op ``o`` acts on a token with these selectors and open gates."""
    need, behind = op_masks[o, NEED], op_masks[o, GATES]
    return bool(bits & need == need and opened & behind == behind)


@_jit
def _terms(
    a: np.float32,
    bits: np.uint64,
    opened: np.uint64,
    first: int,
    last: int,
    op_ints: I32,
    op_values: F32,
    op_masks: U64,
    norm: np.float32,
    scale: np.float32,
    view: F32,
    whole: F32,
    row: int,
    bank_read: F32,
    bank_gate: F32,
    mean_slot: npt.NDArray[np.int64],
    mean: F32,
    terms: F32,
) -> None:
    """What the remaps among the ops that act on a token add to alpha·x: ``terms[o - first]`` = beta·s + gamma·b.

    Args:
        norm, scale, view: ||h||, the SAE's scale of what it writes, and its view of h.
        whole, row: sources index this row of original activations, where they were computed elsewhere; row -1: they are
            bank slots.
        mean_slot, mean: ``[1]``, the mean pre-activation that was last computed for this token (slot -1: none).
    """
    for o in range(first, last):
        if op_ints[o, KIND] != REMAP or not _acts(op_masks, o, bits, opened):
            continue
        if op_ints[o, ACTIVE] and a == 0:
            continue
        term = np.float32(0.0)
        beta = op_values[o, BETA]
        if beta != 0:
            if op_ints[o, UNIT] == ABSOLUTE:
                term = beta
            elif op_ints[o, UNIT] == RESIDUAL_NORM:
                if scale != 0:
                    term = beta * (norm / scale)
            else:
                slot = op_ints[o, MEAN]
                if mean_slot[0] != slot:
                    mean[0] = abs(_dot(bank_read[slot], view) + bank_gate[slot, 0])
                    mean_slot[0] = slot
                term = beta * mean[0]
        source = op_ints[o, SOURCE]
        if source >= 0:
            if row >= 0:
                term += op_values[o, GAMMA] * whole[row, source]
            else:
                term += op_values[o, GAMMA] * np.float32(_activation(_dot(bank_read[source], view), bank_gate[source]))
        terms[o - first] = term


@_jit
def _compose(
    a: np.float32,
    bits: np.uint64,
    opened: np.uint64,
    first: int,
    last: int,
    op_ints: I32,
    op_values: F32,
    op_masks: U64,
    bank_read: F32,
    terms: F32,
) -> tuple[np.float32, np.uint64]:
    """The ops ``first … last`` on ``a``, in order, as far as they act: x, and bits of who changed it.

    ``terms`` are those of :func:`_terms`; read for remaps only.
    """
    x = a
    changed = np.uint64(0)
    for o in range(first, last):
        if not _acts(op_masks, o, bits, opened):
            continue
        if op_ints[o, ACTIVE] and a == 0:
            continue
        new = x
        if op_ints[o, KIND] == AFFINE:
            new = min(max(op_values[o, ALPHA] * x + op_values[o, BETA], op_values[o, LOW]), op_values[o, HIGH])
        elif op_ints[o, KIND] == REMAP:
            new = min(max(op_values[o, ALPHA] * x + terms[o - first], op_values[o, LOW]), op_values[o, HIGH])
        elif op_ints[o, KIND] == GAIN:
            new = _gain(x, op_values[o, STRENGTH], bank_read[op_ints[o, TABLE]])
        elif x > 0 and op_values[o, LOW] <= x <= op_values[o, HIGH]:
            new = np.float32(0.0)
        if new != x:
            changed |= np.uint64(1) << np.uint64(op_ints[o, INTERVENTION])
        x = new
    return x, changed


@_jit
def compose_joint(
    h: F32,
    norm_kind: int,
    width: int,
    tokens: npt.NDArray[np.int64],
    token_selected: npt.NDArray[np.uint64],
    token_open: npt.NDArray[np.uint64],
    features: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    channels: I32,
    channel_ops: I32,
    op_ints: I32,
    op_values: F32,
    op_masks: U64,
    bank_read: F32,
    bank_gate: F32,
    z: F32,
    edited: F32,
    fired: npt.NDArray[np.uint64],
    touched: npt.NDArray[np.bool_],
) -> None:
    """Edit all activations of one SAE for one request: what a non-additive decoder must see as a whole.

    Args:
        h: pre-edit residual stream of all planned tokens, fp32 ``[n, d]``.
        norm_kind: how the SAE normalises its input.
        width: most ops of one channel.
        tokens: planned tokens that the rows of ``z`` belong to, ``[m]``; they index ``h``, ``token_selected``,
            ``token_open`` and ``fired``.
        features, places: the latents with JOINT channels, and which channels these are.
        z, edited: original activations ``[m, n_features]``, and a copy that is edited in place.
        fired: ORed with the bits of the interventions that changed a latent of the token.
        touched: output ``[m]``, whether any latent of the token ends with another value than it had.
    """
    terms = np.empty(width, np.float32)
    scratch = np.empty(h.shape[1], np.float32)
    mean_slot, mean = np.empty(1, np.int64), np.empty(1, np.float32)
    for r in range(tokens.shape[0]):
        t = tokens[r]
        touched[r] = False
        norm = np.float32(-1.0)
        scale = np.float32(1.0)
        view = h[t]
        for j in range(features.shape[0]):
            a = z[r, features[j]]
            c = places[j]
            if channels[c, REMAPS]:
                if norm < 0:
                    norm = np.float32(math.sqrt(_dot(h[t], h[t])))
                    mean_slot[0] = -1
                    if norm_kind != PLAIN_INPUT:
                        scale = _normalise(h[t], norm_kind, scratch)
                        view = scratch
                _terms(
                    a,
                    token_selected[t],
                    token_open[t],
                    channel_ops[c],
                    channel_ops[c + 1],
                    op_ints,
                    op_values,
                    op_masks,
                    norm,
                    scale,
                    view,
                    z,
                    r,
                    bank_read,
                    bank_gate,
                    mean_slot,
                    mean,
                    terms,
                )
            x, changed = _compose(
                a,
                token_selected[t],
                token_open[t],
                channel_ops[c],
                channel_ops[c + 1],
                op_ints,
                op_values,
                op_masks,
                bank_read,
                terms,
            )
            if x != a:
                edited[r, features[j]] = x
                fired[t] |= changed
                touched[r] = True


@_jit
def _add_rows(coefficients: F32, slots: I64, n: int, bank_write: F32, out: F32) -> None:
    """out = sum of coefficient · row, one row after another at every coordinate, up to four of them in one pass."""
    d = out.shape[0]
    done = 0
    while done < n:
        begins = done == 0
        if n - done >= 4:
            a, b, c, e = coefficients[done], coefficients[done + 1], coefficients[done + 2], coefficients[done + 3]
            first, second = bank_write[slots[done]], bank_write[slots[done + 1]]
            third, fourth = bank_write[slots[done + 2]], bank_write[slots[done + 3]]
            if begins:
                for i in range(d):
                    out[i] = a * first[i] + b * second[i] + c * third[i] + e * fourth[i]
            else:
                for i in range(d):
                    out[i] = out[i] + a * first[i] + b * second[i] + c * third[i] + e * fourth[i]
            done += 4
        else:
            a, first = coefficients[done], bank_write[slots[done]]
            if begins:
                for i in range(d):
                    out[i] = a * first[i]
            else:
                for i in range(d):
                    out[i] += a * first[i]
            done += 1


@_jit
def edit_tokens(
    form: int,
    hidden_at: int,
    residual_at: int,
    n: int,
    index: I64,
    loaded: bool,
    h: F32,
    token_program: I32,
    token_selected: U64,
    token_open: U64,
    width: int,
    members: F32,
    joint: F32,
    joint_fired: U64,
    programs: I32,
    channels: I32,
    channel_ops: I32,
    op_ints: I32,
    op_values: F32,
    op_masks: U64,
    program_dose: F32,
    program_refuses: Flags,
    bank_read: F32,
    bank_write: F32,
    bank_gate: F32,
    delta: F32,
    fired: U64,
    dose: F32,
    flags: npt.NDArray[np.uint8],
    written: Flags,
) -> int:
    """Edit the planned tokens at one layer, in place; returns how many were written to.

    A token whose delta is not zero becomes dtype(h + delta); with a residual, that becomes the residual and hidden zero. No
    other token is touched. Arrays by token may be longer than ``n``.

    Args:
        form: where the stream is: FLOAT32 or BFLOAT16, in tensors of that type, contiguous ``[tokens, d]``; or PREPARED.
        hidden_at, residual_at: addresses of these tensors; the stream is their sum, rounded to their type. Residual 0:
            hidden is the stream.
        n: number of planned tokens.
        index: where each stands in the tensors.
        loaded, h: whether ``h [n, d]`` is the stream before the edit, as :func:`load_tokens` leaves it; it will be the stream
            after it (PREPARED: not rounded, and all that is written). Else ``h [1, d]`` is scratch.
        token_program: which program each token runs; -1 for none.
        token_selected: bit s set = selector s of that program selects the token.
        token_open: bit g set = gate g of that program at this layer is open at the token.
        width: most ops of one channel.
        members: activations of latents whose membership was decided elsewhere, ``[n, m]``.
        joint, joint_fired: what the JOINT channels do to each token ``[n, d]``, and who did it ``[n]`` (0: nothing is
            there to read); both empty when no program has any.
        programs: CSR ``[programs + 1]`` into ``channels [channels, CHANNEL_COLUMNS]``.
        channel_ops: CSR ``[channels + 1]`` into ``op_ints [ops, OP_COLUMNS]``, ``op_values [ops, OP_VALUES]`` and
            ``op_masks [ops, OP_MASKS]``.
        program_dose, program_refuses: bound on ||delta||/||h||, and whether exceeding it is an error.
        bank_read, bank_write, bank_gate: ``[slots, d]``, ``[slots, d]``, ``[slots, 4]``.
        delta: output ``[n, d]``, of the tokens that were written to; or fewer rows, then used in turn.
        fired, dose, flags, written: outputs by token.
    """
    d = delta.shape[1]
    views = np.empty((CENTRE + 1, d), np.float32)
    back = np.empty(CENTRE + 1, np.float32)
    terms = np.empty(width, np.float32)
    mean_slot, mean = np.empty(1, np.int64), np.empty(1, np.float32)
    longest = 0
    for program in range(programs.shape[0] - 1):
        longest = max(longest, programs[program + 1] - programs[program])
    acting, sums = np.empty(longest, np.int64), np.empty(longest, np.float32)
    coefficients, slots = np.empty(longest, np.float32), np.empty(longest, np.int64)
    n_written = 0
    for t in range(n):
        fired[t] = 0
        dose[t] = 0.0
        flags[t] = 0
        written[t] = False
        program = token_program[t]
        if program < 0 or token_selected[t] == 0:
            continue
        first, last = programs[program], programs[program + 1]
        if first == last:
            continue
        ht = h[t % h.shape[0]]
        if not loaded:
            _load(form, hidden_at, residual_at, index[t], ht)
        dt = delta[t % delta.shape[0]]
        norm = np.float32(-1.0)
        back[:] = np.float32(-1.0)
        mean_slot[0] = -1
        bits, opened = token_selected[t], token_open[t]
        who = np.uint64(0)
        n_rows = 0
        # All sums first: no branch waits for one of them, so the rows behind it are on their way from memory already.
        n_acting = 0
        for c in range(first, last):
            kind = channels[c, READ]
            if kind == JOINT:
                continue
            acts = False
            for o in range(channel_ops[c], channel_ops[c + 1]):
                if _acts(op_masks, o, bits, opened):
                    acts = True
                    break
            if not acts:
                continue
            acting[n_acting] = c
            if kind == DOT:
                sums[n_acting] = _dot(bank_read[channels[c, SLOT]], ht)
            elif kind >= LATENT:
                how = channels[c, INPUT_NORM]
                if how != PLAIN_INPUT and back[how] < 0:
                    back[how] = _normalise(ht, how, views[how])
                if kind == LATENT:
                    sums[n_acting] = _dot(bank_read[channels[c, SLOT]], ht if how == PLAIN_INPUT else views[how])
            n_acting += 1
        for k in range(n_acting):
            c = acting[k]
            kind, slot = channels[c, READ], channels[c, SLOT]
            scale = np.float32(1.0)
            a = np.float32(0.0)
            if kind == NORM:
                if norm < 0:
                    norm = np.float32(math.sqrt(_dot(ht, ht)))
                scale = norm
            elif kind == DOT:
                a = sums[k]
            elif kind >= LATENT:
                view = ht
                how = channels[c, INPUT_NORM]
                if how != PLAIN_INPUT:
                    view = views[how]
                    scale = back[how]
                if kind == MEMBER:
                    a = members[t, channels[c, MEMBER_COLUMN]]
                else:
                    a = np.float32(_activation(sums[k], bank_gate[slot]))
                if channels[c, REMAPS]:
                    if norm < 0:
                        norm = np.float32(math.sqrt(_dot(ht, ht)))
                    _terms(
                        a,
                        bits,
                        opened,
                        channel_ops[c],
                        channel_ops[c + 1],
                        op_ints,
                        op_values,
                        op_masks,
                        norm,
                        scale,
                        view,
                        members,
                        t if kind == MEMBER else -1,
                        bank_read,
                        bank_gate,
                        mean_slot,
                        mean,
                        terms,
                    )
            o = channel_ops[c]
            if channel_ops[c + 1] - o == 1 and op_ints[o, KIND] == AFFINE:  # as _compose, without its arguments
                if op_ints[o, ACTIVE] and a == 0:
                    continue
                x = min(max(op_values[o, ALPHA] * a + op_values[o, BETA], op_values[o, LOW]), op_values[o, HIGH])
                changed = np.uint64(1) << np.uint64(op_ints[o, INTERVENTION])
            else:
                x, changed = _compose(
                    a,
                    bits,
                    opened,
                    o,
                    channel_ops[c + 1],
                    op_ints,
                    op_values,
                    op_masks,
                    bank_read,
                    terms,
                )
            coefficient = scale * (x - a)
            if coefficient == 0:
                continue
            who |= changed
            coefficients[n_rows], slots[n_rows] = coefficient, slot
            n_rows += 1
        jointly = joint.shape[0] > 0 and joint_fired[t] != 0
        if not jointly and n_rows == 0:
            continue
        _add_rows(coefficients, slots, n_rows, bank_write, dt)
        if jointly:
            who |= joint_fired[t]
            if n_rows:
                for i in range(d):
                    dt[i] += joint[t, i]
            else:
                dt[:] = joint[t]
        size = np.float32(math.sqrt(_dot(dt, dt)))
        if size == 0:
            continue
        if norm < 0:
            norm = np.float32(math.sqrt(_dot(ht, ht)))
        ratio = size / norm if norm > 0 else np.float32(np.inf)
        bound = program_dose[program]
        if ratio > bound:
            if program_refuses[program]:
                flags[t] = OVER
            else:
                flags[t] = CLAMPED
                shrink = bound * norm / size
                for i in range(d):
                    dt[i] *= shrink
                ratio = bound
        fired[t] = who
        dose[t] = ratio
        written[t] = True
        _store(form, hidden_at, residual_at, index[t], ht, dt)
        n_written += 1
    return n_written


@_jit
def read_latents(h: F32, slots: npt.NDArray[np.int32], norm: int, bank_read: F32, bank_gate: F32, out: F32) -> None:
    """Activations of some latents of one SAE: ``out[t, j] = f_j(h[t])`` with the rows in ``slots``, ``[n, m]``."""
    n, d = h.shape
    scratch = np.empty(d, np.float32)
    for t in range(n):
        view = h[t]
        if norm != PLAIN_INPUT:
            _normalise(h[t], norm, scratch)
            view = scratch
        for j in range(slots.shape[0]):
            out[t, j] = _activation(_dot(bank_read[slots[j]], view), bank_gate[slots[j]])


@_jit
def hit_tokens(
    h: F32,
    tokens: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int32],
    norm: int,
    bit: np.uint64,
    bank_read: F32,
    bank_gate: F32,
    hits: npt.NDArray[np.uint64],
) -> None:
    """Set ``bit`` in ``hits[t]`` for those of ``tokens`` at which any of the latents in ``slots`` (of one SAE) is active."""
    scratch = np.empty(h.shape[1], np.float32)
    for r in range(tokens.shape[0]):
        t = tokens[r]
        view = h[t]
        if norm != PLAIN_INPUT:
            _normalise(h[t], norm, scratch)
            view = scratch
        for j in range(slots.shape[0]):
            if _activation(_dot(bank_read[slots[j]], view), bank_gate[slots[j]]) != 0:
                hits[t] |= bit
                break


@_jit
def read_features(
    h: F32,
    segments: npt.NDArray[np.int64],
    feature_ptr: npt.NDArray[np.int64],
    feature_slot: npt.NDArray[np.int64],
    feature_norm: npt.NDArray[np.int64],
    bank_read: F32,
    bank_gate: F32,
    out: F32,
) -> None:
    """As :func:`read_latents`, each request its own: ``out[t, j]`` is its j-th latent's activation at its token t.

    Args:
        segments: a row per request, beginning with its resident index, its first token and its number of tokens.
        feature_ptr: CSR ``[residents + 1]`` into ``feature_slot`` (-1: the activation comes from elsewhere) and
            ``feature_norm``.
        out: ``[tokens, columns]``.
    """
    views = np.empty((CENTRE + 1, h.shape[1]), np.float32)
    for s in range(segments.shape[0]):
        first, last = feature_ptr[segments[s, 0]], feature_ptr[segments[s, 0] + 1]
        if first == last:
            continue
        for t in range(segments[s, 1], segments[s, 1] + segments[s, 2]):
            seen = 0
            for j in range(first, last):
                slot, norm = feature_slot[j], feature_norm[j]
                if slot < 0:
                    continue
                view = h[t]
                if norm != PLAIN_INPUT:
                    view = views[norm]
                    if not seen & (1 << norm):
                        _normalise(h[t], norm, view)
                        seen |= 1 << norm
                out[t, j - first] = _activation(_dot(bank_read[slot], view), bank_gate[slot])


@_jit
def read_listed(
    h: F32,
    token_program: I32,
    token_selected: U64,
    read_ptr: I32,
    read_rows: I32,
    read_bits: U64,
    bank_read: F32,
    bank_gate: F32,
    out: F32,
) -> None:
    """What inspections list: ``out[t, j]`` is the j-th number that token t's own request asks for, NaN where unselected.

    Args:
        h: fp32 ``[n, d]``.
        read_ptr: CSR ``[residents + 1]`` into ``read_rows [reads, READ_COLUMNS]`` and ``read_bits`` (the inspection's
            selector).
        out: ``[n, columns]``.
    """
    views = np.empty((CENTRE + 1, h.shape[1]), np.float32)
    for t in range(h.shape[0]):
        first, last = read_ptr[token_program[t]], read_ptr[token_program[t] + 1]
        seen = 0
        for j in range(first, last):
            if token_selected[t] & read_bits[j] == 0:
                out[t, j - first] = np.nan
                continue
            slot, norm = read_rows[j, READ_SLOT], read_rows[j, READ_NORM]
            if norm == STREAM:
                out[t, j - first] = h[t, slot]
                continue
            view = h[t]
            if norm != PLAIN_INPUT:
                view = views[norm]
                if not seen & (1 << norm):
                    _normalise(h[t], norm, view)
                    seen |= 1 << norm
            out[t, j - first] = _activation(_dot(bank_read[slot], view), bank_gate[slot])


class Arguments(NamedTuple):
    """Places in the int64 block that :func:`edit_block` is given: numbers, then addresses of contiguous arrays.

    ``tokens`` is the length of the arrays by token; ``channel_rows`` are :func:`edit_tokens`' ``channels``.
    """

    hidden: int
    residual: int
    n: int
    form: int
    d: int
    width: int
    tokens: int
    residents: int
    channels: int
    ops: int
    slots: int
    places: int
    scratch: int
    delta: int
    token_program: int
    token_selected: int
    token_open: int
    programs: int
    channel_rows: int
    channel_ops: int
    op_ints: int
    op_values: int
    op_masks: int
    program_dose: int
    program_refuses: int
    bank_read: int
    bank_write: int
    bank_gate: int
    fired: int
    dose: int
    flags: int
    written: int


A = Arguments(*range(len(Arguments._fields)))
N_ARGUMENTS = len(A)
BY_TOKEN = {
    A.places: 8,
    A.token_program: 4,
    A.token_selected: 8,
    A.token_open: 8,
    A.fired: 8,
    A.dose: 4,
    A.flags: 1,
    A.written: 1,
}
"""Bytes of a token in the arrays by token: all that differs for a caller who has some of the tokens edited by somebody else, but
for ``n``, ``tokens`` and what is scratch."""
N_CHANNEL_COLUMNS, N_OP_COLUMNS = len(CHANNEL_COLUMNS), len(OP_COLUMNS)
N_OP_VALUES, N_OP_MASKS = len(OP_VALUES), len(OP_MASKS)


def _edit_block(block: int) -> int:
    a = numba.carray(pointer(block), (N_ARGUMENTS,), np.int64)
    d, tokens, residents, channels, ops, slots = (
        a[A.d],
        a[A.tokens],
        a[A.residents],
        a[A.channels],
        a[A.ops],
        a[A.slots],
    )
    n_written: int = edit_tokens(
        a[A.form],
        a[A.hidden],
        a[A.residual],
        a[A.n],
        numba.carray(pointer(a[A.places]), (tokens,), np.int64),
        False,
        numba.carray(pointer(a[A.scratch]), (1, d), np.float32),
        numba.carray(pointer(a[A.token_program]), (tokens,), np.int32),
        numba.carray(pointer(a[A.token_selected]), (tokens,), np.uint64),
        numba.carray(pointer(a[A.token_open]), (tokens,), np.uint64),
        a[A.width],
        np.empty((0, 0), np.float32),
        np.empty((0, d), np.float32),
        np.empty(0, np.uint64),
        numba.carray(pointer(a[A.programs]), (residents + 1,), np.int32),
        numba.carray(pointer(a[A.channel_rows]), (channels, N_CHANNEL_COLUMNS), np.int32),
        numba.carray(pointer(a[A.channel_ops]), (channels + 1,), np.int32),
        numba.carray(pointer(a[A.op_ints]), (ops, N_OP_COLUMNS), np.int32),
        numba.carray(pointer(a[A.op_values]), (ops, N_OP_VALUES), np.float32),
        numba.carray(pointer(a[A.op_masks]), (ops, N_OP_MASKS), np.uint64),
        numba.carray(pointer(a[A.program_dose]), (residents,), np.float32),
        numba.carray(pointer(a[A.program_refuses]), (residents,), np.bool_),
        numba.carray(pointer(a[A.bank_read]), (slots, d), np.float32),
        numba.carray(pointer(a[A.bank_write]), (slots, d), np.float32),
        numba.carray(pointer(a[A.bank_gate]), (slots, 4), np.float32),
        numba.carray(pointer(a[A.delta]), (1, d), np.float32),
        numba.carray(pointer(a[A.fired]), (tokens,), np.uint64),
        numba.carray(pointer(a[A.dose]), (tokens,), np.float32),
        numba.carray(pointer(a[A.flags]), (tokens,), np.uint8),
        numba.carray(pointer(a[A.written]), (tokens,), np.bool_),
    )
    return n_written


@functools.cache
def edit_block() -> int:
    """Address of a C function ``int64_t (int64_t block)`` that is :func:`edit_tokens` for a caller without Python.

    ``block`` is the address of its arguments, laid out as :class:`Arguments` says; the stream is not loaded, and nothing
    comes from elsewhere.
    """
    made = numba.cfunc(types.int64(types.intp), cache=True)(_edit_block)
    _compiled.append(made)
    where: int = made.address
    return where


_compiled: list[Any] = []
"""What must not go away as long as somebody may call it."""
