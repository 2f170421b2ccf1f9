"""The dictionaries of Gemma Scope 2 that span layers: how their files become rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Block
from sae_weights.source import Rows

from .tensor_file import TensorFile
from .tensors import refuse_others

_NAMES = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")
_SKIP = "affine_skip_connection"


class LayerRows:
    """Rows of one layer's file: the encoder of that layer, and a decoder that writes to all layers.

    Row j reads [d] and writes [layers · d]. ``b_dec`` and W_skip are those of the file's own layer and zero elsewhere.
    """

    recorded_digest: str | None = None

    def __init__(self, file: TensorFile, index: int, *, skip: bool = True) -> None:
        self._file = file
        self.label = str(file.path)
        file.require("w_enc")
        file.require("w_dec")
        if len(file.shapes["w_enc"]) != 2 or len(file.shapes["w_dec"]) != 3 or 0 in file.shapes["w_enc"]:
            raise SAEFormatError(
                f"{file.path}: tensors w_enc {file.shapes['w_enc']} and w_dec {file.shapes['w_dec']}; "
                "expected [d, n_features] and [n_features, layers, d]"
            )
        self.d_model, self.n_features = d, n = file.shapes["w_enc"]
        self.layers = file.shapes["w_dec"][1]
        if not 0 <= index < self.layers:
            raise SAEFormatError(f"{file.path}: layer {index} by its name; its decoder writes to {self.layers} layers")
        self.d_out = self.layers * d
        file.require("w_dec", [n, self.layers, d])
        file.require("b_enc", [n])
        file.require("threshold", [n])
        file.require("b_dec", [d])
        self._gate = {name: file.tensor(name) for name in ("b_enc", "threshold")}
        self.gate_shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self._gate, ())
        own = slice(index * d, (index + 1) * d)
        self.b_dec = torch.zeros(self.d_out)
        self.b_dec[own] = file.tensor("b_dec").float()
        self.extras: dict[str, Tensor] = {}
        known = set(_NAMES)
        if skip and _SKIP in file.shapes:
            file.require(_SKIP, [d, d])
            self.extras["W_skip"] = torch.zeros(self.d_out, d)
            self.extras["W_skip"][own] = file.tensor(_SKIP).float().T
            known.add(_SKIP)
        refuse_others(file, known, "a layer of a Gemma Scope 2 " + ("transcoder" if skip else "crosscoder"))

    def read(self, rows: Rows) -> Block:
        chosen = rows if isinstance(rows, slice) else list(rows)
        gate = {name: vector[chosen] for name, vector in self._gate.items()}
        return Block(self._file.columns("w_enc", chosen), self._file.rows("w_dec", chosen).flatten(1), gate)

    def release(self) -> None:
        pass


class CrosscoderRows:
    """Rows of all layers' files, one after another: row j reads and writes [layers · d], its encoder in its own part."""

    recorded_digest: str | None = None

    def __init__(self, folder: Path, files: Sequence[TensorFile]) -> None:
        self.label = str(folder)
        self._layers = [LayerRows(file, index, skip=False) for index, file in enumerate(files)]
        first = self._layers[0]
        for one in self._layers:
            if one.d_model != first.d_model or one.layers != len(files):
                raise SAEFormatError(
                    f"{one.label}: reads {one.d_model} values and writes to {one.layers} layers; expected "
                    f"{first.d_model} and {len(files)}, as the folder's other files"
                )
        self._width = first.d_model
        self.d_model = self.d_out = first.d_out
        self.n_features = sum(one.n_features for one in self._layers)
        self.gate_shapes = first.gate_shapes
        self.extras: dict[str, Tensor] = {}
        self.b_dec = torch.stack([one.b_dec for one in self._layers]).sum(dim=0)

    def read(self, rows: Rows) -> Block:
        wanted = list(range(*rows.indices(self.n_features))) if isinstance(rows, slice) else [int(row) for row in rows]
        W_enc = torch.zeros(len(wanted), self.d_model)
        W_dec = torch.empty(len(wanted), self.d_out)
        gate = {name: torch.empty(len(wanted)) for name in self.gate_shapes}
        start = 0
        for index, one in enumerate(self._layers):
            at = [i for i, row in enumerate(wanted) if start <= row < start + one.n_features]
            if at:
                inner = [wanted[i] - start for i in at]
                run = inner[-1] - inner[0] + 1 == len(inner) and inner == list(range(inner[0], inner[-1] + 1))
                block = one.read(slice(inner[0], inner[-1] + 1) if run else inner)
                W_enc[at, index * self._width : (index + 1) * self._width] = block.W_enc.float()
                W_dec[at] = block.W_dec.float()
                for name, vector in block.gate.items():
                    gate[name][at] = vector.float()
            start += one.n_features
        return Block(W_enc, W_dec, gate)

    def release(self) -> None:
        pass
