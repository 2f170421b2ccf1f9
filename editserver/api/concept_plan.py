"""What a fit of a concept works with: the plan, and the texts as they pass through the served engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from editserver.api.concept_labels import Labelling, TokenLabels
from editserver.api.evidence import Seen
from editserver.api.passes import Passes, Prompt, run
from editserver.api.state import EditState
from editserver.catalogue import ServedSAE
from editserver.library import ConceptLibrary
from interventions.concepts.concept import Concept, Method
from interventions.concepts.detection import Recipe
from interventions.concepts.fitting import Choice
from interventions.concepts.labelled import Floats, Ints
from interventions.errors import InterventionError

UNLABELLED = "unlabelled"
"""Class of the tokens of the target's texts that no label names, where labels are of tokens."""
LOW_PRIORITY = 1000
"""Of a job's passes, where the server schedules by priority: requests have 0 and go first."""

_CAPACITY_WAIT_S = 1.0
_CAPACITY_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Examples:
    """The texts of a fit.

    Attributes:
        classes: names, in the order given.
        prompts, labels: each text and the index of its class.
        held_out: which texts are kept from the fit, for the report.
        tokens: labels of the tokens of each text of the target from position 1 on, where labels are of tokens; else ``None``.
    """

    classes: tuple[str, ...]
    prompts: Sequence[Prompt]
    labels: Sequence[int]
    held_out: Sequence[bool]
    tokens: Sequence[TokenLabels | None]

    def indices(self, held_out: bool) -> list[int]:
        """Of the texts that are, or are not, held out."""
        return [i for i, held in enumerate(self.held_out) if held == held_out]


@dataclass(frozen=True)
class Plan:
    """Everything that a fit needs, validated.

    Attributes:
        name: in the library.
        sae: in whose latents the concept is fitted.
        readout: the dictionary whose view of the edited text the report's probe takes, and whether it must read after the edit
            (it is ``sae`` itself) rather than at a later layer.
        strengths: of method app, for the report.
        labelling: what the labels are of.
        recipe: of the detector; ``None`` for none.
        fitted_on: provenance.
    """

    name: str
    sae: ServedSAE
    readout: tuple[ServedSAE, bool]
    examples: Examples
    choice: Choice
    strengths: tuple[float, ...]
    labelling: Labelling
    recipe: Recipe | None
    fitted_on: Mapping[str, Any]

    @property
    def token_classes(self) -> tuple[str, ...]:
        """Classes of tokens: those of texts, and of the unlabelled ones where labels are of tokens."""
        return (*self.examples.classes, UNLABELLED) if self.labelling.by_token else self.examples.classes

    @property
    def methods(self) -> list[tuple[Method, float]]:
        """(method, strength) of every point of the report; none where texts of one class leave nothing to tell apart."""
        if len(self.examples.classes) < 2:
            return []
        app: list[tuple[Method, float]] = [("app", strength) for strength in self.strengths]
        return [*app, ("attenuate", 0.5), ("range", 1.0), ("mask", 1.0)]

    @property
    def total(self) -> int:
        """Forward passes of one text."""
        held_out = sum(self.examples.held_out)
        return len(self.examples.prompts) + held_out * len(self.methods)


@dataclass(frozen=True)
class Evidence:
    """What the plain pass over one text brought.

    Attributes:
        seen: in the latents of the concept's dictionary.
        readout: in those of the readout's.
        logprobs: of the prompt's tokens, of held-out texts.
        stream: the residual stream at the concept's layer, for the dense baseline.
    """

    seen: Seen
    readout: Seen
    logprobs: npt.NDArray[np.float64] | None
    stream: Stream | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream of one text.

    Attributes:
        mean: float32 ``[d]``, over the tokens of ordinary norm.
        at: int64 ``[r]``, the tokens that are kept; token 0 is position 1.
        rows: float32 ``[r, d]``.
    """

    mean: Floats
    at: Ints
    rows: Floats


@dataclass
class Readings:
    """All plain passes, and which tokens count."""

    texts: list[Evidence]
    kept: list[npt.NDArray[np.bool_]] = field(default_factory=list)


class _Only:
    """A library that has one concept, under every name."""

    def __init__(self, concept: Concept) -> None:
        self._concept = concept

    def get(self, name: str) -> Concept:
        return self._concept


def trying(state: EditState, concept: Concept) -> EditState:
    """The same server, in whose library every name stands for ``concept``: it is measured before it is stored."""
    catalogue = replace(state.catalogue, concepts=cast(ConceptLibrary, _Only(concept)))
    return replace(state, catalogue=catalogue)


async def patient_pass(state: EditState, prompt: Prompt, *fields: Any, **options: Any) -> Passes:
    """One text through the engine; waits where the bank is full of requests' rows, which go first."""
    waited = 0.0
    while True:
        try:
            return await run(state, [prompt], *fields, priority=LOW_PRIORITY, **options)
        except InterventionError as error:
            if error.code != "capacity" or waited >= _CAPACITY_PATIENCE_S:
                raise
        await asyncio.sleep(_CAPACITY_WAIT_S)
        waited += _CAPACITY_WAIT_S
