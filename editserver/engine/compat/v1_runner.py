"""Adapter for the V1 family of model runners: ``GPUModelRunner`` (vllm/v1/worker/gpu_model_runner.py) and its CPU subclass.

* ``_update_states`` (:1172) tells which requests came and went;
* after ``_prepare_inputs`` (:1920) the batch is final: row order, ``query_start_loc``, ``positions`` and ``input_ids`` on the
  device are what the forward pass will see (what the host has of them is a forecast, :2087), so the plan is made from them
  and nothing else;
* ``input_batch.block_table[group]`` (vllm/v1/worker/block_table.py) then holds the KV blocks of every row, in row order:
  hit bits of gates are kept by KV slot;
* after ``initialize_kv_cache`` (:7055) the buffers of the KV cache lie where they will stay;
* ``_dummy_run`` (:5508) runs the model without a batch: nothing may be edited;
* ``sample_tokens`` (:4304) returns the step's output, to which the records are attached.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy.typing as npt
import torch

from editserver.engine import op
from editserver.engine.batch import StepBatch
from editserver.engine.compat import runner as adapter


def batch_of(runner: Any, total: int) -> StepBatch:
    """The batch of ``total`` tokens that ``runner`` has just prepared."""
    batch = runner.input_batch
    n_rows = batch.num_reqs

    def table(group: int) -> tuple[torch.Tensor, int]:
        found = batch.block_table[group]
        return found.get_device_tensor(n_rows), found.block_size

    return StepBatch(
        batch.req_ids[:n_rows],
        *_rows(runner.max_num_reqs, runner.positions.device),
        runner.query_start_loc.gpu,
        total,
        runner.positions,
        runner.input_ids.gpu,
        lambda: adapter.block_table(runner.kv_cache_config, table),
    )


@functools.cache
def _rows(n: int, device: torch.device) -> tuple[npt.NDArray[Any], torch.Tensor]:
    """0 … n − 1, here and there."""
    rows = torch.arange(n)
    return rows.numpy(), rows.to(device)


def buffers_of(runner: Any, group: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A cache group's blocks by row and slots by token, and its block size, as long as the runner lives."""
    found = runner.input_batch.block_table[group]
    return found.get_device_tensor(runner.max_num_reqs), found.slot_mapping.gpu, found.block_size


def install(model: torch.nn.Module, vllm_config: Any) -> None:
    """Wrap the runner class, once per process (called when ``model`` has been armed)."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if hasattr(GPUModelRunner, "editserver"):
        return
    GPUModelRunner.editserver = True
    update_states, prepare_inputs = GPUModelRunner._update_states, GPUModelRunner._prepare_inputs
    dummy_run, sample_tokens = GPUModelRunner._dummy_run, GPUModelRunner.sample_tokens
    initialize_kv_cache = GPUModelRunner.initialize_kv_cache

    @functools.wraps(initialize_kv_cache)
    def _initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        initialized = initialize_kv_cache(self, kv_cache_config, *args, **kwargs)
        if (worker := op.current()) is not None:
            adapter.attach(worker, self.kv_cache_config, lambda group: buffers_of(self, group))
        return initialized

    @functools.wraps(update_states)
    def _update_states(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        worker = op.current()
        if worker is not None:
            for request_id in scheduler_output.finished_req_ids:
                worker.remove_request(request_id)
            for new in scheduler_output.scheduled_new_reqs:
                adapter.admit(worker, new)
            worker.idle_step()  # until the batch is prepared, nothing is planned
        return update_states(self, scheduler_output, *args, **kwargs)

    @functools.wraps(prepare_inputs)
    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare_inputs(self, scheduler_output, *args, **kwargs)
        worker = op.current()
        if worker is not None and worker.residents.requests:  # else idle since _update_states
            worker.begin(batch_of(self, scheduler_output.total_num_scheduled_tokens))
        return prepared

    @functools.wraps(dummy_run)
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        worker = op.current()
        if worker is not None:
            worker.idle_step(bool(kwargs.get("uniform_decode")) and self.uniform_decode_query_len == 1)
        return dummy_run(self, *args, **kwargs)

    @functools.wraps(sample_tokens)
    def _sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(self, *args, **kwargs)
        worker = op.current()
        return output if worker is None else adapter.report(worker, output)

    GPUModelRunner._update_states = _update_states
    GPUModelRunner._prepare_inputs = _prepare_inputs
    GPUModelRunner._dummy_run = _dummy_run
    GPUModelRunner.initialize_kv_cache = _initialize_kv_cache
    GPUModelRunner.sample_tokens = _sample_tokens
