"""Sequence gates: whether a remap acts at a token, from which tokens of the sequence so far were hits.

A gate sees one bit per token (a latent of F was active there) and keeps a small state, so a sequence may arrive in chunks
of any size; what it answers for a token depends on that token and earlier ones only. As a plain loop, with *evidence*
every token but absolute position 0 (that one too with ``include_bos``), e_t the evidence bit and x_t the hit bit::

    seen += e_t;  hits += e_t·x_t
    share    statistic = hits / seen                     over "seen": at every token
                                                         over "prompt": decided at the last prompt token, held from it on
    window   statistic = hits among the last w evidence tokens / min(seen, w)
    cusum    S = max(0, S + x_t − k) at evidence tokens; statistic = S; after an alarm S = 0 if ``reset``
    open_t   = statistic > threshold                     and with ``latch`` ever after

DSG (2504.08192) is ``share`` over the prompt, here without position 0 in the denominator. It is open to *dilution*
(:mod:`interventions.maps.dilution`), which the other two answer. A ``share`` over "seen" acts from the token on at which it
opens: the earlier tokens of the prompt stay as they are.

Counts are integers and S is a fixed-point integer (:data:`STEP`), so chunking changes no bit; a share is one IEEE
float64 division, which tells all shares of fewer than 2²⁶ tokens apart.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from interventions.errors import InterventionError
from interventions.wording import show

Bits = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

STEP = 2.0**-20
"""Resolution of CUSUM: S and ``k`` are multiples of it."""
LONGEST_WINDOW = 1 << 16


@dataclass(frozen=True)
class ShareGate:
    """Share of hit tokens: over the whole ``prompt`` once, or over all tokens ``seen`` so far at every token.

    Attributes:
        threshold: opens above it.
        over: "prompt" or "seen".
        least: evidence tokens below which a share over "seen" says nothing and the gate stays closed.
        latch: stay open once opened ("prompt" always does).
        include_bos: position 0 is evidence too.
    """

    threshold: float
    over: Literal["prompt", "seen"] = "prompt"
    least: int = 1
    latch: bool = False
    include_bos: bool = False

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        _check_range("least", self.least, 1, 1 << 30)
        if self.over not in ("prompt", "seen"):
            raise _invalid("over", f"expected prompt or seen, got {show(self.over)}")


@dataclass(frozen=True)
class WindowGate:
    """Share of hits among the last ``window`` evidence tokens; closed before ``least`` of them."""

    threshold: float
    window: int
    least: int = 1
    latch: bool = False
    include_bos: bool = False

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        _check_range("window", self.window, 1, LONGEST_WINDOW)
        _check_range("least", self.least, 1, self.window)


@dataclass(frozen=True)
class CusumGate:
    """Page's cumulative sum: every hit adds 1 − k, every other token takes k away, never below 0.

    Attributes:
        threshold: the h of the literature, in hits.
        k: share of hits that is still ordinary, in [0, 1); rounded to a multiple of :data:`STEP`.
        reset: start again from 0 after an alarm (without ``latch`` the gate is then open at the alarm only).
        latch: stay open once opened.
        include_bos: position 0 is evidence too.
    """

    threshold: float
    k: float
    reset: bool = False
    latch: bool = False
    include_bos: bool = False

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        if not 0.0 <= self.k < 1.0:
            raise _invalid("k", f"must be at least 0 and below 1, got {show(self.k)}")


Gate = ShareGate | WindowGate | CusumGate


@dataclass(frozen=True)
class GateState:
    """What a gate remembers between chunks: the same for every way in which the tokens so far were split.

    Attributes:
        position: absolute position of the next token.
        seen, hits: evidence tokens so far and hits among them (over "prompt": of the prompt).
        recent: bits of the last ``window`` evidence tokens, the newest lowest; 0 for other gates.
        level: S in units of :data:`STEP`; 0 for other gates.
        open: whether the gate was open at the last token.
    """

    position: int = 0
    seen: int = 0
    hits: int = 0
    recent: int = 0
    level: int = 0
    open: bool = False

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        fields = [self.position, self.seen, self.hits, f"{self.recent:x}", self.level, self.open]
        return json.dumps(fields, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> GateState:
        """Inverse of :meth:`to_bytes`; ValueError for anything else."""
        fields = json.loads(data)
        if not isinstance(fields, list) or [type(field) for field in fields] != [int, int, int, str, int, bool]:
            raise ValueError("not a gate state")
        position, seen, hits, recent, level, is_open = fields
        state = GateState(position, seen, hits, int(recent, 16), level, is_open)
        if state.to_bytes() != data or min(position, seen, hits, state.recent, level) < 0:
            raise ValueError("not a gate state")
        return state


START = GateState()


def update(gate: Gate, state: GateState, hits: npt.ArrayLike, prompt_len: int | None = None) -> tuple[Bits, GateState]:
    """Whether the gate is open at each of the next tokens, and the state after them.

    Args:
        gate: which gate.
        state: after the tokens before these; :data:`START` at position 0.
        hits: bool ``[n]``, one bit per token.
        prompt_len: length of the request's original prompt; needed by a share over "prompt".

    Returns:
        ``(open, state)``, open: bool ``[n]``.
    """
    opened, _, after = advance(gate, state, hits, prompt_len)
    return opened, after


def advance(
    gate: Gate, state: GateState, hits: npt.ArrayLike, prompt_len: int | None = None
) -> tuple[Bits, Floats, GateState]:
    """:func:`update`, with the statistic at each token in between: ``(open [n], statistic [n], state)``."""
    bits = np.asarray(hits, dtype=np.bool_)
    if bits.ndim != 1:
        raise ValueError(f"expected one bit per token, got shape {list(bits.shape)}")
    statistic, after = _statistics(gate, state, bits, prompt_len)
    opened = statistic > gate.threshold
    if isinstance(gate, ShareGate) and gate.over == "prompt":
        opened |= state.open  # decided in an earlier chunk
    if gate.latch:
        opened = np.logical_or.accumulate(opened) | state.open
    return opened, statistic, replace(after, open=bool(opened[-1]) if len(bits) else state.open)


def statistic(gate: Gate, hits: npt.ArrayLike, prompt_len: int | None = None) -> float:
    """The largest statistic along a whole sequence: the gate opens somewhere in it exactly if this is above its threshold.

    This is what a threshold is calibrated on. ``prompt_len`` defaults to the length of the sequence.
    """
    bits = np.asarray(hits, dtype=np.bool_)
    never = replace(gate, threshold=math.inf)
    values, _ = _statistics(never, START, bits, len(bits) if prompt_len is None else prompt_len)
    return float(values.max(initial=0.0))


def _statistics(gate: Gate, state: GateState, bits: Bits, prompt_len: int | None) -> tuple[Floats, GateState]:
    """The gate's statistic at each token (0 where it says nothing) and the state after, ``open`` not yet updated."""
    positions = state.position + np.arange(len(bits))
    evidence = np.ones(len(bits), np.bool_) if gate.include_bos else positions > 0
    if isinstance(gate, ShareGate) and gate.over == "prompt":
        if prompt_len is None:
            raise ValueError("a share over the prompt needs the prompt's length")
        evidence &= positions < prompt_len
    counted = bits & evidence
    seen: Integers = state.seen + np.cumsum(evidence, dtype=np.int64)
    hits: Integers = state.hits + np.cumsum(counted, dtype=np.int64)
    after = replace(state, position=state.position + len(bits))
    if len(bits):
        after = replace(after, seen=int(seen[-1]), hits=int(hits[-1]))
    if isinstance(gate, CusumGate):
        levels, level = _cusum(gate, state.level, counted, evidence)
        values: Floats = levels.astype(np.float64) * STEP
        return values, replace(after, level=level)
    if isinstance(gate, WindowGate):
        within, recent = _window(gate.window, state, counted, evidence)
        share = within / np.maximum(np.minimum(seen, gate.window), 1)
        return np.where(seen >= gate.least, share, 0.0), replace(after, recent=recent)
    share = hits / np.maximum(seen, 1)
    if gate.over == "seen":
        return np.where(seen >= gate.least, share, 0.0), after
    assert prompt_len is not None
    return np.where((positions >= prompt_len - 1) & (state.position < prompt_len), share, 0.0), after


