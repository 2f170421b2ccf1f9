"""The KV cache gets what editing leaves: a worker's answer about available memory is lowered by what comes after it.

Hook: ``determine_available_memory`` of the worker's class (vllm/v1/worker/gpu_worker.py:634, cpu_worker.py:204). What is
allocated with the model lies in its profile already; the bits that gates and rules keep along with the KV cache do not, nor
do, where a CPU's memory is measured by what is in use, buffers that nobody has written to yet.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from editserver.engine import op
from editserver.engine.compat import signatures
from editserver.engine.compat.kv_groups import whole_group
from editserver.engine.config import EngineConfig
from editserver.engine.memory import Budget, Footprint

logger = logging.getLogger("vllm.editserver")

MIB, GIB = 2**20, 2**30


class OutOfMemory(ValueError):
    """What editing needs leaves no room for a KV cache; the message says how much that is."""


def block_of(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> tuple[int, int] | None:
    """Bytes of one block of a cache of these layers, and how many tokens' bits are kept along with it (0: nobody's).

    None where there is no KV cache. As vLLM will group the layers (vllm/v1/core/kv_cache_utils.py:2159), so it is asked.
    """
    from vllm.v1.core.kv_cache_utils import _pool_bytes_per_block, get_kv_cache_groups
    from vllm.v1.kv_cache_interface import KVCacheConfig

    groups = get_kv_cache_groups(vllm_config, copy.deepcopy(kv_cache_spec))
    if not groups:
        return None
    group = whole_group(KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups))
    tokens = 0 if group is None else int(groups[group].kv_cache_spec.block_size)
    bytes_of: Any = _pool_bytes_per_block
    takes_config = "vllm_config" in inspect.signature(bytes_of).parameters  # vLLM 0.29 to 0.31 does not
    return int(bytes_of(vllm_config, groups) if takes_config else bytes_of(groups)), tokens


def divide(vllm_config: Any, kv_cache_spec: dict[str, Any], available: int, footprint: Footprint) -> Budget | None:
    """What of ``available`` bytes is for the KV cache; None where there is none.

    Raises:
        OutOfMemory: nothing is left.
    """
    block = block_of(vllm_config, kv_cache_spec)
    if block is None:
        return None
    block_bytes, block_tokens = block
    later = _not_counted(vllm_config, footprint)
    budget = Budget.of(available - later, block_bytes, block_tokens, footprint.kept_per_token)
    if not budget.n_blocks:
        raise OutOfMemory(
            f"of {available / MIB:.1f} MiB for the KV cache, editing needs {later / MIB:.1f} MiB and "
            f"{footprint.kept_per_token} bytes per token: nothing is left. Raise the memory share, or lower --bank-rows, "
            "--limit propositions=N, --max-num-batched-tokens or the armed layers"
        )
    return budget


def _not_counted(vllm_config: Any, footprint: Footprint) -> int:
    """Bytes besides what is kept per token that ``available`` does not reflect.

    A share of a CPU's memory is taken by what the process uses so far. A budget that the operator named in bytes is for the
    KV cache alone; on an accelerator, everything else was there when it was profiled.
    """
    measured = vllm_config.cache_config.kv_cache_memory_bytes is None
    return footprint.fixed_bytes if measured and not footprint.on_device else 0


def install(vllm_config: Any) -> None:
    """Have the worker's class count what this process's engine needs (called in the worker when its model has been armed)."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    signatures.check(signatures.MEMORY_RELIED_ON)
    worker_class = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    original = worker_class.determine_available_memory
    if not hasattr(original, "editserver"):
        worker_class.determine_available_memory = _counting(original)


def _counting(original: Callable[[Any], int]) -> Callable[[Any], int]:
    @functools.wraps(original)
    def determine_available_memory(self: Any) -> int:
        available = original(self)
        worker = op.current()
        if worker is None or EngineConfig.of(self.vllm_config) is None:
            return available
        footprint = worker.footprint()
        budget = divide(self.vllm_config, self.get_kv_cache_spec(), available, footprint)
        if budget is None:
            return available
        logger.info("%s", described(footprint, budget))
        return budget.kv_bytes

    determine_available_memory.editserver = True  # type: ignore[attr-defined]
    return determine_available_memory


def described(footprint: Footprint, budget: Budget) -> str:
    """The line of the log."""
    reserved = ", ".join(f"{name} {size / MIB:.1f}" for name, size in footprint.reserved.items())
    return (
        f"editserver: {sum(footprint.reserved.values()) / MIB:.1f} MiB reserved ({reserved}), up to "
        f"{sum(footprint.on_demand.values()) / MIB:.1f} MiB on demand; KV cache {budget.kv_bytes / GIB:.2f} GiB, beside it "
        f"{footprint.kept_per_token} bytes per token for gates and rules ({budget.share:.2%} of both)"
    )
