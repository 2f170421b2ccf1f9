"""The device's engine behind the adapters: whose edits the rows get, what is reported, and what is never waited for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from editserver.engine.batch import StepBatch
from editserver.engine.triton.capacity import Capacity
from editserver.engine.triton.readout import Taken
from editserver.engine.triton.step import Stages
from editserver.engine.triton.worker import MOST_BEHIND, DeviceWorker
from tests.engine.marked_requests import KINDS, LAYER, MAX_ROWS, MAX_TOKENS, D, payload_of
from tests.engine.runners_on_paper import CONFIG, Machine
from tests.engine.triton.batches import ON

pytest.importorskip("vllm")

EDITS_ALONE = Stages(gates=False, before=False, after=False)


def made(stages: Stages | None = EDITS_ALONE) -> DeviceWorker:
    capacity = Capacity.of(tokens=MAX_TOKENS, rows=MAX_ROWS, bank_rows=64, instructions=64, history=64)
    return DeviceWorker(CONFIG, D, torch.float32, ON, capacity, stages=stages)


@pytest.mark.parametrize(("family", "seed", "steps"), [("v1", 13, 16), ("v2", 2, 26)])
def test_each_row_gets_its_own_edit_on_the_device(family: str, seed: int, steps: int) -> None:
    """Seeds in whose runs everything comes up soon."""
    machine = Machine(family, seed, tuple(KINDS), made())
    machine.run(steps)
    assert machine.check_receipts() > 2
    wanted = ("steps", "rejected") if family == "v1" else ("dummies", "padded", "resent", "rejected", "reallocated")
    assert all(machine.counts[event] for event in wanted), machine.counts


def one_step(worker: DeviceWorker, name: str = "a", number: int = 0, n: int = 3) -> torch.Tensor:
    """A prompt of ``n`` tokens alone, planned and not run; its stream."""
    payload = payload_of(number, KINDS["all"][0])
    worker.add_request(name, payload, [number], n)
    worker.begin(batch(name, n))
    return torch.zeros(n, D, device=ON)


def batch(name: str, n: int, start: int = 0) -> StepBatch:
    positions, ids = torch.arange(start, start + n, device=ON), torch.zeros(n, dtype=torch.int32, device=ON)
    query_start = torch.tensor([0, n], dtype=torch.int32, device=ON)
    return StepBatch(
        [name],
        np.zeros(1, np.int64),
        torch.zeros(1, dtype=torch.int64, device=ON),
        query_start,
        n,
        positions,
        ids,
        lambda: None,
    )


def test_a_layer_that_did_not_run_by_the_steps_plan_fails_the_step() -> None:
    worker = made()
    stream = one_step(worker)
    records = worker.finish()
    assert records is not None
    with pytest.raises(RuntimeError, match=rf"the edit op of layers \[{LAYER}\] did not run in this step"):
        records()
    worker.begin(batch("a", 3))
    worker.run(LAYER, stream, None)
    records = worker.finish()
    assert records is not None
    assert records()["a"].n == 3
    worker.begin(batch("a", 3))  # and that it ran in the step before is no excuse
    records = worker.finish()
    assert records is not None
    with pytest.raises(RuntimeError, match="did not run"):
        records()


def test_a_rank_that_nobody_asks_fails_with_its_next_step() -> None:
    worker = made()
    one_step(worker)
    assert worker.finish() is not None
    worker.begin(batch("a", 3))
    with pytest.raises(RuntimeError, match=rf"the edit op of layers \[{LAYER}\] did not run in this step"):
        worker.finish()
    worker = made()
    worker.run(LAYER, one_step(worker), None)
    assert worker.finish() is not None
    worker.idle_step()
    assert worker.finish() is None


def test_what_has_not_arrived_is_looked_at_later_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = made()
    stream = one_step(worker)
    monkeypatch.setattr(Taken, "arrived", False)
    assert worker.finish() is not None, "of a step that did not run"
    for _ in range(MOST_BEHIND):
        worker.begin(batch("a", 3))
        worker.run(LAYER, stream, None)
        assert worker.finish() is not None
    with pytest.raises(RuntimeError, match="did not run in this step"):
        worker.finish()


@pytest.mark.parametrize("split", [False, True])
def test_where_ranks_have_to_agree_they_do_before_anything_is_read_and_whoever_is_there(split: bool) -> None:
    worker = made()
    others, agreed = torch.full((3, D), 2.0, device=ON), []

    def agree(h: torch.Tensor) -> None:
        agreed.append(h.data_ptr())
        h.copy_(others)

    worker.agree = agree
    stream, residual = one_step(worker), torch.zeros(3, D, device=ON) if split else None
    worker.run(LAYER, stream, residual)
    edited = stream if residual is None else stream + residual
    plain = others * (2 if split else 1)
    assert edited[0].tolist() == plain[0].tolist(), "position 0 is not edited"
    assert (edited - plain)[1:, 0].tolist() == [1, 1]
    worker.idle_step()
    worker.run(LAYER, stream, residual)
    assert agreed == [stream.data_ptr(), *([residual.data_ptr()] if residual is not None else [])] * 2
    assert torch.equal(stream, others), "a neighbour's stream does not depend on whether anybody is edited"


def test_a_plan_that_stands_does_not_reach_a_dummy_batch_or_one_of_nobody() -> None:
    worker = made()
    stream = one_step(worker)
    worker.idle_step()
    worker._planned = True  # as if a graph were replayed: it is launched whatever the host thinks
    worker.run(LAYER, stream, None)
    assert not stream.any()
    worker.begin(batch("a", 3))
    worker.run(LAYER, stream, None)
    assert stream[1:, 0].tolist() == [1, 1]
    worker.begin(batch("somebody else", 3))
    worker._planned = True
    stream.zero_()
    worker.run(LAYER, stream, None)
    assert not stream.any()
    assert worker.finish() is None


def test_a_layer_that_runs_in_a_dummy_batch_is_counted_though_nothing_is_edited_or_called() -> None:
    worker = made(None)
    stream = one_step(worker)
    assert worker.visits == {LAYER: 0}, "nobody asked for it"
    worker.count_visits()
    worker.idle_step()
    worker.run(LAYER, stream, None)
    assert worker.visits == {LAYER: 1}
    assert worker.visits == {LAYER: 0}
    assert not stream.any()
    worker.count_visits()
    worker.idle_step()
    assert worker.visits == {LAYER: 0}, "it did not run"
    worker.begin(batch("a", 3))
    worker.run(LAYER, stream, None)
    records = worker.finish()
    assert records is not None
    assert records()["a"].n == 3
    assert stream[1:, 0].tolist() == [1, 1]


def test_records_are_of_their_own_step_however_late_they_are_asked_for() -> None:
    worker = made()
    late, stream = [], one_step(worker)
    for start in (0, 3):
        worker.begin(batch("a", 3, start))
        worker.run(LAYER, stream, None)
        late.append(worker.finish())
    worker.remove_request("a")
    assert [made()["a"].start for made in late if made is not None] == [0, 3]


def test_another_request_of_the_same_name_is_not_taken_for_an_earlier_one() -> None:
    """Whether or not that one was said to have left."""
    worker = made()
    mention = KINDS["mention"][0]
    for leaves, prompt in ((True, (3, 5, 3, 5)), (False, (3, 3, 3, 5)), (True, (5, 3, 3, 5))):
        worker.add_request("a", payload_of(0, mention), [0], 4, prompt)
        worker.begin(batch("a", 1, 3))
        seen = worker.step.tables.history[worker.step.tables["history_row"][0], :3].tolist()
        assert seen == list(prompt[:3])
        if leaves:
            worker.remove_request("a")
