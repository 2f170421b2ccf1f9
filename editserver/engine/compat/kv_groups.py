"""Whether a KV cache keeps something for every token of a request, and where."""

from __future__ import annotations

from typing import Any


def whole_group(kv_cache_config: Any) -> int | None:
    """Number of a KV cache group that holds a block for every position of a running request; None where there is none.

    That is full attention (vllm/v1/kv_cache_interface.py:578, MLA too). Windows give blocks back, and next to recurrent
    states vLLM may copy a block that it shares in part (``_apply_cow``, vllm/v1/core/single_type_kv_cache_manager.py:454):
    what is kept by KV slot would not come along.
    """
    from vllm.v1.kv_cache_interface import KVCacheSpecKind, RSWASpec, get_kv_cache_spec_kind

    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = [get_kv_cache_spec_kind(spec) for spec in specs]
    if KVCacheSpecKind.MAMBA in kinds or KVCacheSpecKind.UNKNOWN in kinds:
        return None
    for number, (spec, kind) in enumerate(zip(specs, kinds, strict=True)):
        members = getattr(spec, "kv_cache_specs", {"": spec}).values()
        whole = kind in (KVCacheSpecKind.FULL_ATTENTION, KVCacheSpecKind.MLA_ATTENTION)
        if whole and not any(isinstance(member, RSWASpec) for member in members):
            return number
    return None
