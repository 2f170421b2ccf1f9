"""Temporal SAE: predicts a token's code from its context. arXiv:2511.01836; SAELens ``temporal``."""

from __future__ import annotations

from .sequence import SequenceWide


class Temporal(SequenceWide):
    """Attention over the context predicts one part of the code; the other part is TopK of what it left unexplained."""

    name = "temporal"
    kind = "temporal"
    title = "Temporal"
    reference = "arXiv:2511.01836; sae-lens 6.54, temporal_sae.py"
    why_not = (
        "it attends over all earlier tokens of the sequence, so a latent of one token cannot be computed from that "
        "token's activation, and editing it would change the codes of later tokens"
    )
