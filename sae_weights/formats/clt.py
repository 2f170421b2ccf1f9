"""Cross-layer transcoders as circuit-tracer saves them: two safetensors files per layer, and one config.yaml.

Layout (``model_kind: cross_layer_transcoder``; mntss/clt-…, bluelightai/clt-…), for each of L layers::

    W_enc_N.safetensors   W_enc_N [n, d], b_enc_N [n], b_dec_N [d], threshold_N [n] (JumpReLU; ReLU without it)
    W_dec_N.safetensors   W_dec_N [n, L − N, d]: entry j is what a feature of layer N writes to layer N + j
    config.yaml           model_name, feature_input_hook, feature_output_hook

A path is a layer's W_enc_N.safetensors (its W_dec_N beside it), or a folder; in a folder with several, the layer of the
given hook.

One layer's features are opened as one dictionary: it reads feature_input_hook of layer N, and a decoder row is the
concatenation of what the feature writes to layers N … L − 1 (``d_out = (L − N) · d``; the places are listed in the
metadata). circuit-tracer adds b_dec once per layer written to, not per layer read: each dictionary carries the bias of its
own layer, so that the decodes of all layers, each block at its place, add up to the whole CLT's. Nothing is folded.

Source: circuit-tracer 0.5.0, transcoder/cross_layer_transcoder.py (MIT); Ameisen et al. 2025, Circuit Tracing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Block
from sae_weights.sae import SAE
from sae_weights.source import Rows

from .base import Format, Hints
from .circuit_tracer import CONFIG_FILE, hooks_of, layer_of, layers_in, one_layer, thresholds
from .tensor_file import TensorFile
from .tensors import refuse_others


class CLT(Format):
    """See the module."""

    name = "clt"
    title = "Cross-layer transcoders (circuit-tracer)"
    files = f"W_enc_N.safetensors + W_dec_N.safetensors + {CONFIG_FILE}"
    reference = "circuit-tracer 0.5.0, transcoder/cross_layer_transcoder.py"
    architectures = ("relu", "jumprelu")
    edited = False

    def recognises(self, path: Path) -> bool:
        try:
            if path.is_dir():
                return bool(layers_in(path, "W_enc"))
            return layer_of(path, "W_enc") is not None
        except OSError:
            return False

    def open(self, path: Path, hints: Hints) -> SAE:
        weights, layer = one_layer(path, "W_enc", hints)
        source = CLTRows(weights, layer)
        config, hook, hook_out = hooks_of(self, weights, layer, hints)
        model = config.content.get("model_name")
        written = config.content.get("feature_output_hook")
        places = [f"blocks.{layer + j}.{written}" for j in range(source.d_out // source.d_model)]
        return SAE(
            architecture="jumprelu" if "threshold" in source.gate_shapes else "relu",
            hook=hook,
            hook_out=hook_out,
            source=source,
            metadata={
                **({"model_name": model} if isinstance(model, str) else {}),
                "hook_name": hook.hook_name,
                **({"hook_names_out": places} if isinstance(written, str) else {}),
            },
        )


class CLTRows:
    """The rows of one layer: encoder and vectors in one file, the decoders to all later layers in another."""

    recorded_digest: str | None = None

    def __init__(self, weights: Path, layer: int) -> None:
        self.label = f"{weights} (with W_dec_{layer}.safetensors)"
        self._layer = layer
        self._encoder = TensorFile(weights)
        self._decoder = TensorFile(weights.parent / f"W_dec_{layer}.safetensors")
        self._W_enc, self._W_dec = f"W_enc_{layer}", f"W_dec_{layer}"
        bias, b_dec, threshold = f"b_enc_{layer}", f"b_dec_{layer}", f"threshold_{layer}"
        self.n_features, self.d_model = self._shape(self._encoder, self._W_enc, 2)
        n, d = self.n_features, self.d_model
        _, outputs, _ = shape = self._shape(self._decoder, self._W_dec, 3)
        if shape != [n, outputs, d]:
            raise SAEFormatError(
                f"{self._decoder.path}: tensor {self._W_dec!r} has shape {shape}; expected [{n}, layers, {d}]"
            )
        self.d_out = outputs * d
        self._encoder.require(bias, [n])
        self._encoder.require(b_dec, [d])
        self._gate = {"b_enc": self._encoder.tensor(bias)}
        if threshold in self._encoder.shapes:
            self._gate["threshold"] = thresholds(self._encoder, threshold, n)
        refuse_others(self._encoder, {self._W_enc, bias, b_dec, threshold}, "a layer of a CLT")
        refuse_others(self._decoder, {self._W_dec}, "a layer of a CLT")
        self.gate_shapes: Mapping[str, tuple[int, ...]] = dict.fromkeys(self._gate, ())
        self.extras: Mapping[str, Tensor] = {}
        own = self._encoder.tensor(b_dec)
        self.b_dec = torch.cat([own, own.new_zeros(self.d_out - d)])

    def read(self, rows: Rows) -> Block:
        chosen = rows if isinstance(rows, slice) else list(rows)
        decoder = self._decoder.rows(self._W_dec, chosen).flatten(1)
        return Block(self._encoder.rows(self._W_enc, chosen), decoder, {k: v[chosen] for k, v in self._gate.items()})

    def release(self) -> None:
        pass

    @staticmethod
    def _shape(file: TensorFile, name: str, ndim: int) -> list[int]:
        file.require(name)
        shape = file.shapes[name]
        if len(shape) != ndim or 0 in shape:
            form = "[n_features, d]" if ndim == 2 else "[n_features, layers, d]"
            raise SAEFormatError(f"{file.path}: tensor {name!r} has shape {shape}; expected {form}")
        return shape
