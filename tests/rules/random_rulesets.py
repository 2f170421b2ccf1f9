"""Random rule sets over four propositions, and random texts on which to run them."""

from __future__ import annotations

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from interventions.rules.errors import RuleError
from interventions.rules.reading import parse_ruleset
from interventions.rules.ruleset import Ruleset

DECLARED = """
proposition a = feature(s, 0) >= 1
proposition b = feature(s, 1) > 0
proposition e = feature(s, 2) - 0.5 * feature(s, 3) >= 0.5
proposition t = tree(z, if 0 >= 1 then if 1 > 0 then 0.9 else 0.2 else 0.4) > 0.3
"""
READS = (("s", 0), ("s", 1), ("s", 2), ("s", 3), ("z", 0), ("z", 1))

Text = tuple[dict[tuple[str, int], np.ndarray], int, int, list[int]]

PROPOSITION = st.sampled_from(["a", "b", "e", "t"])
TOKEN = st.one_of(
    PROPOSITION,
    st.tuples(PROPOSITION, st.sampled_from(["and", "or", "xor", "and not"]), PROPOSITION).map(
        lambda x: f"({' '.join(x)})" if x[0] != x[2] else x[0]
    ),
    PROPOSITION.map(lambda name: f"(not {name})"),
)
SCOPED = st.one_of(
    TOKEN.map(lambda x: f"seen({x})"),
    TOKEN.map(lambda x: f"prompt({x})"),
    st.tuples(st.integers(2, 5), TOKEN).map(lambda x: f"last({x[0]}, {x[1]})"),
)
COUNTED = st.tuples(
    st.sampled_from(["2", "3", "20 %", "50 %", "33.3333 %"]), st.sampled_from(["seen(", "prompt(", "last(4, "]), TOKEN
).map(lambda x: f"at least {x[0]} of {x[1]}{x[2]})")
ORDER = st.lists(TOKEN, min_size=2, max_size=3).map(" before ".join)
ATOM = st.one_of(TOKEN, SCOPED, COUNTED, COUNTED, ORDER, ORDER.map(lambda x: f"prompt({x})"), st.just("prompt_ended"))


def expressions(names: list[str]) -> st.SearchStrategy[str]:
    atom = st.one_of(ATOM, st.sampled_from(names)) if names else ATOM

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        joined = st.tuples(inner, st.sampled_from(["and", "or", "xor", "->"]), inner)
        return st.one_of(joined.map(lambda x: f"({' '.join(x)})"), inner.map(lambda x: f"not ({x})"))

    return st.recursive(atom, grow, max_leaves=5)


def written(bodies: list[tuple[str, str]], latch: set[str], deeds: dict[str, str]) -> Ruleset:
    lines = [DECLARED]
    lines += [f"rule n{i}: ({body}) -> {'latch ' * (head in latch)}{head}" for i, (head, body) in enumerate(bodies)]
    return parse_ruleset("\n".join(lines + [f"on {head}: {deed}" for head, deed in deeds.items()]))


STEER = 'do {"type": "steer", "vector": "v"}'


@st.composite
def rulesets(draw: st.DrawFn) -> Ruleset:
    """A rule set; what negates under a latch or in a circle gives way: first the latches, then the draw."""
    bodies: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 5))):
        head = draw(st.sampled_from("pqr"))
        others = sorted({name for name, _ in bodies})
        body = draw(expressions(others))
        if others and draw(st.booleans()):
            body = f"({body}) {draw(st.sampled_from(['and', 'or', 'and not']))} {draw(st.sampled_from(others))}"
        bodies.append((head, body))
    heads = sorted({head for head, _ in bodies})
    deeds = {head: draw(st.sampled_from(["flag", STEER, STEER + " for 3 tokens"])) for head in heads}
    lasting = {head: draw(st.sampled_from([deeds[head], 'refuse "no"', STEER + " from now on"])) for head in heads}
    latch = draw(st.sets(st.sampled_from(heads)))
    for kept, done in ((latch, lasting), (latch, deeds), (set(), lasting), (set(), deeds)):
        try:
            return written(bodies, kept, done)
        except RuleError as error:
            if not any(word in error.message for word in ("may change", "cycle", "whatever the evidence")):
                raise
    return reject()


@st.composite
def texts(draw: st.DrawFn) -> Text:
    """Activations, prompt length, number of tokens, and a chunking of them."""
    n = draw(st.integers(1, 12))
    values = st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.5]), min_size=n, max_size=n)
    readings = {read: np.array(draw(values), np.float32) for read in READS}
    prompt_len = draw(st.integers(1, n + 2))
    chunks, left = [], n
    while left:
        chunks.append(draw(st.integers(0, left)))
        left -= chunks[-1]
        if len(chunks) > 30:
            chunks.append(left)
            left = 0
    return readings, prompt_len, n, chunks
