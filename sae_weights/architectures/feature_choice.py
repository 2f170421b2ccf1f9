"""Feature Choice SAE: each feature chooses its tokens. Ayonrinde 2024, arXiv:2411.02124."""

from __future__ import annotations

from .jumprelu import JumpReLU


class FeatureChoice(JumpReLU):
    """f = relu(p) · 1[p > θ_j], one threshold per feature.

    In training, feature j keeps the m_j largest of its pre-activations over the batch (m_j follows a Zipf law). That
    needs the batch; for one token at a time it becomes the threshold above which feature j fired at that rate, as for
    BatchTopK but per feature. The authors published no code: this inference rule is reconstructed from the paper.
    """

    name = "feature_choice"
    title = "Feature Choice"
    reference = "Ayonrinde 2024, arXiv:2411.02124 (inference rule reconstructed)"
