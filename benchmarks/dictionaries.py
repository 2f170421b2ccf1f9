"""Dictionaries of random directions: what an edit costs does not depend on what its features mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from editserver.engine.config import SAESource
from sae_weights import SAE, load_sae
from sae_weights.formats import save_native
from sae_weights.hook import Hook


def write_random(
    folder: Path,
    name: str,
    layer: int,
    d_model: int,
    n_features: int,
    *,
    architecture: str = "relu",
    k: int | None = None,
) -> SAESource:
    """Such a dictionary in the feature-major layout of ``editserver sae import``, its numbers exact in bfloat16."""
    generator = torch.Generator().manual_seed(layer)
    rows = torch.nn.functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=1)
    rows = rows.bfloat16().float()
    fields: dict[str, Any] = {"k": k} if k else {}
    sae = SAE.from_tensors(
        architecture=architecture,
        hook=Hook("resid_post", layer),
        W_enc=rows,
        W_dec=rows,
        b_dec=torch.zeros(d_model),
        gate={"b_enc": torch.zeros(n_features)},
        **fields,
    )
    opened = load_sae(save_native(sae, folder / name.replace("/", "-"), dtype=torch.bfloat16))
    assert opened.origin is not None
    return SAESource(name, opened.origin.as_dict(), opened.digest, layer)
