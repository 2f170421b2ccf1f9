"""What a decoder row says by itself: the tokens it promotes (logit lens) and the rows that point the same way.

The direction d_j takes the residual stream's place before the model's final norm and unembedding::

    w_j = (I − 11ᵀ/V) · W_U · (norm(c·d_j) − norm(0)) / √d        [vocabulary]

with c so large that the norm's ε does not matter. For an RMSNorm with gain γ this is W_U·(γ ⊙ d_j/‖d_j‖), for a LayerNorm
d_j is centred first and the bias drops out; the mean over the vocabulary, which no softmax sees, is taken away. A weight is
a change of logits per unit of the final residual's RMS. nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sae_weights.training.activations import decoder_layers

_ROWS = 512
_SCALE = 1e4


@dataclass(frozen=True)
class Lens:
    """Per feature the tokens with the largest and the smallest weight.

    Attributes:
        promoted, suppressed: token ids ``[n, k]``, strongest first.
        promoted_weights, suppressed_weights: their weights ``[n, k]``.
        spread: standard deviation of a feature's weights over the vocabulary ``[n]``.
    """

    promoted: Tensor
    promoted_weights: Tensor
    suppressed: Tensor
    suppressed_weights: Tensor
    spread: Tensor


def final_norm(model: Any) -> nn.Module:
    """The norm between the last decoder layer and the unembedding.

    Raises:
        ValueError: no norm stands beside the list of decoder layers.
    """
    layers = decoder_layers(model)
    for module in model.modules():
        children = list(module.children())
        if any(child is layers for child in children):
            norms: list[nn.Module] = [child for child in children if "norm" in type(child).__name__.lower()]
            if norms:
                return norms[-1]  # some models also norm their embeddings
    raise ValueError(f"{type(model).__name__}: found no final norm beside its decoder layers")


@torch.inference_mode()
def logit_lens(model: Any, directions: Tensor, k: int, vocabulary: int | None = None) -> Lens:
    """The ``k`` most promoted and suppressed tokens of each row of ``directions`` [n, d].

    ``vocabulary`` leaves out the ids beyond it (padding of the embedding matrix).
    """
    # A copy in fp32: the model runs in bf16, whose three digits would reorder the tokens.
    norm = copy.deepcopy(final_norm(model)).float().cpu()
    unembedding = model.get_output_embeddings().weight.detach()[:vocabulary].float().cpu()
    unembedding = unembedding - unembedding.mean(dim=0)
    d = directions.shape[1]
    parts: list[tuple[Tensor, ...]] = []
    zero = norm(torch.zeros(1, d))
    for rows in directions.split(_ROWS):
        unit = F.normalize(rows.float(), dim=1)
        weights = ((norm(_SCALE * unit) - zero) / d**0.5) @ unembedding.T
        high, low = weights.topk(k), weights.topk(k, largest=False)
        parts.append((high.indices, high.values, low.indices, low.values, weights.std(dim=1)))
    return Lens(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@torch.inference_mode()
def neighbours(directions: Tensor, k: int) -> Iterator[tuple[tuple[int, float], ...]]:
    """Per row of ``directions`` [n, d] the ``k`` others with the largest cosine, nearest first."""
    unit = F.normalize(directions.float(), dim=1)
    for start in range(0, len(unit), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        own = torch.arange(len(cosines))
        cosines[own, own + start] = -2.0
        best = cosines.topk(min(k, len(unit) - 1))
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            yield tuple(zip(indices, values, strict=True))
