"""Synthetic activations with known features, for tests that train."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Planted:
    """``rows`` = offset + codes @ directions, with ``codes`` sparse and positive: what a dictionary should find."""

    rows: Tensor
    directions: Tensor
    offset: Tensor


def plant(tokens: int, d_model: int = 24, features: int = 32, per_token: int = 3, seed: int = 0) -> Planted:
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(features, d_model, generator=generator), dim=1)
    on = torch.rand(tokens, features, generator=generator).topk(per_token, dim=1).indices
    strengths = 20 + 20 * torch.rand(tokens, per_token, generator=generator)
    codes = torch.zeros(tokens, features).scatter(1, on, strengths)
    offset = 30 * F.normalize(torch.randn(d_model, generator=generator), dim=0)
    return Planted(codes @ directions + offset, directions, offset)


@pytest.fixture(scope="session")
def planted() -> Planted:
    return plant(40_000)
