"""Flat batches as a model runner lays them out: the tokens of one request behind those of another, with or without vLLM."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from interventions.program import Payload
from interventions.selectors import Selector


@dataclass(frozen=True)
class Part:
    """What one request has in a batch: the tokens at ``start … start + len(ids)``; no payload for a plain one."""

    payload: Payload | None
    start: int
    prompt_len: int
    ids: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.start, self.start + len(self.ids))

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """Of the program, then of the inspections."""
        return () if self.payload is None else self.payload.selectors


def bounds_of(parts: Sequence[Part]) -> list[slice]:
    """Where each part's tokens are."""
    edges = np.cumsum([0] + [len(part.ids) for part in parts]).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def stream_of(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The residual stream in the model's dtype; ``residual`` None where ``hidden [tokens, d]`` is the whole of it."""
    return hidden.clone() if residual is None else (hidden.float() + residual.float()).to(hidden.dtype)


def random_stream(
    random: np.random.Generator, n: int, d: int, dtype: torch.dtype, split: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``hidden`` and ``residual`` of n tokens, of norms around 60."""
    scale = np.exp(random.normal(size=(n, 1)) * 0.5) * 60 / math.sqrt(d)
    stream = torch.from_numpy(random.normal(size=(n, d)) * scale).float()
    if not split:
        return stream.to(dtype), None
    residual = (stream * 0.8).to(dtype)
    return (stream - residual.float()).to(dtype), residual
