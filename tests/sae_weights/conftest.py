"""Small random dictionaries, one maker for every test of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sae_weights import SAE, Folding, Hook
from sae_weights.architectures import ARCHITECTURES

RESID_POST_3 = Hook("resid_post", 3)
MakeSAE = Callable[..., SAE]


@pytest.fixture(scope="session")
def make_sae() -> MakeSAE:
    def make(
        architecture: str = "jumprelu",
        *,
        d: int = 6,
        n: int = 16,
        seed: int = 0,
        hook: Hook = RESID_POST_3,
        **more,
    ) -> SAE:
        g = torch.Generator().manual_seed(seed)
        gate = {name: torch.randn(n, generator=g) * 0.3 for name in ARCHITECTURES[architecture].gate_tensors}
        if "threshold" in gate:
            gate["threshold"] = gate["threshold"].abs()
        if architecture == "topk":
            more.setdefault("k", 4)
        return SAE.from_tensors(
            architecture=architecture,
            hook=hook,
            W_enc=torch.randn(n, d, generator=g),
            W_dec=torch.randn(n, d, generator=g),
            b_dec=torch.randn(d, generator=g),
            gate=gate,
            folding=more.pop("folding", Folding()),
            **more,
        )

    return make
