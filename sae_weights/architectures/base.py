"""What distinguishes one SAE architecture from another, once its checkpoint is canonical."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

Gate = Mapping[str, Tensor]
"""The per-feature tensors [n] (or [n, r]) besides the matrices, by their usual names: b_enc, threshold, b_gate …"""

Execution = Literal["row", "dictionary", "sequence"]
"""What f_j of one token depends on: row j alone; every row; other tokens as well (such a dictionary is refused)."""

NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


class RowForm(NamedTuple):
    """The vectors [m] of ``FeatureRows`` that follow from a gate."""

    gate_bias: Tensor
    threshold: Tensor
    mag_scale: Tensor
    mag_bias: Tensor

    def transfer(self, u: Tensor) -> Tensor:
        """f(u) = relu(mag_scale · u + mag_bias) · 1[u + gate_bias > threshold] for u [..., m] fp32."""
        return torch.relu(self.mag_scale * u + self.mag_bias) * (u + self.gate_bias > self.threshold)


@dataclass(frozen=True)
class Whole:
    """A whole canonical dictionary in memory, fp32.

    Attributes:
        W_enc: [n, d_in]. The same tensor as ``W_dec`` where the architecture has no encoder of its own.
        W_dec: [n, d_out].
        b_dec: [d_out].
        gate: per-feature tensors [n] or [n, r].
        extras: tensors that belong to no feature, such as ``W_skip`` [d_out, d_in].
        k: latents per token, where the architecture has that.
        settings: what else decides the function.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    gate: Gate
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    k: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Architecture(ABC):
    """One family of dictionaries: which tensors it has, how they fold, and what it computes. One file each.

    Attributes:
        name: canonical name, as in ``SAE.architecture``.
        kind: enters the content digest; architectures that compute the same function of the same tensors share it.
        title, reference: for people: its usual name, and paper or code.
        execution: what f_j depends on, see ``Execution``.
        why_not: for sequence-wide ones, why they are refused.
        gate_tensors: the per-feature tensors that it needs; ``optional_gate``: those it may have;
            ``gate_matrices``: those among both that are [n, r], not [n].
        extra_tensors: the other tensors that it needs (every architecture may have ``W_skip``); ``optional_extras``:
            those it may have; ``output_extras``: those among both in units of the output, as the decoder is.
        needs_k: whether it has a number of latents per token.
        settings: names of its other settings, with their defaults; ``described``: those among them that say something
            about the dictionary without deciding what it computes (they stay out of the digest).
        additive: whether the decoder is linear in f, so that the effect of one latent does not depend on the others.
        tied: whether it has no encoder matrix: W_enc is W_dec.
        signed: whether activations may be negative.
        several_places: whether it always reads several places at once (crosscoders), which no edit can.
        thresholdable: whether one calibrated threshold on the pre-activation can stand in for the membership rule.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    execution: ClassVar[Execution] = "row"
    why_not: ClassVar[str] = ""
    gate_tensors: ClassVar[tuple[str, ...]] = ()
    optional_gate: ClassVar[tuple[str, ...]] = ()
    gate_matrices: ClassVar[tuple[str, ...]] = ()
    extra_tensors: ClassVar[tuple[str, ...]] = ()
    optional_extras: ClassVar[tuple[str, ...]] = ()
    output_extras: ClassVar[tuple[str, ...]] = ()
    needs_k: ClassVar[bool] = False
    settings: ClassVar[Mapping[str, Any]] = NO_SETTINGS
    described: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = True
    tied: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    thresholdable: ClassVar[bool] = False
    several_places: ClassVar[bool] = False

    @property
    def row_separable(self) -> bool:
        """Whether f_j needs row j only."""
        return self.execution == "row"

    def check(  # noqa: B027  most have nothing to add
        self,
        n_features: int,
        k: int | None,
        gate: Mapping[str, tuple[int, ...]],
        extras: Mapping[str, Tensor],
        settings: Mapping[str, Any],
    ) -> None:
        """Raise SAEFormatError where parts with right names do not fit each other.

        ``gate`` maps names to shapes without the first dimension, n.
        """

    @abstractmethod
    def shift_input(self, gate: Gate, projection: Tensor) -> dict[str, Tensor]:
        """The gate after folding ``x − b`` into it, where projection [m] = W_enc · b."""

    @abstractmethod
    def scale_rows(self, gate: Gate, scale: Tensor) -> dict[str, Tensor]:
        """The gate when each p_j becomes scale_j · p_j (scale [m] > 0), so that f_j becomes scale_j · f_j."""

    @abstractmethod
    def row_form(self, gate: Gate) -> RowForm:
        """The gate as the vectors of ``FeatureRows``: f itself where row-separable, else f before membership."""

    def encode(self, x: Tensor, whole: Whole) -> Tensor:
        """x [N, d_in] fp32, normalised per token → post-activations [N, n] fp32."""
        return self.row_form(whole.gate).transfer(x @ whole.W_enc.T)

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        """Pre-activations [N, n] → post-activations [N, n]: the non-linearity alone, membership included."""
        form = self.row_form(whole.gate)
        return form.transfer(pre - form.gate_bias)

    def decode(self, f: Tensor, whole: Whole) -> Tensor:
        """f [N, n] fp32 → f · W_dec + b_dec, [N, d_out] fp32 (without the skip connection)."""
        return f @ whole.W_dec + whole.b_dec

    def effect(self, f: Tensor, f_new: Tensor, whole: Whole) -> Tensor:
        """decode(f_new) − decode(f), [N, d_out]; exactly zero where nothing changed."""
        if self.additive:
            return (f_new - f) @ whole.W_dec
        changed = (f_new != f).any(dim=-1, keepdim=True)
        return torch.where(changed, self.decode(f_new, whole) - self.decode(f, whole), 0.0)


class BiasOnly(Architecture):
    """Encoders whose only bias is ``b_enc``: p = W_enc · x̃ + b_enc."""

    def shift_input(self, gate: Gate, projection: Tensor) -> dict[str, Tensor]:
        return {**gate, "b_enc": gate["b_enc"] - projection}

    def scale_rows(self, gate: Gate, scale: Tensor) -> dict[str, Tensor]:
        return {name: vector * scale if name in ("b_enc", "threshold") else vector for name, vector in gate.items()}

    def row_form(self, gate: Gate) -> RowForm:
        bias = gate["b_enc"]
        threshold = gate.get("threshold", torch.zeros_like(bias))
        return RowForm(gate_bias=bias, threshold=threshold, mag_scale=torch.ones_like(bias), mag_bias=bias)

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        # The magnitude is the pre-activation itself: no bias is added and taken away, so nothing is rounded.
        return torch.relu(pre) * (pre > self.row_form(whole.gate).threshold)


class Members(BiasOnly):
    """Dictionary-wide encoders that first decide which latents of a token survive, from p of all of them."""

    execution = "dictionary"
    gate_tensors = ("b_enc",)

    @abstractmethod
    def members(self, pre: Tensor, whole: Whole) -> Tensor:
        """Which of the pre-activations [N, n] survive, bool [N, n]; equal values: the lower index wins."""

    def encode(self, x: Tensor, whole: Whole) -> Tensor:
        return self.activate(x @ whole.W_enc.T + whole.gate["b_enc"], whole)

    def activate(self, pre: Tensor, whole: Whole) -> Tensor:
        magnitude = pre if self.signed else torch.relu(pre)
        return magnitude * self.members(pre, whole)
