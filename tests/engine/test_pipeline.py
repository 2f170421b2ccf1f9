"""A pipeline's stages: what each is given of a payload, and what the last one makes of all their records."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from editserver.engine.compat.pipeline import Part, Stage, cut, join, stage_of
from editserver.engine.wire import KEY, StepRecord
from interventions.program import Channel, LayerProgram, Op, Payload, Program, Read, ReadKind, vector_key
from interventions.selectors import ALL, PROMPT

D = 4


def payload_of(layers: tuple[int, ...], reads: tuple[int, ...]) -> Payload:
    """Another vector is added at each of ``layers``; one latent is read at each of ``reads``."""
    vectors = [np.full(D, layer, "<f4").tobytes() for layer in layers]
    add = Op(1.0, 1.0, -np.inf, np.inf, False, 0, 0)
    edits = tuple(
        LayerProgram(layer, (Channel(ReadKind.NONE, vector_key(values), (add,)),))
        for layer, values in zip(layers, vectors, strict=True)
    )
    program = Program(edits, (PROMPT,), {vector_key(values): values for values in vectors}) if edits else None
    return Payload(program, tuple(Read("d" * 64, layer, (layer,), 0, ALL) for layer in reads), None)


PAYLOAD = payload_of((1, 3, 6), (6, 0, 3))
FIRST, SECOND = range(4), range(4, 8)


def record(layers: tuple[int, ...], reads: tuple[int, ...], start: int = 5, n: int = 2) -> StepRecord:
    """As a stage with these of :data:`PAYLOAD` would make it; every number says its layer."""
    told = tuple((np.full((n, 1), layer, "<f4").tobytes(), b"", b"") for layer in reads)
    rows = np.repeat(layers, n)
    return StepRecord(
        start, n, rows.astype("<u8").tobytes(), rows.astype("<f4").tobytes(), rows.astype("u1").tobytes(), told
    )


def test_a_stage_gets_what_lies_at_its_layers_with_the_same_selectors() -> None:
    own, reads = cut(PAYLOAD, FIRST)
    assert own is not None
    assert own.program is not None
    assert [one.layer for one in own.program.layers] == [1, 3]
    assert own.program.selectors == (PROMPT,)
    assert ([one.layer for one in own.reads], reads) == ([0, 3], (1, 2))
    assert cut(PAYLOAD, SECOND)[1] == (0,)
    assert cut(PAYLOAD, range(8))[0] == PAYLOAD
    assert cut(PAYLOAD, range(4, 6)) == (None, ())
    only_read, _ = cut(payload_of((1,), (6,)), SECOND)
    assert only_read is not None
    assert (only_read.program, len(only_read.reads)) == (None, 1)


def test_its_rows_keep_the_slots_that_the_core_gave_them() -> None:
    slots = list(range(10, 10 + len(PAYLOAD.row_keys)))
    given = dict(zip(PAYLOAD.row_keys, slots, strict=True))
    for layers in (FIRST, SECOND):
        own, mine = Stage(tuple(layers)).admit("r", PAYLOAD, slots)
        assert own is not None
        assert mine == [given[key] for key in own.row_keys]
    assert Stage((4,)).admit("r", PAYLOAD, slots) == (None, [])


def test_the_stages_records_are_joined_to_one_workers() -> None:
    whole = record((1, 3, 6), (6, 0, 3))
    parts = [Part("r", (1, 2), record((1, 3), (0, 3))), Part("r", (0,), record((6,), (6,)))]
    assert join(PAYLOAD, parts) == whole


@pytest.mark.parametrize(
    "parts",
    [
        [Part("r", (1, 2), record((1, 3), (0, 3)))],
        [Part("r", (1,), record((1, 3), (0,))), Part("r", (0,), record((6,), (6,)))],
        [Part("r", (1, 2), record((1,), (0, 3))), Part("r", (0,), record((6,), (6,)))],
        [Part("r", (1, 2), record((1, 3), (0, 3))), Part("r", (0,), record((6,), (6,), start=4))],
    ],
    ids=["a stage is missing", "an inspection is missing", "a layer is missing", "of another step"],
)
def test_records_that_are_not_of_everything_are_an_error(parts: list[Part]) -> None:
    with pytest.raises(RuntimeError, match="the stages' records of request r are not of all its layers"):
        join(PAYLOAD, parts)


class Recording:
    """An engine that has made ``records`` of the step behind it."""

    def __init__(self, records: dict[str, StepRecord] | None) -> None:
        self.records = records

    def finish(self) -> Any:
        records, self.records = self.records, None
        return None if records is None else lambda: records


def test_records_travel_with_the_hidden_states_and_nothing_of_a_step_comes_with_the_next() -> None:
    stages = [Stage((0, 1, 3)), Stage(()), Stage((6,))]
    other = payload_of((3,), ())
    for stage in stages:
        stage.admit("r", PAYLOAD, range(len(PAYLOAD.row_keys)))
        stage.admit("s", other, range(len(other.row_keys)))
    hidden = {"hidden_states": object()}
    stages[0].receive(None)
    first: Any = Recording({"r": record((1, 3), (0, 3)), "s": record((3,), ())})
    sent: dict[str, Any] = stages[0].send(first, hidden)
    assert sent[KEY].device.type == "cpu"
    stages[1].receive(sent)
    assert sent == hidden, "the model is given what it expects"
    sent = stages[1].send(None, hidden)
    stages[2].receive(sent)
    records = stages[2].joined(lambda: {"r": record((6,), (6,))})
    for stage in stages:
        stage.forget("r")  # the request ended before they were asked for
    assert records is not None
    assert records() == {"r": record((1, 3, 6), (6, 0, 3)), "s": record((3,), ())}

    stages[0].receive(None)
    sent = stages[0].send(first, hidden)
    assert sent == hidden
    stages[2].receive(sent)
    assert stages[2].joined(None) is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_whole_records_are_sent_and_never_ranks_shares_of_them(ranks: int) -> None:
    stage, lengths = Stage((1,), ranks), set()
    for n in range(1, 9):
        made: Any = Recording({"r" * n: record((1,), (), n=n)})
        stage.admit("r" * n, PAYLOAD, range(len(PAYLOAD.row_keys)))
        sent = stage.send(made, {})
        lengths.add(len(sent[KEY]) % ranks)
        stage.receive(sent)
        assert [(part.request_id, part.record.n) for part in stage._earlier] == [("r" * n, n)]
        stage.receive(None)
    assert (0 in lengths) == (ranks == 1)


def test_what_is_sent_is_data_and_never_code() -> None:
    with pytest.raises(msgspec.MsgspecError):
        Stage(()).receive({KEY: torch.frombuffer(bytearray(b"\0" + pickle.dumps([])), dtype=torch.uint8)})


@pytest.mark.parametrize(("size", "armed"), [(1, None), (2, (1, 3))])
def test_a_worker_arms_those_of_the_configured_layers_that_it_has(size: int, armed: tuple[int, ...] | None) -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=size, tensor_parallel_size=2))
    stage = stage_of(config, (1, 3, 6), tuple(FIRST))
    assert (None if stage is None else stage.armed) == armed
