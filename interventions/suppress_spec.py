"""The request object that turns a concept down; :mod:`interventions.suppression` has what it compiles into."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, ValidationError, WithJsonSchema, model_validator

from interventions.concepts.concept import METHODS, Method
from interventions.concepts.gain import TAU
from interventions.fields import Integers, Name, NotNegative, Statistic, fault, one_of, text
from interventions.items import Common, Item, first_fault
from interventions.wording import choices, show


class InlineConcept(Item):
    """A concept as a few latents of one SAE; ``mu`` and ``sigma`` are for method range."""

    sae: Name = Field(description="SAE id.")
    features: Integers = Field(description="Indices of its latents.")
    mu: Statistic | None = Field(None, description="Mean of each latent's positive activations, or one number for all.")
    sigma: Statistic | None = Field(None, description="Their standard deviation, or one number for all.")

    @model_validator(mode="after")
    def _one_statistic_a_feature(self) -> Self:
        for field, values in (("mu", self.mu), ("sigma", self.sigma)):
            if isinstance(values, list) and len(values) != len(self.features):
                raise fault(f"has {len(values)} numbers for {len(self.features)} features", field)
        spread = self.sigma if isinstance(self.sigma, list) else [self.sigma]
        for i, sigma in enumerate(spread):
            if sigma is not None and sigma < 0:
                path = ("sigma", i) if isinstance(self.sigma, list) else ("sigma",)
                raise fault(f"expected a standard deviation ≥ 0, got {show(sigma)}", *path)
        return self

    def statistic(self, field: Literal["mu", "sigma"]) -> list[float] | None:
        """One number per latent, if there are any."""
        values: float | list[float] | None = getattr(self, field)
        return values if values is None or isinstance(values, list) else [values] * len(self.features)


def _concept(value: Any) -> str | InlineConcept:
    if isinstance(value, InlineConcept):
        return value
    if isinstance(value, str):
        return text(value, at_most=256)
    if not isinstance(value, dict):
        raise fault(f'expected the name of a library concept, or {{"sae", "features"}}; got {show(value)}')
    try:
        return InlineConcept.model_validate(value)
    except ValidationError as error:
        message, path = first_fault(error)
    raise fault(message, *path)


Concept = Annotated[
    str | InlineConcept,
    PlainValidator(_concept),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 256}, InlineConcept.model_json_schema()]}
    ),
]
"""Name of a library concept, or the concept itself."""


class Suppress(Common):
    """Turns a concept down; x is the current value of each of its latents.

    ``app``: x·(1 − strength·P(concept | x)). ``attenuate``: x·(1 − strength). ``mask``: 0. ``range``: 0 where x > 0 lies
    within μ ± ``tau``·σ of the concept's activations. Strength 0 changes nothing; above 1 a latent may go below zero.
    """

    type: Literal["suppress"] = Field("suppress", description="Kind of intervention.")
    concept: Concept = Field(description="Name of a library concept, or some latents of an SAE.")
    method: Annotated[Literal["app", "attenuate", "mask", "range"], BeforeValidator(one_of(*METHODS))] | None = Field(
        None, description="Default: app for a library concept, mask for latents given inline."
    )
    strength: NotNegative = Field(1.0, description="Factor λ of app and attenuate; mask and range zero at any above 0.")
    tau: NotNegative | None = Field(None, description=f"Half width of method range in σ; default {TAU:g}.")

    @property
    def chosen(self) -> Method:
        """The method, given or by default."""
        return self.method or ("app" if isinstance(self.concept, str) else "mask")

    @model_validator(mode="after")
    def _method_fields(self) -> Self:
        if self.given("tau") and self.chosen != "range":
            raise fault(f"goes with method range only, not with {self.chosen}", "tau")
        if isinstance(self.concept, str):
            return self
        if self.chosen == "app":
            message = "app needs P(concept | activation), which only a fitted concept has: name one of the library"
            raise fault(f"{message}, or choose another of {choices(METHODS)}", "method")
        for field in ("mu", "sigma"):
            if self.chosen == "range" and getattr(self.concept, field) is None:
                raise fault("is required by method range on latents given inline", "concept", field)
        return self
