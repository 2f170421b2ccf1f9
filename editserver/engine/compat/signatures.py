"""The private interfaces the adapters rely on. One that is missing or takes other arguments stops the server."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from editserver.engine.compat.version import UnsupportedVllm, check_vllm

RELIED_ON: dict[str, tuple[str, ...]] = {
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
"""Symbol → its leading parameters. The runner's are checked in the worker, where it is imported anyway."""

RUNNER_RELIED_ON: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run": ("self", "num_tokens"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": ("self", "grammar_output"),
}


def differences(relied_on: dict[str, tuple[str, ...]]) -> list[str]:
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
        if parameters[: len(expected)] != expected:
            found.append(f"{symbol} takes {parameters}, expected {expected} first")
    return found


def check(relied_on: dict[str, tuple[str, ...]] = RELIED_ON) -> None:
    """Raise :class:`UnsupportedVllm` naming every interface that is not as the adapters know it."""
    if found := differences(relied_on):
        info = check_vllm()
        raise UnsupportedVllm(f"{info.flavour} {info.version} is not as editserver knows it: " + "; ".join(found))
