"""Formulas of one meaning get one normal form, and the normal form means what was written."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.rules.boolean import full, polynomial, prime_implicants, prime_implicates, support, variable
from interventions.rules.canonical import canonical
from interventions.rules.formula import And, Evidence, Formula, Holds, Not, Or, PromptEnded, Xor, atoms, to_text, truth
from interventions.rules.reading import parse_ruleset

DECLARED = "".join(f"proposition {name} = feature(s, {i}) > 0\n" for i, name in enumerate("abdefghijk"))


def normal(body: str) -> str:
    return parse_ruleset(f"{DECLARED}rule r: {body} -> c").rules[0].text.removeprefix("rule r: ").removesuffix(" -> c")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a and b", "b and a and b"),
        ("not (a and b)", "not a or not b"),
        ("(a -> b)", "b or not a"),
        ("a or a and b", "a"),
        ("a and b or a and not b", "a"),
        ("(a xor b) xor b", "a"),
        ("a xor b", "(a or b) and not (a and b)"),
        ("a and (b or d)", "a and b or a and d"),
        ("not not a", "token(a)"),
        ("seen(a or b)", "seen(b) or seen(a)"),
        ("at least 1 of seen(a)", "seen(a)"),
        ("at least 50 % of last(4, a)", "at least 2 of last(4, a)"),
        ("last(1, a)", "a"),
        ("seen(not (a -> b))", "seen(not b and a)"),
        ("a before b", "seen(a before b)"),
        ("prompt(a) and (b or not b)", "prompt(a)"),
        ("prompt(a) and prompt_ended", "prompt(a)"),
        ("prompt(a) or not prompt(a)", "prompt_ended"),
        ("feature(s, 0) > 0", "a"),
        ("feature(s, 0) <= 0", "not a"),
        ("1 * feature(q, 1) + 2 * feature(q, 0) + feature(q, 1) > 1", "2 * feature(q, 0) + 2 * feature(q, 1) > 1.0"),
        ("tree(q, if 1 > 0 then (if 2 > 1 then 0.5 else 0.5) else 1) > 0", "tree(q, if 1 > 0.0 then .5 else 1) > 0"),
    ],
)
def test_equal_meanings_have_one_normal_form_and_digest(one: str, other: str) -> None:
    assert normal(one) == normal(other)
    first, second = (parse_ruleset(f"{DECLARED}rule r: {body} -> c") for body in (one, other))
    assert first.digest == second.digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "not a"),
        ("seen(a)", "prompt(a)"),
        ("seen(a and b)", "seen(a) and seen(b)"),
        ("a or prompt(b)", "a and prompt_ended or prompt(b)"),
        ("a and (prompt(b) or not prompt(b))", "a"),
        ("a before b", "b before a"),
        ("feature(s, 0) >= 0", "a"),
        ("at least 2 of seen(a)", "at least 2 of prompt(a)"),
        ("last(3, a)", "last(4, a)"),
    ],
)
def test_different_meanings_have_different_digests(one: str, other: str) -> None:
    first, second = (parse_ruleset(f"{DECLARED}rule r: {body} -> c") for body in (one, other))
    assert first.digest != second.digest


def test_precedence_is_not_and_xor_or_implies() -> None:
    assert normal("not a and b xor d or e") == normal("((((not a) and b) xor d) or e)")
    assert normal("(a -> b -> d)") == normal("(a -> (b -> d))")
    assert normal("not a before b") == normal("not (a before b)")


def test_a_long_formula_is_tidied_and_reads_back() -> None:
    body = "not (a and b and d and e and f) or (g xor h xor i xor j) and not (k or not a)"
    ruleset = parse_ruleset(f"{DECLARED}rule r: {body} -> c")
    assert parse_ruleset(ruleset.text) == ruleset
    shuffled = "not (k or not a) and (j xor h xor not i xor not g) or not (f and e and d and b and a)"
    assert normal(body) == normal(shuffled)


ATOMS = [Holds(name) for name in "abde"] + [Evidence("prompt", Holds("a")), Evidence("prompt", Holds("b"))]


def formulas(names: list) -> st.SearchStrategy[Formula]:
    def grow(inner: st.SearchStrategy[Formula]) -> st.SearchStrategy[Formula]:
        parts = st.lists(inner, min_size=2, max_size=3).map(tuple)
        return st.one_of(st.builds(Not, inner), *(st.builds(kind, parts) for kind in (And, Or, Xor)))

    return st.recursive(st.sampled_from(names), grow, max_leaves=12)


def closed(atom: object) -> bool:
    return isinstance(atom, Evidence) and atom.scope == "prompt"


def holds(formula: Formula, true: set, ended: bool) -> bool:
    def value(atom: object) -> tuple[bool, bool]:
        if isinstance(atom, PromptEnded):
            return ended, not ended
        known = ended or not closed(atom)
        return known and atom in true, known and atom not in true

    return truth(formula, value)[0]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(formulas([*ATOMS, PromptEnded()]), formulas([Holds(name) for name in "abcdefghijklm"])), st.integers(0)
)
def test_the_normal_form_means_what_was_written(formula, seed) -> None:
    found = canonical(formula, closed)
    names = sorted(set(atoms(formula)) - {PromptEnded()}, key=to_text)
    chance = random.Random(seed)
    for _ in range(20):
        true = {name for name in names if chance.random() < 0.5}
        for ended in (False, True):
            expected = holds(formula, true, ended)
            assert expected == (found if isinstance(found, bool) else holds(found, true, ended))


@settings(max_examples=200, deadline=None)
@given(formulas(ATOMS), formulas(ATOMS))
def test_two_small_formulas_share_a_normal_form_exactly_when_they_mean_the_same(one, other) -> None:
    same = all(
        holds(one, set(true), ended) == holds(other, set(true), ended)
        for size in range(len(ATOMS) + 1)
        for true in itertools.combinations(ATOMS, size)
        for ended in (False, True)
    )
    assert (canonical(one, closed) == canonical(other, closed)) == same


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 2**2**n - 1))))
def test_each_boolean_form_gives_its_table_back(case) -> None:
    n, table = case
    everything = full(n)

    def literal(i: int, positive: bool) -> int:
        return variable(i, n) if positive else everything & ~variable(i, n)

    either, both, odd = 0, everything, 0
    for term in prime_implicants(table, n):
        product = everything
        for i, positive in term:
            product &= literal(i, positive)
        assert product & ~table == 0
        for left_out in term:  # prime: no literal can go
            wider = everything
            for i, positive in term:
                wider &= everything if (i, positive) == left_out else literal(i, positive)
            assert wider & ~table
        either |= product
    for clause in prime_implicates(table, n):
        some = 0
        for i, positive in clause:
            some |= literal(i, positive)
        both &= some
    for monomial in polynomial(table, n):
        product = everything
        for i in monomial:
            product &= variable(i, n)
        odd ^= product
    assert either == both == odd == table
    assert set(support(table, n)) == {i for term in prime_implicants(table, n) for i, _ in term}
