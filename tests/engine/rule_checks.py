"""The promises about rules under prefix caching, chunking and preemption, as functions that raise when one is broken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from interventions.program import parse_feature_key
from interventions.rules.machine import Machine, RuleTrace, holds, scores
from tests.engine.lab import Lab, plain
from tests.engine.schedules import SHARED, behind_a_prefix, in_chunks, preempted
from tests.engine.shadow import fired_at
from tests.engine.support import Answer, Ask, prompt_of

TAIL = 8
READ = 24
"""Latents of each dictionary that rules may be about."""
A, B, C, D, E = "standard/l0", "jumprelu/l15", "topk/l15", "polysae/l15", "jumprelu/l29"
"""Where the rules look: single rows and whole dictionaries, layers behind one another."""

Json = dict[str, Any]


def inspected(names: Sequence[str] = (A, B, C, D, E)) -> list[Json]:
    """Reads all that rules may be about, position 0 included."""
    return [{"sae": name, "features": list(range(READ)), "include_bos": True} for name in names]


def activations(lab: Lab, ask: Ask, answer: Answer) -> dict[str, np.ndarray]:
    """SAE → float32 ``[tokens, READ]``, of what the answer's inspections saw."""
    assert answer.journal is not None
    found = {}
    for number, name in enumerate(answer.compiled.inspect_ids):
        readings = answer.journal.readings(number, 0, len(ask.prompt) + len(answer.token_ids) - 1)
        found[name] = np.array([[value for _, value in pairs] for _, pairs in readings], np.float32)
    return found


def threshold(values: np.ndarray, share: float) -> float:
    """In the middle of the widest gap near the share's quantile, so that no noise decides."""
    ordered = np.unique(values)
    near = (1 - share) * (len(ordered) - 1)
    first, last = max(0, int(near - len(ordered) / 8)), min(len(ordered) - 1, int(near + len(ordered) / 8) + 1)
    at = first + int(np.diff(ordered[first : last + 1]).argmax())
    return float(np.float32((ordered[at] + ordered[at + 1]) / 2))


def _liveliest(values: np.ndarray, n: int = 1) -> list[int]:
    """Latents that are on at most of the tokens, and off at few."""
    return np.unique(values, axis=0).std(axis=0).argsort()[::-1][:n].tolist()


def ruled(lab: Lab, prompt: list[int], refuse: str = "") -> list[Mapping[str, Any]]:
    """Rules of every kind that begin to act behind the shared blocks, with effects at two layers and on three dictionaries."""
    ask = Ask(prompt, inspect=inspected(), max_tokens=4)
    seen = {name: values[1:] for name, values in activations(lab, ask, lab.alone(ask)).items()}
    (a,), (b, b2), (c,), (d,), (e,) = (_liveliest(seen[name], 2 if name == B else 1) for name in (A, B, C, D, E))
    limit = threshold(seen[A][:, a], 0.6)
    many = int((seen[A][: SHARED + 1, a] > limit).sum())
    mixed = (seen[B][:, b] - np.float32(0.5) * seen[B][:, b2]).astype(np.float32)
    text = [
        f"proposition a = feature({A}, {a}) > {limit!r}",
        f"proposition b = feature({B}, {b}) - 0.5 * feature({B}, {b2}) >= {threshold(mixed, 0.5)!r}",
        f"proposition c = feature({C}, {c}) > {threshold(seen[C][:, c], 0.4)!r}",
        f"proposition d = tree({D}, if {d} > {threshold(seen[D][:, d], 0.5)!r} then 1 else 0.2) > 0.5",
        f"proposition e = feature({E}, {e}) >= {threshold(seen[E][:, e], 0.5)!r}",
        f"rule: at least {many} of seen(a) -> latch many",
        "rule: at least 10 % of prompt(b) -> settled",
        "rule: at least 3 of last(7, c or a) -> often",
        "rule: many and d -> both",
        "rule: settled and not both -> calm",
        "rule: prompt(a before c before d) and e -> late",
        f"on many: do {json.dumps(_steer('standard/l29', 5, 60.0))} from now on",
        f"on both: do {json.dumps(_set('polysae/l15', 40, 15.0))}",
        f"on calm: do {json.dumps(_set('topk/l15', 60, 30.0))} for 2 tokens",
        "on late: flag",
        "on often: log",
    ]
    return [{"type": "rules", "text": "\n".join(text + ([refuse] if refuse else []))}]


def _steer(sae: str, feature: int, strength: float) -> Json:
    return {"type": "steer", "sae": sae, "feature": feature, "strength": strength}


def _set(sae: str, index: int, value: float) -> Json:
    return {"type": "edit_features", "sae": sae, "features": [{"index": index, "op": "set", "value": value}]}


def trace_of(answer: Answer) -> RuleTrace:
    assert answer.journal is not None
    trace = answer.journal.rules
    assert trace is not None
    return trace


