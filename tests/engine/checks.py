"""The promises about isolation, cache and schedule as functions that raise ``AssertionError`` when one is broken.

The tests named after the promises call them on a healthy engine; ``test_mutants`` calls them on engines that were
deliberately broken, and each must fail.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from editserver.library import Vector, VectorLibrary
from tests.engine import gate_checks
from tests.engine.lab import DIFFERENT, Driver, Lab, chunked, plain, scarce, set_features, steer, watched
from tests.engine.shadow import assert_edited_where_asked
from tests.engine.support import BLOCK, Ask, prompt_of

Edits = Sequence[Mapping[str, Any]]

# -- promise 1: neighbours --------------------------------------------------------------------------------------------

TOGGLED_ROW = 3
ALWAYS = f"""
rule: feature(standard/l0, 1) >= 0 -> always
on always: do {json.dumps(steer(15, 11))}
"""
"""Rules that hold at every token but position 0."""
TOGGLES: dict[str, dict[str, Any]] = {
    "steer": {"interventions": [steer(15, 11)]},
    "features": {"interventions": [set_features("gated/l15", {5: 30.0, 9: -20.0})]},
    "topk": {"interventions": [set_features("topk/l15", {7: 40.0})]},
    "joint": {"interventions": [set_features("polysae/l15", {7: 15.0, 8: -9.0})]},
    "rules": {"interventions": [{"type": "rules", "text": ALWAYS}]},
    "inspect": {"inspect": {"sae": "jumprelu/l15", "top_k": 4, "features": [2]}},
}
"""What row ``TOGGLED_ROW`` of the batch does instead of nothing."""

OTHERS: dict[int, Edits] = {
    0: [steer(15, 3)],
    2: [set_features("jumprelu/l15", {5: 30.0})],
    4: [set_features("polysae/l15", {2: 15.0})],
    5: [set_features("topk/l15", {1: 40.0})],
    6: [steer(15, 4, 60.0, ["last_prompt_token", "generated"]), steer(29, 5, 60.0)],
}
"""The edited ones among the other seven rows."""


def neighbours(lab: Lab, toggles: Sequence[str] = tuple(TOGGLES), max_tokens: int = 4) -> None:
    """Toggling one row's edit leaves ids and log-probabilities of the seven others bit for bit as they were."""
    bare = [Ask(prompt_of(row, 17 + row), max_tokens=max_tokens) for row in range(8)]
    batch = [replace(ask, interventions=OTHERS.get(row, ())) for row, ask in enumerate(bare)]
    unedited = lab.engine.run(bare, cold=True)
    before = lab.engine.run(batch, cold=True)
    tolerance = lab.noise(bare[:4], unedited[:4])
    for row in OTHERS:
        assert_edited_where_asked(batch[row], before[row])
        lab.assert_edit_shows(batch[row], before[row], unedited[row], tolerance)
        lab.assert_as_alone(batch[row], before[row], tolerance)
    for row in set(range(8)) - OTHERS.keys():
        assert before[row].same_bits(unedited[row]), f"row {row} is plain and changed with its edited neighbours"
    for name in toggles:
        batch[TOGGLED_ROW] = ask = replace(bare[TOGGLED_ROW], **TOGGLES[name])
        after = lab.engine.run(batch, cold=True)
        for row in set(range(8)) - {TOGGLED_ROW}:
            assert after[row].same_bits(before[row]), f"row {row} changed when row {TOGGLED_ROW} turned to {name}"
        answer = after[TOGGLED_ROW]
        assert_edited_where_asked(ask, answer)
        lab.assert_as_alone(ask, answer, tolerance)
        if ask.interventions:
            lab.assert_edit_shows(ask, answer, unedited[TOGGLED_ROW], tolerance)
            continue
        assert answer.same_bits(unedited[TOGGLED_ROW]), "looking changed what was looked at"
        assert answer.journal is not None
        n_fed = len(ask.prompt) + max_tokens - 1
        readings = answer.journal.readings(0, 0, n_fed)
        assert [position for position, _ in readings] == list(range(1, n_fed))


# -- promise 2: prefix cache ------------------------------------------------------------------------------------------

