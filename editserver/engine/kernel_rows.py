"""Rows that move when requests come and go: compiled with numba, as :mod:`editserver.engine.kernel_cpu`."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_jit = numba.njit(cache=True, nogil=True)

_EXPONENT = np.uint32(0x7F800000)
"""Bits of a float32 that are all set in what is not finite."""


@_jit
def _copy(row: npt.NDArray[Any], shift: Any, into: npt.NDArray[np.uint32]) -> bool:
    finite = True
    for i in range(into.shape[0]):
        bits = np.uint32(row[i]) << shift
        finite &= (bits & _EXPONENT) != _EXPONENT
        into[i] = bits
    return finite


@_jit
def gather_rows(
    pairs: npt.NDArray[np.int64],
    encoder: npt.NDArray[Any],
    decoder: npt.NDArray[Any],
    gates: npt.NDArray[np.float32],
    read: npt.NDArray[np.uint32],
    write: npt.NDArray[np.uint32],
    gate: npt.NDArray[np.float32],
) -> bool:
    """Copy features into the bank's rows; False, with some of them copied, where one is not there or not finite.

    ``pairs`` is ``[m, 2]``, index and slot; ``encoder`` and ``decoder`` are ``[n, d]``, the bits of float32 (uint32) or of
    bfloat16 (uint16); ``gates`` is ``[n, 4]``; the bank is ``read`` and ``write [rows, d]``, the bits of float32, and ``gate
    [rows, 4]``.
    """
    of_encoder, of_decoder = np.uint32(32 - 8 * encoder.itemsize), np.uint32(32 - 8 * decoder.itemsize)
    for m in range(pairs.shape[0]):
        index, slot = pairs[m]
        if index < 0 or index >= gates.shape[0]:
            return False
        if not _copy(encoder[index], of_encoder, read[slot]) or not _copy(decoder[index], of_decoder, write[slot]):
            return False
        for i in range(gates.shape[1]):
            gate[slot, i] = gates[index, i]
            if not np.isfinite(gates[index, i]):
                return False
    return True


@_jit
def keep_rows(which: npt.NDArray[np.bool_], rows: npt.NDArray[np.uint8]) -> int:
    """Move the rows ``[at least len(which), bytes]`` that ``which`` marks to the front, in their order; how many they are."""
    n = 0
    for i in range(which.shape[0]):
        if which[i]:
            if n != i:
                rows[n] = rows[i]
            n += 1
    return n


@_jit
def rows_of_owners(which: npt.NDArray[np.bool_], pointers: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Of every row, whether its owner is marked: owner i has the rows ``pointers[i] … pointers[i + 1] − 1``."""
    marked = np.empty(pointers[which.shape[0]], np.bool_)
    for i in range(which.shape[0]):
        marked[pointers[i] : pointers[i + 1]] = which[i]
    return marked


@_jit
def keep_blocks(which: npt.NDArray[np.bool_], pointers: npt.NDArray[np.int32]) -> int:
    """``pointers`` as they are when the rows of the owners that are not marked are taken out; how many there are then."""
    n, begins = 1, pointers[0]
    for i in range(which.shape[0]):
        ends = pointers[i + 1]
        if which[i]:
            pointers[n] = pointers[n - 1] + (ends - begins)
            n += 1
        begins = ends
    return n
