"""A rule set in its normal form: what the evaluators and the engine's compiler read, and how it is written back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from interventions.rules.errors import NOWHERE, Place
from interventions.rules.formula import (
    And,
    Evidence,
    Formula,
    Not,
    Or,
    Ordered,
    PromptEnded,
    Xor,
    percent,
    to_text,
)
from interventions.rules.proposition import Proposition

VERSION = 1
"""Part of every digest. Raise it when the same rule set would conclude something else."""


@dataclass(frozen=True)
class Rule:
    """Where ``body`` holds, ``head`` is concluded; with ``latch`` it then holds at every later token."""

    label: str
    body: Formula
    head: str
    latch: bool = False
    place: Place = field(default=NOWHERE, compare=False)

    @property
    def text(self) -> str:
        """As it is written; an implication never is at the top of a body."""
        return f"rule {self.label}: {to_text(self.body)} -> {'latch ' if self.latch else ''}{self.head}"


@dataclass(frozen=True)
class Action:
    """What happens at the tokens where ``conclusion`` holds.

    Attributes:
        conclusion: the conclusion that triggers it.
        kind: ``do`` an intervention, ``refuse`` with a message, ``flag`` (report only), ``log``.
        payload: the intervention's object or the message, as canonical JSON; empty for flag and log.
        tokens: 1 for a token where the conclusion holds, k for that token and k − 1 more, ``None`` for it and all later ones.
    """

    conclusion: str
    kind: Literal["do", "refuse", "flag", "log"]
    payload: str = ""
    tokens: int | None = 1
    place: Place = field(default=NOWHERE, compare=False)

    @property
    def sticks(self) -> bool:
        """Whether one firing has its effect for good."""
        return self.tokens is None

    @property
    def text(self) -> str:
        """As it is written."""
        words = f"on {self.conclusion}: {self.kind}"
        if self.payload:
            words += f" {self.payload}"
        if self.kind != "do" or self.tokens == 1:
            return words
        return words + (" from now on" if self.tokens is None else f" for {self.tokens} tokens")

    def as_json(self) -> dict[str, Any]:
        """The JSON form of :attr:`text`."""
        found: dict[str, Any] = {"on": self.conclusion}
        found[self.kind] = json.loads(self.payload) if self.payload else True
        if self.kind == "do" and self.tokens != 1:
            found["tokens"] = "from now on" if self.tokens is None else self.tokens
        return found


@dataclass(frozen=True)
class Ruleset:
    """Propositions, rules and actions that passed every check and are written in one way.

    Attributes:
        propositions: name → proposition, sorted; an inline one is named by its own text.
        rules: in order of their labels.
        actions: in the order given, which is the order in which their effects compose.
        closed: conclusions that are decided at the last prompt token.
        strata: conclusions in groups; a group's negations are about earlier groups only.
        given: conclusions of other rule sets that bodies name → whether they are decided at the last prompt token.
    """

    propositions: Mapping[str, Proposition]
    rules: tuple[Rule, ...]
    actions: tuple[Action, ...]
    closed: frozenset[str] = field(default=frozenset(), compare=False)
    strata: tuple[tuple[str, ...], ...] = field(default=(), compare=False)
    given: Mapping[str, bool] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("propositions", "given"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def waits(self, conclusion: str) -> bool:
        """Whether a conclusion, own or given, is undecided until the last prompt token."""
        return conclusion in self.closed or self.given.get(conclusion, False)

    @property
    def declared(self) -> dict[str, Proposition]:
        """The propositions that have a name of their own."""
        return {name: found for name, found in self.propositions.items() if name != found.text}

    @property
    def latching(self) -> frozenset[str]:
        """Conclusions that hold for good once concluded."""
        return frozenset(rule.head for rule in self.rules if rule.latch)

    def reads(self) -> tuple[tuple[str, int], ...]:
        """``(SAE id, feature)`` of every activation needed, sorted."""
        return tuple(sorted({read for found in self.propositions.values() for read in found.reads()}))

    @property
    def text(self) -> str:
        """The normal form as text; reading it gives the same rule set."""
        lines = [f"proposition {name} = {found.text}" for name, found in self.declared.items()]
        lines += [rule.text for rule in self.rules]
        lines += [action.text for action in self.actions]
        return "".join(line + "\n" for line in lines)

    def as_json(self) -> dict[str, Any]:
        """The normal form as JSON; reading it gives the same rule set."""
        rules = []
        for rule in self.rules:
            latch = {"latch": True} if rule.latch else {}
            rules.append({"label": rule.label, "if": self._json(rule.body), "then": rule.head, **latch})
        return {
            "propositions": {name: found.as_json() for name, found in self.declared.items()},
            "rules": rules,
            "actions": [action.as_json() for action in self.actions],
        }

    @property
    def digest(self) -> str:
        """sha256 (hex) of the normal form: equal for rule sets that conclude, report and do the same."""
        return hashlib.sha256(f"rules {VERSION}\n{self.text}".encode()).hexdigest()

    def _json(self, formula: Formula) -> Any:
        if isinstance(formula, Not):
            return {"not": self._json(formula.part)}
        if isinstance(formula, (And, Or, Xor)):
            return {type(formula).__name__.lower(): [self._json(part) for part in formula.parts]}
        if isinstance(formula, PromptEnded):
            return {"prompt_ended": True}
        if isinstance(formula, Ordered):
            return {formula.scope: {"before": [self._json(part) for part in formula.parts]}}
        if isinstance(formula, Evidence):
            scoped: dict[str, Any] = {formula.scope: self._json(formula.inner)}
            if formula.window:
                scoped["tokens"] = formula.window
            if formula.share:
                return {"at_least_percent": float(percent(formula.share)), "of": scoped}
            return scoped if formula.least == 1 else {"at_least": formula.least, "of": scoped}
        found = self.propositions.get(formula.name)
        return found.as_json() if found is not None and found.text == formula.name else formula.name
