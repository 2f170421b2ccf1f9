"""The content digest: one name for one function, whatever file it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

_VERSION = b"sae-content/1"


def content_digest(facts: Sequence[Any], blocks: Iterable[Mapping[str, Tensor]], vectors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the facts, the per-feature tensors (given block by block, in order) and the other tensors.

    Tensors enter as little-endian fp32, each with a hash of its own, so that block sizes leave no trace.
    """
    parts: dict[str, Any] = {}
    for block in blocks:
        for name, tensor in block.items():
            parts.setdefault(name, hashlib.sha256()).update(little_endian(tensor))
    for name, tensor in vectors.items():
        parts[name] = hashlib.sha256(little_endian(tensor))
    total = hashlib.sha256(_VERSION + repr(tuple(map(str, facts))).encode())
    for name in sorted(parts):
        total.update(name.encode() + b"=" + parts[name].digest())
    return total.hexdigest()


def derived_digest(*facts: str) -> str:
    """SHA-256 (hex) of a dictionary that is defined by another one's digest and a few numbers."""
    return hashlib.sha256(b"sae-derived/1" + repr(facts).encode()).hexdigest()


def little_endian(tensor: Tensor) -> bytes:
    """The values as little-endian fp32 bytes, C order."""
    values: bytes = tensor.contiguous().numpy().astype("<f4", copy=False).tobytes()
    return values
