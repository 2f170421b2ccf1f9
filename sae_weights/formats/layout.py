"""The common case of a format: two matrices, a few vectors, one file. Rows are read as they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from sae_weights.architectures import ARCHITECTURES
from sae_weights.errors import SAEFormatError
from sae_weights.folding import Block
from sae_weights.source import Rows, StoredRows

from .tensor_file import TensorFile
from .tensors import Tensors, refuse_others

_GATE_MATRICES = {name for form in ARCHITECTURES.values() for name in form.gate_matrices}
# Up to this size a matrix whose rows are strided on disk is read and transposed once instead of column by column.
TRANSPOSE_BYTES = 256 << 20


@dataclass(frozen=True)
class Matrix:
    """A weight matrix in a file: feature-major [n, d], or ``transposed`` [d, n], where a feature's row is a column."""

    name: str
    transposed: bool = False


class TensorRows:
    """A ``RowSource`` over a file of named tensors.

    Args:
        file: what holds them.
        encoder, decoder: the matrices; ``encoder`` None where the decoder is the encoder.
        b_dec: name or tensor [d_out]; None for zeros.
        gate: canonical name → name in the file, or a tensor [n].
        extras: canonical name → name in the file, or a tensor.
        ignore: names of tensors that decide nothing here. Any other name is refused.
        what: how errors call the layout.
    """

    recorded_digest: str | None = None

    def __init__(
        self,
        file: Tensors,
        *,
        encoder: Matrix | None,
        decoder: Matrix,
        b_dec: str | Tensor | None,
        gate: Mapping[str, str | Tensor],
        extras: Mapping[str, str | Tensor] | None = None,
        ignore: Collection[str] = (),
        what: str = "this layout",
    ) -> None:
        self._file = file
        self._encoder, self._decoder = encoder, decoder
        self.label = str(file.path)
        self.n_features, self.d_out = self._extent(decoder)
        self.d_model = self.d_out
        if encoder is not None:
            n, self.d_model = self._extent(encoder)
            if n != self.n_features:
                raise SAEFormatError(
                    f"{file.path}: tensor {encoder.name!r} has {n} features and {decoder.name!r} has {self.n_features}"
                )
        n = self.n_features
        self._gate = {name: self._vector(name, source, n) for name, source in gate.items()}
        self.b_dec = decoder_bias(file, b_dec, self.d_out)
        self.extras = {name: self._extra(source) for name, source in (extras or {}).items()}
        if (skip := self.extras.get("W_skip")) is not None and list(skip.shape) != [self.d_out, self.d_model]:
            raise SAEFormatError(
                f"{file.path}: the skip matrix has shape {list(skip.shape)}; expected {[self.d_out, self.d_model]}"
            )
        self.gate_shapes = {name: tuple(tensor.shape[1:]) for name, tensor in self._gate.items()}
        named = {source for source in (*gate.values(), *(extras or {}).values(), b_dec) if isinstance(source, str)}
        matrices = {matrix.name for matrix in (encoder, decoder) if matrix is not None}
        refuse_others(file, named | matrices | set(ignore), what)
        self._transposed: dict[str, Tensor] = {}

    def read(self, rows: Rows) -> Block:
        chosen = rows if isinstance(rows, slice) else list(rows)
        decoder = self._rows(self._decoder, chosen)
        encoder = decoder if self._encoder is None else self._rows(self._encoder, chosen)
        return Block(encoder, decoder, {name: vector[chosen] for name, vector in self._gate.items()})

    def stored(self) -> StoredRows | None:
        file = self._file
        if (
            not isinstance(file, TensorFile)
            or self._encoder is None
            or self._encoder.transposed
            or self._decoder.transposed
        ):
            return None
        encoder, decoder = file.bits(self._encoder.name), file.bits(self._decoder.name)
        if encoder is None or decoder is None:
            return None
        return StoredRows(encoder, decoder, self._gate, file.refuse_change)

    def release(self) -> None:
        self._transposed = {}

    def _extent(self, matrix: Matrix) -> tuple[int, int]:
        self._file.require(matrix.name)
        shape = self._file.shapes[matrix.name]
        if len(shape) != 2 or 0 in shape:
            form = "[d, n_features]" if matrix.transposed else "[n_features, d]"
            raise SAEFormatError(f"{self.label}: tensor {matrix.name!r} has shape {shape}; expected {form}")
        return (shape[1], shape[0]) if matrix.transposed else (shape[0], shape[1])

    def _vector(self, name: str, source: str | Tensor, n: int) -> Tensor:
        if isinstance(source, str):
            self._file.require(source)
        shape = self._file.shapes[source] if isinstance(source, str) else list(source.shape)
        if shape[:1] != [n] or (len(shape) > 1 and name not in _GATE_MATRICES):
            called = repr(source) if isinstance(source, str) else name
            raise SAEFormatError(f"{self.label}: tensor {called} has shape {shape}; expected {[n]}")
        return self._file.tensor(source) if isinstance(source, str) else source

    def _extra(self, source: str | Tensor) -> Tensor:
        if isinstance(source, str):
            self._file.require(source)
            return self._file.tensor(source)
        return source

    def _rows(self, matrix: Matrix, rows: slice | list[int]) -> Tensor:
        if not matrix.transposed:
            return self._file.rows(matrix.name, rows)
        kept = self._transposed.get(matrix.name)  # once: another thread may release it
        if kept is None and self.d_model * self.n_features * 4 <= TRANSPOSE_BYTES:
            kept = self._transposed[matrix.name] = self._file.tensor(matrix.name).T.contiguous()
        return self._file.columns(matrix.name, rows) if kept is None else kept[rows]


def decoder_bias(file: Tensors, b_dec: str | Tensor | None, d_out: int) -> Tensor:
    """b_dec [d_out] by name, as given, or zeros."""
    import torch

    if b_dec is None:
        return torch.zeros(d_out)
    if isinstance(b_dec, str):
        file.require(b_dec, [d_out])
        return file.tensor(b_dec)
    return b_dec
