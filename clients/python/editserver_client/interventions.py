"""The interventions that a request may carry; h is the residual stream after a layer.

Common to all: `id` (label echoed in the receipt; default its place in the list), `tokens` (selector, default all),
`when` (a rule expression, as text or JSON: it acts only where that holds), `include_bos` (position 0 too). What can be
seen to be wrong without the server raises `pydantic.ValidationError`; the rest (names, dimensions, armed layers) it answers
with `BadRequest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator
from pydantic.dataclasses import dataclass

from .features import FeatureEdit, Index, check_bounds, check_distinct
from .rules import Name, Rules, When
from .selectors import Selector
from .tensors import TensorLike, as_wire, shape_of
from .wire import STRICT, Wire


def _values(given: Any) -> Any:
    return None if given is None else as_wire(given)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Common(Wire):
    """The fields that every intervention has."""

    type: str
    id: str | None = None
    tokens: Selector | None = None
    when: When | None = None
    include_bos: bool | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Steer(Common):
    """Move h along a direction v, or bound it there.

    The direction is one of `vector` (library name), `values` with `layer` or `layers` ([d], or [len(layers), d]), or
    `sae` + `feature` (that decoder row). With v̂ = v/‖v‖ and s = `strength` (1 unless given), `mode` is

        add           h + s·v                 (default)
        normalized    h + s·‖h‖·v̂
        project_out   h − s·(h·v̂)·v̂
        cap           h·v̂ clamped into [min, max]; no strength, at least one bound
    """

    type: Literal["steer"] = "steer"
    vector: Name | None = None
    values: Annotated[TensorLike | None, PlainValidator(_values)] = None
    sae: Name | None = None
    feature: Index | None = None
    layer: Index | None = None
    layers: Annotated[Sequence[Index], Field(min_length=1)] | None = None
    strength: float | None = None
    mode: Literal["add", "normalized", "project_out", "cap"] | None = None
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _is_one_direction(self) -> Steer:
        from_sae = self.sae is not None or self.feature is not None
        if from_sae and (self.sae is None or self.feature is None):
            raise ValueError("sae and feature go together")
        if sum((self.vector is not None, self.values is not None, from_sae)) != 1:
            raise ValueError("give exactly one of vector, values, or sae with feature")
        if self.values is None:
            if self.layer is not None or self.layers is not None:
                raise ValueError(
                    "a library vector and a feature bring their own layer; layer and layers go with values"
                )
        else:
            self._check_layers()
        if self.mode == "cap":
            if self.strength is not None:
                raise ValueError("mode cap has no strength; its bounds are min and max")
            check_bounds(self.min, self.max)
        elif self.min is not None or self.max is not None:
            raise ValueError("min and max belong to mode cap")
        return self

    def _check_layers(self) -> None:
        if (self.layer is None) == (self.layers is None):
            raise ValueError("values need exactly one of layer and layers")
        if self.layers is not None:
            check_distinct(list(self.layers), "layer")
        shape = shape_of(self.values)  # type: ignore[arg-type]  # as_wire has made it a list or a PackedTensor
        n_layers = 1 if self.layers is None else len(self.layers)
        if len(shape) > 2 or (len(shape) == 2 and (self.layers is None or shape[0] != n_layers)):
            raise ValueError(f"values of shape {list(shape)} for {n_layers} layer(s): expected [d] or [len(layers), d]")


@dataclass(frozen=True, config=STRICT)
class EditFeatures(Common):
    """Edit latents of one SAE; the part of h that the SAE does not explain is kept: h' = h + decode(z') − decode(z)."""

    sae: Name
    features: Annotated[Sequence[FeatureEdit], Field(min_length=1)]
    type: Literal["edit_features"] = Field(default="edit_features", kw_only=True)

    @model_validator(mode="after")
    def _indices_are_distinct(self) -> EditFeatures:
        check_distinct([edit.index for edit in self.features], "feature")
        return self


@dataclass(frozen=True, config=STRICT)
class InlineConcept(Wire):
    """A concept given by its latents instead of a library name.

    `mu` and `sigma` are for method range: mean and standard deviation of the latents' positive activations, one each or
    one number for all.
    """

    sae: Name
    features: Annotated[Sequence[Index], Field(min_length=1)]
    mu: float | Sequence[float] | None = Field(default=None, kw_only=True)
    sigma: float | Sequence[float] | None = Field(default=None, kw_only=True)

    @model_validator(mode="after")
    def _one_statistic_a_feature(self) -> InlineConcept:
        check_distinct(list(self.features), "feature")
        for name, statistic in (("mu", self.mu), ("sigma", self.sigma)):
            if isinstance(statistic, Sequence) and len(statistic) != len(self.features):
                raise ValueError(f"{name} has {len(statistic)} entries for {len(self.features)} features")
        spread = self.sigma if isinstance(self.sigma, Sequence) else [self.sigma or 0]
        if min(spread) < 0:
            raise ValueError(f"sigma is a standard deviation, so it is not below 0; got {min(spread)}")
        return self


@dataclass(frozen=True, config=STRICT)
class Suppress(Common):
    """Turn a concept down. With x the current value of each of its latents and s = `strength` (1 unless given),

        app         x·(1 − s·P(concept | x))      (default for a library concept, and only for one)
        attenuate   x·(1 − s)
        mask        0                             (default for latents given inline)
        range       0 where x > 0 and μ − tau·σ ≤ x ≤ μ + tau·σ; tau is 2 unless given

    Strength 0 changes nothing; above 1 a latent may go below zero; mask and range are the same at any strength above 0.
    """

    concept: Name | InlineConcept
    method: Literal["app", "attenuate", "mask", "range"] | None = Field(default=None, kw_only=True)
    strength: Annotated[float, Field(ge=0)] | None = Field(default=None, kw_only=True)
    tau: Annotated[float, Field(ge=0)] | None = Field(default=None, kw_only=True)
    type: Literal["suppress"] = Field(default="suppress", kw_only=True)

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Suppress:
        if self.tau is not None and self.method != "range":
            raise ValueError("tau belongs to method range")
        if isinstance(self.concept, InlineConcept):
            if self.method == "app":
                raise ValueError("method app needs a concept of the library: only a fitted one has its posterior")
            if self.method == "range" and (self.concept.mu is None or self.concept.sigma is None):
                raise ValueError("method range on an inline concept needs its mu and sigma")
        return self


@dataclass(frozen=True, config=STRICT)
class Remap(Common):
    """Map latents as a map of the library says, on the tokens of its scope that `tokens` selects, while its gate is open.

    `strength` s (1 unless given) goes from the latents as they are (0) to the map's values (1): (1 − s)·x + s·map(x);
    above 1 it overshoots.
    """

    map: Name
    strength: Annotated[float, Field(ge=0)] | None = Field(default=None, kw_only=True)
    type: Literal["remap"] = Field(default="remap", kw_only=True)


Intervention = Steer | EditFeatures | Suppress | Remap | Rules
