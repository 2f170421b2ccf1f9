"""What is promised of any engine, on a model so small that Triton's interpreter can run the kernels: not collected by itself.

Run by :mod:`tests.engine.test_v2_engine` and :mod:`tests.engine.test_device_engine` in processes of their own, which choose the
runner, the engine and the scheduling.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from editserver.engine import op
from editserver.engine.worker import EngineWorker
from editserver.library import MapLibrary
from interventions.maps.gates import CusumGate, ShareGate, WindowGate
from interventions.maps.map import LatentMap, SequenceGate
from interventions.maps.transfer import interpolate
from interventions.reference import ReferenceExecutor
from tests.engine.dictionaries import write_sae
from tests.engine.lab import Driver, Lab, chunked, scarce, watched
from tests.engine.shadow import assert_edited_where_asked, fired_at
from tests.engine.support import BLOCK, Answer, Ask, Engine, prompt_of
from tests.engine.tiny import D_MODEL, VOCAB, write_model

LAYERS = (1, 2)
TOLERANCE = 1e-3
Edit = Mapping[str, Any]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two armed layers of four, fp32, eager, prefix caching on."""
    root = tmp_path_factory.mktemp("small")
    model = write_model(root / "model")
    saes: dict[str, Path] = {
        name: write_sae(root / name, layer, name, D_MODEL, seed=i)
        for i, (name, layer) in enumerate((("standard", 1), ("jumprelu", 2), ("gated", 1), ("topk", 2)))
    }
    engine = Engine.start(
        model,
        saes,
        LAYERS,
        bank_rows=256,
        full_encode=["topk"],
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=6,
        max_num_batched_tokens=96,
        num_gpu_blocks_override=40,
    )
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def lab(engine: Engine) -> Lab:
    return Lab(engine)


