"""BatchTopK SAE at inference: one threshold instead of a batch. Bussmann et al. 2024, arXiv:2412.06410, section 3."""

from __future__ import annotations

from .jumprelu import JumpReLU


class BatchTopK(JumpReLU):
    """f = relu(p) · 1[p > θ] with the θ that training estimated, broadcast to every feature.

    The same function as a JumpReLU of equal tensors, hence the same digest. Matryoshka dictionaries are of this form.
    """

    name = "batchtopk"
    title = "BatchTopK"
    reference = "Bussmann et al. 2024, arXiv:2412.06410"
