"""The systems that are compared: how each is started, and how a load is put to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dictionaries import write_random
from benchmarks.engine_process import BARE, ROOT, Batch, EngineProcess
from benchmarks.payloads import payload, vectors
from benchmarks.scenarios import (
    D_MODEL,
    EDITSERVER,
    LAYERS,
    LENS,
    OLDER,
    VANILLA,
    WIDTHS,
    Ask,
    Group,
    K,
    Load,
    Scenario,
)
from editserver.engine.config import EngineConfig, SAESource

PEER_PYTHON = ROOT / ".venv-vllm-lens" / "bin" / "python"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@dataclass(frozen=True)
class Bench:
    """What all systems of a run share.

    Attributes:
        model: the checkpoint's folder.
        cache: keeps dictionaries from run to run: vLLM compiles once per configuration, and their paths are part of it.
        logs: where engines and servers write what they say.
        eager: without torch.compile.
        dtype: what the model is computed in.
    """

    model: Path
    cache: Path
    logs: Path
    eager: bool
    dtype: str
    sources: Mapping[str, SAESource] = field(default_factory=dict)

    @property
    def engine_config(self) -> EngineConfig:
        """editserver's: all layers armed, every dictionary of :attr:`sources` known."""
        found = tuple(self.sources.values())
        return EngineConfig(LAYERS, found, tuple(one.id for one in found if one.id.startswith("topk")))


def write_dictionaries(folder: Path, scenarios: Sequence[Scenario]) -> dict[str, SAESource]:
    """The dictionaries that these scenarios need, by name."""
    used = {"4k"} | {load.dictionary for scenario in scenarios for load in scenario.loads}
    found = [
        write_random(folder, f"{name}/l{layer}", layer, D_MODEL, WIDTHS[name])
        for name in ("4k", "64k")
        for layer in LAYERS
        if name in used
    ]
    if "topk" in used:
        found.append(write_random(folder, "topk/l15", 15, D_MODEL, WIDTHS["topk"], architecture="topk", k=K))
    return {one.id: one for one in found}


def prompts(scenario: Scenario, salt: int = 0) -> list[list[int]]:
    """The scenario's prompts as token ids, others for every ``salt``."""
    rng = np.random.default_rng(salt)
    drawn = rng.integers(100, 40_000, (scenario.n_requests, (scenario.prompt_len - 1) // scenario.repeats))
    drawn = np.tile(drawn, scenario.repeats)
    return [[1, *(int(token) for token in row)] for row in drawn]


class EngineSystem:
    """A system whose engine is driven without HTTP."""

    def __init__(self, name: str, group: Group, bench: Bench) -> None:
        self.name = name
        self._bench = bench
        self._payloads: dict[tuple[str, Load], Batch] = {}
        config: dict[str, Any] = {
            "model": str(bench.model),
            "dtype": bench.dtype,
            "gpu_memory_utilization": 0.2,
            "max_model_len": 1024,
            "max_num_seqs": 256,
            "enforce_eager": bench.eager,
        }
        if group is Group.NGRAM:
            config |= {"speculative_config": NGRAM, "disable_log_stats": False}
        if name == EDITSERVER:
            config["additional_config"] = {"editserver": bench.engine_config.as_dict()}
        python = PEER_PYTHON if name in (LENS, OLDER) else Path(sys.executable)
        plugins = {EDITSERVER: "editserver", LENS: "activations"}.get(name, "")
        self._engine = EngineProcess(python, plugins, config, bench.logs / f"{group}-{name}.log")
        self.family = self._engine.family

    def wait_ready(self) -> dict[str, str]:
        """Block until it answers; its versions."""
        return self._engine.wait_ready()

    def run(self, scenario: Scenario, load: Load, salt: int) -> dict[str, Any]:
        """One run of ``load``: its seconds and what shows that the work was done.

        Raises:
            RuntimeError: the receipts do not say that every token was edited, or read, as asked.
        """
        batch = self._payloads.get((scenario.id, load)) or self._batch(scenario, load)
        self._payloads[scenario.id, load] = batch
        ran = self._engine.run(batch)
        if self.name == EDITSERVER:
            _check(scenario, load, ran.edited, ran.read)
        record: dict[str, Any] = {"seconds": ran.seconds, "first_tokens": [tokens[:4] for tokens in ran.tokens]}
        if scenario.quantity == "step":
            record["step"] = ran.step
        if ran.drafted:
            record |= {"accepted": ran.accepted, "drafted": ran.drafted}
        return record

    def close(self) -> None:
        """Stop it."""
        self._engine.close()

    def _batch(self, scenario: Scenario, load: Load) -> Batch:
        numbers = range(scenario.n_requests)
        texts = prompts(scenario)
        if self.name == EDITSERVER:
            return Batch(texts, scenario.max_tokens, [payload(load, r, self._bench.sources) for r in numbers])
        if load.ask is Ask.VECTORS:
            drawn = [vectors(load, r) for r in numbers]
            rows = [(list(one), np.stack(list(one.values())).tobytes()) for one in drawn]
            return Batch(texts, scenario.max_tokens, vectors=rows)
        assert load.ask is Ask.NOTHING, f"{self.name} cannot do {load.ask}"
        return Batch(texts, scenario.max_tokens)


def _check(scenario: Scenario, load: Load, edited: int, read: int) -> None:
    """All tokens that were fed, but position 0 (which only a steering vector is told to reach)."""
    due = scenario.n_requests * (scenario.prompt_len + scenario.max_tokens - 2)
    edits = {Ask.LATENTS: due, Ask.VECTORS: due + scenario.n_requests}
    reads = dict.fromkeys((Ask.INSPECT, Ask.TOP_K, Ask.RULES_FLAG, Ask.RULES_STEER), due)
    if load.ask in (Ask.RULES_STEER, Ask.APP):  # where the conclusion holds; where a latent of the concept is active
        right = 0 < edited <= due
    else:
        right = edited == edits.get(load.ask, 0)
    if not right or read != reads.get(load.ask, 0):
        raise RuntimeError(f"{scenario.id}/{load.id}: {edited} tokens edited and {read} read, {due} were due")


def peer_installed() -> bool:
    """Whether ``make bench-peers`` was run."""
    return PEER_PYTHON.exists()


def available() -> list[str]:
    """The systems that can be started on this machine."""
    return [VANILLA, EDITSERVER, *((LENS, OLDER) if peer_installed() else ())]


def settings() -> dict[str, str]:
    """Environment variables that change what is measured."""
    names = (
        "THP_MEM_ALLOC_ENABLE",
        "GLIBC_TUNABLES",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_OMP_THREADS_BIND",
        "OMP_NUM_THREADS",
        "VLLM_CPU_NUM_OF_RESERVED_CPU",
        BARE,
    )
    return {name: os.environ[name] for name in names if name in os.environ}
