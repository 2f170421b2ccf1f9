"""Adapter for the V1 family of model runners: ``GPUModelRunner`` (vllm/v1/worker/gpu_model_runner.py) and its CPU subclass.

* ``_update_states`` (:1172) tells which requests came and went;
* after ``_prepare_inputs`` (:1920) the batch is final: row order, ``query_start_loc``, ``positions`` and ``input_ids`` are
  what the forward pass will see, so the plan is made from them and nothing else;
* ``input_batch.block_table[group]`` (vllm/v1/worker/block_table.py) then holds the KV blocks of every row, in row order:
  hit bits of gates are kept by KV slot;
* ``_dummy_run`` (:5508) runs the model without a batch: nothing may be edited;
* ``sample_tokens`` (:4304) returns the step's output, to which the records are attached.
"""

from __future__ import annotations

import functools
from typing import Any

from editserver.engine import op
from editserver.engine.compat.core import SLOTS
from editserver.engine.compat.kv_groups import whole_group
from editserver.engine.gates import Blocks
from editserver.engine.wire import KEY
from editserver.engine.worker import EngineWorker
from interventions.program import Payload


def _update_requests(worker: EngineWorker, scheduler_output: Any) -> None:
    for request_id in scheduler_output.finished_req_ids:
        worker.remove_request(request_id)
    for new in scheduler_output.scheduled_new_reqs:
        extra = getattr(new.sampling_params, "extra_args", None) or {}
        if KEY not in extra:
            worker.remove_request(new.req_id)  # an id may come back without a program
            continue
        payload = Payload.from_bytes(extra[KEY])
        prompt = new.prompt_token_ids
        worker.add_request(new.req_id, payload, list(extra[SLOTS]), len(prompt), prompt)


def _plan_step(worker: EngineWorker, runner: Any, total: int) -> None:
    n_rows = runner.input_batch.num_reqs
    worker.begin_step(
        runner.input_batch.req_ids[:n_rows],
        runner.query_start_loc.gpu[: n_rows + 1].numpy(),
        runner.positions[:total].numpy(),
        runner.input_ids.gpu[:total].numpy(),
        _blocks(runner),
    )


def _blocks(runner: Any) -> Blocks | None:
    """Where the KV of the batch's rows lies, in the group that keeps every token's."""
    config = runner.kv_cache_config
    group = whole_group(config)
    if group is None:
        return None
    table = runner.input_batch.block_table[group]
    return Blocks(table.get_numpy_array(), table.block_size, config.num_blocks * table.block_size)


def install() -> None:
    """Wrap the runner class, once per process (called when a model has been armed)."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if hasattr(GPUModelRunner, "editserver"):
        return
    GPUModelRunner.editserver = True
    update_states, prepare_inputs = GPUModelRunner._update_states, GPUModelRunner._prepare_inputs
    dummy_run, sample_tokens = GPUModelRunner._dummy_run, GPUModelRunner.sample_tokens

    @functools.wraps(update_states)
    def _update_states(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        worker = op.current()
        if worker is not None:
            _update_requests(worker, scheduler_output)
            worker.idle_step()  # until the batch is prepared, nothing is planned
        return update_states(self, scheduler_output, *args, **kwargs)

    @functools.wraps(prepare_inputs)
    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare_inputs(self, scheduler_output, *args, **kwargs)
        worker = op.current()
        if worker is not None:
            _plan_step(worker, self, scheduler_output.total_num_scheduled_tokens)
        return prepared

    @functools.wraps(dummy_run)
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        worker = op.current()
        if worker is not None:
            worker.idle_step()
        return dummy_run(self, *args, **kwargs)

    @functools.wraps(sample_tokens)
    def _sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(self, *args, **kwargs)
        worker = op.current()
        if worker is not None and worker.plan.active:
            setattr(output, KEY, worker.end_step())
        return output

    GPUModelRunner._update_states = _update_states
    GPUModelRunner._prepare_inputs = _prepare_inputs
    GPUModelRunner._dummy_run = _dummy_run
    GPUModelRunner.sample_tokens = _sample_tokens
