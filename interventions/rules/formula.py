"""What a rule's body is made of once names are resolved: atoms of evidence, and ``not``, ``and``, ``or``, ``xor``.

Truth is Kleene's: an atom over the ``prompt`` scope is *undecided* until the last prompt token, and then neither it nor its
negation holds. A formula holds where it is true; ``not x`` where x is false, not merely undecided. Everything else is
decided at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

PPM = 1_000_000
"""Shares are whole parts per million, so that they compare exactly."""


@dataclass(frozen=True)
class Holds:
    """A proposition at this token; ``name`` as declared, or the text of an inline one."""

    name: str

    @property
    def text(self) -> str:
        return self.name


@dataclass(frozen=True)
class Concluded:
    """A conclusion at this token."""

    name: str

    @property
    def text(self) -> str:
        return self.name


@dataclass(frozen=True)
class PromptEnded:
    """From the last prompt token on."""

    @property
    def text(self) -> str:
        return "prompt_ended"


@dataclass(frozen=True)
class Evidence:
    """How often ``inner`` (over propositions) held in a scope: at least ``least`` times, or ``share`` ppm of its tokens.

    ``seen``: this token and all before it. ``last``: the last ``window`` tokens, this one included. ``prompt``: all
    prompt tokens. Position 0 is in none of them. Exactly one of ``least`` and ``share`` is not 0.
    """

    scope: Literal["seen", "prompt", "last"]
    inner: Formula
    least: int = 1
    share: int = 0
    window: int = 0

    @property
    def text(self) -> str:
        inside = to_text(self.inner)
        scoped = f"last({self.window}, {inside})" if self.scope == "last" else f"{self.scope}({inside})"
        if self.share:
            return f"at least {percent(self.share)} % of {scoped}"
        return scoped if self.least == 1 else f"at least {self.least} of {scoped}"


@dataclass(frozen=True)
class Ordered:
    """``parts`` (over propositions) held at strictly increasing positions, in this order; ``seen`` or in the ``prompt``."""

    scope: Literal["seen", "prompt"]
    parts: tuple[Formula, ...]

    @property
    def text(self) -> str:
        chain = " before ".join(to_text(part, 5) for part in self.parts)
        return f"prompt({chain})" if self.scope == "prompt" else f"seen({chain})"


Atom = Holds | Concluded | PromptEnded | Evidence | Ordered


@dataclass(frozen=True)
class Not:
    """Negation."""

    part: Formula


@dataclass(frozen=True)
class And:
    """Conjunction."""

    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Or:
    """Disjunction."""

    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Xor:
    """An odd number of ``parts``."""

    parts: tuple[Formula, ...]


Formula = Atom | Not | And | Or | Xor


def percent(share: int) -> str:
    """A share in ppm as percent: 200000 is ``20``."""
    return f"{share / 10_000:.4f}".rstrip("0").rstrip(".")


def atom_key(atom: Atom) -> tuple[str, str]:
    """The order in which atoms are written."""
    return atom.text, type(atom).__name__


def atoms(formula: Formula) -> Iterator[Atom]:
    """Every atom of a formula, as often as it is written (not those inside evidence)."""
    if isinstance(formula, Not):
        yield from atoms(formula.part)
    elif isinstance(formula, (And, Or, Xor)):
        for part in formula.parts:
            yield from atoms(part)
    else:
        yield formula


def held_names(formula: Formula) -> Iterator[str]:
    """The propositions that a formula looks at, inside evidence too."""
    for atom in atoms(formula):
        if isinstance(atom, Holds):
            yield atom.name
        elif isinstance(atom, Evidence):
            yield from held_names(atom.inner)
        elif isinstance(atom, Ordered):
            for part in atom.parts:
                yield from held_names(part)


def nodes(formula: Formula) -> int:
    """How many names and operators the written formula has."""
    if isinstance(formula, Not):
        return 1 + nodes(formula.part)
    if isinstance(formula, (And, Or, Xor)):
        return 1 + sum(map(nodes, formula.parts))
    if isinstance(formula, Evidence):
        return 1 + nodes(formula.inner)
    return 2 + sum(map(nodes, formula.parts)) if isinstance(formula, Ordered) else 1


class Bits(Protocol):
    """Truth values that combine with ``&`` and ``|``: bool, an int as a bit set, a bool array."""

    def __and__(self, other: Any, /) -> Self: ...
    def __or__(self, other: Any, /) -> Self: ...


B = TypeVar("B", bound=Bits)


def truth(formula: Formula, value: Callable[[Atom], tuple[B, B]]) -> tuple[B, B]:
    """``(true, false)`` of a formula, given both for every atom; neither means undecided."""
    if isinstance(formula, Not):
        yes, no = truth(formula.part, value)
        return no, yes
    if not isinstance(formula, (And, Or, Xor)):
        return value(formula)
    yes, no = truth(formula.parts[0], value)
    for part in formula.parts[1:]:
        also, nor = truth(part, value)
        if isinstance(formula, And):
            yes, no = yes & also, no | nor
        elif isinstance(formula, Or):
            yes, no = yes | also, no & nor
        else:
            yes, no = (yes & nor) | (no & also), (yes & also) | (no & nor)
    return yes, no


_LEVEL = {Or: 1, Xor: 2, And: 3}
_WORD = {Or: " or ", Xor: " xor ", And: " and "}


def to_text(formula: Formula, above: int = 0) -> str:
    """The text form; in parentheses where an operator of precedence ``above`` would take it apart."""
    if isinstance(formula, Not):
        words = f"not {to_text(formula.part, 4)}"
        return f"({words})" if above > 4 else words
    if isinstance(formula, (And, Or, Xor)):
        level = _LEVEL[type(formula)]
        words = _WORD[type(formula)].join(to_text(part, level + 1) for part in formula.parts)
        return f"({words})" if level < above else words
    return formula.text


def polarities(formula: Formula) -> tuple[tuple[Atom, bool], ...]:
    """The distinct atoms of a formula with whether they stand positive; under ``xor`` both."""
    if isinstance(formula, Not):
        return tuple((atom, not positive) for atom, positive in polarities(formula.part))
    if not isinstance(formula, (And, Or, Xor)):
        return ((formula, True),)
    found = dict.fromkeys(pair for part in formula.parts for pair in polarities(part))
    if isinstance(formula, Xor):
        found |= {(atom, not positive): None for atom, positive in found}
    return tuple(found)
