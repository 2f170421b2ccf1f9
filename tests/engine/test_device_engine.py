"""The device's engine inside a real vLLM: V2 model runner, asynchronous scheduling, the kernels under Triton's interpreter.

The promises of :mod:`tests.engine.small`, each in the process of :mod:`tests.engine.device_machine`. By hand, the same for the
CPU's engine, whose scheduling vLLM never makes asynchronous: ``pytest -p tests.engine.async_machine tests/engine/small.py``.
"""

from __future__ import annotations

import pytest

from tests.engine.elsewhere import run_elsewhere

pytest.importorskip("triton.language")
pytestmark = pytest.mark.engine

PROMISES = (
    "test_answers_receipts_and_inspections_are_the_references",
    "test_the_handshake_hears_of_every_armed_layer_and_of_one_that_is_silent",
    "test_a_rows_edit_changes_no_bit_of_its_neighbours",
    "test_prefixes_are_shared_by_equal_edits_alone",
    "test_edits_are_the_same_in_chunks",
    "test_preempted_requests_have_the_same_edits_when_they_come_back",
    "test_gates_over_sequences_open_where_the_references_do",
    "test_members_of_whole_dictionaries_are_the_references",
    "test_rules_hold_and_act_where_the_references_do",
    "test_requests_that_come_and_go_mix_up_nothing",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = [f"small.py::{name}" for name in PROMISES]
    return run_elsewhere("tests.engine.device_machine", names, tmp_path_factory.mktemp("device"))


@pytest.mark.parametrize("name", PROMISES)
def test_the_promise_holds_on_the_device(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[f"small.py::{name}"] == ""
