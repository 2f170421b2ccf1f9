"""Adapters of both families of model runners over many made-up steps: every row gets the edit of its own request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from editserver.engine.compat import core, v2_runner
from editserver.engine.compat import runner as adapter
from editserver.engine.splice import UnsupportedModel
from editserver.engine.wire import KEY, encode_step
from editserver.engine.worker import EngineWorker
from interventions.program import Payload
from tests.engine.runners_on_paper import BareState, Machine, current

pytest.importorskip("vllm")

STEPS = 300
MET = {
    "v1": ("steps", "resent", "rejected"),
    "v2": ("steps", "dummies", "padded", "resent", "rejected", "reallocated", "ahead"),
}
"""What must have come up for a run to prove something."""


def churn(family: str, seed: int) -> dict[str, int]:
    """A run of random steps with everything checked in each, then the receipts of all that finished."""
    machine = Machine(family, seed)
    machine.run(STEPS)
    assert machine.check_receipts() > 10
    return machine.counts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_each_row_gets_its_own_edit_through_sorts_padding_dummies_preemptions_and_forecasts(
    family: str, seed: int
) -> None:
    counts = churn(family, seed)
    assert all(counts[event] for event in MET[family]), counts


def _v2_starts_from_the_host(batch: Any, blocks: Any) -> Any:
    """Row starts as the host laid them out."""
    starts = torch.from_numpy(batch.query_start_loc_np[: batch.num_reqs + 1])
    return dataclasses.replace(v2_batch_of(batch, blocks), query_start=starts)


def _v2_positions_from_the_host(batch: Any, blocks: Any) -> Any:
    """Positions from the host's number of computed tokens."""
    starts = batch.query_start_loc.tolist()
    pairs = zip(batch.num_computed_tokens_np.tolist(), starts, starts[1:], strict=False)
    positions = torch.cat([torch.arange(c, c + b - a) for c, a, b in pairs])
    return dataclasses.replace(v2_batch_of(batch, blocks), positions=positions)


def _v2_rows_by_slot(batch: Any, blocks: Any) -> Any:
    """Rows in the order of the request slots."""
    ids = [name for _, name in sorted(zip(batch.idx_mapping_np.tolist(), batch.req_ids, strict=True))]
    return dataclasses.replace(v2_batch_of(batch, blocks), request_ids=ids)


def _prompts_only(worker: EngineWorker, new: Any) -> None:
    """What a request had generated before it was preempted is not known to the engine."""
    admit(worker, dataclasses.replace(new, prefill_token_ids=None))


def _all_prompt(worker: EngineWorker, new: Any) -> None:
    """What a request had generated before it was preempted is taken for prompt."""
    admit(worker, dataclasses.replace(new, prompt_token_ids=new.prefill_token_ids))


v2_batch_of, admit = v2_runner.batch_of, adapter.admit


def _records_of_the_last_step(worker: EngineWorker, output: Any) -> Any:
    """A late output has the records of whatever step was run last."""
    last.update(records=worker.end_step() if worker.plan.active else {})
    output.get_output = lambda: SimpleNamespace(**{KEY: encode_step(last["records"])})
    return output


last: dict[str, Any] = {}

MUTANTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "V2: row starts of the host": ("v2", v2_runner, "batch_of", _v2_starts_from_the_host),
    "V2: positions of the host": ("v2", v2_runner, "batch_of", _v2_positions_from_the_host),
    "V2: rows in the order of slots": ("v2", v2_runner, "batch_of", _v2_rows_by_slot),
    "V2: a resent request knows its prompt only": ("v2", adapter, "admit", _prompts_only),
    "V2: a resent request is all prompt": ("v2", adapter, "admit", _all_prompt),
    "V2: a late output has the last step's records": ("v2", adapter, "report", _records_of_the_last_step),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_an_adapter_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    family, module, function, mutant = MUTANTS[name]
    monkeypatch.setattr(module, function, mutant)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        churn(family, 0)
    print(name, "→", str(caught.value)[:150])


def test_a_dummy_batch_is_nobodys_even_behind_a_batch_that_was_preprocessed_and_never_run() -> None:
    machine = Machine("v2", 0)
    while not machine.running:
        machine.arrive()
        machine.step()
    machine.state._real = (SimpleNamespace(), None)
    machine.dummy()


def test_a_model_state_answers_as_the_one_that_it_extends() -> None:
    machine = Machine("v2", 3)
    machine.arrive()
    machine.step()
    seen = machine.state.seen
    assert seen[0] == "initialize"
    assert seen[1:3] == ["remove r0", "add 5 r0"]
    assert seen[3:] == ["preprocess"]
    assert type(machine.state).__name__ == "ListeningBareState"
    with current(machine.worker):
        assert machine.state.prepare_dummy_inputs(1, 1) == {"inputs_embeds": "of the base"}


def test_a_model_that_brings_a_model_state_of_its_own_is_refused_by_name() -> None:
    model = torch.nn.Module()
    model.get_model_state_cls = lambda: BareState  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match=r"Module runs with a model state of its own \(BareState\)"):
        v2_runner.install(model, None)


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_step_without_edits_adds_nothing_to_the_output(family: str) -> None:
    machine = Machine(family, 0)
    output = SimpleNamespace()
    assert adapter.report(machine.worker, output) is output
    assert not hasattr(output, KEY)
    assert adapter.report(machine.worker, None) is None


def test_a_payload_is_decoded_once_for_the_core_and_the_worker_and_a_large_one_is_not_kept() -> None:
    def asked(payload: Payload) -> SimpleNamespace:
        return SimpleNamespace(extra_args={KEY: payload.to_bytes(), core.SLOTS: []})

    small = Payload(None, (), "small")
    known = core.payload_of(asked(small))
    admitted: list[Any] = []
    worker = SimpleNamespace(add_request=lambda *given: admitted.append(given))
    new = SimpleNamespace(req_id="a", sampling_params=asked(small), prompt_token_ids=[1, 2], prefill_token_ids=None)
    adapter.admit(worker, new)  # type: ignore[arg-type]
    assert admitted == [("a", small, [], 2, [1, 2])]
    assert admitted[0][1] is known
    large = Payload(None, (), "l" * core.KNOWN_BYTES)
    assert core.payload_of(asked(large)) == large
    assert core.payload_of(asked(large)) is not core.payload_of(asked(large))
