"""Multi-hop questions about invented categories, in the manner of PrOntoQA, and the rules that answer them.

A question tells of two individuals, one category each. From each category a chain of rules leads to the same property, in one
case affirmed and in the other denied, so neither the words that occur nor their number give the answer away. The rules of the
question are given, as in the published experiment. Which individual is of which category, whom the last sentence is about and
whether it denies the property has to be read off the activations.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from interventions.concepts.detector import Detector
from reproduce.rules.detectors import proposition
from reproduce.rules.settings import STRENGTH, WINDOW
from reproduce.rules.texts import Labelled

MADE = [
    "gaft",
    "vimp",
    "snilt",
    "plizz",
    "snong",
    "quix",
    "vord",
    "mift",
    "nask",
    "jorp",
    "yusk",
    "drarm",
    "zull",
    "skamp",
    "gisk",
    "rark",
]
"""Invented here: two tokens each, the last of which differ."""
PUBLISHED = [
    "wumpus",
    "yumpus",
    "rompus",
    "numpus",
    "impus",
    "jompus",
    "gorpus",
    "sterpus",
    "grimpus",
    "lorpus",
    "brimpus",
    "dumpus",
    "zumpus",
    "tumpus",
    "vumpus",
    "shumpus",
]
"""PrOntoQA's: two or three tokens, and nearly all of them end with the same one."""
NAMES: dict[str, Sequence[str]] = {"made": MADE, "published": PUBLISHED}
PEOPLE = ["Max", "Sam", "Rex", "Polly", "Alex", "Emma"]
PROPERTIES = ["bitter", "wooden", "loud", "shy", "cold", "heavy", "bright", "sour"]
ASKS, DENIES = "asks", "denies"
WORDS = {"false": ASKS, "not": DENIES}
INSTRUCTION = "Answer with one word, True or False."
THINK = 'Think step by step. Then end with "Answer: True" or "Answer: False".'

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Templates:
    """How facts, rules and the last sentence are worded; nothing is worded alike in training and in test."""

    fact: tuple[str, ...]
    rule: tuple[str, ...]
    ask: tuple[str, ...]


