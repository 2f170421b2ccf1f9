"""Labels are made from evidence by rule: what each rule says, and that none breaks its bounds."""

from __future__ import annotations

import random

import pytest

from sae_weights.knowledge.naming import LONGEST, Evidence, Use, label, says_clearly
from sae_weights.knowledge.topics import Topic


def uses(*pairs: tuple[str, float], corpus: float = 1e-4, proper: bool = False) -> tuple[Use, ...]:
    return tuple(Use(text, share, corpus, proper) for text, share in pairs)


def evidence(**facts: object) -> Evidence:
    return Evidence(**({"fires": 100, "density": 0.01} | facts))  # type: ignore[arg-type]


CASES = {
    "one form": (
        evidence(tokens=uses((" Paris", 0.8), (" paris", 0.1)), words=uses(("Paris", 0.9))),
        '"Paris"',
    ),
    "one form after another": (
        evidence(tokens=uses((" course", 0.9)), words=uses(("course", 0.9)), before=[(" of", 0.8)]),
        '"of course"',
    ),
    "a common form near others": (
        evidence(tokens=uses((" the", 0.9), corpus=0.05), words=uses(("the", 0.9)), nearby=["court", "judge"]),
        '"the" near court, judge',
    ),
    "an ending": (
        evidence(
            tokens=uses(("ing", 0.9)), words=uses(("frobbing", 0.3), ("wibbing", 0.3), ("zapping", 0.3))
        ),
        '"-ing": frobbing, wibbing, zapping',
    ),
    "a part of one word": (
        evidence(tokens=uses(("adelphia", 0.95)), words=uses(("Philadelphia", 0.95))),
        '"Philadelphia"',
    ),
    "words of one ending": (
        evidence(words=uses(*((w, 0.02) for w in ("frobbing", "wibbing", "zapping", "dancing", "eating", "mending", "sun")))),
        '"-ing": frobbing, wibbing, zapping',
    ),
    "words of one beginning": (
        evidence(words=uses(*((w, 0.02) for w in ("fork", "French", "Fame", "fun", "fill", "fender")))),
        '"f-": fork, French, Fame',
    ),
    "words of one beginning, of which one rules": (
        evidence(words=uses(("fork", 0.3), *((w, 0.02) for w in ("French", "Fame", "fun", "fill", "fender")))),
        "fork",
    ),
    "a diffuse feature whose heaviest word is common": (
        evidence(
            words=(*uses(("tree", 0.019), ("flower", 0.018), ("leaf", 0.017)), *uses(("of", 0.02), corpus=0.015)),
        ),
        "tree, flower, leaf",
    ),
    "years": (evidence(words=uses(("1961", 0.5), ("1958", 0.4))), "years: 1961, 1958"),
    "numbers": (evidence(words=uses(("12", 0.5), ("7", 0.4))), "numbers: 12, 7"),
    "a class": (
        evidence(
            words=uses(("violin", 0.3), ("piano", 0.2), ("flute", 0.1)), topics=[Topic("musical instrument", 0.6, 90)]
        ),
        "musical instrument: violin, piano, flute",
    ),
    "names": (
        evidence(words=uses(("Mary", 0.3), ("John", 0.2), ("Smith", 0.2), ("Ann", 0.1), proper=True)),
        "names: Mary, John, Smith, Ann",
    ),
    "words": (evidence(words=uses(("harbour", 0.2), ("sail", 0.2), ("ship", 0.1))), "harbour, sail, ship"),
    "a special token": (
        evidence(tokens=uses(("<|im_start|>", 0.9)), special=frozenset({"<|im_start|>"})), "<|im_start|>",
    ),
    "behind a special token": (
        evidence(tokens=uses(("user", 0.6), ("system", 0.3)), before=[("<|im_start|>", 1.0)], special=frozenset({"<|im_start|>"})),
        "after <|im_start|>: user, system",
    ),
    "the start": (evidence(early=0.9, words=uses(("once", 0.3))), "start of a text: once"),
    "dense": (evidence(density=0.3, words=uses(("a", 0.2), ("b", 0.2))), "dense: a, b"),
    "code": (evidence(code=True, words=uses(("def", 0.2), ("class", 0.2))), "code: def, class"),
    "says clearly": (
        evidence(words=uses(("sail", 0.3), ("ship", 0.2)), promoted=[(" Paris", 9.0), (" France", 8.0), (" x", 2.0)]),
        "sail, ship → says Paris, France",
    ),
    "says what it fires on": (
        evidence(words=uses(("sail", 0.3), ("ship", 0.2)), promoted=[(" sails", 9.0), (" ships", 8.0)]),
        "sail, ship",
    ),
    "says unclearly": (evidence(words=uses(("sail", 0.3)), promoted=[(" Paris", 4.0)]), "sail"),
    "hardly ever fired": (evidence(fires=1, words=uses(("sail", 1.0))), None),
    "hardly ever fired, says clearly": (evidence(fires=0, promoted=[(" Paris", 9.0)]), "→ says Paris"),
    "white space": (evidence(tokens=uses(("\n", 0.9)), words=uses(("\n", 0.9))), "line break"),
    "a sign": (
        evidence(tokens=uses((",", 0.9)), words=uses((",", 0.9)), nearby=["red", "blue"]), 'comma "," near red, blue'
    ),
    "signs": (evidence(tokens=uses((",", 0.4), (".", 0.3)), words=uses((",", 0.4), (".", 0.3))), "signs: comma, full stop"),
    "one word in several forms": (
        evidence(words=uses(("look", 0.2), ("looked", 0.15), ("looking", 0.15), ("stare", 0.1))), "look, stare"
    ),
    "nothing": (evidence(), None),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=list(CASES))