@pytest.fixture(scope="session")
def reference(engine: Engine) -> ReferenceExecutor:
    """Plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(engine.llm.llm_engine.model_config.model, dtype=torch.float32)
    return ReferenceExecutor(model, {one.sae.digest: one.sae for one in engine.catalogue.saes.values()})


def prompt(seed: int, length: int) -> list[int]:
    return prompt_of(seed, length, VOCAB)


def steer(feature: int, strength: float = 12.0, tokens: Any = "all") -> Edit:
    return {"type": "steer", "sae": "standard", "feature": feature, "strength": strength, "tokens": tokens}


def change(sae: str, *features: Edit, tokens: Any = "all") -> Edit:
    return {"type": "edit_features", "sae": sae, "features": list(features), "tokens": tokens}


def set_to(index: int, value: float) -> Edit:
    return {"index": index, "op": "set", "value": value}


def steer_later(feature: int) -> Edit:
    """At the later of the two layers: rules may look at both."""
    return {"type": "steer", "sae": "jumprelu", "feature": feature, "strength": 12.0}


ASKS: list[Ask] = [
    Ask(prompt(1, 13), [steer(3)], max_tokens=3),
    Ask(prompt(2, 9), max_tokens=3),
    Ask(prompt(3, 11), [change("jumprelu", set_to(5, 15.0), set_to(9, -8.0), tokens="prompt")], max_tokens=3),
    Ask(
        prompt(4, 6),
        [change("gated", set_to(7, 30.0), tokens=["last_prompt_token", "generated"]), steer(8, -25.0)],
        inspect={"sae": "jumprelu", "features": [1, 2, 3], "tokens": "all"},
        max_tokens=3,
    ),
]


def assert_reference(reference: ReferenceExecutor, ask: Ask, answer: Answer) -> None:
    """Tokens, log-probabilities, receipts and readings are those of plain transformers."""
    payload = answer.compiled.payload()
    wanted = reference.generate(ask.prompt, payload, ask.max_tokens)
    assert answer.token_ids == wanted.token_ids
    for step, top in zip(wanted.logprobs, answer.top, strict=True):
        assert max(abs(float(step[token]) - value) for token, value in top.items()) < TOLERANCE
    if answer.journal is None:
        return
    n_fed = len(ask.prompt) + ask.max_tokens - 1
    for i, entry in enumerate(answer.compiled.entries):
        for layer in entry.layers:
            mine, theirs = answer.journal.stats(i, layer, n_fed), wanted.forward.stats(i, layer)
            assert mine.fired == theirs.fired
            assert mine.dose_mean == pytest.approx(theirs.dose_mean, rel=1e-3)
            assert mine.dose_max == pytest.approx(theirs.dose_max, rel=1e-3)
    for number, theirs in enumerate(wanted.forward.readings):
        mine = answer.journal.readings(number, 0, n_fed)
        assert [position for position, _ in mine] == [position for position, _ in theirs]
        for (_, a), (_, b) in zip(mine, theirs, strict=True):
            assert [feature for feature, _ in a] == [feature for feature, _ in b]
            assert [value for _, value in a] == pytest.approx([value for _, value in b], rel=1e-3, abs=1e-3)


def test_answers_receipts_and_inspections_are_the_references(
    engine: Engine, lab: Lab, reference: ReferenceExecutor
) -> None:
    answers = engine.run(ASKS, cold=True)
    for ask, answer in zip(ASKS, answers, strict=True):
        assert_reference(reference, ask, answer)
        assert_edited_where_asked(ask, answer)
    edited = [ask for ask in ASKS if ask.interventions]
    assert len(edited) == 3
    for ask, answer in zip(ASKS, answers, strict=True):
        if ask.interventions:
            lab.assert_edit_shows(ask, answer)
    lab.assert_nothing_left()


def test_the_handshake_hears_of_every_armed_layer_and_of_one_that_is_silent(engine: Engine) -> None:
    (heard,) = engine.llm.collective_rpc("editserver_handshake")
    assert (heard["ok"], heard["armed"], heard["error"]) == (True, list(LAYERS), None)
    assert (heard["device"] is None) == isinstance(op.current(), EngineWorker)
    layer = engine.runner.model.model.layers[LAYERS[0]]
    armed, layer.__class__ = layer.__class__, type(layer).__bases__[0]
    try:
        (heard,) = engine.llm.collective_rpc("editserver_handshake")
    finally:
        layer.__class__ = armed
    assert (heard["ok"], heard["error"]) == (
        False,
        f"the compiled model does not call the edit op of layers [{LAYERS[0]}]",
    )
    answer = engine.run([Ask(prompt(60, 4), [steer(3)], max_tokens=1)])[0]
    assert_edited_where_asked(Ask(prompt(60, 4), [steer(3)], max_tokens=1), answer)


def test_a_rows_edit_changes_no_bit_of_its_neighbours(engine: Engine) -> None:
    batch = [replace(ask, max_tokens=2) for ask in ASKS]
    before = engine.run(batch, cold=True)
    batch[1] = replace(batch[1], interventions=[change("gated", set_to(2, 10.0), set_to(4, 10.0)), steer(1)])
    after = engine.run(batch, cold=True)
    assert after[1].differs(before[1]) > 0.1
    for row in (0, 2, 3):
        assert after[row].same_bits(before[row]), f"row {row} changed with its neighbour"


def test_prefixes_are_shared_by_equal_edits_alone(engine: Engine, lab: Lab) -> None:
    shared = prompt(10, BLOCK + 2)
    kinds: list[Sequence[Edit]] = [[], [steer(3)], [change("jumprelu", set_to(5, 15.0))]]
    asks = [Ask(shared, kind, max_tokens=2) for kind in kinds]
    alone = [lab.alone(ask) for ask in asks]
    engine.reset_cache()
    for due in (0, BLOCK):
        for ask, wanted in zip(asks, alone, strict=True):
            answer = engine.run([ask])[0]
            assert answer.cached == due
            assert answer.differs(wanted) < TOLERANCE
            assert_edited_where_asked(ask, answer)


def test_edits_are_the_same_in_chunks(engine: Engine, lab: Lab) -> None:
    asks = [replace(ask, max_tokens=2) for ask in (ASKS[0], ASKS[2], ASKS[3])]
    for ask in asks:
        lab.alone(ask)
    with watched(engine) as steps, chunked(engine, 7):
        answers = engine.run(asks, cold=True)
    assert max(sum(step.values()) for step in steps.tokens) == 7
    for ask, answer in zip(asks, answers, strict=True):
        lab.assert_as_alone(ask, answer, TOLERANCE)
        assert_edited_where_asked(ask, answer)


def test_preempted_requests_have_the_same_edits_when_they_come_back(engine: Engine, lab: Lab) -> None:
    kinds: list[Sequence[Edit]] = [
        [steer(3, 12.0, "generated")],
        [],
        [change("jumprelu", set_to(5, 15.0), tokens="prompt")],
    ]
    asks = [Ask(prompt(20 + i, BLOCK - 3), kind, max_tokens=6) for i, kind in enumerate(kinds)]
    ruled = Ask(prompt(40, BLOCK - 3), [{"type": "rules", "text": RULES}], max_tokens=6)
    asks.append(ruled)
    for ask in asks:
        lab.alone(ask)
    with scarce(engine, 5), watched(engine) as steps, Driver(engine) as driver:
        names = [driver.add(ask) for ask in asks]
        driver.drain()
    assert steps.preempted(names[0]) == 0
    assert steps.preempted(names[2]) > 0, "no edit was preempted: the test proves nothing"
    assert steps.preempted(names[3]) > 0, "no rules were preempted: the test proves nothing"
    for name, ask in zip(names, asks, strict=True):
        answer = driver.answer(name)
        lab.assert_as_alone(ask, answer, TOLERANCE)
        if ask is not ruled:
            assert_edited_where_asked(ask, answer, preempted=True)
            continue
        assert answer.journal is not None
        wanted = lab.alone(ask).journal
        assert wanted is not None
        mine, theirs = answer.journal.rules, wanted.rules
        assert mine is not None
        assert theirs is not None
        for part in ("held", "concluded", "active"):
            assert np.array_equal(getattr(mine, part), getattr(theirs, part)), part
        assert theirs.active.any()
    lab.assert_nothing_left()


def test_gates_over_sequences_open_where_the_references_do(
    engine: Engine, reference: ReferenceExecutor, tmp_path: Path
) -> None:
    """Behind a cached prefix, and in chunks: what they heard lies with the KV."""
    engine.catalogue.maps = MapLibrary(tmp_path)
    words = prompt(30, BLOCK + 5)
    gates = (ShareGate(0.5, "seen", least=20), WindowGate(0.6, 12, least=12), CusumGate(8.0, 0.4, latch=True))
    edits = []
    for number, gate in enumerate(gates):
        served = engine.catalogue.sae(("jumprelu", "gated", "jumprelu")[number])
        found = LatentMap(
            "demo",
            served.sae.digest,
            served.layer,
            tuple(interpolate(i, 9.0) for i in range(40 + 3 * number, 43 + 3 * number)),
            gate=SequenceGate(gate, (number, number + 10, number + 20)),
        )
        engine.catalogue.maps.put(found.digest[:20], found)
        edits.append({"type": "remap", "map": found.digest[:20]})
    ask = Ask(words, edits, max_tokens=2)
    with chunked(engine, 16):
        runs = engine.run([ask], cold=True) + engine.run([ask])
    assert [answer.cached for answer in runs] == [0, BLOCK]
    for answer in runs:
        wanted = reference.generate(words, answer.compiled.payload(), ask.max_tokens)
        assert answer.token_ids == wanted.token_ids
        assert answer.journal is not None
        assert answer.compiled.program is not None
        n_fed, opened = len(words) + ask.max_tokens - 1, []
        for layer in answer.compiled.program.layers:
            for i, facts in enumerate(wanted.forward.gates[layer.layer]):
                assert answer.journal.gate(layer.layer, i) == (facts.open_from, pytest.approx(facts.statistic))
                opened.append(facts.open_from)
        assert any(place is not None and BLOCK > place > 0 for place in opened), f"gates open at {opened}"
        for i, entry in enumerate(answer.compiled.entries):
            due = wanted.forward.layers[entry.layers[0]].fired.numpy() >> i & 1
            start = answer.journal.computed_from
            assert fired_at(answer.journal, i, entry.layers[0], n_fed) == [p for p in np.flatnonzero(due) if p >= start]


def test_members_of_whole_dictionaries_are_the_references(engine: Engine, reference: ReferenceExecutor) -> None:
    """Edited, and the largest of them looked at, next to a request that needs nothing of the kind."""
    edits = [change("topk", set_to(5, 20.0), {"index": 11, "op": "scale", "value": 2.0}, tokens={"from": -3})]
    asks = [
        Ask(prompt(50, 8), edits, inspect={"sae": "topk", "features": [3], "top_k": 4, "tokens": "all"}, max_tokens=2),
        Ask(prompt(51, 5), [steer(3)], max_tokens=2),
    ]
    for ask, answer in zip(asks, engine.run(asks, cold=True), strict=True):
        assert_reference(reference, ask, answer)
    with chunked(engine, 3):
        assert_reference(reference, asks[0], engine.run(asks[:1], cold=True)[0])


RULES = f"""
proposition early = 0.5 * feature(gated, 2) + feature(gated, 5) + feature(gated, 8) > 0.5
proposition late = feature(jumprelu, 3) + feature(jumprelu, 11) > 0
rule: at least 4 of last(9, early) -> latch often
rule: often and late -> both
on both: do {json.dumps(steer_later(4))} for 2 tokens
"""


def test_rules_hold_and_act_where_the_references_do(engine: Engine, reference: ReferenceExecutor) -> None:
    """Behind a cached prefix, and in chunks."""
    ask = Ask(prompt(40, BLOCK + 4), [{"type": "rules", "text": RULES}], max_tokens=2)
    with chunked(engine, 16):
        runs = engine.run([ask], cold=True) + engine.run([ask])
    assert [answer.cached for answer in runs] == [0, BLOCK]
    for answer in runs:
        wanted = reference.generate(ask.prompt, answer.compiled.payload(), ask.max_tokens)
        assert answer.token_ids == wanted.token_ids
        assert answer.journal is not None
        mine, theirs = answer.journal.rules, wanted.forward.rules
        assert mine is not None
        assert theirs is not None
        for name in ("held", "concluded", "active"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
        assert 0 < theirs.active.sum() < theirs.active.size
        (layer,) = wanted.forward.layers
        due = np.flatnonzero(wanted.forward.layers[layer].fired.numpy())
        start = answer.journal.computed_from
        assert fired_at(answer.journal, 0, layer, len(ask.prompt) + 1) == [p for p in due if p >= start]


def test_requests_that_come_and_go_mix_up_nothing(engine: Engine, lab: Lab) -> None:
    asks = [replace(ask, max_tokens=3) for ask in ASKS]
    for ask in asks:
        lab.alone(ask)
    engine.reset_cache()
    with Driver(engine) as driver:
        for i, ask in enumerate([*asks, asks[0], asks[3]]):
            driver.add(ask)
            driver.step()
            if i == 2:
                driver.abort("r0")
        driver.drain()
    for name, ask in driver.asks.items():
        if name == "r0":
            continue
        answer = driver.answer(name)
        lab.assert_as_alone(ask, answer, TOLERANCE)
        assert_edited_where_asked(ask, answer)
    lab.assert_nothing_left()
