"""Boolean functions of a few variables as truth tables, and the three forms in which one can be written canonically.

A table over variables 0 … n−1 is an integer of 2ⁿ bits: bit m is the value where variable i is bit i of m. All three forms
depend on the function alone, so two formulas with one meaning get one form:

* all prime implicants (Blake's canonical form), an ``or`` of ``and``;
* its dual, an ``and`` of ``or``;
* the Zhegalkin polynomial, an ``xor`` of ``and``.
"""

from __future__ import annotations

Term = tuple[tuple[int, bool], ...]
"""A conjunction (or clause): ``(variable, positive)`` ascending."""


def full(n: int) -> int:
    """The table that is true everywhere."""
    return int((1 << (1 << n)) - 1)


def variable(i: int, n: int) -> int:
    """The table of variable i among n."""
    half = 1 << i
    block = ((1 << half) - 1) << half
    return sum(block << start for start in range(0, 1 << n, 2 * half))


def cofactor(table: int, i: int, value: bool, n: int) -> int:
    """The table (still over n variables) with variable i fixed."""
    half = 1 << i
    if value:
        kept = table & variable(i, n)
        return kept | kept >> half
    kept = table & ~variable(i, n)
    return kept | kept << half


def support(table: int, n: int) -> tuple[int, ...]:
    """The variables on which the function depends."""
    return tuple(i for i in range(n) if cofactor(table, i, True, n) != cofactor(table, i, False, n))


def polarity(table: int, i: int, n: int) -> tuple[bool, bool]:
    """Whether raising variable i can make the function true, and whether it can make it false."""
    low, high = cofactor(table, i, False, n), cofactor(table, i, True, n)
    return bool(high & ~low), bool(low & ~high)


def prime_implicants(table: int, n: int) -> list[Term]:
    """All prime implicants of a function, by their own order (shorter first)."""

    def primes(bits: int, k: int) -> set[Term]:
        if not bits:
            return set()
        if bits == full(k):
            return {()}
        half = 1 << (k - 1)
        low, high = bits & full(k - 1), bits >> half
        both = primes(low & high, k - 1)
        found = set(both)
        for side, value in ((low, False), (high, True)):
            found |= {(*term, (k - 1, value)) for term in primes(side, k - 1) - both}
        return found

    return sorted(primes(table, n), key=lambda term: (len(term), term))


def prime_implicates(table: int, n: int) -> list[Term]:
    """All prime clauses of a function: their conjunction is the function."""
    clauses = prime_implicants(full(n) & ~table, n)
    return [tuple((i, not positive) for i, positive in clause) for clause in clauses]


def polynomial(table: int, n: int) -> list[tuple[int, ...]]:
    """The monomials (sets of variables) whose ``xor`` is the function; ``()`` is the constant 1."""
    bits = table
    for i in range(n):
        bits ^= (bits & ~variable(i, n)) << (1 << i)
    bits &= full(n)
    found = [tuple(i for i in range(n) if m >> i & 1) for m in range(1 << n) if bits >> m & 1]
    return sorted(found, key=lambda monomial: (len(monomial), monomial))