def test_the_label_of(given: Evidence, expected: str | None) -> None:
    assert label(given) == expected


def test_no_evidence_makes_a_label_too_long_or_of_two_lines() -> None:
    rng = random.Random(0)
    pieces = [
        "a",
        "Straße",
        "\n",
        "\t",
        " ",
        "…",
        "🎻",
        "x" * 90,
        "<|im_start|>",
        "1961",
        "12",
        '"',
        "�",
        "",
        "戦",
        "It's",
    ]

    def some(most: int) -> list[str]:
        return [rng.choice(pieces) + rng.choice(pieces) for _ in range(rng.randint(0, most))]

    for _ in range(3000):
        given = Evidence(
            fires=rng.choice((0, 2, 5, 100)),
            density=rng.choice((0.0, 0.01, 0.5)),
            tokens=[Use(t, rng.random(), rng.random() / 100) for t in some(4)],
            words=[Use(t, rng.random(), rng.random() / 100, rng.random() < 0.5) for t in some(6)],
            before=[(t, rng.random()) for t in some(2)],
            nearby=some(3),
            early=rng.random(),
            code=rng.random() < 0.5,
            special=frozenset({"<|im_start|>"}),
            promoted=sorted(((t, rng.random() * 12) for t in some(6)), key=lambda p: -p[1]),
            topics=[Topic(t, 0.5, 10) for t in some(1)],
        )
        made = label(given)
        assert made is None or (0 < len(made) <= LONGEST and "\n" not in made), (made, given)


def test_promoted_tokens_of_one_stem_are_named_although_none_stands_out() -> None:
    assert says_clearly([(" sing", 5.0), (" singing", 4.8), (" tax", 4.5)]) == ["sing", "tax"]
    assert says_clearly([(" sing", 5.0), (" tax", 4.8), (" sea", 4.6)]) == []


def test_pieces_of_words_are_not_named_however_strongly_they_are_promoted() -> None:
    assert says_clearly([("utherford", 9.0), ("allclose", 8.0), (" Ü", 7.0), ("?!", 7.0)]) == []
