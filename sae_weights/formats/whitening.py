"""SAELens' covariance whitening, folded into the rows of a training checkpoint. arXiv:2511.13981.

Such a dictionary was trained on z = (x − mean) · M and its output ẑ means x̂ = ẑ · M⁻¹ + mean; both maps are affine::

    W_enc' = W_enc · Mᵀ        b_enc' = b_enc − W_enc' · mean  (− W_enc · b_dec, where b_dec is subtracted from z)
    W_dec' = W_dec · M⁻¹       b_dec' = b_dec · M⁻¹ + mean

M⁻¹ changes the norms of decoder rows, so what is measured in them (TopK's ranking, BatchTopK's threshold) is folded first.

File: activation_whitening.safetensors beside the checkpoint, with mean [d], matrix [d, d] and inverse_matrix [d, d].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sae_weights.architectures import Architecture
from sae_weights.errors import SAEFormatError
from sae_weights.folding import Block, Folding, fold_rows
from sae_weights.source import Rows, RowSource

from .tensor_file import TensorFile
from .tensors import refuse_others

WHITENING_FILE = "activation_whitening.safetensors"


class WhitenedRows:
    """A ``RowSource`` over another one's rows, with ``folding`` and the whitening folded in."""

    recorded_digest: str | None = None

    def __init__(self, source: RowSource, folder: Path, folding: Folding, architecture: Architecture) -> None:
        file, d = TensorFile(folder / WHITENING_FILE), source.d_model
        for name, shape in (("mean", [d]), ("matrix", [d, d]), ("inverse_matrix", [d, d])):
            file.require(name, shape)
        refuse_others(file, ("mean", "matrix", "inverse_matrix"), "SAELens' whitening")
        self._mean, self._matrix = file.tensor("mean").double(), file.tensor("matrix").double()
        self._inverse = file.tensor("inverse_matrix").double()
        identity = self._matrix @ self._inverse
        if not bool((identity - identity.new_ones(d).diag()).abs().max() < 1e-2):
            raise SAEFormatError(f"{file.path}: tensor 'inverse_matrix' is not the inverse of 'matrix'")
        self._source, self._architecture = source, architecture
        self._folding = Folding(decoder_norm=folding.decoder_norm)
        self._subtracted = source.b_dec.double() if folding.subtract_b_dec else None
        self.label = source.label
        self.d_model, self.d_out, self.n_features = source.d_model, source.d_out, source.n_features
        self.gate_shapes: Mapping[str, tuple[int, ...]] = source.gate_shapes
        self.extras: Mapping[str, Tensor] = source.extras
        self.b_dec = source.b_dec.double() @ self._inverse + self._mean

    def read(self, rows: Rows) -> Block:
        block = fold_rows(self._source.read(rows), self._source.b_dec, self._folding, self._architecture)
        whitened = block.W_enc.double()
        W_enc = whitened @ self._matrix.T
        shift = W_enc @ self._mean
        if self._subtracted is not None:
            shift = shift + whitened @ self._subtracted
        gate = self._architecture.shift_input({name: t.double() for name, t in block.gate.items()}, shift)
        return Block(W_enc, block.W_dec.double() @ self._inverse, gate)

    def release(self) -> None:
        self._source.release()
