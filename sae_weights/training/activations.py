"""The model's own activations at one hook: what a dictionary is trained on and judged by.

``resid_post(L)`` is the output of decoder layer L. The model is cut off behind that layer and runs in bf16. Position 0
and massive-activation tokens (‖h‖ > 10 × median) are dropped: a handful of them carry most of the variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OUTLIER = 10.0
"""Tokens whose norm exceeds this multiple of the median are neither trained on nor counted."""


def windows(token_ids: Sequence[int], length: int, shortest: int = 16) -> Iterator[list[int]]:
    """Consecutive windows of ``length`` tokens; a rest shorter than ``shortest`` is dropped."""
    for start in range(0, len(token_ids), length):
        window = list(token_ids[start : start + length])
        if len(window) >= shortest:
            yield window


@dataclass(frozen=True)
class Activations:
    """Ordinary tokens' activations.

    Attributes:
        values: bf16 ``[tokens, d_model]``.
        median_norm: median ‖h‖ over all tokens but those at position 0.
        dropped: tokens left out as outliers.
    """

    values: Tensor
    median_norm: float
    dropped: int


class Truncated:
    """A ``transformers`` causal LM up to and including decoder layer ``layer``."""

    def __init__(self, model: Any, layer: int) -> None:
        self._decoder = model.model
        self._decoder.layers = self._decoder.layers[: layer + 1]
        self._seen: list[Tensor] = []
        self._decoder.layers[layer].register_forward_hook(self._note)

    def _note(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._seen.append(output[0] if isinstance(output, tuple) else output)

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``resid_post`` of the last kept layer, ``[batch, tokens, d_model]``."""
        self._seen.clear()
        self._decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self._seen.pop()


def collect(
    model: Truncated,
    sequences: Sequence[Sequence[int]],
    *,
    batch: int = 32,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Activations:
    """Activations of all sequences, position 0 and outliers left out. ``report(tokens done, tokens in all)``."""
    total = sum(len(s) for s in sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    chunks: list[Tensor] = []
    done = 0
    for members in _batches(order, batch):
        part = [sequences[i] for i in members]
        width = max(len(s) for s in part)
        ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in part])
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in part])
        h = model(ids, mask)
        keep = mask.bool()
        keep[:, 0] = False
        chunks.append(h[keep].to(torch.bfloat16))
        done += sum(len(s) for s in part)
        report(done, total)
    values = torch.cat(chunks)
    norms = torch.cat([c.float().norm(dim=1) for c in values.split(1 << 16)])
    median = float(norms.median())
    ordinary = norms <= OUTLIER * median
    dropped = int((~ordinary).sum())
    return Activations(values[ordinary] if dropped else values, median, dropped)


def _batches(order: Iterable[int], size: int) -> Iterator[list[int]]:
    members: list[int] = []
    for i in order:
        members.append(i)
        if len(members) == size:
            yield members
            members = []
    if members:
        yield members
