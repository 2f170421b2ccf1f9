"""Promise 5: what changes nothing leaves no trace, neither in the bits of the answer nor, where it is known, in the cache."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.support import BLOCK, Answer, Ask, Engine, prompt_of

Json = dict[str, Any]

pytestmark = pytest.mark.engine

PROMPT = prompt_of(41, 3 * BLOCK + 5)
N_NEW = 6
SHARED = 3 * BLOCK
"""Cached tokens of a second run: the prompt's full blocks."""

NOOPS: dict[str, list[Json]] = {
    "steer with strength 0": [{"type": "steer", "sae": "gated/l15", "feature": 2, "strength": 0}],
    "normalized with strength 0": [
        {"type": "steer", "sae": "gated/l15", "feature": 2, "strength": 0, "mode": "normalized"}
    ],
    "project_out with strength 0": [
        {"type": "steer", "sae": "gated/l15", "feature": 2, "strength": 0, "mode": "project_out"}
    ],
    "steer along zero": [{"type": "steer", "values": [0.0] * 576, "layers": [0, 29], "strength": 9}],
    "scale 1": [{"type": "edit_features", "sae": "jumprelu/l0", "features": [{"index": 1, "op": "scale", "value": 1}]}],
    "add 0": [
        {
            "type": "edit_features",
            "sae": "topk/l29",
            "features": [{"index": i, "op": "add", "value": 0} for i in range(9)],
        }
    ],
    "an empty slice": [
        {"type": "steer", "sae": "gated/l15", "feature": 2, "strength": 50, "tokens": {"from": 7, "to": 7}},
        {
            "type": "edit_features",
            "sae": "standard/l15",
            "features": [{"index": 1, "op": "ablate"}],
            "tokens": {"from": -2, "to": -5},
        },
    ],
}


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Answer:
    """The plain answer, computed alone and cold."""
    return alone(engine, [])


def alone(engine: Engine, interventions: list[Json], *, cold: bool = True, **fields: Any) -> Answer:
    return engine.run([Ask(PROMPT, interventions, max_tokens=N_NEW, **fields)], cold=cold)[0]


@pytest.fixture(scope="module")
def silent(engine: Engine) -> dict[str, list[int]]:
    """SAE → its latents that are off for every token of the plain request, position 0 included."""
    found = {}
    for name in ("jumprelu/l15", "topk/l15", "gated/l0"):
        inspect = {"sae": name, "features": list(range(96)), "include_bos": True}
        journal = alone(engine, [], inspect=inspect).journal
        assert journal is not None
        readings = journal.readings(0, 0, len(PROMPT) + N_NEW - 1)
        assert len(readings) == len(PROMPT) + N_NEW - 1
        awake = {feature for _, pairs in readings for feature, value in pairs if value != 0}
        found[name] = sorted(set(range(96)) - awake)
        assert found[name], f"{name} has no silent latent on this prompt"
        assert len(awake) > 10
    return found


# name → interventions(silent latents of jumprelu/l15, topk/l15, gated/l0)
NEVER_FIRING: dict[str, Any] = {
    "scale on a silent latent": lambda j, t, g: [
        {"type": "edit_features", "sae": "jumprelu/l15", "features": [{"index": j, "op": "scale", "value": 50}]}
    ],
    "set if active on a silent latent": lambda j, t, g: [
        {
            "type": "edit_features",
            "sae": "jumprelu/l15",
            "features": [{"index": j, "op": "set", "value": 500, "only_if_active": True}],
        }
    ],
    "add if active on a latent that is never a member": lambda j, t, g: [
        {
            "type": "edit_features",
            "sae": "topk/l15",
            "features": [{"index": t, "op": "add", "value": 500, "only_if_active": True}],
        }
    ],
    "ablate a silent latent": lambda j, t, g: [
        {"type": "edit_features", "sae": "gated/l0", "features": [{"index": g, "op": "ablate"}]}
    ],
    "a clamp that never binds": lambda j, t, g: [
        {
            "type": "edit_features",
            "sae": "standard/l29",
            "features": [{"index": i, "op": "clamp", "min": -1, "max": 1e6} for i in range(40)],
        }
    ],
    "a cap that never binds": lambda j, t, g: [
        {"type": "steer", "sae": "gated/l15", "feature": 2, "mode": "cap", "min": -1e6, "max": 1e6}
    ],
    "a token that never comes": lambda j, t, g: [
        {"type": "steer", "sae": "gated/l15", "feature": 2, "strength": 200, "tokens": {"tokens": [49_000]}}
    ],
    "all of them": lambda j, t, g: [
        intervention for name, make in NEVER_FIRING.items() if name != "all of them" for intervention in make(j, t, g)
    ],
}


