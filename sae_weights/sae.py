"""The canonical SAE: what every checkpoint becomes before anything else in the project sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor

from .architectures import ARCHITECTURES
from .errors import SAEFormatError
from .feature_rows import FeatureRows
from .folding import Block, Folding, fold_b_dec, fold_rows
from .hook import Hook
from .input_norm import InputNorm, NormalisedInput, normalise
from .source import MemoryRows, Rows, RowSource

__all__ = ["SAE", "FeatureRows", "Hook"]

# Rows that are folded at a time when the whole dictionary is read: 4096 × 4096 float64 values are 128 MiB.
_BLOCK_ELEMENTS = 1 << 24
_DIGEST_VERSION = b"sae-content/1"


class SAE:
    """A sparse autoencoder after folding: feature-major (row j of W_enc and of W_dec belongs to feature j), fp32.

    ::

        x̃ = normalise(x)                                       per token, see input_norm.py
        f = transfer(W_enc · x̃)                                FeatureRows; TopK keeps the k largest pre-activations
        x̂ = (f · W_dec + b_dec) · scale + shift                decode_for

    Opening one reads no weight matrix. ``rows`` reads the rows it is asked for; ``encode``, ``decode``, ``digest`` and
    the tensor properties read everything, the first three of those keeping the matrices in memory as fp32.

    Attributes: ``architecture`` ("relu", "jumprelu", "gated", "topk", "batchtopk"), ``d_model`` d, ``n_features`` n,
    ``hook``, ``input_norm``, ``k`` (TopK only), ``metadata`` (what the checkpoint and its sidecar say: model_name,
    hook_name, median_norm, max_activation …; never part of the digest).
    """

    def __init__(
        self,
        *,
        architecture: str,
        hook: Hook,
        source: RowSource,
        folding: Folding | None = None,
        input_norm: InputNorm = "none",
        k: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._form = ARCHITECTURES[architecture]
        self._source = source
        self._folding = folding or Folding()
        self._block: Block | None = None
        self._b_dec = fold_b_dec(source.b_dec, self._folding)
        self._digest: str | None = None
        self.architecture = architecture
        self.d_model = source.d_model
        self.n_features = source.n_features
        self.hook = hook
        self.input_norm = input_norm
        self.k = k
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata or {}))
        if input_norm not in get_args(InputNorm):
            raise SAEFormatError(f"input_norm: {input_norm!r}; expected one of {', '.join(get_args(InputNorm))}")
        if self._form.needs_k != (k is not None):
            raise SAEFormatError(
                f"k: {k!r}; architecture {architecture!r} takes {'one' if self._form.needs_k else 'none'}"
            )
        if k is not None and not 1 <= k <= self.n_features:
            raise SAEFormatError(f"k: {k}; expected 1..{self.n_features} (the number of features)")
        if not bool(self._b_dec.isfinite().all()):
            raise SAEFormatError(f"{source.label}: tensor b_dec holds values that are not finite")

    @classmethod
    def from_tensors(
        cls,
        *,
        architecture: str,
        hook: Hook,
        W_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        gate: Mapping[str, Tensor],
        folding: Folding | None = None,
        input_norm: InputNorm = "none",
        k: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SAE:
        """An SAE from tensors: W_enc and W_dec [n, d] (both feature-major), b_dec [d], and the gate's vectors [n].

        ``gate`` holds ``b_enc`` (relu, topk), ``b_enc`` and ``threshold`` (jumprelu, batchtopk), or ``b_gate``,
        ``b_mag`` and ``r_mag`` (gated). ``folding`` names the conventions that still have to be folded in. Raises
        SAEFormatError if names or shapes do not fit.
        """
        if architecture not in ARCHITECTURES:
            raise SAEFormatError(f"architecture: {architecture!r}; expected one of {', '.join(sorted(ARCHITECTURES))}")
        if W_enc.ndim != 2:
            raise SAEFormatError(f"W_enc: shape {list(W_enc.shape)}; expected [n_features, d_model]")
        n, d = W_enc.shape
        given = {"W_dec": W_dec, "b_dec": b_dec, **gate}
        expected = {"W_dec": [n, d], "b_dec": [d]} | {name: [n] for name in ARCHITECTURES[architecture].gate_tensors}
        if given.keys() != expected.keys():
            raise SAEFormatError(f"gate: {sorted(gate)}; expected {list(ARCHITECTURES[architecture].gate_tensors)}")
        for name, shape in expected.items():
            if list(given[name].shape) != shape:
                raise SAEFormatError(f"{name}: shape {list(given[name].shape)}; expected {shape}")
        tensors = {name: tensor.detach().cpu() for name, tensor in (given | {"W_enc": W_enc}).items()}
        block = Block(tensors["W_enc"], tensors["W_dec"], {name: tensors[name] for name in gate})
        return cls(
            architecture=architecture,
            hook=hook,
            source=MemoryRows(block, tensors["b_dec"]),
            folding=folding,
            input_norm=input_norm,
            k=k,
            metadata=metadata,
        )

    # What it is

    @property
    def row_separable(self) -> bool:
        """Whether f_j needs row j only. False for TopK: membership needs every pre-activation."""
        return self._form.row_separable

    @property
    def materialised(self) -> bool:
        """Whether the whole dictionary is in memory."""
        return self._block is not None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical content: both matrices, biases, gate, k, norm and hook; not of names or paths.

        Reads the dictionary once, block by block, without keeping it. The same numbers stored in another dtype, layout
        or convention give the same digest wherever folding them is exact.
        """
        if self._digest is None:
            parts: dict[str, Any] = {}
            for _, block in self._blocks():
                for name, tensor in {"W_enc": block.W_enc, "W_dec": block.W_dec, **block.gate}.items():
                    parts.setdefault(name, hashlib.sha256()).update(_little_endian(tensor))
            parts["b_dec"] = hashlib.sha256(_little_endian(self._b_dec))
            facts = (self._form.kind, self.d_model, self.n_features, self.hook, self.input_norm, self.k)
            total = hashlib.sha256(_DIGEST_VERSION + repr(tuple(map(str, facts))).encode())
            for name in sorted(parts):
                total.update(name.encode() + b"=" + parts[name].digest())
            self._digest = total.hexdigest()
        return self._digest

    # Whole tensors, fp32

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """[n, d]"""
        return self._whole().W_enc

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """[n, d]"""
        return self._whole().W_dec

    @property
    def b_dec(self) -> Tensor:
        """[d], in normalised space."""
        return self._b_dec

    @property
    def gate(self) -> Mapping[str, Tensor]:
        """The encoder's vectors [n] under the checkpoint's names (b_enc, threshold, b_gate, b_mag, r_mag), folded."""
        return self._whole().gate

    # What it computes

    def encode(self, x: Tensor) -> Tensor:
        """x [N, d] of any floating dtype → post-activations [N, n] fp32; for TopK, members only.

        A hook_z SAE also takes [N, n_heads, d_head].
        """
        projection = self._project(x)
        rows = self._all_rows()
        return self._keep_members(rows.transfer(projection), projection + rows.gate_bias)

    def pre_activations(self, x: Tensor) -> Tensor:
        """x [N, d] → what the gate looks at, W_enc · x̃ + b_enc (gated: + b_gate), [N, n] fp32."""
        return self._project(x) + self._all_rows().gate_bias

    def activate(self, pre: Tensor) -> Tensor:
        """Pre-activations [N, n] → post-activations [N, n]: the non-linearity alone, TopK membership included."""
        rows = self._all_rows()
        if self.architecture == "gated":
            return rows.transfer(pre - rows.gate_bias)
        # Elsewhere the magnitude is the pre-activation itself: no bias is added and taken away, so nothing is rounded.
        return self._keep_members(torch.relu(pre) * (pre > rows.threshold), pre)

    def decode(self, f: Tensor) -> Tensor:
        """f [N, n] → f · W_dec + b_dec, [N, d] fp32, still in normalised space where input_norm is not "none"."""
        return f.float() @ self.W_dec + self._b_dec

    def decode_for(self, x: Tensor, f: Tensor) -> Tensor:
        """The reconstruction of x [N, d] by f [N, n] in x's own space: decode(f) · scale + shift; shaped like x."""
        _, scale, shift = self._normalised(x)
        return (self.decode(f) * scale + shift).reshape(x.shape)

    def token_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, d] → (x̃ [N, d], delta_scale [N]), fp32: a change f → f' moves x by delta_scale · (f' − f) · W_dec."""
        normalised, scale, _ = self._normalised(x)
        return normalised, scale.squeeze(-1)

    def rows(self, indices: Sequence[int]) -> FeatureRows:
        """The rows of these features, in this order, fp32. Reads only them unless the whole dictionary is in memory.

        Raises IndexError for an index outside 0..n_features−1.
        """
        index = [int(i) for i in indices]
        for i in index:
            if not 0 <= i < self.n_features:
                raise IndexError(f"feature {i}; this SAE has 0..{self.n_features - 1}")
        if self._block is not None:
            whole = self._block
            block = Block(whole.W_enc[index], whole.W_dec[index], {name: v[index] for name, v in whole.gate.items()})
        else:
            block = self._read(index)
        return self._feature_rows(torch.tensor(index, dtype=torch.int64), block)

    def __repr__(self) -> str:
        return f"SAE({self.architecture}, d_model={self.d_model}, n_features={self.n_features}, hook={self.hook})"

    # Reading

    def _read(self, rows: Rows) -> Block:
        block = fold_rows(self._source.read(rows), self._source.b_dec, self._folding, self._form)
        for name, tensor in {"W_enc": block.W_enc, "W_dec": block.W_dec, **block.gate}.items():
            finite = tensor.isfinite() if tensor.ndim == 1 else tensor.isfinite().all(dim=-1)
            if not bool(finite.all()):
                where = int((~finite).nonzero()[0])
                feature = where + rows.start if isinstance(rows, slice) else rows[where]
                raise SAEFormatError(f"{self._source.label}: tensor {name} is not finite at feature {feature}")
        return block

    def _blocks(self) -> Iterator[tuple[slice, Block]]:
        """The whole dictionary in order, a block of rows at a time."""
        if self._block is not None:
            yield slice(0, self.n_features), self._block
            return
        step = max(1, _BLOCK_ELEMENTS // self.d_model)
        for start in range(0, self.n_features, step):
            rows = slice(start, min(start + step, self.n_features))
            yield rows, self._read(rows)

    def _whole(self) -> Block:
        if self._block is None:
            n, d = self.n_features, self.d_model
            whole = Block(
                torch.empty(n, d), torch.empty(n, d), {name: torch.empty(n) for name in self._form.gate_tensors}
            )
            for rows, block in self._blocks():
                whole.W_enc[rows], whole.W_dec[rows] = block.W_enc, block.W_dec
                for name, vector in block.gate.items():
                    whole.gate[name][rows] = vector
            self._block = whole
            self._source.release()
        return self._block

    def _all_rows(self) -> FeatureRows:
        return self._feature_rows(torch.arange(self.n_features), self._whole())

    def _feature_rows(self, index: Tensor, block: Block) -> FeatureRows:
        gate_bias, threshold, mag_scale, mag_bias = self._form.row_form(block.gate)
        return FeatureRows(index, block.W_enc, block.W_dec, gate_bias, threshold, mag_scale, mag_bias)

    def _keep_members(self, f: Tensor, pre: Tensor) -> Tensor:
        members = self._form.members(pre, self.k)
        return f if members is None else f * members

    def _normalised(self, x: Tensor) -> NormalisedInput:
        if x.shape[-1] != self.d_model and self.hook.point.endswith("z") and x.ndim >= 2:
            x = x.flatten(-2)
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x has width {x.shape[-1]}; this SAE reads {self.d_model} values per token")
        return normalise(x.float(), self.input_norm)

    def _project(self, x: Tensor) -> Tensor:
        return self._normalised(x).x @ self.W_enc.T


def _little_endian(tensor: Tensor) -> bytes:
    values: bytes = tensor.contiguous().numpy().astype("<f4", copy=False).tobytes()
    return values