SHARED = 3 * BLOCK
KINDS: dict[str, Edits] = {
    "none": [],
    "A": [steer(15, 3)],
    "B": [set_features("jumprelu/l15", {5: 30.0})],
    "phase": [steer(15, 6, 60.0, ["last_prompt_token", "generated"])],
}


def cache_matrix(lab: Lab, kinds: Sequence[str] = tuple(KINDS), seed: int = 0) -> None:
    """Any order of {none, A, B, …} over prompts that share three blocks: equal edits share them, others never do."""
    prompts = [prompt_of(200, SHARED + 2) + prompt_of(300 + i, 6)[1:] for i in range(2)]
    asks = {(kind, i): Ask(prompts[i], KINDS[kind], max_tokens=3) for kind in kinds for i in range(2)}
    for ask in asks.values():
        lab.alone(ask)
    order = [(kind, i) for kind in kinds for i in range(2)]
    random.Random(seed).shuffle(order)
    lab.engine.reset_cache()
    answers = {}
    seen: set[str] = set()
    for kind, i in order:
        answer = answers[kind, i] = lab.engine.run([asks[kind, i]])[0]
        due = SHARED if kind in seen else 0
        assert answer.cached == due, f"{kind} after {sorted(seen)} had {answer.cached} cached tokens, {due} are due"
        seen.add(kind)
    together = dict(zip(order, lab.engine.run([asks[key] for key in order]), strict=True))
    for (kind, _), answer in together.items():
        assert answer.cached >= SHARED, f"{kind} shared nothing with itself"
    for found in (answers, together):
        tolerance = lab.noise([asks["none", i] for i in range(2)], [found["none", i] for i in range(2)])
        for key, answer in found.items():
            lab.assert_as_alone(asks[key], answer, tolerance)
            if asks[key].interventions:
                assert_edited_where_asked(asks[key], answer)
                lab.assert_edit_shows(asks[key], answer)


def next_turn(lab: Lab, edits: Edits) -> tuple[Ask, int]:
    """Run a turn whose answer fills a block, then the next one on a warm cache; returns the latter and its hits."""
    first = Ask(prompt_of(210, SHARED - 6), edits, max_tokens=8)
    said = lab.alone(first).token_ids
    second = Ask([*first.prompt, *said, *prompt_of(310, 12)[1:]], edits, max_tokens=3)
    for ask in (second, plain(second)):
        lab.alone(ask)  # now: a cold run forgets what is cached
    lab.engine.reset_cache()
    turns = lab.engine.run([first])
    assert turns[0].token_ids == said
    answer = lab.engine.run([second])[0]
    if edits:
        assert_edited_where_asked(second, answer)
        lab.assert_edit_shows(second, answer)
    tolerance = lab.noise([plain(second)], lab.engine.run([plain(second), plain(second)])[1:])
    lab.assert_as_alone(second, answer, tolerance)
    again = lab.engine.run([second])[0]
    assert again.cached >= SHARED, "the same turn again shares with itself"
    lab.assert_as_alone(second, again, tolerance)
    return second, answer.cached


def two_turns(lab: Lab) -> None:
    """KV of a *generated* token, edited by a generated-only edit, is never read as KV of the next turn's *prompt*."""
    _, cached = next_turn(lab, [steer(15, 6, 80.0, "generated")])
    assert cached == 0, f"{cached} tokens of the first turn were reused although their phase changed"


