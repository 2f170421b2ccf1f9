"""Classes that many of a feature's words belong to, by WordNet: "violin, orchestra, piano" are musical instruments.

Every word is taken in its most frequent sense as a noun, else as a verb, and belongs to the synset of that sense and to
all its hypernyms. A class fits a feature when it covers much of what the feature fires on and little of the language.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

MIN_COVERAGE = 0.4
MIN_LIFT = 6.0
MIN_WORDS = 3
_MIN_DEPTH = 3
"""Hypernyms nearer to the root ("entity", "abstraction", "object") name nothing."""
_VAGUE = frozenset(
    (
        "artifact", "whole", "instrumentality", "living thing", "causal agent", "matter", "act", "event", "state",
        "organism", "cognition", "content", "information", "group", "attribute", "property", "relation", "measure",
        "psychological feature", "definite quantity", "fundamental quantity", "substance", "structure", "device",
        "happening", "cause", "part", "thing", "physical condition", "message", "area", "signal", "idea", "concept",
        "change", "act", "move", "make", "travel", "be", "have", "get", "think", "physical entity", "chordate",
        "vertebrate", "placental", "adult", "unit", "social group", "point", "line", "entity", "body",
    )
)  # fmt: skip
"""Classes whose names would tell a reader nothing."""


@dataclass(frozen=True)
class Topic:
    """A class: its name, the share of a feature's words (by activation) in it, and that share over the corpus's."""

    name: str
    coverage: float
    lift: float


class Topics:
    """WordNet's hypernyms, by word.

    ``classes(word)`` are names of synsets; words that WordNet does not have belong to none.
    """

    def __init__(self, classes: Mapping[str, frozenset[str]]) -> None:
        self._classes = classes
        self._base: dict[str, float] = {}

    @classmethod
    def of_wordnet(cls, folder: Path) -> Topics:
        """Read ``index.noun``, ``data.noun`` and the verbs' from WordNet's folder ``dict``."""
        classes: dict[str, frozenset[str]] = {}
        for part in ("verb", "noun"):  # nouns win
            classes |= _read(folder, part)
        return cls(classes)

    def classes(self, word: str) -> frozenset[str]:
        """Names of the classes of a word as it stands, else in lower case, else without a plural's or verb's ending."""
        lower = word.lower()
        for form in (word, lower, *(lower[: -len(e)] for e in ("s", "es", "ed", "ing") if lower.endswith(e))):
            found = self._classes.get(form)
            if found is not None:
                return found
        return frozenset()

    def calibrate(self, words: Iterable[tuple[str, int]]) -> None:
        """Learn from a corpus's word counts how common each class is."""
        total = 0
        counts: dict[str, int] = {}
        for word, count in words:
            total += count
            for name in self.classes(word):
                counts[name] = counts.get(name, 0) + count
        self._base = {name: count / max(1, total) for name, count in counts.items()}

    def fit(self, words: Iterable[tuple[str, float]], least: float = MIN_COVERAGE) -> list[Topic]:
        """Classes that cover at least ``least`` of the words' (word, mass), best first; one name per line of descent."""
        mass: dict[str, float] = {}
        members: dict[str, set[str]] = {}
        total = 0.0
        for word, weight in words:
            total += weight
            for name in self.classes(word):
                mass[name] = mass.get(name, 0.0) + weight
                members.setdefault(name, set()).add(word.lower().rstrip("s"))
        fitting = []
        for name, weight in mass.items():
            coverage = weight / total
            lift = coverage / max(self._base.get(name, 0.0), 1e-5)
            if coverage >= least and lift >= MIN_LIFT and len(members[name]) >= MIN_WORDS:
                fitting.append(Topic(name, coverage, lift))
        fitting.sort(key=lambda t: (-t.coverage * math.log(t.lift), t.name))
        kept: list[Topic] = []
        for topic in fitting:
            # A class whose members are (nearly) those of a better one says the same in other words.
            if all(members[topic.name] != members[other.name] for other in kept):
                kept.append(topic)
        return kept


def _read(folder: Path, part: str) -> dict[str, frozenset[str]]:
    """Word → names of its first sense's synset and hypernyms, for one part of speech."""
    names: dict[str, str] = {}
    above: dict[str, list[str]] = {}
    spelling: dict[str, str] = {}
    for line in _records(folder / f"data.{part}"):
        fields = line.split(" | ")[0].split()
        offset, count = fields[0], int(fields[3], 16)
        lemmas = [lemma.replace("_", " ") for lemma in fields[4 : 4 + 2 * count : 2]]
        names[offset] = lemmas[0]
        for lemma in lemmas:
            spelling.setdefault(f"{lemma.lower()} {offset}", lemma)
        rest = fields[4 + 2 * count :]
        pointers = [rest[1 + 4 * i : 5 + 4 * i] for i in range(int(rest[0]))]
        above[offset] = [p[1] for p in pointers if p[0] in ("@", "@i")]
    ancestors: dict[str, frozenset[str]] = {}

    def up(offset: str, seen: int = 0) -> tuple[tuple[str, ...], int]:
        parents = above.get(offset, [])
        if not parents or seen > 30:
            return (offset,), 0
        chain, depth = up(parents[0], seen + 1)
        return (*chain, offset), depth + 1

    classes: dict[str, frozenset[str]] = {}
    least = _MIN_DEPTH if part == "noun" else 0
    for line in _records(folder / f"index.{part}"):
        fields = line.split()
        lemma, first = fields[0].replace("_", " "), fields[-int(fields[2])]
        if " " in lemma:
            continue
        known = ancestors.get(first)
        if known is None:
            chain, _ = up(first)
            named = (names[offset] for offset in chain[least:])
            known = ancestors[first] = frozenset(name for name in named if name not in _VAGUE)
        classes[spelling.get(f"{lemma} {first}", lemma)] = known
    return classes


def _records(path: Path) -> Iterable[str]:
    """Lines but for the licence at the head of each file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if not line.startswith("  "))
