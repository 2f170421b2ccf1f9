"""Small random dictionaries, one maker for every test of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sae_weights import SAE, Folding, Hook
from sae_weights.architectures import ARCHITECTURES

RESID_POST_3 = Hook("resid_post", 3)
RANK = 3  # of polynomial decoders
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
        form = ARCHITECTURES[architecture]
        g = torch.Generator().manual_seed(seed)
        wide = {"W_glu": (n, d), "head_norm": (n, 1), "U1": (n, RANK), "C1": (d, RANK)}
        gate = {name: torch.randn(wide.get(name, n), generator=g) * 0.3 for name in form.gate_tensors}
        gate |= {name: gate[name].abs() for name in ("threshold", "head_norm") if name in gate}
        extras = {name: torch.randn(wide[name], generator=g) for name in form.extra_tensors}
        extras |= more.pop("more_extras", {})
        if form.needs_k:
            more.setdefault("k", 4)
        return SAE.from_tensors(
            architecture=architecture,
            hook=hook,
            W_enc=None if form.tied else torch.randn(n, d, generator=g),
            W_dec=torch.randn(n, d, generator=g),
            b_dec=torch.randn(d, generator=g),
            gate=gate,
            extras=extras,
            folding=more.pop("folding", Folding()),
            **more,
        )

    return make
