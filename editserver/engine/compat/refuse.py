"""Configurations of vLLM under which an edit could be wrong: the server says so by name and does not start."""

from __future__ import annotations

from typing import Any

from editserver.engine.compat.version import SERVER, below_server

EDITED_ON = ("cpu", "cuda")
"""Types of devices. On a GPU nothing is taken on trust: every start runs the self-test of ``editserver.engine.triton.self_test``
on the device that will edit, and every step proves that each armed layer ran."""


class UnsupportedConfig(RuntimeError):
    """The server was started with a feature under which editing is not proven; the message names it."""


def refusals(vllm_config: Any) -> list[str]:
    """Every feature of ``vllm_config`` that editing does not support yet, each as a phrase naming the flag."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    cache = vllm_config.cache_config
    device = vllm_config.device_config.device_type
    checks = {
        f"speculative decoding by {_drafter(vllm_config)} (only ngram, on the V1 model runner, is proven)": bool(
            vllm_config.speculative_config is not None
            and (_drafter(vllm_config) != "ngram" or vllm_config.use_v2_model_runner)
        ),
        "pipeline parallelism on the V1 model runner (--pipeline-parallel-size > 1; set VLLM_USE_V2_MODEL_RUNNER=1)": (
            parallel.pipeline_parallel_size > 1 and not vllm_config.use_v2_model_runner
        ),
        f"pipeline parallelism through {_executor(parallel)} (pass --distributed-executor-backend mp)": (
            parallel.pipeline_parallel_size > 1 and _executor(parallel) != "mp"
        ),
        "data parallelism of a mixture of experts (--data-parallel-size > 1; its engines run in step)": bool(
            parallel.data_parallel_size > 1 and model.is_moe
        ),
        "a residual stream that is shared out between ranks (--enable-expert-parallel with tensor and data parallelism)": bool(
            getattr(parallel, "use_sequence_parallel_moe", False)
        ),
        f"the V2 model runner of vLLM below {SERVER[0]} (set VLLM_USE_V2_MODEL_RUNNER=0)": bool(
            vllm_config.use_v2_model_runner
        )
        and below_server(),
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual batch overlap (--enable-dbo)": bool(
            getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False)
        ),
        "a KV connector (--kv-transfer-config)": vllm_config.kv_transfer_config is not None,
        "an encoder-cache connector (--ec-transfer-config)": getattr(vllm_config, "ec_transfer_config", None)
        is not None,
        "pooling models (--runner pooling)": model.runner_type != "generate",
        "encoder-decoder models": bool(model.is_encoder_decoder),
        "prompt embeddings (--enable-prompt-embeds)": bool(getattr(model, "enable_prompt_embeds", False)),
        "sleep mode (--enable-sleep-mode; memory that the engine believes to be there may be gone when it wakes)": bool(
            getattr(model, "enable_sleep_mode", False)
        ),
        "KV-sharing fast prefill (--kv-sharing-fast-prefill)": bool(getattr(cache, "kv_sharing_fast_prefill", False)),
        "float16 weights (pass --dtype bfloat16 or float32)": str(model.dtype)
        not in ("torch.bfloat16", "torch.float32"),
    }
    found = [name for name, present in checks.items() if present]
    if device not in EDITED_ON:
        found.insert(0, f"the {device} backend (editserver edits on vLLM's CPU and CUDA backends)")
    return found


def _drafter(vllm_config: Any) -> str | None:
    """The method of ``--speculative-config``."""
    return getattr(vllm_config.speculative_config, "method", None)


def _executor(parallel: Any) -> str:
    """Who runs the workers: "mp", "ray", …"""
    backend = parallel.distributed_executor_backend
    return str(getattr(backend, "__name__", backend))


def check_config(vllm_config: Any) -> None:
    """Raise :class:`UnsupportedConfig` naming everything that stands in the way."""
    if found := refusals(vllm_config):
        raise UnsupportedConfig(
            "editserver cannot guarantee correct edits with " + "; ".join(found) + ". Start without, or use plain vLLM."
        )
