"""Which tokens of a batch are planned, what selects them, and the message of what was done to them: compiled with numba, as
:mod:`editserver.engine.kernel_cpu`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types

from editserver.engine.kernel_address import pointer

_jit = numba.njit(cache=True, nogil=True)


@_jit
def select_tokens(
    query_start: npt.NDArray[np.int32],
    positions: npt.NDArray[np.int64],
    token_ids: npt.NDArray[Any],
    row_request: npt.NDArray[np.int32],
    request_selectors: npt.NDArray[np.int32],
    selector_intervals: npt.NDArray[np.int32],
    intervals: npt.NDArray[np.int32],
    selector_ids: npt.NDArray[np.int32],
    wanted_ids: npt.NDArray[np.int32],
    selector_bos: npt.NDArray[np.bool_],
    token_index: npt.NDArray[np.int64],
    token_request: npt.NDArray[np.int32],
    token_selected: npt.NDArray[np.uint64],
) -> int:
    """The step's plan: which tokens of the flat batch belong to requests with a program, and what selects them.

    Bit s of ``token_selected`` is set when selector s of the token's own request holds at the token's own position.
    Rows of the batch are ``query_start[r] … query_start[r + 1]``; ``row_request[r]`` is the resident request or -1.
    ``intervals`` is ``[k, 2]``; selectors of request q are ``request_selectors[q] … request_selectors[q + 1]``.
    Returns the number of planned tokens (prefix of the three outputs).
    """
    n = 0
    for r in range(row_request.shape[0]):
        q = row_request[r]
        if q < 0:
            continue
        for t in range(query_start[r], query_start[r + 1]):
            bits = np.uint64(0)
            position = positions[t]
            for s in range(request_selectors[q], request_selectors[q + 1]):
                hit = False
                for k in range(selector_intervals[s], selector_intervals[s + 1]):
                    if intervals[k, 0] <= position < intervals[k, 1]:
                        hit = True
                        break
                if not hit and (position > 0 or selector_bos[s]):
                    for k in range(selector_ids[s], selector_ids[s + 1]):
                        if wanted_ids[k] == token_ids[t]:
                            hit = True
                            break
                if hit:
                    bits |= np.uint64(1) << np.uint64(s - request_selectors[q])
            token_index[n] = t
            token_request[n] = q
            token_selected[n] = bits
            n += 1
    return n


BIN_8, BIN_16 = 2, 3
"""Bytes of the headers of msgpack's byte strings, shorter than 256 bytes or not."""


@_jit
def tell_tokens(
    positions: npt.NDArray[np.int64],
    at: npt.NDArray[np.int64],
    layer_ptr: npt.NDArray[np.int32],
    layers: npt.NDArray[np.int32],
    fired: npt.NDArray[np.uint64],
    dose: npt.NDArray[np.uint32],
    flags: npt.NDArray[np.uint8],
    out: npt.NDArray[np.uint8],
) -> None:
    """Fill in a message of records of one token each (:func:`editserver.engine.wire.form_of`).

    Args:
        positions: of each token, ``[n]``.
        at: where the position of each stands in ``out``.
        layer_ptr: CSR ``[n + 1]`` into ``layers``: rows of the arrays below.
        fired, dose, flags: ``[layers, tokens]``; of ``dose`` the bits.
    """
    for t in range(at.shape[0]):
        first, last = layer_ptr[t], layer_ptr[t + 1]
        n, place = last - first, at[t]
        for i in range(8):
            out[place + i] = (positions[t] >> (56 - 8 * i)) & 255
        place += 8 + 1 + (BIN_8 if 8 * n < 256 else BIN_16)
        for j in range(first, last):
            for i in range(8):
                out[place + i] = (fired[layers[j], t] >> np.uint64(8 * i)) & np.uint64(255)
            place += 8
        place += BIN_8 if 4 * n < 256 else BIN_16
        for j in range(first, last):
            for i in range(4):
                out[place + i] = (dose[layers[j], t] >> np.uint32(8 * i)) & np.uint32(255)
            place += 4
        place += BIN_8 if n < 256 else BIN_16
        for j in range(first, last):
            out[place] = flags[layers[j], t]
            place += 1


JOB_COLUMNS = DUE, RAN, ROWS, WIDTH, TYPE, AT, SHARE = range(7)
"""Of a layer's job, as ``Job`` in the C++ op's source has them."""
NOTHING, EDIT, ASK = range(3)
"""What is due: pass by; call the kernel with the arguments; ask Python."""
N_JOB = len(JOB_COLUMNS)


