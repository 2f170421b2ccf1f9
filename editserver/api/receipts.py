"""The receipt of one choice: what was asked, which tokens it selected, what the engine really did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from editserver import metrics
from editserver.engine.journal import Journal
from interventions.compile import Compiled, Entry
from interventions.program import GateKind, Program

GATES = {
    GateKind.SHARE_PROMPT: "share",
    GateKind.SHARE_SEEN: "share",
    GateKind.WINDOW: "window",
    GateKind.CUSUM: "cusum",
}
OVER = {GateKind.SHARE_PROMPT: "prompt", GateKind.SHARE_SEEN: "seen"}


def build_receipt(
    compiled: Compiled, journal: Journal | None, fed: Sequence[int], prompt_len: int, computed_from: int
) -> dict[str, Any]:
    """``{"digest", "receipt": [entry per intervention]}`` of one choice; edits of stand-ins say ``"approximate"``, those
    behind a sequence gate what it saw.

    Args:
        compiled: the request's interventions, resolved for the choice's prompt.
        journal: what the engine reported; None only when the program is empty.
        fed: token ids that were fed to the model, from position 0 (prompt and all but the last sampled token).
        prompt_len: how many of them are the prompt.
        computed_from: first position that was computed in this request.
    """
    digest = None if compiled.program is None else compiled.program.digest()
    entries = [
        _entry(i, entry, journal, fed, prompt_len, computed_from) | _gate(compiled.program, entry, journal)
        for i, entry in enumerate(compiled.entries)
    ]
    return {"digest": digest, "receipt": entries}


def _entry(
    i: int, entry: Entry, journal: Journal | None, fed: Sequence[int], prompt_len: int, computed_from: int
) -> dict[str, Any]:
    selected, in_prompt = entry.count(fed, prompt_len)
    head: dict[str, Any] = {"id": entry.id, "type": entry.type}
    applied: dict[int, dict[str, Any]] = {}
    for layer in entry.layers:
        counts = {"tokens_edited": selected, "prompt_tokens_edited": in_prompt}
        applied[layer] = counts | _numbers(i, layer, journal, len(fed), computed_from)
        metrics.EDITED_TOKENS.labels(entry.type).inc(selected)
        if applied[layer]["fired"]:
            metrics.DOSE.labels(entry.type).observe(applied[layer]["dose_mean"] or 0.0)
    tail = ({"approximate": True} if entry.approximate else {}) | ({"noop": True} if entry.noop else {})
    if len(applied) == 1:
        (layer, numbers), *_ = applied.items()
        return head | {"layer": layer} | numbers | tail
    return head | {"layers": {str(layer): numbers for layer, numbers in applied.items()}} | tail


def _gate(program: Program | None, entry: Entry, journal: Journal | None) -> dict[str, Any]:
    """What the sequence gate of an entry saw: its largest statistic, and from where on it was open."""
    if entry.gate is None or entry.noop or program is None or journal is None:
        return {}
    (at,) = entry.layers
    (layer,) = (layer for layer in program.layers if layer.layer == at)
    open_from, statistic = journal.gate(at, layer.gates.index(entry.gate))
    kind = {"kind": GATES[entry.gate.kind]} | ({"over": OVER[entry.gate.kind]} if entry.gate.kind in OVER else {})
    return {"gate": kind | {"threshold": entry.gate.threshold, "statistic": statistic, "open_from": open_from}}


def _numbers(i: int, layer: int, journal: Journal | None, stop: int, computed_from: int) -> dict[str, Any]:
    if journal is None:
        return {"fired": 0, "computed_from": computed_from, "dose_mean": 0.0, "dose_max": 0.0, "clamped": 0}
    stats = journal.stats(i, layer, stop)
    return {
        "fired": stats.fired,
        "computed_from": computed_from,
        "dose_mean": _finite(stats.dose_mean),
        "dose_max": _finite(stats.dose_max),
        "clamped": stats.clamped,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: a dose beyond float32 is reported as null."""
    return round(value, 6) if math.isfinite(value) else None