TEMPLATES: dict[Split, Templates] = {
    "train": Templates(
        ("{x} is {a}.", "We know that {x} is {a}.", "{x} happens to be {a}."),
        ("Every {c} is {b}.", "Each {c} is {b}.", "If something is a {c}, then it is {b}."),
        ("True or false: {q}.", "Say whether this is true or false: {q}."),
    ),
    "test": Templates(
        ("It is certain that {x} is {a}.", "{x} has always been {a}."),
        ("Any {c} is {b}.", "Whatever is a {c} is always {b}."),
        ("Is this statement true or false? {q}.",),
    ),
}


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        context: facts and rules, in random order.
        ask: the sentence to be judged, with its introduction.
        chains: individual → categories from its own to the last.
        affirms: individual → whether its chain ends with the property (else with its denial).
        person: whom the question is about.
        what: the property that it is about.
        denied: whether the sentence to be judged denies the property.
    """

    context: str
    ask: str
    chains: Mapping[str, tuple[str, ...]]
    affirms: Mapping[str, bool]
    person: str
    what: str
    denied: bool

    @property
    def answer(self) -> bool:
        """Whether the sentence follows from the facts."""
        return self.affirms[self.person] != self.denied

    @property
    def categories(self) -> tuple[str, ...]:
        """All that are mentioned, sorted."""
        return tuple(sorted(c for chain in self.chains.values() for c in chain))

    @property
    def facts(self) -> frozenset[str]:
        """What is told of individuals, as conclusions."""
        return frozenset(f"{person}.{chain[0]}" for person, chain in self.chains.items())

    @property
    def steps(self) -> list[tuple[str, str]]:
        """The rules, each as (body, head)."""
        found = []
        for person, chain in self.chains.items():
            ends = "is" if self.affirms[person] else "is_not"
            heads = [*(f"it.{c}" for c in chain), f"it.{ends}.{self.what}"]
            found += list(itertools.pairwise(heads))
        return found

    def message(self, begun: str = "Answer:", instruction: str = INSTRUCTION) -> Labelled:
        """What the user says."""
        words = {c: c for c in self.categories} | {p: p for p in self.chains} | {self.what: self.what}
        return Labelled(f"{self.context} {self.ask} {instruction}", words | WORDS, begun)


def generate(names: Sequence[str], hops: int, split: Split, count: int, seed: int) -> list[Question]:
    """``count`` questions of ``hops`` rule applications each: answers, denials and ends of chains balanced."""
    rng = random.Random(f"{split} {hops} {seed} {names[0]}")
    cases = [(affirms, denied) for affirms in (True, False) for denied in (True, False)]
    kinds = [cases[i % len(cases)] for i in range(count)]
    rng.shuffle(kinds)
    whats = [PROPERTIES[i % len(PROPERTIES)] for i in range(count)]
    rng.shuffle(whats)
    pairs = zip(kinds, whats, strict=True)
    return [_question(rng, names, hops, TEMPLATES[split], what, *kind) for kind, what in pairs]


def _question(
    rng: random.Random, names: Sequence[str], hops: int, words: Templates, what: str, affirms: bool, denied: bool
) -> Question:
    chosen = rng.sample(list(names), 2 * hops)
    person, other = rng.sample(PEOPLE, 2)
    chains = {person: tuple(chosen[:hops]), other: tuple(chosen[hops:])}
    ends = {person: affirms, other: not affirms}
    sentences = []
    for who, chain in chains.items():
        sentences.append(rng.choice(words.fact).format(x=who, a=_article(chain[0])))
        last = what if ends[who] else f"not {what}"
        for body, head in zip(chain, [*map(_article, chain[1:]), last], strict=True):
            sentences.append(rng.choice(words.rule).format(c=body, b=head))
    rng.shuffle(sentences)
    ask = rng.choice(words.ask).format(q=f"{person} is {'not ' if denied else ''}{what}")
    return Question(" ".join(sentences), ask, chains, ends, person, what, denied)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def rules(question: Question, detectors: Mapping[str, Detector], sae_id: str) -> str:
    """The rule set of a question: how to read its words, the rules that it states, and what to do with the answer.

    It has the vocabulary of the question, two individuals among it, and nothing of who is what.
    """
    people, categories, what = sorted(question.chains), question.categories, question.what
    used = (*people, *categories, what, ASKS, DENIES)
    persons, kinds = ", ".join(people), ", ".join(categories)
    about = f"prompt({ASKS} before {what})"
    bound = " or ".join(f"({x}.KIND and asked.{x})" for x in people)
    lines = [f"proposition {name} = {proposition(detectors[name], sae_id).text}" for name in used]
    lines += [
        f"rule told: for x in {{{persons}}}, c in {{{kinds}}}: last({WINDOW}, x) and c -> latch x.c",
        f"rule asked: for x in {{{persons}}}: prompt({ASKS} before x) -> asked.x",
        f"rule denied: prompt({ASKS} before {DENIES}) -> denied",
        f"rule it: for c in {{{kinds}}}: {bound.replace('KIND', 'c')} -> it.c",
    ]
    lines += [f"rule s{number}: {body} -> {head}" for number, (body, head) in enumerate(question.steps, 1)]
    yes, no = f"it.is.{what}", f"it.is_not.{what}"
    lines += [
        f"rule yes: {about} and ({yes} and not denied or {no} and denied) -> holds",
        f"rule no: {about} and ({no} and not denied or {yes} and denied) -> fails",
        f'on holds: do {{"type": "steer", "vector": "true", "mode": "normalized", "strength": {STRENGTH}}}',
        f'on fails: do {{"type": "steer", "vector": "false", "mode": "normalized", "strength": {STRENGTH}}}',
    ]
    return "\n".join(lines) + "\n"
