"""The canonical SAE: what every checkpoint becomes before anything else in the project sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from .architectures import ARCHITECTURES, Execution, Whole
from .checks import check_settings, check_tensors
from .digest import content_digest
from .errors import SAEFormatError
from .feature_rows import FeatureRows, StoredFeatures
from .folding import Block, Folding, fold_b_dec, fold_extras, fold_rows
from .hook import Hook
from .input_norm import InputNorm, NormalisedInput, normalise
from .source import FirstRows, MappedSource, MemoryRows, Rows, RowSource, StoredRows
from .thresholded import ThresholdedRows

if TYPE_CHECKING:
    from .formats.base import Origin

__all__ = ["SAE", "FeatureRows", "Hook"]

# Rows that are folded at a time when the whole dictionary is read: 4096 × 4096 float64 values are 128 MiB.
_BLOCK_ELEMENTS = 1 << 24


class SAE:
    """A sparse dictionary after folding: feature-major (row j of W_enc and of W_dec belongs to feature j), fp32.

    ::

        x̃ = normalise(x)                                       per token, see input_norm.py
        f = encode(x̃)                                          by its architecture; transfer(W_enc · x̃) where row-separable
        x̂ = (decode(f) + W_skip · x̃) · scale + shift           decode_for; decode(f) = f · W_dec + b_dec where additive

    Opening one reads no weight matrix. ``rows`` reads the rows it is asked for; ``encode``, ``decode``, ``digest`` and
    the tensor properties read everything, the first three of those keeping the matrices in memory as fp32.

    Attributes: ``architecture`` (a name in ``ARCHITECTURES``), ``d_model`` (values read per token, d_in), ``d_out``,
    ``n_features`` n, ``hooks`` (what it reads; several for a crosscoder, whose input is their concatenation),
    ``hook_out`` (where the decoder writes, for transcoders; None: where it reads), ``input_norm``, ``k`` (latents per
    token, where the architecture has that), ``settings``, ``extras`` (tensors that belong to no feature),
    ``approximates`` (what a thresholded stand-in stands in for), ``origin`` (how to open it again), ``metadata`` (what
    the checkpoint and its sidecar say: model_name, hook_name, median_norm, max_activation …; never part of the digest).
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
        settings: Mapping[str, Any] | None = None,
        hook_out: Hook | None = None,
        hooks: Sequence[Hook] | None = None,
        metadata: Mapping[str, Any] | None = None,
        approximates: str | None = None,
    ) -> None:
        if architecture not in ARCHITECTURES:
            raise SAEFormatError(f"architecture: {architecture!r}; expected one of {', '.join(sorted(ARCHITECTURES))}")
        self._form = ARCHITECTURES[architecture]
        if self._form.execution == "sequence":
            raise SAEFormatError(
                f"{source.label}: architecture {architecture!r} is not supported: {self._form.why_not}"
            )
        self._source = source
        self._folding = folding or Folding()
        self._block: Block | None = None
        self._b_dec = fold_b_dec(source.b_dec, self._folding)
        self._extras = MappingProxyType(fold_extras(source.extras, self._folding, self._form))
        self._digest = source.recorded_digest if self._folding.trivial else None
        self.architecture = architecture
        self.d_model = source.d_model
        self.d_out = source.d_out
        self.n_features = source.n_features
        self.hooks: tuple[Hook, ...] = tuple(hooks) if hooks else (hook,)
        self.hook_out = None if hook_out == hook else hook_out
        self.input_norm = input_norm
        self.k = k
        self.settings: Mapping[str, Any] = MappingProxyType(
            check_settings(self._form, settings or {}, source.n_features)
        )
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata or {}))
        self.approximates = approximates
        self.origin: Origin | None = None
        if input_norm not in get_args(InputNorm):
            raise SAEFormatError(f"input_norm: {input_norm!r}; expected one of {', '.join(get_args(InputNorm))}")
        if self._form.needs_k != (k is not None):
            raise SAEFormatError(
                f"k: {k!r}; architecture {architecture!r} takes {'one' if self._form.needs_k else 'none'}"
            )
        if k is not None and not 1 <= k <= self.n_features:
            raise SAEFormatError(f"k: {k}; expected 1..{self.n_features} (the number of features)")
        for name, beyond in source.gate_shapes.items():
            if len(beyond) != (1 if name in self._form.gate_matrices else 0):
                raise SAEFormatError(
                    f"{source.label}: tensor {name} has shape {[self.n_features, *beyond]}; "
                    f"expected {'[n_features, r]' if name in self._form.gate_matrices else '[n_features]'}"
                )
        self._form.check(self.n_features, k, source.gate_shapes, self._extras, self.settings)
        if self.d_out != self.d_model and self.hook_out is None:
            raise SAEFormatError(
                f"{source.label}: W_dec has width {self.d_out} and W_enc {self.d_model}; "
                "they differ only where hook_out says that the dictionary writes elsewhere (a transcoder)"
            )
        for name, tensor in {"b_dec": self._b_dec, **self._extras}.items():
            if not bool(tensor.isfinite().all()):
                raise SAEFormatError(f"{source.label}: tensor {name} holds values that are not finite")

    @classmethod
    def from_tensors(
        cls,
        *,
        architecture: str,
        hook: Hook,
        W_dec: Tensor,
        b_dec: Tensor,
        gate: Mapping[str, Tensor],
        W_enc: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        folding: Folding | None = None,
        input_norm: InputNorm = "none",
        k: int | None = None,
        settings: Mapping[str, Any] | None = None,
        hook_out: Hook | None = None,
        hooks: Sequence[Hook] | None = None,
        metadata: Mapping[str, Any] | None = None,
        label: str = MemoryRows.label,
    ) -> SAE:
        """An SAE from tensors: W_enc [n, d_in] and W_dec [n, d_out] (both feature-major), b_dec [d_out], and the gate.

        ``gate`` holds the architecture's ``gate_tensors``: ``b_enc`` (relu, topk), ``b_enc`` and ``threshold``
        (jumprelu, batchtopk), ``b_gate``, ``b_mag`` and ``r_mag`` (gated) …; ``W_enc`` is left out where the
        architecture has none of its own. ``folding`` names the conventions that still have to be folded in. ``label`` is
        what errors call the tensors: the file that they came from. Raises SAEFormatError if names or shapes do not fit.
        """
        given = check_tensors(architecture, W_enc, W_dec, b_dec, gate, extras or {})
        encoder, decoder = given["W_enc"], given["W_dec"]
        block = Block(encoder, decoder, {name: given[name] for name in gate})
        source = MemoryRows(block, given["b_dec"], {name: given[name] for name in extras or {}})
        source.label = label
        return cls(
            architecture=architecture,
            hook=hook,
            source=source,
            folding=folding,
            input_norm=input_norm,
            k=k,
            settings=settings,
            hook_out=hook_out,
            hooks=hooks,
            metadata=metadata,
        )

    # What it is

    @property
    def hook(self) -> Hook:
        """What it reads; the first of several."""
        return self.hooks[0]

    @property
    def execution(self) -> Execution:
        """Whether f_j needs row j only ("row") or every pre-activation ("dictionary")."""
        return self._form.execution

    @property
    def row_separable(self) -> bool:
        """Whether f_j needs row j only. False for TopK: membership needs every pre-activation."""
        return self._form.row_separable

    @property
    def additive(self) -> bool:
        """Whether the decoder is linear in f, so that one latent's effect does not depend on the others."""
        return self._form.additive

    @property
    def signed(self) -> bool:
        """Whether activations may be negative."""
        return self._form.signed

    @property
    def refusal(self) -> str | None:
        """Why a server cannot edit or read through this dictionary, naming the hook; None where it can."""
        if len(self.hooks) > 1:
            places = ", ".join(str(hook) for hook in self.hooks)
            return f"a crosscoder: it reads {places} at once, and no single place holds that"
        if self.hook_out is not None:
            return f"a transcoder: it reads {self.hook} and writes {self.hook_out}; an edit belongs where a dictionary reads"
        if self.hook.edit_layer is None:
            return f"trained on {self.hook}, a hook that is not served; served are resid_post(L), and resid_pre(L) for L > 0"
        return None

    @property
    def materialised(self) -> bool:
        """Whether the whole dictionary is in memory."""
        return self._block is not None

    @property
    def whole_bytes(self) -> int:
        """Memory of the matrices and the gate, fp32, when the whole dictionary is in memory."""
        matrices = self.d_out + (0 if self._form.tied else self.d_model)
        gate = sum(math.prod(beyond) for beyond in self._source.gate_shapes.values())
        return torch.float32.itemsize * self.n_features * (matrices + gate)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical content: matrices, biases, gate, k, norm and hook; not of names or paths.

        Reads the dictionary once, block by block, without keeping it, unless its file carries the digest. The same
        numbers stored in another dtype, layout or convention give the same digest wherever folding them is exact.
        """
        if self._digest is None:
            self._digest = self.compute_digest()
        return self._digest

    def compute_digest(self) -> str:
        """The digest from the content, whatever the file records."""
        facts: list[Any] = [self._form.kind, self.d_model, self.n_features, self.hook, self.input_norm, self.k]
        if self.hook_out is not None or self.d_out != self.d_model:
            facts += ["out", self.hook_out, self.d_out]
        if len(self.hooks) > 1:
            facts += ["hooks", *self.hooks]
        deciding = {name: self.settings[name] for name in self.settings if name not in self._form.described}
        if deciding:
            facts += ["settings", sorted(deciding.items())]
        blocks = ({"W_enc": block.W_enc, "W_dec": block.W_dec, **block.gate} for _, block in self.blocks())
        return content_digest(facts, blocks, {"b_dec": self._b_dec, **self._extras})

    # Whole tensors, fp32

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """[n, d_in]"""
        return self._whole().W_enc

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """[n, d_out]"""
        return self._whole().W_dec

    @property
    def b_dec(self) -> Tensor:
        """[d_out], in normalised space."""
        return self._b_dec

    @property
    def gate(self) -> Mapping[str, Tensor]:
        """The per-feature tensors under the checkpoint's names (b_enc, threshold, b_gate, b_mag, r_mag …), folded."""
        return self._whole().gate

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """The tensors that belong to no feature (W_skip [d_out, d_in] …), folded."""
        return self._extras

    # What it computes

    def encode(self, x: Tensor) -> Tensor:
        """x [N, d_in] of any floating dtype → post-activations [N, n] fp32; members only where there is membership.

        A hook_z SAE also takes [N, n_heads, d_head].
        """
        return self._form.encode(self._normalised(x).x, self._whole())

    def pre_activations(self, x: Tensor) -> Tensor:
        """x [N, d_in] → what the gate looks at, W_enc · x̃ + b_enc (gated: + b_gate), [N, n] fp32."""
        whole = self._whole()
        return self._normalised(x).x @ whole.W_enc.T + self._form.row_form(whole.gate).gate_bias

    def activate(self, pre: Tensor) -> Tensor:
        """Pre-activations [N, n] → post-activations [N, n]: the non-linearity alone, membership included."""
        return self._form.activate(pre, self._whole())

    def decode(self, f: Tensor) -> Tensor:
        """f [N, n] → [N, d_out] fp32, still in normalised space where input_norm is not "none"; no skip connection."""
        return self._form.decode(f.float(), self._whole())

    def decode_for(self, x: Tensor, f: Tensor) -> Tensor:
        """The reconstruction by f [N, n] for x [N, d_in], in x's own space; shaped like x where d_out = d_in."""
        normalised, scale, shift = self._normalised(x)
        out = self.decode(f)
        if "W_skip" in self._extras:
            out = out + normalised @ self._extras["W_skip"].T
        out = out * scale + shift
        return out.reshape(x.shape) if out.numel() == x.numel() else out

    def delta(self, x: Tensor, f: Tensor, f_new: Tensor) -> Tensor:
        """What changing f to f_new [N, n] adds at x [N, d_in]: (decode(f_new) − decode(f)) · scale, [N, d_out] fp32.

        x + delta keeps the reconstruction error. Exactly zero where f_new = f.
        """
        effect = self._form.effect(f.float(), f_new.float(), self._whole())
        return self._normalised(x).scale * effect

    def token_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, d_in] → (x̃ [N, d_in], delta_scale [N]), fp32: f → f' moves x by delta_scale · (f' − f) · W_dec."""
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
            block = self.read(index)
        form = self._form.row_form(block.gate)
        return FeatureRows(torch.tensor(index, dtype=torch.int64), block.W_enc, block.W_dec, *form)

    def stored(self) -> StoredFeatures | None:
        """All features where they lie, in memory or in the file; None where they have to be folded row by row."""
        block = self._block
        if block is not None:
            encoder, decoder = (matrix.numpy().view(np.uint32) for matrix in (block.W_enc, block.W_dec))
            found = StoredRows(encoder, decoder, block.gate, lambda: None)
        elif self._folding.trivial and isinstance(self._source, MappedSource) and (rows := self._source.stored()):
            found = rows
        else:
            return None
        form = self._form.row_form({name: vector.float() for name, vector in found.gate.items()})
        return StoredFeatures(found.encoder, found.decoder, torch.stack(form, dim=1).numpy(), found.unchanged)

    def __repr__(self) -> str:
        return f"SAE({self.architecture}, d_model={self.d_model}, n_features={self.n_features}, hook={self.hook})"

    # Dictionaries made of this one

    def prefix(self, groups: int) -> SAE:
        """The first ``groups`` groups of a Matryoshka dictionary: a smaller dictionary in its own right.

        Raises SAEFormatError where there are no groups, or not that many.
        """
        sizes = self.settings.get("group_sizes")
        if not sizes:
            raise SAEFormatError(f"groups: {groups}; this {self.architecture} dictionary has no groups")
        if not 1 <= groups <= len(sizes):
            raise SAEFormatError(f"groups: {groups}; this dictionary has 1..{len(sizes)} (of sizes {list(sizes)})")
        if groups == len(sizes):
            return self
        n = sum(sizes[:groups])
        return SAE(
            architecture=self.architecture,
            hook=self.hook,
            source=FirstRows(self._source, n),
            folding=self._folding,
            input_norm=self.input_norm,
            k=None if self.k is None else min(self.k, n),
            settings={**self.settings, "group_sizes": list(sizes[:groups])},
            hook_out=self.hook_out,
            hooks=self.hooks,
            metadata=self.metadata,
        )

    def thresholded(self, theta: float) -> SAE:
        """A row-separable stand-in for a TopK-like dictionary: f = relu(p) where p > theta (in the units it ranks by).

        An approximation: a token then has k active latents on average, not exactly. ``theta`` is what
        ``editserver sae calibrate`` measures. Raises SAEFormatError for architectures that no threshold stands in for.
        """
        if not self._form.thresholdable:
            reason = "it is row-separable already" if self.row_separable else "no threshold decides its membership"
            raise SAEFormatError(f"architecture {self.architecture!r} takes no calibrated threshold: {reason}")
        return SAE(
            architecture="jumprelu",
            hook=self.hook,
            source=ThresholdedRows(self, theta),
            input_norm=self.input_norm,
            hook_out=self.hook_out,
            hooks=self.hooks,
            metadata=self.metadata,
            approximates=self.architecture + (f" (k = {self.k})" if self.k else ""),
        )

    # Reading

    def read(self, rows: Rows) -> Block:
        """Canonical rows straight from the source, fp32, nothing cached. Raises SAEFormatError if one is not finite."""
        block = fold_rows(self._source.read(rows), self._source.b_dec, self._folding, self._form)
        for name, tensor in {"W_enc": block.W_enc, "W_dec": block.W_dec, **block.gate}.items():
            if not np.isfinite(tensor.numpy()).all():
                finite = tensor.isfinite() if tensor.ndim == 1 else tensor.isfinite().all(dim=-1)
                where = int((~finite).nonzero()[0])
                feature = where + rows.start if isinstance(rows, slice) else rows[where]
                raise SAEFormatError(f"{self._source.label}: tensor {name} is not finite at feature {feature}")
        return block

    def blocks(self) -> Iterator[tuple[slice, Block]]:
        """The whole canonical dictionary in order, a block of rows at a time, without keeping it."""
        if self._block is not None:
            yield slice(0, self.n_features), self._block
            return
        step = max(1, _BLOCK_ELEMENTS // max(self.d_model, self.d_out))
        for start in range(0, self.n_features, step):
            rows = slice(start, min(start + step, self.n_features))
            yield rows, self.read(rows)

    def _whole(self) -> Whole:
        if self._block is None:
            # Filled block by block: a wide dictionary is never in memory twice.
            tensors: dict[str, Tensor] = {}
            for rows, block in self.blocks():
                own = {} if block.W_enc is block.W_dec else {"W_enc": block.W_enc}
                for name, part in {**own, "W_dec": block.W_dec, **block.gate}.items():
                    if name not in tensors:
                        tensors[name] = torch.empty(self.n_features, *part.shape[1:])
                    tensors[name][rows] = part
            decoder = tensors.pop("W_dec")
            self._block = Block(tensors.pop("W_enc", decoder), decoder, tensors)
            self._source.release()
        block = self._block
        return Whole(block.W_enc, block.W_dec, self._b_dec, block.gate, self._extras, self.k, self.settings)

    def _normalised(self, x: Tensor) -> NormalisedInput:
        if x.shape[-1] != self.d_model and self.hook.point.endswith("z") and x.ndim >= 2:
            x = x.flatten(-2)
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x has width {x.shape[-1]}; this SAE reads {self.d_model} values per token")
        return normalise(x.float(), self.input_norm)
