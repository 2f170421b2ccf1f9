"""What a server of some configuration would keep in memory for editing: the table of ``editserver doctor MODEL …``."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from editserver.engine.compat.reserved import abilities_of, drafts_of
from editserver.engine.config import EngineConfig
from editserver.engine.memory import Budget, Footprint, on_cpu, on_device

MIB, GIB = 2**20, 2**30

KV_BYTES = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
"""Of one number in the KV cache, by ``--kv-cache-dtype``; the other formats pack numbers with their scales."""


@dataclass(frozen=True)
class Plan:
    """What a server would reserve.

    Attributes:
        kv_per_token: see :func:`kv_per_token`.
        kv_budget: bytes for the KV cache, where they were given as such.
        memory: bytes that the server may use at all, where that was given as a share.
    """

    footprint: Footprint
    kv_per_token: int
    block_tokens: int
    kv_budget: int | None
    memory: int | None

    @property
    def share(self) -> float:
        """The most of the KV cache's budget that is kept for gates and rules, 0 to 1."""
        kept = self.footprint.kept_per_token
        return kept / (kept + self.kv_per_token) if self.kv_per_token else 0.0

    @property
    def budget(self) -> Budget | None:
        """How a given budget is divided."""
        if self.kv_budget is None or not self.kv_per_token:
            return None
        block = self.block_tokens * self.kv_per_token
        return Budget.of(self.kv_budget, block, self.block_tokens, self.footprint.kept_per_token)


def plan(args: Namespace) -> Plan:
    """Of a server with these parsed arguments (``editserver.cli.serve.prepare``); reads the model's config, no weights."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    config = EngineConfig.of(vllm_config)
    assert config is not None
    cache = vllm_config.cache_config
    measured = cache.kv_cache_memory_bytes is None
    return Plan(
        _footprint(config, vllm_config),
        kv_per_token(vllm_config),
        int(cache.block_size or 16),
        cache.kv_cache_memory_bytes,
        int(cache.gpu_memory_utilization * _all_memory(vllm_config)) if measured else None,
    )


def _footprint(config: EngineConfig, vllm_config: Any) -> Footprint:
    d_model = int(vllm_config.model_config.get_hidden_size())
    scheduler = vllm_config.scheduler_config
    abilities = abilities_of(vllm_config, config)
    if abilities is None:
        whole = [source.open() for source in config.saes if source.id in config.full_encode]
        return on_cpu(config, d_model, int(scheduler.max_num_batched_tokens), whole)
    return on_device(config, d_model, abilities, drafts_of(vllm_config))


def kv_per_token(vllm_config: Any) -> int:
    """Keys and values of one token at all attention layers of one worker, in bytes; 0 in formats that are not known here."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = vllm_config.cache_config.cache_dtype
    size = int(model.dtype.itemsize) if dtype == "auto" else KV_BYTES.get(dtype, 0)
    layers = int(model.get_num_layers_by_block_type(parallel, "attention"))
    both = 1 if model.use_mla else 2
    return layers * both * int(model.get_num_kv_heads(parallel)) * int(model.get_head_size()) * size


def _all_memory(vllm_config: Any) -> int:
    if vllm_config.device_config.device_type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    return int(torch.cuda.mem_get_info()[1])


def show(found: Plan, console: Console) -> None:
    """Print the buffers by name, their totals, and the share that they take at most."""
    footprint = found.footprint
    place = "the device's memory" if footprint.on_device else "memory"
    table = Table(title=f"What editing keeps in {place}, per worker", title_justify="left")
    table.add_column("buffer")
    table.add_column("when")
    table.add_column("size", justify="right")
    for name, size in footprint.reserved.items():
        table.add_row(name, "at the start", _size(size))
    for name, size in footprint.on_demand.items():
        table.add_row(name, "when needed, about", _size(size))
    for name, size in footprint.kept.items():
        table.add_row(name, "per token of the KV cache, at most", f"{size} B")
    table.add_section()
    table.add_row("all of it", "beside the KV cache", _size(footprint.fixed_bytes))
    table.add_row("", "per token of the KV cache, at most", f"{footprint.kept_per_token} B")
    console.print(table)
    for line in totals(found):
        console.print(line, highlight=False)


def totals(found: Plan) -> list[str]:
    """The table's sums as sentences."""
    footprint, budget, lines = found.footprint, found.budget, list[str]()
    if found.kv_per_token:
        lines.append(
            f"A token's KV is {found.kv_per_token:,} bytes where every layer keeps it: "
            f"gates and rules take at most {found.share:.2%} of the KV cache's memory."
        )
    if budget is not None and found.kv_budget is not None:
        lines.append(
            f"Of {_size(found.kv_budget)} for the KV cache, {_size(budget.kv_bytes)} hold KV, "
            f"{budget.n_blocks * found.block_tokens:,} tokens of it, and {_size(budget.kept_bytes)} lie beside it."
        )
    if found.memory:
        lines.append(
            f"The server may use {_size(found.memory)}; what lies beside the KV cache is "
            f"{footprint.fixed_bytes / found.memory:.2%} of that."
        )
    return lines


def _size(n_bytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.2f} {name}"
    return f"{n_bytes / 2**10:.1f} KiB"
