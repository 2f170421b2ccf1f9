"""Mutual Choice SAE: the largest entries of the whole token × feature matrix survive. Ayonrinde 2024, arXiv:2411.02124."""

from __future__ import annotations

from .jumprelu import JumpReLU


class MutualChoice(JumpReLU):
    """f = relu(p) · 1[p > θ] with one θ, broadcast to every feature.

    In training the k·B largest pre-activations of a batch of B tokens survive, which is BatchTopK; for one token at a
    time that becomes BatchTopK's threshold. The authors published no code: this inference rule is reconstructed from
    the paper.
    """

    name = "mutual_choice"
    title = "Mutual Choice"
    reference = "Ayonrinde 2024, arXiv:2411.02124 (inference rule reconstructed)"
