"""Lorsa: attention heads as latents. He et al. 2025, arXiv:2504.20938; Language-Model-SAEs (llamascopium)."""

from __future__ import annotations

from .sequence import SequenceWide


class Lorsa(SequenceWide):
    """Low-rank sparse attention: an overcomplete set of heads of rank one replaces an attention layer."""

    name = "lorsa"
    kind = "lorsa"
    title = "Lorsa (low-rank sparse attention)"
    reference = "He et al. 2025, arXiv:2504.20938; llamascopium, models/lorsa.py"
    why_not = (
        "its latents are attention heads that read all earlier tokens of the sequence, so they cannot be computed from "
        "one token's activation"
    )
