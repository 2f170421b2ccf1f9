"""Rules over features: the intervention that runs them, and what they told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic.dataclasses import dataclass

from .inspection import ANSWER
from .wire import STRICT, Wire

Name = Annotated[str, Field(min_length=1)]
When = Annotated[str, Field(min_length=1)] | Mapping[str, Any]
"""A rule expression: its text, or the JSON form."""


@dataclass(frozen=True, config=STRICT)
class Rules(Wire):
    """Reason over features while the model runs, and act on what follows.

    The rule set is one of the library by name (`ruleset`), a `text`, or `propositions`, `rules` and `actions` in the JSON
    form. With `when`, every rule waits for that expression too. Rules look at every token but position 0: selectors
    belong into the interventions of their actions.
    """

    ruleset: Name | None = None
    text: str | None = Field(default=None, kw_only=True)
    propositions: Mapping[str, Any] | None = Field(default=None, kw_only=True)
    rules: Sequence[Mapping[str, Any]] | None = Field(default=None, kw_only=True)
    actions: Sequence[Mapping[str, Any]] | None = Field(default=None, kw_only=True)
    id: str | None = Field(default=None, kw_only=True)
    when: When | None = Field(default=None, kw_only=True)
    type: Literal["rules"] = Field(default="rules", kw_only=True)

    @model_validator(mode="after")
    def _one_form(self) -> Rules:
        inline = any(part is not None for part in (self.propositions, self.rules, self.actions))
        if (self.ruleset is not None) + (self.text is not None) + inline != 1:
            raise ValueError("give exactly one of ruleset, text, and propositions, rules and actions")
        return self


RulesetLike = str | Mapping[str, Any] | Rules
"""A rule set: its text, its JSON form, or a `Rules` that has either."""


def ruleset_body(given: RulesetLike) -> dict[str, Any]:
    """The JSON body of a rule set for the library and the check.

    Raises:
        TypeError: a `Rules` that is more than a rule set: the name of one, or one under a `when`.
    """
    if isinstance(given, str):
        return {"text": given}
    if not isinstance(given, Rules):
        return dict(given)
    if given.ruleset is not None or given.when is not None or given.id is not None:
        raise TypeError("expected a rule set itself: a Rules with text, or with propositions, rules and actions, alone")
    return {name: value for name, value in given.to_dict().items() if name != "type"}


class NormalForm(BaseModel):
    """A rule set as the server reads it, written in one way: equal meaning, equal `digest`.

    `propositions` has each one's text by name (an inline one is named by its text).
    """

    model_config = ANSWER
    text: str
    json_form: dict[str, Any] = Field(alias="json")
    digest: str
    propositions: dict[str, str]
    conclusions: list[str]
    rules: list[str]
    actions: list[str]


class Reason(BaseModel):
    """One part of why a rule's body held: a piece of `evidence`, or a premise: a `conclusion` with its own proof.

    Evidence was found at `count` tokens; the first of them are `positions`, with the score of each proposition in it
    there (None: not known, the token came from the cache). A premise that was shown before has no `because`.
    """

    model_config = ANSWER
    evidence: str | None = None
    count: int | None = None
    positions: list[int] = []
    scores: dict[str, list[float | None]] = {}
    conclusion: str | None = None
    rule: str | None = None
    position: int | None = None
    because: list[Reason] | None = None


class Proof(BaseModel):
    """`rule` concluded, `because` of these."""

    model_config = ANSWER
    rule: str
    because: list[Reason]


class Firing(BaseModel):
    """`rule` made `conclusion` hold from `position` on (for one token or more)."""

    model_config = ANSWER
    rule: str
    conclusion: str
    position: int
    proof: Proof | None = None

    def explain(self) -> str:
        """The proof as indented lines."""
        head = f"{self.conclusion} at token {self.position}, by rule {self.rule}"
        return "\n".join([head, *(_lines(self.proof.because, 1) if self.proof else ())])


def _lines(because: Sequence[Reason], depth: int) -> Iterator[str]:
    for reason in because:
        if reason.evidence is not None:
            at = f" at {', '.join(map(str, reason.positions))}" if reason.positions else ""
            yield "  " * depth + reason.evidence + at + (" …" if (reason.count or 0) > len(reason.positions) else "")
        else:
            by = f" at token {reason.position}, by rule {reason.rule}" if reason.rule else ""
            yield "  " * depth + f"{reason.conclusion}{by}"
            yield from _lines(reason.because or (), depth + 1)


class PropositionFacts(BaseModel):
    """A proposition that held at `count` tokens; the first `positions` with their `scores`."""

    model_config = ANSWER
    name: str
    count: int
    positions: list[int]
    scores: list[float | None]


class ActionFacts(BaseModel):
    """What was done `on` a conclusion: `do` is flag, log, refuse, or the type of an intervention.

    First at `position`; it was active at `tokens` tokens.
    """

    model_config = ANSWER
    on: str
    do: str
    position: int
    tokens: int


class WhenFacts(BaseModel):
    """Where a `when` held: first at `open_from` (None: nowhere), at `tokens` tokens in all."""

    model_config = ANSWER
    open_from: int | None
    tokens: int
