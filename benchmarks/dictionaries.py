"""Dictionaries of random directions: what an edit costs does not depend on what its features mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from editserver.engine.config import SAESource
from sae_weights import SAE, load_sae
from sae_weights.errors import SAEFormatError
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
    """Such a dictionary in the feature-major layout of ``editserver sae import``, its numbers exact in bfloat16.

    One that is there already is left as it is: an engine may have it open.
    """
    target = folder / f"{name.replace('/', '-')}-{n_features}x{d_model}"
    try:
        return _source(name, layer, load_sae(target))
    except SAEFormatError:
        pass  # not there, or another program's unfinished work
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
    return _source(name, layer, load_sae(save_native(sae, target, dtype=torch.bfloat16)))


def _source(name: str, layer: int, opened: SAE) -> SAESource:
    assert opened.origin is not None
    return SAESource(name, opened.origin.as_dict(), opened.digest, layer)
