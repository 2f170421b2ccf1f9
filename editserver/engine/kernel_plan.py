"""Which tokens of a batch are planned, and what selects them: compiled with numba, as :mod:`editserver.engine.kernel_cpu`."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

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
