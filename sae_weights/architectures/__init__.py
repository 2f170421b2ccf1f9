"""The architectures by their canonical name. A new one is one file and one line here."""

from __future__ import annotations

from .base import NO_SETTINGS, Architecture, Execution, Gate, RowForm, Whole
from .batchtopk import BatchTopK
from .gated import Gated
from .jumprelu import JumpReLU
from .relu import ReLU
from .topk import TopK, topk_members

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        ReLU(),
        JumpReLU(),
        Gated(),
        TopK(),
        BatchTopK(),
    )
}

__all__ = [
    "ARCHITECTURES",
    "NO_SETTINGS",
    "Architecture",
    "Execution",
    "Gate",
    "RowForm",
    "Whole",
    "topk_members",
]
