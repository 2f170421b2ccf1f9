"""What the study runs: sizes, layers, detectors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

EVIDENCE_LAYER, EFFECT_LAYER = 15, 20
"""Where concepts are read, and where a conclusion steers: an effect never comes before its evidence."""
STRENGTH = 0.5
"""‖Δh‖/‖h‖ of one conclusion, the published α."""
HOPS = (1, 3, 5)
WINDOW = 8
"""Tokens within which a category's name follows that of the individual who is said to belong to it."""

How = Literal["single", "multi", "relation", "weighted"]
DETECTORS: dict[How, str] = {
    "single": "one latent",
    "multi": "10 latents, log-decay weights",
    "relation": "tree over 10 latents",
    "weighted": "64 latents, fitted weights",
}
MAIN: How = "weighted"


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        fit: labelled passages that detectors are fitted to, of each set of names.
        fit_trains: labelled trains that colours are fitted to, of each kind of hint.
        calibrate: questions of the training templates on which the ways to steer are compared, of each number of hops.
        questions: test questions of each number of hops, with the names that were made for this study.
        published_names: the same with the names of PrOntoQA.
        thoughts: of the test questions, how many are answered by chain of thought.
        thought_tokens: tokens of such an answer at most.
        trains: test items of each wagon set.
        chats: texts of each class of the toxicity set.
        chat_tokens: of which so many tokens are read.
    """

    fit: int = 60
    fit_trains: int = 100
    calibrate: int = 6
    questions: int = 80
    published_names: int = 40
    thoughts: int = 16
    thought_tokens: int = 80
    trains: int = 56
    chats: int = 120
    chat_tokens: int = 40

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


FULL = Sizes()
QUICK = Sizes(30, 40, 3, 6, 4, 2, 24, 12, 40, 32)
