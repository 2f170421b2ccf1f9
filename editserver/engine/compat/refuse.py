"""Configurations of vLLM under which an edit could be wrong: the server says so by name and does not start."""

from __future__ import annotations

from typing import Any


class UnsupportedConfig(RuntimeError):
    """The server was started with a feature under which editing is not proven; the message names it."""


def refusals(vllm_config: Any) -> list[str]:
    """Every feature of ``vllm_config`` that editing does not support yet, each as a phrase naming the flag."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    checks = {
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "tensor parallelism (--tensor-parallel-size > 1)": parallel.tensor_parallel_size > 1,
        "pipeline parallelism (--pipeline-parallel-size > 1)": parallel.pipeline_parallel_size > 1,
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
        "KV-sharing fast prefill (--kv-sharing-fast-prefill)": bool(getattr(cache, "kv_sharing_fast_prefill", False)),
        "asynchronous scheduling (pass --no-async-scheduling)": bool(scheduler.async_scheduling),
        "the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": bool(vllm_config.use_v2_model_runner),
        "float16 weights (pass --dtype bfloat16 or float32)": str(model.dtype)
        not in ("torch.bfloat16", "torch.float32"),
    }
    found = [name for name, present in checks.items() if present]
    device = vllm_config.device_config.device_type
    if device != "cpu":
        found.insert(0, f"the {device} backend (this version edits on vLLM's CPU backend)")
    return found


def check_config(vllm_config: Any) -> None:
    """Raise :class:`UnsupportedConfig` naming everything that stands in the way."""
    if found := refusals(vllm_config):
        raise UnsupportedConfig(
            "editserver cannot guarantee correct edits with " + "; ".join(found) + ". Start without, or use plain vLLM."
        )
