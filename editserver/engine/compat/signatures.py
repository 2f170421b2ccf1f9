"""The private interfaces the adapters rely on. One that is missing or takes other arguments stops the server."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from editserver.engine.compat.version import ENGINE, UnsupportedVllm, check_vllm

Relied = Mapping[str, tuple[str, ...] | frozenset[str]]
"""Symbol → its leading parameters, or some fields of a dataclass in any order."""

RELIED_ON: Relied = {
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model": ("self", "vllm_config", "model_config"),
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": ("self", "request_ids", "finished_status"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": ("self", "scheduler_output", "model_runner_output"),
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": ("self", "request"),
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": ("self", "engine_core_outputs"),
    "vllm.v1.engine.output_processor:RequestState._new_completion_output": ("self", "token_ids", "finish_reason"),
    "vllm.v1.engine.detokenizer:IncrementalDetokenizer.num_output_tokens": ("self",),
    "vllm.v1.engine:EngineCoreOutput": ("request_id", "new_token_ids", "new_logprobs"),
}
"""What every process relies on. The runners' are checked in the worker, where they are imported anyway."""

_NEW_REQUEST = {
    "vllm.v1.core.sched.output:NewRequestData": frozenset(
        ("req_id", "prompt_token_ids", "sampling_params", "prefill_token_ids")
    )
}

V1_RELIED_ON: Relied = {
    **_NEW_REQUEST,
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run": ("self", "num_tokens"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": ("self", "grammar_output"),
}
"""What ``v1_runner`` wraps."""

_STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"
V2_RELIED_ON: Relied = {
    **_NEW_REQUEST,
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls": ("vllm_config", "model"),
    f"{_STATE}.add_request": ("self", "req_index", "new_req_data"),
    f"{_STATE}.remove_request": ("self", "req_id"),
    f"{_STATE}.initialize_kv_cache": ("self", "kv_cache_config", "block_tables"),
    f"{_STATE}.preprocess_state": ("self", "input_batch", "block_tables", "kv_cache_config"),
    f"{_STATE}.prepare_inputs": ("self", "input_batch", "req_states"),
    f"{_STATE}.prepare_dummy_inputs": ("self", "num_reqs", "num_tokens"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": (
        "self",
        "scheduler_output",
        "intermediate_tensors",
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": ("self", "grammar_output"),
    "vllm.v1.worker.gpu.input_batch:InputBatch": frozenset(
        (
            "req_ids",
            "idx_mapping",
            "idx_mapping_np",
            "num_reqs",
            "num_tokens",
            "query_start_loc",
            "positions",
            "input_ids",
        )
    ),
}
"""What ``v2_runner`` extends, wraps and reads."""


MEMORY_RELIED_ON: Relied = {
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": ("self",),
    "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec": ("self",),
    "vllm.v1.core.kv_cache_utils:get_kv_cache_groups": ("vllm_config", "kv_cache_spec"),
    "vllm.v1.core.kv_cache_utils:_pool_bytes_per_block": frozenset(("kv_cache_groups",)),
    "vllm.v1.kv_cache_interface:KVCacheConfig": frozenset(("num_blocks", "kv_cache_tensors", "kv_cache_groups")),
}
"""What ``memory`` wraps and asks."""


def differences(relied_on: Relied) -> list[str]:
    """What does not match, one sentence each."""
    found = []
    for symbol, expected in relied_on.items():
        module, _, path = symbol.partition(":")
        try:
            target: Any = importlib.import_module(module)
            for part in path.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError):
            found.append(f"{symbol} does not exist")
            continue
        parameters = tuple(inspect.signature(target).parameters)
        if isinstance(expected, frozenset):
            if missing := sorted(expected - set(parameters)):
                found.append(f"{symbol} has no {', '.join(missing)}")
        elif parameters[: len(expected)] != expected:
            found.append(f"{symbol} takes {parameters}, expected {expected} first")
    return found


def check(relied_on: Relied = RELIED_ON) -> None:
    """Raise :class:`UnsupportedVllm` naming every interface that is not as the adapters know it."""
    if found := differences(relied_on):
        info = check_vllm(ENGINE)
        raise UnsupportedVllm(f"{info.flavour} {info.version} is not as editserver knows it: " + "; ".join(found))
