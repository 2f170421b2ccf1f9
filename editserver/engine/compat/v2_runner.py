"""Adapter for the V2 family of model runners: ``GPUModelRunner`` (vllm/v1/worker/gpu/model_runner.py) and its CPU subclass.

A model may bring its own ``ModelState`` (``get_model_state_cls``, vllm/v1/worker/gpu/model_states/__init__.py:31): ours is
the one it would have had, and listens. In the order of a step (``execute_model``, :1719):

* ``remove_request`` and ``add_request`` tell which requests came and went. Preempted ones go too, and are sent again;
* ``preprocess_state`` sees real batches only, with the KV blocks of every row in row order;
* ``prepare_inputs`` sees every batch last of all. Rows are sorted, ``query_start_loc_np`` is a forecast, ``positions`` and
  ``input_ids`` are padded; a batch that was not preprocessed is a dummy (its rows are nobody's, though they stand for
  request slots that are somebody's): nothing may be edited;
* ``prepare_dummy_inputs`` stands for it where CUDA graphs are captured.

``GPUModelRunner.sample_tokens`` (:2088) returns the step's output, to which the records are attached. In a pipeline, what
``execute_model`` is given and returns besides carries those of earlier stages (``pipeline``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from editserver.engine import op
from editserver.engine.batch import BlockTable, StepBatch
from editserver.engine.compat import pipeline
from editserver.engine.compat import runner as adapter
from editserver.engine.splice import UnsupportedModel


def batch_of(input_batch: Any, blocks: Callable[[], BlockTable | None]) -> StepBatch:
    """The batch that the forward pass is about to see (``InputBatch``, vllm/v1/worker/gpu/input_batch.py:41)."""
    return StepBatch(
        input_batch.req_ids,
        input_batch.idx_mapping_np,
        input_batch.idx_mapping,
        input_batch.query_start_loc,
        input_batch.num_tokens,
        input_batch.positions,
        input_batch.input_ids,
        blocks,
    )


def buffers_of(block_tables: Any, group: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Blocks by row and slots by token of one cache group of ``BlockTables`` (vllm/v1/worker/gpu/block_table.py:17), and its
    block size: what every forward pass is given."""
    return block_tables.input_block_tables[group], block_tables.slot_mappings[group], block_tables.block_sizes[group]


def listening(base: type[Any]) -> type[Any]:
    """``base``, a class of model states, as a class of such that tell this process's engine what they are told."""

    class Listening(base):
        _real: tuple[Any, Callable[[], BlockTable | None]] | None = None
        """The batch that was preprocessed last, and what tells where its KV lies."""
        _block_sizes: list[int]

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            adapter.admit(op.current(), new_req_data)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            adapter.remove(op.current(), req_id)

        def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
            super().initialize_kv_cache(kv_cache_config, block_tables)
            self._block_sizes = block_tables.block_sizes
            if (worker := op.current()) is not None:
                adapter.attach(worker, kv_cache_config, lambda group: buffers_of(block_tables, group))

        def preprocess_state(
            self, input_batch: Any, block_tables: Any, kv_cache_config: Any, *args: Any, **kwargs: Any
        ) -> None:
            super().preprocess_state(input_batch, block_tables, kv_cache_config, *args, **kwargs)

            def table(group: int) -> tuple[torch.Tensor, int]:
                return block_tables[group], self._block_sizes[group]

            self._real = input_batch, lambda: adapter.block_table(kv_cache_config, table)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            prepared = super().prepare_inputs(input_batch, req_states)
            real, self._real = self._real, None
            if (worker := op.current()) is not None:
                if real is not None and real[0] is input_batch:
                    worker.begin(batch_of(*real))
                else:
                    worker.idle_step()
            return prepared

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
            self._real = None
            if (worker := op.current()) is not None:
                worker.idle_step(num_reqs == num_tokens)
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

    Listening.__name__ = Listening.__qualname__ = f"Listening{base.__name__}"
    return Listening


def install(model: torch.nn.Module, vllm_config: Any) -> None:
    """Give ``model`` its model state, and wrap the runner class once per process (called when ``model`` has been armed)."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    base = resolve_model_state_cls(vllm_config, model)
    if base is not DefaultModelState:
        raise UnsupportedModel(
            f"{type(model).__name__} runs with a model state of its own ({base.__name__}); with the V2 model runner "
            "editserver knows models that do not (VLLM_USE_V2_MODEL_RUNNER=0 may run it)"
        )
    state = listening(base)
    model.get_model_state_cls = lambda: state  # type: ignore[assignment]
    if hasattr(GPUModelRunner, "editserver"):
        return
    GPUModelRunner.editserver = True
    execute_model, sample_tokens = GPUModelRunner.execute_model, GPUModelRunner.sample_tokens

    @functools.wraps(execute_model)
    def _execute_model(
        self: Any, scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        stage = pipeline.current()
        if stage is not None:
            stage.receive(None if intermediate_tensors is None else intermediate_tensors.tensors)
        output = execute_model(self, scheduler_output, intermediate_tensors, *args, **kwargs)
        if stage is not None and hasattr(output, "tensors"):
            return type(output)(stage.send(op.current(), output.tensors))
        return output

    @functools.wraps(sample_tokens)
    def _sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        return adapter.report(op.current(), sample_tokens(self, *args, **kwargs))

    GPUModelRunner.execute_model = _execute_model
    GPUModelRunner.sample_tokens = _sample_tokens
