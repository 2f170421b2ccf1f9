"""Trains whose wagons show a flag, in the manner of Rail2Country: colours named outright, or only hinted at.

*mono*: "The first wagon is red." *meta*: "The first wagon is the colour of a ripe tomato." The colours are concepts, learned from
labelled sentences of other wording; the rules say which colours in which order are whose flag.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from interventions.concepts.detector import Detector
from reproduce.rules.detectors import proposition
from reproduce.rules.settings import STRENGTH
from reproduce.rules.texts import Labelled

FLAGS: dict[str, tuple[str, str, str]] = {
    "Germany": ("black", "red", "yellow"),
    "Belgium": ("black", "yellow", "red"),
    "France": ("blue", "white", "red"),
    "Netherlands": ("red", "white", "blue"),
    "Italy": ("green", "white", "red"),
    "Ireland": ("green", "white", "orange"),
    "Romania": ("blue", "yellow", "red"),
    "Russia": ("white", "blue", "red"),
    "Hungary": ("red", "white", "green"),
    "Bulgaria": ("white", "green", "red"),
    "Lithuania": ("yellow", "green", "red"),
    "Estonia": ("blue", "black", "white"),
    "Austria": ("red", "white", "red"),
    "Armenia": ("red", "blue", "orange"),
}
THINGS: dict[str, tuple[str, ...]] = {
    "black": ("coal", "tar", "soot", "a raven", "ebony", "a panther", "liquorice", "obsidian"),
    "red": ("blood", "a strawberry", "a fire engine", "a ruby", "a ripe tomato", "a cherry", "ketchup", "a boiled lobster"),
    "yellow": ("a lemon", "a banana", "a canary", "mustard", "a sunflower", "an egg yolk", "ripe corn", "a daffodil"),
    "white": ("snow", "milk", "chalk", "a swan", "salt", "flour", "cotton", "a polar bear"),
    "blue": ("the clear sky", "a sapphire", "a cornflower", "the ocean", "denim", "a peacock", "cobalt", "forget-me-nots"),
    "green": ("grass", "a frog", "spinach", "an emerald", "moss", "lettuce", "a cucumber", "clover"),
    "orange": ("a carrot", "a pumpkin", "a tangerine", "a basketball", "an apricot", "a goldfish", "saffron", "a mandarin"),
}  # fmt: skip
"""Things of a colour; the last of each are kept for the test."""
KNOWN = 5
"""How many of them stand in training sentences."""
COLOURS = tuple(THINGS)

Hints = Literal["mono", "meta, known things", "meta, new things"]
HINTS: tuple[Hints, ...] = ("mono", "meta, known things", "meta, new things")
Split = Literal["train", "test"]

_ORDER = ("first", "second", "third")
_PLAIN: dict[Split, tuple[str, ...]] = {
    "train": (
        "The {n} wagon is {c}.",
        "Its {n} wagon has been painted {c}.",
        "They made its {n} wagon {c}.",
        "Its {n} wagon is bright {c}.",
    ),
    "test": ("For the {n} wagon they chose {c}.", "On the {n} wagon everything looks {c}."),
}
_HINTED: dict[Split, tuple[str, ...]] = {
    "train": (
        "The {n} wagon is the colour of {c}.",
        "Its {n} wagon has been painted like {c}.",
        "They made its {n} wagon to match {c}.",
        "Its {n} wagon resembles {c}.",
    ),
    "test": ("For the {n} wagon they chose the hue of {c}.", "On the {n} wagon everything looks like {c}."),
}
LETTERS = "ABCD"


@dataclass(frozen=True)
class Train:
    """One item.

    Attributes:
        text: its description.
        phrases: the three phrases that tell the colours.
        colours: which these are.
        options: countries to choose from; in training, where any three colours go, the flag may be nobody's.
        country: whose flag it is; empty in training.
    """

    text: str
    phrases: tuple[str, ...]
    colours: tuple[str, ...]
    options: tuple[str, ...]
    country: str = ""

    @property
    def letter(self) -> str:
        """The right option."""
        return LETTERS[self.options.index(self.country)]

    def message(self) -> Labelled:
        """What the user says."""
        options = ", ".join(f"{letter}) {country}" for letter, country in zip(LETTERS, self.options, strict=True))
        ask = f"Together its wagons show the flag of a country. Which one? {options}. Answer with one letter."
        words = dict(zip(self.phrases, self.colours, strict=True))
        return Labelled(f"A train has three wagons. {self.text} {ask}", words, "Answer:")


def generate(hints: Hints, split: Split, count: int, seed: int) -> list[Train]:
    """``count`` trains; in the test every country equally often, in training any colours."""
    rng = random.Random(f"{split} {hints} {seed}")
    countries = [list(FLAGS)[i % len(FLAGS)] for i in range(count)]
    rng.shuffle(countries)
    found = []
    for country in countries:
        colours = FLAGS[country] if split == "test" else tuple(rng.choice(COLOURS) for _ in _ORDER)
        phrases = _phrases(rng, hints, colours)
        templates = (_PLAIN if hints == "mono" else _HINTED)[split]
        told = [rng.choice(templates).format(n=n, c=phrase) for n, phrase in zip(_ORDER, phrases, strict=True)]
        others = rng.sample([one for one in FLAGS if one != country], len(LETTERS) - 1)
        options = tuple(rng.sample([country, *others], len(LETTERS)))
        found.append(Train(" ".join(told), phrases, colours, options, country if split == "test" else ""))
    return found


def _phrases(rng: random.Random, hints: Hints, colours: Sequence[str]) -> tuple[str, ...]:
    if hints == "mono":
        return tuple(colours)
    choice = {c: THINGS[c][:KNOWN] if hints == "meta, known things" else THINGS[c][KNOWN:] for c in set(colours)}
    return tuple(rng.choice(choice[c]) for c in colours)


def rules(train: Train, detectors: Mapping[str, Detector], sae_id: str) -> str:
    """The flags as rules over colours in order, and the options as they are stated; the letter is what is steered towards."""
    lines = [f"proposition {c} = {proposition(detectors[c], sae_id).text}" for c in COLOURS]
    for country, (one, two, three) in FLAGS.items():
        lines.append(f"rule {country}_flag: prompt({one} before {two} before {three}) -> {country}")
    for letter, country in zip(LETTERS, train.options, strict=True):
        steer = f'{{"type": "steer", "vector": "{letter}", "mode": "normalized", "strength": {STRENGTH}}}'
        lines += [f"rule option_{letter}: {country} -> says.{letter}", f"on says.{letter}: do {steer}"]
    return "\n".join(lines) + "\n"