def assert_as_meant(lab: Lab, ask: Ask) -> None:
    """What the engine decided is what the machine makes of the engine's own readings, and it acted there and only there."""
    looking = replace(ask, inspect=inspected())
    answer = lab.alone(looking)
    trace, program = trace_of(answer), answer.compiled.program
    assert program is not None
    assert program.rules is not None
    digests = {lab.engine.catalogue.sae(name).sae.digest: name for name in (A, B, C, D, E)}
    acts = activations(lab, looking, answer)
    score = np.zeros(trace.held.shape, np.float32)
    for i, one in enumerate(program.rules.propositions):
        at = [parse_feature_key(key) for key in one.features]
        score[:, i] = scores(one, np.stack([acts[digests[digest]][:, index] for digest, index in at], axis=1))
    held = np.stack([holds(one, score[:, i]) for i, one in enumerate(program.rules.propositions)], axis=1)
    meant = Machine(program.rules, len(ask.prompt)).run(held, score)
    for part in ("held", "concluded", "active", "scores"):
        assert np.array_equal(getattr(trace, part), getattr(meant, part), equal_nan=part == "scores"), part
    assert answer.journal is not None
    for layer in program.layers:
        acting = {gate.action for gate in layer.gates}
        due = np.flatnonzero(trace.active[:, sorted(acting)].any(axis=1)).tolist()
        assert fired_at(answer.journal, 0, layer.layer, trace.n) == due
    alone = lab.alone(ask)
    assert alone.same_bits(answer), "looking changed what was looked at"
    assert np.array_equal(trace_of(alone).scores, trace.scores, equal_nan=True)


def _assert_as_alone(lab: Lab, ask: Ask, answer: Answer, tolerance: float) -> None:
    """Log-probabilities, every bit of the rules at every token, and the scores of what was computed."""
    alone = lab.alone(ask)
    lab.assert_as_alone(ask, answer, tolerance)
    assert answer.token_ids == alone.token_ids
    mine, theirs = trace_of(answer), trace_of(alone)
    assert mine.n == len(ask.prompt) + len(answer.token_ids) - 1
    for part in ("held", "concluded", "active"):
        different = np.argwhere(getattr(mine, part) != getattr(theirs, part))
        assert not len(different), f"{part} differs from the run alone at (token, number) {different[:5].tolist()}"
    assert answer.journal is not None
    start = answer.journal.computed_from
    assert np.allclose(mine.scores[start:], theirs.scores[start:], rtol=1e-3, atol=1e-3, equal_nan=True)
    assert np.isnan(mine.scores[:start]).all()
    for layer in answer.compiled.entries[0].layers:
        due = [p for p in fired_at(_journal(alone), 0, layer, mine.n) if p >= start]
        assert fired_at(_journal(answer), 0, layer, mine.n) == due


def _journal(answer: Answer) -> Any:
    assert answer.journal is not None
    return answer.journal


def asks_of(lab: Lab) -> list[Ask]:
    """Two prompts over the same blocks, of the same length, with tails of their own, and one set of rules."""
    prompts = [prompt_of(760, SHARED) + prompt_of(761 + i, TAIL + 1)[1:] for i in range(2)]
    edits = ruled(lab, prompts[0])
    asks = [Ask(prompt, edits, max_tokens=4) for prompt in prompts]
    for ask in asks:
        lab.alone(ask)
        lab.alone(plain(ask))
    trace = trace_of(lab.alone(asks[0]))
    begins = [int(row.argmax()) for row in trace.active.T if row.any()]
    assert len(begins) >= 4, f"only {len(begins)} of {trace.active.shape[1]} actions are ever active"
    assert max(begins) >= SHARED, "everything begins in the shared blocks: memories are not needed"
    assert not trace.active[1:].all(axis=0).any(), "an action is always active"
    lab.assert_edit_shows(asks[0], lab.alone(asks[0]))
    return asks


def ruled_prefix(lab: Lab) -> None:
    """A request behind a prefix hit has the rules of one that computes everything; so has another prompt over the prefix."""
    behind_a_prefix(lab, asks_of(lab), _assert_as_alone)


def ruled_chunks(lab: Lab, size: int) -> None:
    """However the prompt is cut."""
    in_chunks(lab, asks_of(lab), size, _assert_as_alone)


def ruled_preempted(lab: Lab) -> None:
    """Requests that lose their blocks while they generate have the same rules when they come back."""
    preempted(lab, asks_of(lab), 780, _assert_as_alone)


def ruled_neighbours(lab: Lab) -> None:
    """Turning rules on in one row changes no bit of plain and of edited neighbours."""
    ask = asks_of(lab)[0]
    others = [Ask(prompt_of(790 + i, 19 + i), max_tokens=4) for i in range(2)]
    others.append(replace(others[0], interventions=[_steer("standard/l15", 3, 40.0)]))
    before = lab.engine.run([*others, plain(ask)], cold=True)
    after = lab.engine.run([*others, ask], cold=True)
    for mine, theirs in zip(after[:-1], before[:-1], strict=True):
        assert mine.same_bits(theirs), "a neighbour changed with the rules of another request"
    _assert_as_alone(lab, ask, after[-1], lab.noise([plain(ask)], before[-1:]))
