"""What an adapter tells the engine of a worker, in one form for both families of model runners: who came and went, the flat
batch of a step, and what goes back with its output.

An adapter knows where its runner keeps these things, and when they are final; everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from editserver.engine.batch import BlockTable
from editserver.engine.compat import pipeline
from editserver.engine.compat.core import SLOTS, payload_of
from editserver.engine.compat.kv_groups import whole_group
from editserver.engine.engine import Engine
from editserver.engine.wire import KEY, Told, encode_step
from interventions.program import Payload


def block_table(kv_cache_config: Any, table: Callable[[int], tuple[torch.Tensor, int]]) -> BlockTable | None:
    """``table(group)`` gives a group's blocks by row, and their size; None where no group keeps every token's."""
    group = whole_group(kv_cache_config)
    if group is None:
        return None
    blocks, block_size = table(group)
    return BlockTable(blocks, block_size, n_slots(kv_cache_config, group))


def n_slots(kv_cache_config: Any, group: int) -> int:
    """Tokens that a whole cache of ``group`` holds. Up to vLLM 0.31 a table may have its blocks in smaller pieces."""
    return int(kv_cache_config.num_blocks * kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size)


def attach(
    worker: Engine, kv_cache_config: Any, table: Callable[[int], tuple[torch.Tensor, torch.Tensor, int]]
) -> None:
    """The KV cache is there; ``table(group)`` gives the buffers of a group: blocks by row, slots by token, and the block size."""
    group = whole_group(kv_cache_config)
    if group is not None:
        blocks, slot_mapping, block_size = table(group)
        worker.attach(BlockTable(blocks, block_size, n_slots(kv_cache_config, group)), slot_mapping)


def admit(worker: Engine | None, new: Any) -> None:
    """A request that is scheduled for the first time, or sent again: vLLM's ``NewRequestData`` (vllm/v1/core/sched/output.py:40).

    The V2 family forgets preempted requests and has them sent again, with the tokens that they had generated behind their
    prompt in ``prefill_token_ids``: those are known tokens, and not prompt.
    """
    payload, prompt = payload_of(new.sampling_params), new.prompt_token_ids
    if payload is None:
        remove(worker, new.req_id)  # an id may come back without a program
        return
    slots = list(new.sampling_params.extra_args[SLOTS])
    own: Payload | None = payload
    if (stage := pipeline.current()) is not None:
        own, slots = stage.admit(new.req_id, payload, slots)
    if worker is not None and own is not None:
        worker.add_request(new.req_id, own, slots, len(prompt), new.prefill_token_ids or prompt)
    elif worker is not None:
        worker.remove_request(new.req_id)


def remove(worker: Engine | None, request_id: str) -> None:
    """A request that is gone, finished or preempted."""
    if (stage := pipeline.current()) is not None:
        stage.forget(request_id)
    if worker is not None:
        worker.remove_request(request_id)


def report(worker: Engine | None, output: Any) -> Any:
    """The step's ``output`` with the records of what was done in it as attribute ``KEY`` (:func:`encode_step`).

    Where the runner answers before the device is done (``AsyncModelRunnerOutput``, vllm/v1/outputs.py:354), the output that
    is waited for has them.
    """
    records = worker.finish() if worker is not None else None
    if (stage := pipeline.current()) is not None:
        records = stage.joined(records)
    if records is None:
        return output
    if hasattr(output, "get_output"):
        output.get_output = _Reporting(output.get_output, records)
    else:
        setattr(output, KEY, encode_step(records()))
    return output


@dataclass(frozen=True)
class _Reporting:
    """``get_output`` of an asynchronous output."""

    original: Callable[[], Any]
    records: Callable[[], Told]

    def __call__(self) -> Any:
        output = self.original()
        setattr(output, KEY, encode_step(self.records()))
        return output
