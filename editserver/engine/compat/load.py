"""Arming at load time: the target model exists, is fully loaded, and nothing has been traced.

Hook: ``BaseModelLoader.load_model`` (vllm/model_executor/model_loader/base_loader.py:62), through which every runner and
every loader passes. A drafter's load is told apart by its ``model_config``.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import torch

from editserver.engine.compat import llvmlite_guard, signatures
from editserver.engine.compat.refuse import check_config
from editserver.engine.compat.reserved import abilities_of, drafts_of
from editserver.engine.compat.version import SERVER, check_vllm
from editserver.engine.config import EngineConfig

logger = logging.getLogger("vllm.editserver")


def install() -> None:
    """Wrap the loader and the engine's configuration step, once per process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original = BaseModelLoader.load_model
    if hasattr(original, "editserver"):
        return

    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, vllm_config, model_config, *args, **kwargs)
        config = EngineConfig.of(vllm_config)
        if config is not None and model_config is vllm_config.model_config:
            arm_model(model, vllm_config, config)
        return model

    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(create_engine_config)
    def _create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        usage = args[0] if args else kwargs.get("usage_context")
        if getattr(usage, "name", None) == "OPENAI_API_SERVER":
            check_vllm(SERVER)  # fields of a request would go unnoticed in a server that edits do not build on
        vllm_config = create_engine_config(self, *args, **kwargs)
        if EngineConfig.of(vllm_config) is not None:
            check_config(vllm_config)  # here as well as in the worker: said at once, in the process that was started
        return vllm_config

    load_model.editserver = True  # type: ignore[attr-defined]
    BaseModelLoader.load_model = load_model
    EngineArgs.create_engine_config = _create_engine_config


def arm_model(model: torch.nn.Module, vllm_config: Any, config: EngineConfig) -> None:
    """Arm ``model`` and install this process's engine; raises when an edit could be wrong."""
    # Imported here and not sooner: these load numba, and vLLM's worker start (triton_utils/dispatcher.py:138) trips over
    # llvmlite's module objects if they are there before it.
    from editserver.engine import op, splice
    from editserver.engine.choose import engine_for
    from editserver.engine.compat import memory, parallel, pipeline, v1_runner, v2_runner

    llvmlite_guard.install()
    check_config(vllm_config)
    text_config = vllm_config.model_config.hf_text_config
    names = list(vllm_config.compilation_config.static_forward_context)
    layers = splice.locate(model, text_config.num_hidden_layers, names)
    width = int(vllm_config.model_config.get_hidden_size())
    stage = pipeline.stage_of(vllm_config, config.armed, tuple(layers))
    pipeline.install(stage)
    if stage is not None:
        config = replace(config, armed=stage.armed)
    armed = splice.arm(layers, config.armed, width)
    if armed or stage is None:
        worker = engine_for(
            config,
            width,
            vllm_config.model_config.dtype,
            next(model.parameters()).device,
            abilities_of(vllm_config, config),
            int(vllm_config.scheduler_config.max_num_batched_tokens),
            drafts_of(vllm_config),
        )
        op.install(worker)
        memory.install(vllm_config)
        logger.info(
            "editserver: armed layers %s of %s, %d rows (%.0f MB)%s",
            armed,
            type(model).__name__,
            config.bank_rows,
            worker.bank.n_bytes / 1e6,
            "" if getattr(worker, "jobs", None) is None else ", the op in C++",
        )
    else:
        logger.info("editserver: none of the armed layers lies at this stage of the pipeline")
    parallel.install(vllm_config)
    v2 = bool(vllm_config.use_v2_model_runner)
    signatures.check(signatures.V2_RELIED_ON if v2 else signatures.V1_RELIED_ON)
    (v2_runner if v2 else v1_runner).install(model, vllm_config)
