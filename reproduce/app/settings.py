"""What the study runs: sizes, and the edits at each layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from interventions.concepts.concept import Method
from interventions.concepts.salient import By

MAIN_LAYER = 15
SIDE_LAYERS = (10, 20)
SUFFIX = "\nTopic:"
"""What follows every labelled text; the next token is read."""
WINDOW = 64
"""Tokens of a piece of neutral text."""


@dataclass(frozen=True)
class Trial:
    """One edit: a method at one strength on the latents of one selection.

    Attributes:
        strength: λ of app and attenuate.
        tau: of range.
        top: how many latents.
        by: how they are chosen; by "mean" dense ones stay in, as published.
    """

    method: Method
    strength: float = 1.0
    tau: float = math.inf
    top: int = 50
    by: By = "difference"

    @property
    def label(self) -> str:
        """Method and setting."""
        return {
            "app": f"app λ={self.strength:g}",
            "attenuate": f"attenuate λ={self.strength:g}",
            "range": f"range τ={self.tau:g}",
            "mask": "mask" if self.top == 50 else f"mask, top {self.top}",
        }[self.method]


MASK, RANGE_2, APP_1 = Trial("mask"), Trial("range", tau=2.0), Trial("app")
DEFAULTS = (MASK, RANGE_2, APP_1)
"""Each method as published, in the order of the published claim, the dearest first."""

MAIN = (
    Trial("mask", top=10),
    Trial("mask", top=25),
    MASK,
    Trial("range", tau=1.0),
    RANGE_2,
    Trial("range", tau=3.0),
    *(Trial("attenuate", λ) for λ in (0.25, 0.5, 1.5, 2.0, 4.0)),
    *(Trial("app", λ) for λ in (0.5, 1.0, 2.0, 3.0, 4.0)),
)
"""Attenuation by 1 and the range mask with τ = ∞ are the mask, which runs once."""
BY_MEAN = (
    Trial("mask", by="mean"),
    Trial("range", tau=2.0, by="mean"),
    Trial("app", by="mean"),
)
SIDE = (MASK, RANGE_2, APP_1, Trial("app", 2.0), Trial("app", 4.0))


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        fit: texts of each class that concepts and probes are fitted on.
        target, others: held-out texts of the target class, and of each other class.
        tokens: of a text, at most; shorter than two thirds of it are not used.
        background, neutral: pieces of neutral text for the background class, and for perplexity.
        seeds: how many; each draws its own texts, and the target class goes round with it.
        sets: how many of the labelled sets.
        side: whether the first set is edited at the side layers as well.
    """

    fit: int = 60
    target: int = 32
    others: int = 8
    tokens: int = 32
    background: int = 24
    neutral: int = 8
    seeds: int = 5
    sets: int = 3
    side: bool = True
    dtype: str = "bfloat16"

    def trials(self, layer: int) -> tuple[Trial, ...]:
        """The edits at a layer."""
        return MAIN + BY_MEAN if layer == MAIN_LAYER else SIDE

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


FULL = Settings()
QUICK = Settings(fit=24, target=12, others=4, background=12, neutral=4, seeds=1, sets=1, side=False)
