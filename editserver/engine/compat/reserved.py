"""What a device's engine reserves and can do under a configuration of vLLM: every process works it out the same way."""

from __future__ import annotations

from typing import Any

from editserver.engine.abilities import ENCODED, Abilities
from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.triton.capacity import Capacity, EncodeCapacity, RuleCapacity


def abilities_of(vllm_config: Any, config: EngineConfig) -> Abilities | None:
    """None where the CPU's engine edits, which has no such bounds."""
    if not config.on_device(vllm_config.device_config.device_type):
        return None
    scheduler = vllm_config.scheduler_config
    most = int(vllm_config.compilation_config.max_cudagraph_capture_size or 0)
    capacity = Capacity.of(
        tokens=max(int(scheduler.max_num_batched_tokens), most),
        rows=int(scheduler.max_num_seqs),
        bank_rows=config.bank_rows,
        history=int(vllm_config.model_config.max_model_len),
    )
    rules = RuleCapacity.of(requests=capacity.residents, propositions=config.propositions)
    enabled = [one for one in config.saes if one.id in config.full_encode and one.layer in config.armed]
    if not enabled:
        return Abilities(capacity, rules)
    kinds: dict[str, dict[str, str]] = {"row": {}, "whole": {}, "not encoded": {}}
    for one in enabled:
        kinds[_kind(one.digest, one)][one.digest] = one.id
    return Abilities(capacity, rules, EncodeCapacity(), kinds["whole"], kinds["not encoded"])


_KINDS: dict[str, str] = {}


def _kind(digest: str, source: SAESource) -> str:
    """ "row", "whole" or "not encoded"; opened once per process, its header alone."""
    if digest not in _KINDS:
        sae = source.open()
        wide = "whole" if sae.architecture in ENCODED else "not encoded"
        _KINDS[digest] = "row" if sae.row_separable else wide
    return _KINDS[digest]


def drafts_of(vllm_config: Any) -> int:
    """Most draft tokens of one request in one step."""
    return int(vllm_config.speculative_config.num_speculative_tokens) if vllm_config.speculative_config else 0
