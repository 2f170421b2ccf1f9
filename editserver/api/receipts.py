"""The receipt of one choice: what was asked, which tokens it selected, what the engine really did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from editserver import metrics
from editserver.api.rule_report import RuleReport, opened
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
    compiled: Compiled,
    journal: Journal | None,
    fed: Sequence[int],
    prompt_len: int,
    computed_from: int,
    *,
    stop: int | None = None,
    report: RuleReport | None = None,
) -> dict[str, Any]:
    """``{"digest", "receipt": [entry per intervention]}`` of one choice; edits of stand-ins say ``"approximate"``, those
    behind a sequence gate what it saw, those with ``when`` where that held, rule sets what they concluded and why.

    Args:
        compiled: the request's interventions, resolved for the choice's prompt.
        journal: what the engine reported; None only when the program is empty.
        fed: token ids that were fed to the model, from position 0 (prompt and all but the last sampled token).
        prompt_len: how many of them are the prompt.
        computed_from: first position that was computed in this request.
        stop: how many positions count, where that is more than the ids in ``fed`` (default: as many).
        report: the story of its rules; None where it has none.

    Raises:
        InterventionError: ``intervention_failed``: the engine's rules did something that their evidence does not explain.
    """
    stop = len(fed) if stop is None else stop
    digest = None if compiled.program is None else compiled.program.digest()
    trace = None if journal is None else journal.rules
    explained = {} if report is None or trace is None else report.explain(trace, stop, prompt_len)
    entries = []
    for i, entry in enumerate(compiled.entries):
        part = None if compiled.rules is None else compiled.rules.part(i)
        if entry.type == "rules":
            told = _rules(i, entry, journal, stop, computed_from)
            if part is not None and report is not None and trace is not None:
                told |= report.entry(part, explained[i], trace, stop)
            else:
                told |= {"fired": [], "fired_count": 0, "propositions": [], "actions": []}
        else:
            told = _entry(i, entry, journal, fed, prompt_len, stop, computed_from)
            told |= _gate(compiled.program, entry, journal, stop)
            if entry.when is not None and trace is not None:
                told["when"] = opened(trace, entry.when, stop)
        entries.append(told)
    return {"digest": digest, "receipt": entries}


def _rules(i: int, entry: Entry, journal: Journal | None, stop: int, computed_from: int) -> dict[str, Any]:
    """What is said of every rule set: what its actions wrote, per layer."""
    told: dict[str, Any] = {"id": entry.id, "type": entry.type, "computed_from": computed_from}
    edited: dict[str, dict[str, Any]] = {}
    for layer in entry.layers:
        numbers = _numbers(i, layer, journal, stop, computed_from)
        edited[str(layer)] = {name: value for name, value in numbers.items() if name != "computed_from"}
        metrics.EDITED_TOKENS.labels(entry.type).inc(numbers["fired"])
        if numbers["fired"]:
            metrics.DOSE.labels(entry.type).observe(numbers["dose_mean"] or 0.0)
    told |= {"edited": edited} if edited else {}
    return told | ({"approximate": True} if entry.approximate else {}) | ({"noop": True} if entry.noop else {})


def _entry(
    i: int,
    entry: Entry,
    journal: Journal | None,
    fed: Sequence[int],
    prompt_len: int,
    stop: int,
    computed_from: int,
) -> dict[str, Any]:
    selected, in_prompt = entry.count(fed, prompt_len)
    head: dict[str, Any] = {"id": entry.id, "type": entry.type}
    applied: dict[int, dict[str, Any]] = {}
    for layer in entry.layers:
        counts = {"tokens_edited": selected, "prompt_tokens_edited": in_prompt}
        applied[layer] = counts | _numbers(i, layer, journal, stop, computed_from)
        metrics.EDITED_TOKENS.labels(entry.type).inc(selected)
        if applied[layer]["fired"]:
            metrics.DOSE.labels(entry.type).observe(applied[layer]["dose_mean"] or 0.0)
    tail = ({"approximate": True} if entry.approximate else {}) | ({"noop": True} if entry.noop else {})
    if len(applied) == 1:
        (layer, numbers), *_ = applied.items()
        return head | {"layer": layer} | numbers | tail
    return head | {"layers": {str(layer): numbers for layer, numbers in applied.items()}} | tail


def _gate(program: Program | None, entry: Entry, journal: Journal | None, stop: int) -> dict[str, Any]:
    """What the sequence gate of an entry saw: its largest statistic, and from where on it was open."""
    if entry.gate is None or entry.noop or program is None or journal is None:
        return {}
    (at,) = entry.layers
    (layer,) = (layer for layer in program.layers if layer.layer == at)
    open_from, statistic = journal.gate(at, layer.gates.index(entry.gate), stop)
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