@pytest.mark.parametrize("name", NOOPS)
def test_a_noop_is_validated_dropped_and_shares_the_plain_cache(engine: Engine, plain: Answer, name: str) -> None:
    answer = alone(engine, NOOPS[name])
    assert answer.same_bits(plain)
    assert answer.journal is None
    assert answer.compiled.program is None
    assert answer.compiled.payload().digest is None
    assert [entry.noop for entry in answer.compiled.entries] == [True] * len(NOOPS[name])
    # The cache now holds what the no-op computed: plain traffic uses it, and the other way round.
    assert answer.cached == 0
    assert alone(engine, [], cold=False).cached == SHARED
    alone(engine, [], cold=True)
    again = alone(engine, NOOPS[name], cold=False)
    assert again.cached == SHARED
    assert again.same_bits(alone(engine, [], cold=False))


@pytest.mark.parametrize("name", NEVER_FIRING)
def test_an_edit_that_never_fires_is_bit_for_bit_no_edit(
    engine: Engine, plain: Answer, silent: dict[str, list[int]], name: str
) -> None:
    interventions = NEVER_FIRING[name](*(latents[0] for latents in silent.values()))
    answer = alone(engine, interventions)
    assert answer.same_bits(plain)
    assert answer.journal is not None
    assert answer.journal.covers(0, len(PROMPT) + N_NEW - 1)
    for i, entry in enumerate(answer.compiled.entries):
        assert not entry.noop
        assert [answer.journal.stats(i, layer, 10**6).fired for layer in entry.layers] == [0]


@pytest.mark.parametrize("name", ["scale on a silent latent", "a clamp that never binds", "a token that never comes"])
def test_an_edit_that_happens_not_to_fire_has_a_cache_of_its_own(
    engine: Engine, plain: Answer, silent: dict[str, list[int]], name: str
) -> None:
    """That it did not fire is known only afterwards: on other tokens of the same prefix tree it may."""
    interventions = NEVER_FIRING[name](*(latents[0] for latents in silent.values()))
    assert alone(engine, [], cold=True).compiled.payload().digest is None
    first = alone(engine, interventions, cold=False)
    assert first.compiled.payload().digest is not None
    assert first.cached == 0
    assert alone(engine, interventions, cold=False).cached == SHARED
    assert alone(engine, [], cold=False).cached == SHARED


def test_a_noop_beside_an_edit_leaves_no_trace_in_its_cache(engine: Engine, plain: Answer) -> None:
    edit: Json = {"type": "steer", "sae": "gated/l15", "feature": 2, "strength": 60}
    real = alone(engine, [edit])
    assert real.differs(plain) >= 0.1
    both = alone(engine, [NOOPS["scale 1"][0], edit, NOOPS["an empty slice"][0]], cold=False)
    assert [entry.noop for entry in both.compiled.entries] == [True, False, True]
    assert both.compiled.payload().digest == real.compiled.payload().digest
    assert both.cached == SHARED
    assert both.same_bits(alone(engine, [edit], cold=False))


def test_a_noop_with_an_inspection_reads_what_a_plain_request_reads(engine: Engine, plain: Answer) -> None:
    inspect = {"sae": "jumprelu/l15", "top_k": 4}
    answer, reading = alone(engine, NOOPS["scale 1"], inspect=inspect), alone(engine, [], inspect=inspect)
    assert answer.same_bits(plain)
    assert reading.same_bits(plain)
    assert answer.journal is not None
    assert reading.journal is not None
    span = (0, len(PROMPT) + N_NEW - 1)
    assert answer.journal.readings(0, *span) == reading.journal.readings(0, *span) != []
    assert answer.compiled.payload().digest is None
    assert alone(engine, [], cold=False).cached == SHARED, "readings never enter the salt"
