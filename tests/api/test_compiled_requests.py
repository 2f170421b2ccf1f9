"""What many requests say alike is compiled once, and never answered with what it meant before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from editserver.api import state as module
from editserver.api.capacity import Capacity
from editserver.api.state import EditState
from editserver.catalogue import build_catalogue
from editserver.engine.config import EngineConfig, SAESource
from editserver.library import StoredRuleset
from editserver.library.vectors import Vector
from editserver.settings import Settings
from interventions.errors import InterventionError
from interventions.spec import parse_inspect, parse_interventions
from sae_weights import load_sae
from tests.engine.dictionaries import write_native

D = 24


@pytest.fixture
def state(tmp_path: Path) -> EditState:
    sae = load_sae(write_native(tmp_path / "relu", 1, "relu", D))
    assert sae.origin is not None
    config = EngineConfig((1,), (SAESource("relu", sae.origin.as_dict(), sae.digest, 1),))
    settings = Settings(library=tmp_path / "library")
    catalogue = build_catalogue(config, settings, d_model=D, n_layers=3, vocab_size=32, tokenizer=None)
    return EditState(config, settings, catalogue, Capacity(config.bank_rows), "0", "model", None)


def edit(value: Any = 2.0, index: int = 3) -> list[dict[str, Any]]:
    return [{"type": "edit_features", "sae": "relu", "features": [{"index": index, "op": "set", "value": value}]}]


def test_the_same_fields_are_compiled_once_and_as_they_would_be_anew(state: EditState) -> None:
    inspect = {"sae": "relu", "features": [1, 2]}
    first, types = state.compiled(edit(), inspect)
    again, _ = state.compiled(edit(), dict(inspect))
    assert again is first
    anew = state.compile(parse_interventions(edit()), parse_inspect(inspect))
    assert first == anew
    assert first.encoded == anew.payload().to_bytes()
    assert types == {"edit_features"}


def test_fields_that_differ_in_anything_are_compiled_apart(state: EditState) -> None:
    values = [2.0, 2, -2.0, 0.0, -0.0, 2.0000001, "2"]
    met: list[Any] = []
    for value in values:
        try:
            met.append(state.compiled(edit(value), None)[0])
        except InterventionError as error:
            met.append(error.code)
    assert met[-1] == "invalid_intervention"
    assert len({id(one) for one in met}) == len(values)
    for value, one in zip(values[:-1], met, strict=False):
        assert one == state.compile(parse_interventions(edit(value)), [])
    assert state.compiled(edit(), {"sae": "relu", "features": [1]})[0].reads
    assert not state.compiled(edit(), None)[0].reads


def test_what_is_refused_is_refused_again(state: EditState) -> None:
    """JSON has no NaN, and Python's parser takes it: it must not be taken for a field that is left out."""
    without = edit()
    del without[0]["features"][0]["value"]
    for _ in range(2):
        for fields in (edit(float("nan")), without, edit(index=10**30), edit(True)):
            with pytest.raises(InterventionError):
                state.compiled(fields, None)


def test_a_name_of_the_library_means_what_it_means_now(state: EditState) -> None:
    library, steer = state.catalogue.library, [{"type": "steer", "vector": "v", "strength": 1.0}]
    library.put("v", Vector({1: np.ones(D, np.float32)}))
    before, _ = state.compiled(steer, None)
    assert state.compiled(edit(), None)[0] is state.compiled(edit(), None)[0]
    library.put("v", Vector({1: np.full(D, 2.0, np.float32)}))
    after, _ = state.compiled(steer, None)
    assert before.program is not None
    assert after.program is not None
    assert before.program.digest() != after.program.digest()
    rules = [{"type": "rules", "ruleset": "r"}]
    told = []
    for threshold in (1, 2):
        state.catalogue.rulesets.put("r", StoredRuleset(f"rule r: feature(relu, 3) > {threshold} -> a"))
        program = state.compiled(rules, None)[0].program
        assert program is not None
        told.append(program.digest())
    assert told[0] != told[1]
    library.delete("v")
    with pytest.raises(InterventionError, match="no vector 'v'"):
        state.compiled(steer, None)


def test_whoever_asks_the_library_is_noted(state: EditState) -> None:
    catalogue = state.catalogue
    asks: list[Callable[[], object]] = [
        lambda: catalogue.vector("x"),
        lambda: catalogue.concept("x"),
        lambda: catalogue.map("x"),
        lambda: catalogue.ruleset("x"),
        catalogue.rule_context,
    ]
    for number, ask in enumerate(asks, 1):
        try:
            ask()
        except InterventionError as error:
            assert error.code.startswith("unknown_")  # noqa: PT017
        assert catalogue.library_uses >= number


def test_little_is_kept_and_nothing_long(state: EditState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    kept = [state.compiled(edit(float(i)), None)[0] for i in range(5)]
    assert len(state._compiled) == 3
    assert state.compiled(edit(4.0), None)[0] is kept[4]
    assert state.compiled(edit(0.0), None)[0] is not kept[0]
    monkeypatch.setattr(module, "KEPT_BYTES", 20)
    assert state.compiled(edit(9.0), None)[0] is not state.compiled(edit(9.0), None)[0]
