"""A worker proves that it is armed: ``collective_rpc("editserver_handshake")`` answers from every worker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from editserver import __version__

METHOD = "editserver_handshake"
STATS = "editserver_stats"


def _handshake(self: Any) -> dict[str, Any]:
    """Run the model once on a dummy batch and report which armed layers' ops were really called.

    ``remembers``: whether the KV cache keeps every token of a request, and with it what gates and rules saw there.
    ``device``: what an engine of kernels can do, as ``Abilities.as_dict``; None where the CPU's edits.
    """
    from editserver.engine import op
    from editserver.engine.compat.kv_groups import whole_group
    from editserver.engine.compat.reserved import abilities_of

    worker = op.current()
    if worker is None:
        return {
            "version": __version__,
            "ok": False,
            "armed": [],
            "saes": [],
            "error": "no layer of this worker is armed",
        }
    worker.count_visits()
    self.model_runner._dummy_run(16)
    remembers = whole_group(self.model_runner.kv_cache_config) is not None
    abilities = abilities_of(self.vllm_config, worker.config)
    silent = [layer for layer, visits in worker.visits.items() if not visits]
    return {
        "version": __version__,
        "ok": not silent,
        "armed": list(worker.config.armed),
        "saes": worker.dictionaries.digests,
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
