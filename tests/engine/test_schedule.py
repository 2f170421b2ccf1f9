"""Promise 3: chunk size, preemption, arrivals, finishes and aborts change nothing about who is edited where."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine import checks
from tests.engine.lab import Driver, Lab, set_features, steer
from tests.engine.shadow import assert_edited_where_asked
from tests.engine.support import Ask, prompt_of

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("size", [16, 17, 64, 512])
def test_edits_are_the_same_at_every_chunk_size(lab: Lab, size: int) -> None:
    checks.chunks(lab, size)


@pytest.mark.parametrize("size", [17, 64])
def test_what_needs_a_whole_dictionary_is_the_same_at_every_chunk_size(lab: Lab, size: int) -> None:
    checks.chunks(lab, size, checks.WHOLE)


def test_a_last_chunk_of_one_token_is_still_prompt(lab: Lab) -> None:
    checks.chunk_of_one(lab)


def test_preempted_requests_have_the_same_edits_when_they_come_back(lab: Lab) -> None:
    checks.preempted(lab)


@pytest.mark.parametrize(("seed", "blocks"), [(0, None), (1, 7)])
def test_arrivals_finishes_and_aborts_mix_up_nothing(lab: Lab, seed: int, blocks: int | None) -> None:
    checks.churn(lab, seed, blocks=blocks)


ROWS: list[Ask] = [
    Ask(prompt_of(430 + i, 20), [set_features("standard/l15", {2 * i: 30.0, 2 * i + 1: 25.0})], max_tokens=4)
    for i in range(4)
]
"""Requests of two rows each, all different."""


def test_requests_wait_for_a_bank_that_is_too_small_and_all_run_correctly(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ask in ROWS:
        lab.alone(ask)
    ledger = lab.bank(monkeypatch, 5)
    most = queued = 0
    with Driver(lab.engine) as driver:
        names = [driver.add(ask) for ask in ROWS]
        plain = driver.add(Ask(ROWS[0].prompt, max_tokens=2))
        while driver.running:
            most, queued = max(most, ledger.in_use), max(queued, len(lab.state.waiting))
            driver.step()
            assert not driver.finished(plain) or not driver.finished(names[3]), "a plain request waited for the bank"
            if driver.finished(plain):
                break
        driver.drain()
    assert (most, queued) == (4, 2)
    for name, ask in zip(names, ROWS, strict=True):
        answer = driver.answer(name)
        assert len(answer.token_ids) == ask.max_tokens
        assert_edited_where_asked(ask, answer)
        lab.assert_as_alone(ask, answer, lab.floor)
        lab.assert_edit_shows(ask, answer)
    lab.assert_nothing_left()


def test_requests_with_equal_rows_share_a_bank_that_holds_them_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    same = [ROWS[0], replace(ROWS[0], prompt=ROWS[1].prompt)]
    lab.bank(monkeypatch, 2)
    with Driver(lab.engine) as driver:
        for ask in same:
            driver.add(ask)
        assert not lab.state.waiting
        assert lab.state.ledger.in_use == 2
        driver.drain()
    for name, ask in driver.asks.items():
        assert_edited_where_asked(ask, driver.answer(name))
    lab.assert_nothing_left()


def test_a_request_that_waits_for_the_bank_can_be_aborted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.bank(monkeypatch, 2)
    with Driver(lab.engine) as driver:
        first, second, third = (driver.add(ask) for ask in ROWS[:3])
        driver.step()
        assert [r.request_id.rpartition("-")[0] for r in lab.state.waiting] == [second, third]
        driver.abort(second)
        assert [r.request_id.rpartition("-")[0] for r in lab.state.waiting] == [third]
        driver.drain()
        assert driver.finished(first)
        assert driver.finished(third)
        assert second not in driver.outputs
    for name in (first, third):
        lab.assert_as_alone(driver.asks[name], driver.answer(name), lab.floor)
    lab.assert_nothing_left()


def test_when_everything_is_aborted_the_queue_is_reported_too(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.request import RequestStatus

    lab.bank(monkeypatch, 2)
    with Driver(lab.engine) as driver:
        names = [driver.add(ask) for ask in ROWS[:3]]
        driver.step()
        gone = lab.engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        assert sorted(request.request_id.rpartition("-")[0] for request in gone) == names
        assert all(request.status == RequestStatus.FINISHED_ABORTED for request in gone)
    lab.assert_nothing_left()


def test_an_abort_in_the_middle_of_a_prompt_leaves_nothing_behind(lab: Lab) -> None:
    with Driver(lab.engine) as driver, checks.chunked(lab.engine, 16):
        name = driver.add(Ask(prompt_of(440, 60), [steer(15, 3)], max_tokens=4))
        other = driver.add(ROWS[0])
        driver.step()
        assert lab.state.pending
        driver.abort(name)
        driver.drain()
    lab.assert_as_alone(ROWS[0], driver.answer(other), lab.floor)
    lab.assert_nothing_left()
