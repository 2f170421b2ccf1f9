"""The edit arithmetic on a CPU: one pass per token, compiled with numba.

Semantics (``interventions.program`` has the definitions), as a plain loop over the selected tokens::

    for token t, for channel c of t's program at this layer, in order:
        a = read_c(h[t]);  x = a
        for op in ops(c), in order: if acts(op, t) and (a != 0 or not op.only_if_active): x = op(x)
        delta[t] += scale_c(t) * (x - a) * write_c

``acts`` are two masks: every bit of ``op_need`` among the token's selectors, every bit of ``op_gates`` among the gates that
are open there. Before it, :func:`compose_joint` edits the activations of SAEs whose decoder is not additive; their delta
comes as a whole.

A token's result depends on nothing but its own h and its own program: batch composition, chunking and neighbours cannot
change a bit, and prefill and decode run the same instructions in the same order, so a threshold never flips between
them. One thread on purpose: the work is a few per mille of the model's own, and a second thread pool would fight with
vLLM's pinned OpenMP threads. One file, too: what numba keeps on disk of a function is renewed when its own file changes,
not when one that it calls from does.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from interventions.program import TABLE_HEADER, OpKind, ReadKind, UnitKind

F32 = npt.NDArray[np.float32]

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

_jit = numba.njit(cache=True, nogil=True, fastmath={"contract"})


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
def _terms(
    a: np.float32,
    bits: np.uint64,
    opened: np.uint64,
    first: int,
    last: int,
    op_kind: npt.NDArray[np.int8],
    op_values: F32,
    op_slots: npt.NDArray[np.int32],
    op_unit: npt.NDArray[np.int8],
    op_active: npt.NDArray[np.bool_],
    op_need: npt.NDArray[np.uint64],
    op_gates: npt.NDArray[np.uint64],
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
        if op_kind[o] != REMAP or bits & op_need[o] != op_need[o] or opened & op_gates[o] != op_gates[o]:
            continue
        if op_active[o] and a == 0:
            continue
        term = np.float32(0.0)
        beta = op_values[o, 1]
        if beta != 0:
            if op_unit[o] == ABSOLUTE:
                term = beta
            elif op_unit[o] == RESIDUAL_NORM:
                if scale != 0:
                    term = beta * (norm / scale)
            else:
                slot = op_slots[o, 2]
                if mean_slot[0] != slot:
                    mean[0] = abs(_dot(bank_read[slot], view) + bank_gate[slot, 0])
                    mean_slot[0] = slot
                term = beta * mean[0]
        source = op_slots[o, 1]
        if source >= 0:
            if row >= 0:
                term += op_values[o, 5] * whole[row, source]
            else:
                term += op_values[o, 5] * np.float32(_activation(_dot(bank_read[source], view), bank_gate[source]))
        terms[o - first] = term


@_jit
def _compose(
    a: np.float32,
    bits: np.uint64,
    opened: np.uint64,
    first: int,
    last: int,
    op_kind: npt.NDArray[np.int8],
    op_values: F32,
    op_slots: npt.NDArray[np.int32],
    op_unit: npt.NDArray[np.int8],
    op_active: npt.NDArray[np.bool_],
    op_need: npt.NDArray[np.uint64],
    op_gates: npt.NDArray[np.uint64],
    op_intervention: npt.NDArray[np.int8],
    bank_read: F32,
    terms: F32,
) -> tuple[np.float32, np.uint64]:
    """The ops ``first … last`` on ``a``, in order, as far as they act: x, and bits of who changed it.

    ``terms`` are those of :func:`_terms`; read for remaps only.
    """
    x = a
    changed = np.uint64(0)
    for o in range(first, last):
        if bits & op_need[o] != op_need[o] or opened & op_gates[o] != op_gates[o]:
            continue
        if op_active[o] and a == 0:
            continue
        new = x
        if op_kind[o] == AFFINE:
            new = min(max(op_values[o, 0] * x + op_values[o, 1], op_values[o, 2]), op_values[o, 3])
        elif op_kind[o] == REMAP:
            new = min(max(op_values[o, 0] * x + terms[o - first], op_values[o, 2]), op_values[o, 3])
        elif op_kind[o] == GAIN:
            new = _gain(x, op_values[o, 4], bank_read[op_slots[o, 0]])
        elif x > 0 and op_values[o, 2] <= x <= op_values[o, 3]:
            new = np.float32(0.0)
        if new != x:
            changed |= np.uint64(1) << np.uint64(op_intervention[o])
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
    channels: npt.NDArray[np.int64],
    channel_ops: npt.NDArray[np.int32],
    channel_remaps: npt.NDArray[np.bool_],
    op_kind: npt.NDArray[np.int8],
    op_values: F32,
    op_slots: npt.NDArray[np.int32],
    op_unit: npt.NDArray[np.int8],
    op_active: npt.NDArray[np.bool_],
    op_need: npt.NDArray[np.uint64],
    op_gates: npt.NDArray[np.uint64],
    op_intervention: npt.NDArray[np.int8],
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
        features, channels: the latents with JOINT channels, and where these stand in ``channel_ops``.
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
            c = channels[j]
            if channel_remaps[c]:
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
                    op_kind,
                    op_values,
                    op_slots,
                    op_unit,
                    op_active,
                    op_need,
                    op_gates,
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
                op_kind,
                op_values,
                op_slots,
                op_unit,
                op_active,
                op_need,
                op_gates,
                op_intervention,
                bank_read,
                terms,
            )
            if x != a:
                edited[r, features[j]] = x
                fired[t] |= changed
                touched[r] = True


@_jit
def edit_tokens(
    h: F32,
    token_program: npt.NDArray[np.int32],
    token_selected: npt.NDArray[np.uint64],
    token_open: npt.NDArray[np.uint64],
    width: int,
    members: F32,
    joint: F32,
    joint_fired: npt.NDArray[np.uint64],
    program_channels: npt.NDArray[np.int32],
    channel_read: npt.NDArray[np.int8],
    channel_slot: npt.NDArray[np.int32],
    channel_norm: npt.NDArray[np.int8],
    channel_member: npt.NDArray[np.int32],
    channel_ops: npt.NDArray[np.int32],
    channel_remaps: npt.NDArray[np.bool_],
    op_kind: npt.NDArray[np.int8],
    op_values: F32,
    op_slots: npt.NDArray[np.int32],
    op_unit: npt.NDArray[np.int8],
    op_active: npt.NDArray[np.bool_],
    op_need: npt.NDArray[np.uint64],
    op_gates: npt.NDArray[np.uint64],
    op_intervention: npt.NDArray[np.int8],
    program_dose: F32,
    program_refuses: npt.NDArray[np.bool_],
    bank_read: F32,
    bank_write: F32,
    bank_gate: F32,
    delta: F32,
    fired: npt.NDArray[np.uint64],
    dose: F32,
    flags: npt.NDArray[np.uint8],
    written: npt.NDArray[np.bool_],
) -> int:
    """Deltas of all tokens at one layer; returns how many tokens have a non-zero one.

    Args:
        h: pre-edit residual stream, fp32 ``[n, d]``.
        token_program: which program each token runs ``[n]``; -1 for none.
        token_selected: bit s set = selector s of that program selects the token ``[n]``.
        token_open: bit g set = gate g of that program at this layer is open at the token ``[n]``.
        width: most ops of one channel.
        members: activations of latents whose membership was decided elsewhere, ``[n, m]``.
        joint, joint_fired: what the JOINT channels do to each token ``[n, d]``, and who did it ``[n]`` (0: nothing is
            there to read); both empty when no program has any.
        program_channels: CSR ``[programs + 1]`` into the channel arrays ``[channels]``.
        channel_ops: CSR ``[channels + 1]`` into the op arrays ``[ops]``; ``op_values`` is (alpha, beta, lo, hi, strength, gamma),
            ``op_slots`` the bank slots of a gain table, a remap's source (MEMBER: column of ``members``) and its mean row
            (-1 where there is none); ``channel_remaps`` says whether any op of a channel is a remap.
        program_dose, program_refuses: bound on ||delta||/||h||, and whether exceeding it is an error.
        bank_read, bank_write, bank_gate: ``[slots, d]``, ``[slots, d]``, ``[slots, 4]``.
        delta, fired, dose, flags, written: outputs, ``[n, d]`` and ``[n]``; fully overwritten.
    """
    n, d = h.shape
    views = np.empty((CENTRE + 1, d), np.float32)
    back = np.empty(CENTRE + 1, np.float32)
    terms = np.empty(width, np.float32)
    mean_slot, mean = np.empty(1, np.int64), np.empty(1, np.float32)
    n_written = 0
    for t in range(n):
        fired[t] = 0
        dose[t] = 0.0
        flags[t] = 0
        written[t] = False
        program = token_program[t]
        if program < 0 or token_selected[t] == 0:
            continue
        first, last = program_channels[program], program_channels[program + 1]
        if first == last:
            continue
        ht = h[t]
        dt = delta[t]
        norm = np.float32(-1.0)
        back[:] = np.float32(-1.0)
        mean_slot[0] = -1
        bits, opened = token_selected[t], token_open[t]
        any_write = False
        if joint.shape[0] and joint_fired[t] != 0:
            fired[t] = joint_fired[t]
            dt[:] = joint[t]
            any_write = True
        for c in range(first, last):
            kind = channel_read[c]
            if kind == JOINT:
                continue
            acts = False
            for o in range(channel_ops[c], channel_ops[c + 1]):
                if bits & op_need[o] == op_need[o] and opened & op_gates[o] == op_gates[o]:
                    acts = True
                    break
            if not acts:
                continue
            slot = channel_slot[c]
            scale = np.float32(1.0)
            a = np.float32(0.0)
            if kind == NORM:
                if norm < 0:
                    norm = np.float32(math.sqrt(_dot(ht, ht)))
                scale = norm
            elif kind == DOT:
                a = np.float32(_dot(bank_read[slot], ht))
            elif kind >= LATENT:
                view = ht
                how = channel_norm[c]
                if how != PLAIN_INPUT:
                    view = views[how]
                    if back[how] < 0:
                        back[how] = _normalise(ht, how, view)
                    scale = back[how]
                if kind == MEMBER:
                    a = members[t, channel_member[c]]
                else:
                    a = np.float32(_activation(_dot(bank_read[slot], view), bank_gate[slot]))
                if channel_remaps[c]:
                    if norm < 0:
                        norm = np.float32(math.sqrt(_dot(ht, ht)))
                    _terms(
                        a,
                        bits,
                        opened,
                        channel_ops[c],
                        channel_ops[c + 1],
                        op_kind,
                        op_values,
                        op_slots,
                        op_unit,
                        op_active,
                        op_need,
                        op_gates,
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
            x, changed = _compose(
                a,
                bits,
                opened,
                channel_ops[c],
                channel_ops[c + 1],
                op_kind,
                op_values,
                op_slots,
                op_unit,
                op_active,
                op_need,
                op_gates,
                op_intervention,
                bank_read,
                terms,
            )
            coefficient = scale * (x - a)
            if coefficient == 0:
                continue
            fired[t] |= changed
            write = bank_write[slot]
            if any_write:
                for i in range(d):
                    dt[i] += coefficient * write[i]
            else:
                for i in range(d):
                    dt[i] = coefficient * write[i]
                any_write = True
        if not any_write:
            fired[t] = 0
            continue
        size = np.float32(math.sqrt(_dot(dt, dt)))
        if size == 0:
            fired[t] = 0
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
        dose[t] = ratio
        written[t] = True
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