class DecodingBlock(NamedTuple):
    """Places in the int64 block that :func:`begin_decoding` is given: numbers, then addresses of contiguous arrays.

    ``kept``: the planned tokens' positions. ``jobs``: the C++ op's, ``[job_rows, JOB_COLUMNS]``, of which ``due`` is what they
    say in such steps, and ``tokens_at`` the place of the number of tokens among their arguments.
    """

    n: int
    rows: int
    stop: int
    tokens: int
    residents: int
    selectors: int
    intervals: int
    ids: int
    armed: int
    told_layers: int
    message_bytes: int
    job_rows: int
    tokens_at: int
    query_start: int
    row_request: int
    request_selectors: int
    interval_ptr: int
    interval_rows: int
    id_ptr: int
    wanted_ids: int
    bos: int
    places: int
    token_request: int
    token_selected: int
    kept: int
    at: int
    layer_ptr: int
    layers: int
    fired: int
    dose: int
    flags: int
    message: int
    jobs: int
    due: int


D = DecodingBlock(*range(len(DecodingBlock._fields)))
N_DECODING = len(D)


@numba.njit(types.int64(types.int64, types.int64, types.int64), cache=True)
def begin_decoding(block: int, positions_at: int, token_ids_at: int) -> int:
    """:func:`select_tokens` where all is as in the step before, but for what is in ``positions`` (int64) and ``token_ids``
    (int32), a token of each row; and the C++ op's jobs. Returns the number of planned tokens.

    Numbers in, a number out: between two steps of a model the caches are cold, and a call with that many arrays, or a line of
    numpy, costs more than all that is done here.
    """
    a = numba.carray(pointer(block), (N_DECODING,), np.int64)
    rows, tokens, residents, selectors = a[D.rows], a[D.tokens], a[D.residents], a[D.selectors]
    positions = numba.carray(pointer(positions_at), (rows,), np.int64)
    places = numba.carray(pointer(a[D.places]), (tokens,), np.int64)
    n: int = select_tokens(
        numba.carray(pointer(a[D.query_start]), (rows + 1,), np.int32),
        positions,
        numba.carray(pointer(token_ids_at), (rows,), np.int32),
        numba.carray(pointer(a[D.row_request]), (rows,), np.int32),
        numba.carray(pointer(a[D.request_selectors]), (residents + 1,), np.int32),
        numba.carray(pointer(a[D.interval_ptr]), (selectors + 1,), np.int32),
        numba.carray(pointer(a[D.interval_rows]), (a[D.intervals], 2), np.int32),
        numba.carray(pointer(a[D.id_ptr]), (selectors + 1,), np.int32),
        numba.carray(pointer(a[D.wanted_ids]), (a[D.ids],), np.int32),
        numba.carray(pointer(a[D.bos]), (selectors,), np.bool_),
        places,
        numba.carray(pointer(a[D.token_request]), (tokens,), np.int32),
        numba.carray(pointer(a[D.token_selected]), (tokens,), np.uint64),
    )
    kept = numba.carray(pointer(a[D.kept]), (tokens,), np.int64)
    for t in range(n):
        kept[t] = positions[places[t]]
    jobs = numba.carray(pointer(a[D.jobs]), (a[D.job_rows], N_JOB), np.int64)
    due = numba.carray(pointer(a[D.due]), (a[D.job_rows],), np.int64)
    for layer in range(a[D.job_rows]):
        jobs[layer, DUE], jobs[layer, RAN], jobs[layer, ROWS] = due[layer], 0, a[D.stop]
        if due[layer] == EDIT:
            numba.carray(pointer(jobs[layer, AT]), (a[D.tokens_at] + 1,), np.int64)[a[D.tokens_at]] = n
    return n


@numba.njit(types.int64(types.int64, types.int64), cache=True)
def end_decoding(block: int, certain: int) -> int:
    """Fill in the message of the step, and have the op pass by until the next one; 0 where it did not do all its jobs: then only
    if that is ``certain`` to be right."""
    a = numba.carray(pointer(block), (N_DECODING,), np.int64)
    jobs = numba.carray(pointer(a[D.jobs]), (a[D.job_rows], N_JOB), np.int64)
    for layer in range(a[D.job_rows]):
        if jobs[layer, DUE] == EDIT and not jobs[layer, RAN] and not certain:
            return 0
    n, tokens, armed = a[D.n], a[D.tokens], a[D.armed]
    tell_tokens(
        numba.carray(pointer(a[D.kept]), (n,), np.int64),
        numba.carray(pointer(a[D.at]), (n,), np.int64),
        numba.carray(pointer(a[D.layer_ptr]), (n + 1,), np.int32),
        numba.carray(pointer(a[D.layers]), (a[D.told_layers],), np.int32),
        numba.carray(pointer(a[D.fired]), (armed, tokens), np.uint64),
        numba.carray(pointer(a[D.dose]), (armed, tokens), np.uint32),
        numba.carray(pointer(a[D.flags]), (armed, tokens), np.uint8),
        numba.carray(pointer(a[D.message]), (a[D.message_bytes],), np.uint8),
    )
    for layer in range(a[D.job_rows]):
        jobs[layer, DUE] = NOTHING
    return 1