def _window(window: int, state: GateState, counted: Bits, evidence: Bits) -> tuple[Integers, int]:
    """Hits among the last ``window`` evidence tokens at each token, and the bits that the next chunk needs."""
    if len(evidence) == 1 and evidence[0]:  # decoding: no need to spell the window out
        recent = (state.recent << 1 | int(counted[0])) & ((1 << window) - 1)
        return np.array([recent.bit_count()], np.int64), recent
    held = min(state.seen, window)
    before = np.array([state.recent >> i & 1 for i in range(held - 1, -1, -1)], np.int64)
    line = np.concatenate([before, counted[evidence].astype(np.int64)])
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(line)])
    ends = held + np.cumsum(evidence, dtype=np.int64)  # evidence tokens of `line` up to each token
    within: Integers = total[ends] - total[np.maximum(ends - window, 0)]
    recent = 0
    for bit in line[-window:].tolist():
        recent = recent << 1 | bit
    return within, recent


def _cusum(gate: CusumGate, level: int, counted: Bits, evidence: Bits) -> tuple[Integers, int]:
    """S at each token, in steps, and the level with which the next chunk begins.

    Without alarms S_t = C_t − min(−S_0, min_{j ≤ t} C_j), C the running sum of the increments: integers, so exactly the
    loop. An alarm that resets starts a new run after it.
    """
    one, k = round(1 / STEP), round(gate.k / STEP)
    steps = np.where(evidence, counted * one - k, 0).astype(np.int64)
    limit = gate.threshold / STEP  # exact: STEP is a power of two
    levels = np.empty(len(steps), np.int64)
    start = 0
    while start < len(steps):
        total = np.cumsum(steps[start:])
        run = total - np.minimum(np.minimum.accumulate(total), -level)
        alarms = np.flatnonzero(run > limit) if gate.reset else np.empty(0, np.int64)
        stop = int(alarms[0]) + 1 if len(alarms) else len(run)
        levels[start : start + stop] = run[:stop]
        level = 0 if len(alarms) else int(run[-1])
        start += stop
    return levels, level


def _check_threshold(threshold: float) -> None:
    if math.isnan(threshold) or threshold < 0:
        raise _invalid("threshold", f"must be a number of at least 0, got {show(threshold)}")


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _invalid(field, f"must be {low} to {high}, got {show(value)}")


def _invalid(field: str, message: str) -> InterventionError:
    return InterventionError("invalid_artifact", f"{field}: {message}", field)
