"""The architectures that can be served, by their canonical name. A new one is one file and one line here."""

from __future__ import annotations

from .base import Architecture, Gate, RowForm
from .batchtopk import BatchTopK
from .gated import Gated
from .jumprelu import JumpReLU
from .relu import ReLU
from .topk import TopK, topk_members

ARCHITECTURES: dict[str, Architecture] = {a.name: a for a in (ReLU(), JumpReLU(), Gated(), TopK(), BatchTopK())}

__all__ = ["ARCHITECTURES", "Architecture", "Gate", "RowForm", "topk_members"]
