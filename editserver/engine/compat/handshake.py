"""A worker proves that it is armed: ``collective_rpc("editserver_handshake")`` answers from every worker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from editserver import __version__
from editserver.engine.config import EngineConfig

METHOD = "editserver_handshake"
STATS = "editserver_stats"


def _handshake(self: Any) -> dict[str, Any]:
    """Run the model once on a dummy batch and report which armed layers' ops were really called.

    ``armed``: the layers that this worker edits; of a pipeline's stage perhaps none.
    ``remembers``: whether the KV cache keeps every token of a request, and with it what gates and rules saw there.
    ``device``: what an engine of kernels can do, as ``Abilities.as_dict``; None where the CPU's edits.
    """
    from editserver.engine import op
    from editserver.engine.compat import pipeline
    from editserver.engine.compat.kv_groups import whole_group
    from editserver.engine.compat.reserved import abilities_of

    worker, config, stage = op.current(), EngineConfig.of(self.vllm_config), pipeline.current()
    silent: list[int] = []
    if config is None or (worker is None and (stage is None or stage.armed)):
        return {
            "version": __version__,
            "ok": False,
            "armed": [],
            "saes": [],
            "error": "no layer of this worker is armed",
        }
    if worker is not None:
        worker.count_visits()
        self.model_runner._dummy_run(min(16, int(self.vllm_config.scheduler_config.max_num_batched_tokens)))
        silent = [layer for layer, visits in worker.visits.items() if not visits]
    remembers = whole_group(self.model_runner.kv_cache_config) is not None
    abilities = abilities_of(self.vllm_config, config)
    return {
        "version": __version__,
        "ok": not silent,
        "armed": [] if worker is None else list(worker.config.armed),
        "saes": [source.digest for source in config.saes] if worker is None else worker.dictionaries.digests,
        "remembers": remembers,
        "device": None if abilities is None else replace(abilities, remembers=remembers).as_dict(),
        "error": f"the compiled model does not call the edit op of layers {silent}" if silent else None,
    }


def _stats(self: Any) -> dict[str, Any]:
    """What the worker holds right now."""
    from editserver.engine import op

    worker = op.current()
    if worker is None:
        return {}
    return {
        "resident": len(worker.residents.requests),
        "bank_bytes": worker.bank.n_bytes,
        "kept_bytes": worker.kept_bytes,
    }


def install() -> None:
    """Give every worker class the two methods."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, METHOD, _handshake)
    setattr(WorkerBase, STATS, _stats)