def content_not_name(lab: Lab, library: Path) -> None:
    """A library vector that changed under its name shares nothing with its past; equal content shares under any name."""
    before, lab.engine.catalogue.library = lab.engine.catalogue.library, VectorLibrary(library)
    rng = np.random.default_rng(0)
    old, new = (120 * v / np.linalg.norm(v) for v in rng.normal(size=(2, 576)).astype(np.float32))
    named = Ask(prompt_of(220, SHARED + 4), [{"type": "steer", "vector": "mood"}], max_tokens=3)
    inline = replace(named, interventions=[{"type": "steer", "values": new.tolist(), "layer": 15}])
    try:
        reference = lab.alone(inline)
        tolerance = max(lab.floor, 2 * lab.worst.get("vanilla", 0.0))
        lab.engine.reset_cache()
        lab.engine.catalogue.library.put("mood", Vector({15: old}))
        first, again = (lab.engine.run([named])[0] for _ in range(2))
        assert (first.cached, again.cached) == (0, SHARED)
        lab.engine.catalogue.library.put("mood", Vector({15: new}))
        changed = lab.engine.run([named])[0]
        assert changed.cached == 0, "KV of the old vector was read under the new one of the same name"
        assert changed.differs(again) >= DIFFERENT
        assert changed.differs(reference) <= tolerance
        lab.engine.catalogue.library.put("temper", Vector({15: new}))
        renamed = replace(named, interventions=[{"type": "steer", "vector": "temper", "id": "label"}])
        for ask in (renamed, inline):
            answer = lab.engine.run([ask])[0]
            assert answer.cached == SHARED, "equal content under another name does not share"
            assert answer.differs(reference) <= tolerance
    finally:
        lab.engine.catalogue.library = before


# -- promise 3: schedule ----------------------------------------------------------------------------------------------

MIXED: list[Ask] = [
    Ask(prompt_of(400, 35), [steer(15, 3)], max_tokens=4),
    Ask(prompt_of(401, 50), max_tokens=4),
    Ask(prompt_of(402, 18), [steer(15, 6, 60.0, ["last_prompt_token", "generated"])], max_tokens=4),
    Ask(prompt_of(403, 49), [set_features("jumprelu/l15", {5: 30.0}, "prompt"), steer(29, 5, 60.0)], max_tokens=4),
    Ask(prompt_of(404, 33), [set_features("topk/l15", {7: 40.0}, {"from": -20})], max_tokens=4),
]
"""Requests of every phase and kind, whose prompts end inside, at and one past the edges of small chunks."""

WHOLE: list[Ask] = [
    Ask(prompt_of(405, 49), [set_features("polysae/l15", {7: 15.0, 8: -9.0}, "prompt")], max_tokens=4),
    Ask(prompt_of(406, 33), [set_features("polysae/l15", {3: 15.0}, ["last_prompt_token", "generated"])], max_tokens=4),
    Ask(prompt_of(407, 35), [set_features("matching_pursuit/l15", {7: 150.0}, {"from": -20})], max_tokens=4),
    Ask(prompt_of(408, 18), [set_features("top_afa/l15", {7: 60.0})], max_tokens=4),
    Ask(
        prompt_of(409, 50), [set_features("topk/l15", {7: 40.0}), set_features("polysae/l15", {5: 15.0})], max_tokens=4
    ),
]
"""Requests that need whole dictionaries, whose tokens share blocks of the full-encode path."""


def chunks(lab: Lab, size: int, asks: Sequence[Ask] = tuple(MIXED)) -> None:
    """However the prompts are cut into chunks, every token has the edit that the shadow model says."""
    for ask in asks:
        lab.alone(ask)
    lab.alone(plain(asks[0]))
    lab.engine.reset_cache()
    with watched(lab.engine) as steps, chunked(lab.engine, size):
        answers = lab.engine.run([*asks, plain(asks[0])], cold=True)
    total = sum(len(ask.prompt) for ask in asks)
    assert max(sum(step.values()) for step in steps.tokens) == min(size, total + len(asks[0].prompt))
    assert sum(sum(step.values()) >= size for step in steps.tokens) >= total // size - 1, "prefill was not chunked"
    tolerance = lab.noise([plain(asks[0])], answers[-1:])
    for ask, answer in zip(asks, answers, strict=False):
        assert_edited_where_asked(ask, answer)
        lab.assert_as_alone(ask, answer, tolerance)
        if ask.interventions:
            lab.assert_edit_shows(ask, answer)


def chunk_of_one(lab: Lab) -> None:
    """A prompt whose last chunk is a single token: it is still prompt, and the first token fed back is generated."""
    asks = [Ask(prompt_of(410, 18), [steer(15, 6, 60.0, tokens)], max_tokens=4) for tokens in ("prompt", "generated")]
    for ask in asks:
        with watched(lab.engine) as steps, chunked(lab.engine, 17):
            answer = lab.engine.run([ask], cold=True)[0]
        assert [sum(step.values()) for step in steps.tokens if step] == [17, 1, 1, 1, 1]
        assert_edited_where_asked(ask, answer)
        lab.assert_edit_shows(ask, answer)
        lab.assert_as_alone(ask, answer, lab.floor)


