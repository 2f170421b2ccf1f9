"""The residual stream at several layers, from one forward pass that stops behind the deepest of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sae_weights.training.activations import decoder_layers


class _Deepest(Exception):
    """The last layer that is read has run."""


class ResidualReader:
    """Reads ``resid_post`` of ``layers`` of a ``transformers`` causal LM, which is left as it was.

    A context manager: hooks are removed on leaving it. Raises ValueError for a layer that the model does not have.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        decoder = decoder_layers(model)
        for layer in layers:
            if not 0 <= layer < len(decoder):
                raise ValueError(f"layer {layer}; the model has 0..{len(decoder) - 1}")
        self.layers = tuple(sorted(set(layers)))
        self._model = model
        self._device = next(model.parameters()).device
        self._seen: dict[int, Tensor] = {}
        self._handles = [decoder[layer].register_forward_hook(self._note(layer)) for layer in self.layers]

    def _note(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._seen[layer] = output[0] if isinstance(output, tuple) else output
            if layer == self.layers[-1]:
                raise _Deepest

        return hook

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """Per layer the residual stream of all tokens, sequence after sequence, ``[Σ lengths, d_model]``, on the CPU."""
        width = max(len(s) for s in sequences)
        ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=self._device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=self._device)
        self._seen.clear()
        with suppress(_Deepest):
            self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        return {layer: self._seen.pop(layer)[mask.bool()].cpu() for layer in self.layers}

    def __enter__(self) -> ResidualReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
