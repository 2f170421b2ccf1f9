"""One form for formulas of one meaning.

Up to :data:`EXACT` distinct atoms the meaning is decided by truth table, and the shortest of three canonical forms is taken
(:mod:`interventions.rules.boolean`). Larger formulas are only tidied: negations at the atoms, flat, sorted, without
repetitions; then two spellings of one meaning may stay two. Atoms are taken to be independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from interventions.rules.boolean import (
    Term,
    full,
    polarity,
    polynomial,
    prime_implicants,
    prime_implicates,
    support,
    variable,
)
from interventions.rules.formula import And, Atom, Formula, Not, Or, PromptEnded, Xor, atom_key, atoms, to_text, truth

EXACT = 8
"""Most atoms (the end of the prompt among them) of a formula whose meaning is decided exactly."""

ENDED = PromptEnded()
Closed = Callable[[Atom], bool]


def canonical(formula: Formula, closed: Closed) -> Formula | bool:
    """The canonical form, or the truth value of a formula that does not depend on any evidence.

    ``closed`` tells which atoms are undecided until the last prompt token.
    """
    names = _variables(formula, closed)
    if len(names) > EXACT:
        tidied = _tidy(formula, closed)
        if isinstance(tidied, bool):
            return tidied
        formula, names = tidied, _variables(tidied, closed)
        if len(names) > EXACT:
            return formula
    n = len(names)
    everything = full(n)
    table = truth(formula, _assignment(names, closed))[0]
    if table in (0, everything):
        return table == everything
    needed = support(table, n)
    terms = _build(prime_implicants(table, n), names, closed, Or, And)
    if any(closed(names[i]) or names[i] == ENDED for i in needed):
        return terms
    forms = [terms, _build(prime_implicates(table, n), names, closed, And, Or)]
    if all(all(polarity(table, i, n)) for i in needed):
        monomials = polynomial(table, n)
        parts = [_join([names[i] for i in monomial], And) for monomial in monomials if monomial]
        odd = _join(parts, Xor)
        forms.append(Not(odd) if () in monomials else odd)
    return min(forms, key=lambda form: sum(1 for _ in atoms(form)))


def alternatives(formula: Formula) -> list[Formula]:
    """The prime implicants of a formula without closed atoms, each as a formula; the formula alone when it is too large."""
    names = _variables(formula, lambda _: False)
    if len(names) > EXACT:
        return [formula]
    table = truth(formula, _assignment(names, lambda _: False))[0]
    return [_term(term, names, And) for term in prime_implicants(table, len(names))]


def _variables(formula: Formula, closed: Closed) -> list[Atom]:
    found = set(atoms(formula))
    if any(map(closed, found)):
        found.add(ENDED)
    return sorted(found, key=atom_key)


def _assignment(names: Sequence[Atom], closed: Closed) -> Callable[[Atom], tuple[int, int]]:
    n = len(names)
    everything = full(n)
    at = {atom: variable(i, n) for i, atom in enumerate(names)}
    ended = at.get(ENDED, 0)

    def value(atom: Atom) -> tuple[int, int]:
        known = ended if closed(atom) else everything
        return known & at[atom], known & ~at[atom]

    return value


def _join(parts: Sequence[Formula], kind: type[And] | type[Or] | type[Xor]) -> Formula:
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def _term(term: Term, names: Sequence[Atom], kind: type[And] | type[Or]) -> Formula:
    return _join([names[i] if positive else Not(names[i]) for i, positive in term], kind)


def _build(
    terms: Sequence[Term],
    names: Sequence[Atom],
    closed: Closed,
    outer: type[And] | type[Or],
    inner: type[And] | type[Or],
) -> Formula:
    parts = []
    for term in terms:
        kept = term
        if any(closed(names[i]) for i, _ in term):  # waiting for the end of the prompt goes without saying
            kept = tuple((i, positive) for i, positive in term if names[i] != ENDED)
        parts.append(_term(kept, names, inner))
    return _join(parts, outer)


# larger formulas -----------------------------------------------------------------------------------------------------


def _tidy(formula: Formula, closed: Closed, negate: bool = False) -> Formula | bool:
    if isinstance(formula, Not):
        return _tidy(formula.part, closed, not negate)
    if isinstance(formula, Xor):
        return _tidy_xor(formula, closed, negate)
    if not isinstance(formula, (And, Or)):
        return Not(formula) if negate else formula
    kind: type[And] | type[Or] = Or if isinstance(formula, And) == negate else And
    absorbing = kind is Or
    parts: set[Formula] = set()
    for part in formula.parts:
        tidied = _tidy(part, closed, negate)
        if isinstance(tidied, bool):
            if tidied == absorbing:
                return absorbing
        elif isinstance(tidied, kind):
            parts |= set(tidied.parts)
        else:
            parts.add(tidied)
    for part in parts:
        if isinstance(part, Not) and part.part in parts:
            if kind is And:
                return False
            if not any(map(closed, atoms(part))):
                return True
    if not parts:
        return not absorbing
    return _join(sorted(parts, key=_order), kind)


def _tidy_xor(formula: Xor, closed: Closed, negate: bool) -> Formula | bool:
    parts: set[Formula] = set()
    kept: list[Formula] = []
    waiting = [_tidy(part, closed) for part in formula.parts]
    while waiting:
        tidied = waiting.pop()
        if isinstance(tidied, bool):
            negate ^= tidied
            continue
        if isinstance(tidied, Not):
            negate, tidied = not negate, tidied.part
        if isinstance(tidied, Xor):
            waiting += tidied.parts
        elif any(map(closed, atoms(tidied))):
            kept.append(tidied)
        else:
            parts ^= {tidied}
    kept += parts
    if not kept:
        return negate
    odd = _join(sorted(kept, key=_order), Xor)
    return Not(odd) if negate else odd


def _order(formula: Formula) -> tuple[str, str]:
    return to_text(formula), type(formula).__name__
