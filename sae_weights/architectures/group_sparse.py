"""Group-sparse SAE: one dictionary for paired modalities, trained to share latents. arXiv:2601.20028."""

from __future__ import annotations

from .relu import ReLU


class GroupSparse(ReLU):
    """f = relu(W_enc · x̃ + b_enc).

    Training masks one modality of a pair at random and penalises the L2,1 norm of the paired codes, so that both use
    the same latents. Neither touches the encoder of a single input, which is a ReLU dictionary's. No code was found:
    this inference rule is reconstructed from the paper.
    """

    name = "group_sparse"
    title = "Group-sparse"
    reference = (
        "Decomposing multimodal embedding spaces with group-sparse autoencoders, arXiv:2601.20028 (reconstructed)"
    )
