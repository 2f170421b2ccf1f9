"""What was written, before any name is resolved: the tree that the text form and the JSON form share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from interventions.rules.errors import Place, RuleError
from interventions.rules.proposition import Proposition

MAX_CHARACTERS = 262_144
"""Longest text of a rule set, as written and in the normal form."""

MAX_DEPTH = 64
"""Deepest nesting of an expression."""

Operator = Literal["and", "or", "xor", "implies"]


@dataclass(frozen=True)
class Name:
    """A proposition, a concept of the library or a conclusion, by name."""

    place: Place
    name: str
    depth: int = 1


@dataclass(frozen=True)
class Inline:
    """A proposition written where it is used; ``negated`` for ``<`` and ``<=``."""

    place: Place
    proposition: Proposition
    negated: bool = False
    depth: int = 1


@dataclass(frozen=True)
class Ended:
    """``prompt_ended``."""

    place: Place
    depth: int = 1


@dataclass(frozen=True)
class Negation:
    """``not part``."""

    place: Place
    part: Expression
    depth: int


@dataclass(frozen=True)
class Connective:
    """``a and b and …``; ``implies`` has two parts."""

    place: Place
    operator: Operator
    parts: tuple[Expression, ...]
    depth: int


@dataclass(frozen=True)
class Scope:
    """``seen(part)`` and its like; ``least`` times, or ``share`` ppm of the tokens in scope."""

    place: Place
    scope: Literal["token", "seen", "prompt", "last"]
    part: Expression
    depth: int
    window: int = 0
    least: int = 1
    share: int = 0


@dataclass(frozen=True)
class Chain:
    """``a before b before …``."""

    place: Place
    parts: tuple[Expression, ...]
    depth: int


Expression = Name | Inline | Ended | Negation | Connective | Scope | Chain


@dataclass(frozen=True)
class Declaration:
    """``proposition name = score >= threshold``."""

    place: Place
    name: str
    inline: Inline


@dataclass(frozen=True)
class Clause:
    """``rule label: body -> head``, for every value of its variables."""

    place: Place
    label: str
    body: Expression
    head: str
    head_place: Place
    latch: bool
    variables: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Deed:
    """``on conclusion: …``; ``tokens`` is 1 for a token, ``k`` for k tokens, ``None`` for all from now on."""

    place: Place
    conclusion: str
    kind: Literal["do", "refuse", "flag", "log"]
    payload: Any = None
    tokens: int | None = 1


Statement = Declaration | Clause | Deed


def depth_of(place: Place, *parts: Expression) -> int:
    """The depth of a node over ``parts``.

    Raises:
        RuleError: it is more than :data:`MAX_DEPTH`.
    """
    depth = 1 + max(part.depth for part in parts)
    if depth > MAX_DEPTH:
        raise RuleError(f"the expression is nested more than {MAX_DEPTH} deep", place)
    return depth


def located(expression: Expression, path: str) -> Expression:
    """The same expression, all of it in the text that is the field ``path``."""
    if not path:
        return expression
    place = replace(expression.place, path=path)
    if isinstance(expression, (Negation, Scope)):
        return replace(expression, place=place, part=located(expression.part, path))
    if isinstance(expression, (Connective, Chain)):
        return replace(expression, place=place, parts=tuple(located(part, path) for part in expression.parts))
    return replace(expression, place=place)
