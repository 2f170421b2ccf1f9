"""Which engine a worker edits with, made and proven before the model is run."""

from __future__ import annotations

import importlib.util

import torch

from editserver.engine import native
from editserver.engine.abilities import Abilities
from editserver.engine.config import EngineConfig
from editserver.engine.engine import Engine
from editserver.engine.warm_up import warm_up
from editserver.engine.worker import EngineWorker


def engine_for(
    config: EngineConfig,
    d_model: int,
    dtype: torch.dtype,
    device: torch.device,
    abilities: Abilities | None,
    max_tokens: int,
    drafts: int = 0,
) -> Engine:
    """The engine of a worker whose model lies on ``device``, its kernels compiled.

    Args:
        abilities: of the device's engine; None for the CPU's.
        max_tokens: of one batch.
        drafts: most draft tokens of one request in one step.

    Raises:
        SelfTestError: the kernels do not compute on this device what the definition says.
        RuntimeError: there is no Triton, or none for this device.
    """
    if abilities is None:
        worker = EngineWorker(config, d_model, dtype, max_tokens, drafts)
        warm_up(worker)
        if native.load():
            worker.give_jobs()
        return worker
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"editing on {device.type} needs Triton, which is not installed")
    from editserver.engine.triton import self_test
    from editserver.engine.triton.kernel_common import INTERPRETED
    from editserver.engine.triton.worker import DeviceWorker

    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"the device engine runs on {device.type} under Triton's interpreter only (TRITON_INTERPRET=1)"
        )
    capacity, rules, encode = abilities.capacity, abilities.rules, abilities.encode
    made = DeviceWorker(config, d_model, dtype, device, capacity, drafts, rules=rules, encode=encode)
    self_test.prove(made.step, dtype, brief=INTERPRETED)
    return made
