"""How good a saved dictionary is, on held-out tokens: reconstruction, sparsity, and what the model makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_weights.sae import SAE
from sae_weights.training.activations import OUTLIER

CHUNK = 4096


@dataclass(frozen=True)
class Reconstruction:
    """On ordinary tokens.

    Attributes:
        fvu: Σ‖x − x̂‖² / Σ‖x − mean‖².
        l0: latents that fire per token.
        dead: share of latents that fire on none of these tokens.
        density, max_activation: per latent, ``[n_features]``.
    """

    tokens: int
    fvu: float
    l0: float
    dead: float
    density: Tensor
    max_activation: Tensor


@torch.inference_mode()
def reconstruction(sae: SAE, activations: Tensor) -> Reconstruction:
    """Judge ``sae`` on raw activations ``[m, d]``."""
    mean = torch.stack([c.float().sum(0) for c in activations.split(CHUNK)]).sum(0) / len(activations)
    error = variance = fired = 0.0
    count = torch.zeros(sae.n_features)
    largest = torch.zeros(sae.n_features)
    for chunk in activations.split(CHUNK):
        x = chunk.float()
        f = sae.encode(x)
        error += float((x - sae.decode_for(x, f)).pow(2).sum())
        variance += float((x - mean).pow(2).sum())
        fired += float((f != 0).sum())
        count += (f != 0).sum(0)
        largest = torch.maximum(largest, f.amax(0))
    n = len(activations)
    return Reconstruction(n, error / variance, fired / n, float((count == 0).float().mean()), count / n, largest)


@dataclass(frozen=True)
class Spliced:
    """Mean cross-entropy (nats per token) with the hook's ordinary tokens left alone, reconstructed, or set to zero."""

    tokens: int
    clean: float
    sae: float
    zero: float

    @property
    def recovered(self) -> float:
        """Share of the loss between zero ablation and the clean model that the reconstruction recovers."""
        return (self.zero - self.sae) / (self.zero - self.clean)


@torch.inference_mode()
def splice(model: Any, sae: SAE, layer: int, sequences: Sequence[Sequence[int]], median_norm: float) -> Spliced:
    """Run the whole model three times per sequence; sinks (position 0, ‖h‖ > 10 × median) are never replaced."""
    totals = dict.fromkeys(("clean", "sae", "zero"), 0.0)
    tokens = 0
    for ids in sequences:
        batch = torch.tensor([list(ids)])
        tokens += len(ids) - 1
        for kind in totals:
            totals[kind] += _loss(model, sae, layer, batch, kind, median_norm)
    return Spliced(tokens, *(totals[kind] / tokens for kind in ("clean", "sae", "zero")))


def _loss(model: Any, sae: SAE, layer: int, batch: Tensor, kind: str, median_norm: float) -> float:
    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        flat = h.reshape(-1, h.shape[-1]).float()
        ordinary = flat.norm(dim=1) <= OUTLIER * median_norm
        ordinary[0] = False
        new = flat.clone()
        new[ordinary] = sae.decode_for(flat[ordinary], sae.encode(flat[ordinary])) if kind == "sae" else 0.0
        replaced = new.reshape(h.shape).to(h.dtype)
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    handle = model.model.layers[layer].register_forward_hook(hook) if kind != "clean" else None
    try:
        logits = model(input_ids=batch).logits[0, :-1].float()
    finally:
        if handle is not None:
            handle.remove()
    loss = float(torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum"))
    if not math.isfinite(loss):
        raise ValueError(f"the {kind} run has a loss of {loss}")
    return loss
