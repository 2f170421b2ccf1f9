"""What the report of a fit says of a detector, from figures alone."""

from __future__ import annotations

from editserver.api.concept_detector import _doubt
from interventions.concepts.agreement import Outcomes


def outcomes(right: int, of: int) -> Outcomes:
    """So many of ``of`` texts of each class decided rightly."""
    decided = [i < right for i in range(of)] + [i >= right for i in range(of)]
    return Outcomes.of_texts(decided, [True] * of + [False] * of)


def test_a_detector_that_chance_could_be_is_doubted_at_the_level_of_its_labels() -> None:
    said = _doubt("text", {"text": (outcomes(12, 20), None)}, "held-out texts")
    assert said is not None
    assert said.startswith("Of texts the detector may be no better than chance: balanced accuracy 0.600 (")
    assert said.endswith(") on held-out texts.")
    assert _doubt("text", {"text": (outcomes(19, 20), None)}, "held-out texts") is None
    assert _doubt("token", {"text": (outcomes(12, 20), None)}, "held-out texts") is None
