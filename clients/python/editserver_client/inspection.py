"""Asking for readings of an SAE, and the readings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from .features import Index, check_distinct
from .selectors import Selector
from .wire import STRICT, Wire

ANSWER = ConfigDict(extra="allow", frozen=True)
"""Answers keep fields that this client does not know: the server may be newer."""


@dataclass(frozen=True, config=STRICT)
class Inspect(Wire):
    """Report activations of `sae` at its layer, before this layer's edits (`after`: after them).

    `features` are always reported, 0 included; `top_k` adds the largest non-zero ones by |activation|.
    `tokens` as in `selectors`; position 0 is omitted unless `include_bos`.
    """

    sae: Annotated[str, Field(min_length=1)]
    top_k: Index | None = Field(default=None, kw_only=True)
    features: Sequence[Index] | None = Field(default=None, kw_only=True)
    tokens: Selector | None = Field(default=None, kw_only=True)
    include_bos: bool | None = Field(default=None, kw_only=True)
    after: bool | None = Field(default=None, kw_only=True)

    @model_validator(mode="after")
    def _features_are_distinct(self) -> Inspect:
        check_distinct(list(self.features or ()), "feature")
        return self


class FeatureReading(BaseModel):
    """One feature at one token."""

    model_config = ANSWER
    index: int
    activation: float
    label: str | None = None


class TokenRules(BaseModel):
    """What held at one token in one rule set: propositions with their scores (None: not known), and conclusions."""

    model_config = ANSWER
    propositions: dict[str, float | None]
    conclusions: list[str]


class TokenReading(BaseModel):
    """What the SAE saw at one absolute position; `phase` is ``"prompt"`` or ``"generated"``.

    `rules` comes with a request that has rules: what held here, by id of the rule set.
    """

    model_config = ANSWER
    position: int
    token: str
    token_id: int
    phase: str
    features: list[FeatureReading]
    rules: dict[str, TokenRules] | None = None

    def activation(self, index: int) -> float | None:
        """The activation of feature `index` here, None when it was not reported."""
        return next((feature.activation for feature in self.features if feature.index == index), None)


class Inspection(BaseModel):
    """The readings of one SAE over the selected tokens, by position."""

    model_config = ANSWER
    sae: str
    tokens: list[TokenReading]
