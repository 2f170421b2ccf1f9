"""The largest of a row, with one answer on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def first_largest(values: Tensor) -> Tensor:
    """Index of the largest of values [..., n] → [..., 1] int64; of equal ones, the lowest (``argmax`` leaves it open).

    A row of NaN has no largest and gives n − 1: a valid index, so that one broken token breaks no other.
    """
    n = values.shape[-1]
    places = torch.arange(n, device=values.device)
    peak = values.amax(dim=-1, keepdim=True)
    return torch.where(values == peak, places, n - 1).amin(dim=-1, keepdim=True)
