"""Edits of one SAE feature, a = its activation (0 when off). Results are not rectified: negatives are allowed.

Index twice in one list is an error. `only_if_active` acts only where a ≠ 0.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .wire import STRICT, Wire

Index = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class SetFeature(Wire):
    """a' = value."""

    index: Index
    value: float
    only_if_active: bool | None = Field(default=None, kw_only=True)
    op: Literal["set"] = Field(default="set", kw_only=True)


@dataclass(frozen=True, config=STRICT)
class ScaleFeature(Wire):
    """a' = value · a."""

    index: Index
    value: float
    only_if_active: bool | None = Field(default=None, kw_only=True)
    op: Literal["scale"] = Field(default="scale", kw_only=True)


@dataclass(frozen=True, config=STRICT)
class AddFeature(Wire):
    """a' = a + value."""

    index: Index
    value: float
    only_if_active: bool | None = Field(default=None, kw_only=True)
    op: Literal["add"] = Field(default="add", kw_only=True)


@dataclass(frozen=True, config=STRICT)
class ClampFeature(Wire):
    """a' = min(max(a, min), max); at least one bound. `min` > 0 wakes inactive latents."""

    index: Index
    min: float | None = Field(default=None, kw_only=True)
    max: float | None = Field(default=None, kw_only=True)
    only_if_active: bool | None = Field(default=None, kw_only=True)
    op: Literal["clamp"] = Field(default="clamp", kw_only=True)

    @model_validator(mode="after")
    def _has_ordered_bounds(self) -> ClampFeature:
        check_bounds(self.min, self.max)
        return self


@dataclass(frozen=True, config=STRICT)
class AblateFeature(Wire):
    """a' = 0."""

    index: Index
    only_if_active: bool | None = Field(default=None, kw_only=True)
    op: Literal["ablate"] = Field(default="ablate", kw_only=True)


FeatureEdit = Annotated[
    SetFeature | ScaleFeature | AddFeature | ClampFeature | AblateFeature, Field(discriminator="op")
]


def check_bounds(low: float | None, high: float | None) -> None:
    """Raise ValueError unless at least one bound is given and low ≤ high."""
    if low is None and high is None:
        raise ValueError("give at least one of min and max")
    if low is not None and high is not None and low > high:
        raise ValueError(f"min {low} is above max {high}")


def check_distinct(indices: list[int], what: str) -> None:
    """Raise ValueError naming the first number that occurs twice."""
    seen: set[int] = set()
    for index in indices:
        if index in seen:
            raise ValueError(f"{what} {index} occurs twice")
        seen.add(index)