def preempted(lab: Lab) -> None:
    """Requests that lose their KV blocks and start again have the same edits at the same positions."""
    kinds: list[Edits] = [
        [steer(15, 6, 60.0, "generated")],
        [],
        [set_features("jumprelu/l15", {5: 30.0}, "prompt")],
        [steer(15, 3), set_features("topk/l15", {7: 40.0}, "generated")],
    ]
    asks = [Ask(prompt_of(420 + i, 44), kind, max_tokens=24) for i, kind in enumerate(kinds)]
    for ask in asks:
        lab.alone(ask)
    lab.engine.reset_cache()
    with scarce(lab.engine, 9), watched(lab.engine) as steps, Driver(lab.engine) as driver:
        names = [driver.add(ask) for ask in asks]
        driver.drain()
    answers = [driver.answer(name) for name in names]
    assert steps.preemptions > 0, "nothing was preempted: the test proves nothing"
    again = [
        n for n, ask in zip(names, asks, strict=True) if steps.computed(n) > len(ask.prompt) + 23 and ask.interventions
    ]
    assert again, "no edited request had to compute a token twice"
    tolerance = lab.noise(asks[1:2], answers[1:2])
    for ask, answer in zip(asks, answers, strict=True):
        assert_edited_where_asked(ask, answer)
        lab.assert_as_alone(ask, answer, tolerance)
        if ask.interventions:
            lab.assert_edit_shows(ask, answer)
    lab.assert_nothing_left()


LONGEST = 8
"""Tokens that the longest request of the churn generates."""


def churn(lab: Lab, seed: int, requests: int = 18, blocks: int | None = None) -> None:
    """Random arrivals, finishes and aborts, one step at a time: each answer is a prefix of its own run alone."""
    rng = random.Random(seed)
    lengths = (30, 61, 28, 58, 31)  # most requests need another block while they generate
    kinds = [
        replace(ask, prompt=prompt_of(450 + i, length), max_tokens=LONGEST)
        for i, (ask, length) in enumerate(zip(MIXED, lengths, strict=True))
    ]
    for ask in kinds:
        lab.alone(ask)
    lab.engine.reset_cache()
    few = scarce(lab.engine, blocks) if blocks else nullcontext()
    with few, watched(lab.engine) as steps, chunked(lab.engine, 48), Driver(lab.engine) as driver:
        while len(driver.asks) < requests:
            for _ in range(rng.choice((0, 1, 1, 2))):
                driver.add(replace(rng.choice(kinds), max_tokens=rng.randint(1, LONGEST)))
            if driver.running and rng.random() < 0.2:
                driver.abort(rng.choice(driver.running))
            driver.step()
        driver.drain()
    assert max(len(step) for step in steps.tokens) >= 3, "never three requests in one step: the test proves little"
    assert driver.aborted
    assert (steps.preemptions > 0) == (blocks is not None), f"{steps.preemptions} preemptions"
    delivered = {name: driver.answer(name) for name in driver.outputs}
    assert delivered.keys() >= driver.asks.keys() - driver.aborted
    bare = [name for name in delivered if not driver.asks[name].interventions]
    whole = {name: replace(driver.asks[name], max_tokens=LONGEST) for name in delivered}
    tolerance = lab.noise([whole[name] for name in bare], [delivered[name] for name in bare]) if bare else lab.floor
    for name, answer in delivered.items():
        if name not in driver.aborted:
            assert len(answer.token_ids) == driver.asks[name].max_tokens
        assert_edited_where_asked(driver.asks[name], answer, preempted=blocks is not None)
        lab.assert_as_alone(whole[name], answer, tolerance)
    for kind in kinds:
        if kind.interventions:
            lab.assert_edit_shows(kind, lab.alone(kind))
    lab.assert_nothing_left()


# -- gates ------------------------------------------------------------------------------------------------------------

gated_prefix, gated_chunks, gated_preempted = (
    gate_checks.gated_prefix,
    gate_checks.gated_chunks,
    gate_checks.gated_preempted,
)
