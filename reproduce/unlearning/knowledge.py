"""Who is known, who is not, and how they are split.

A question counts for an entity if the model answers it right, *and* would not say the same about a name of nothing: an
answer that it gives for at least :data:`GUESSED` of the invented names of that type too ("Europe") is a guess. Known = at
least :data:`LEAST` questions right that are no guesses; unknown = invented names, and real entities with no right answer.
Unknown ones are matched to known ones by token count within each type. Known and unknown are split in half: maps and probes
are fitted on the first, targets and everything measured come from the second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from interventions.maps.entities import match_lengths
from reproduce.unlearning.entities import Entity, candidates, invented
from reproduce.unlearning.passes import Passes
from reproduce.unlearning.recall import Forward, Question, ask, question, questions

GUESSED = 0.15
LEAST = 2
ANSWER = 4
"""Tokens of an answer about an invented name that are looked at."""


@dataclass
class Knowledge:
    """What the model knows.

    Attributes:
        fit_known, fit_unknown: what maps and probes are fitted on; pairs of equal token count.
        targets: to be forgotten, one map each.
        others: known, never a target, not used in fitting.
        unknown: not used in fitting.
        right: entity → its questions that are answered right and are no guesses.
        asked: (type, attribute) → (right, of which guesses, candidates).
        counts: type → group → how many.
    """

    fit_known: list[Entity]
    fit_unknown: list[Entity]
    targets: list[Entity]
    others: list[Entity]
    unknown: list[Entity]
    right: Mapping[str, list[Question]]
    asked: Mapping[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def find(passes: Passes, forward: Forward, per_kind: int) -> Knowledge:
    """Ask all questions; ``per_kind`` targets of each type, those with the most right answers of the measured half."""
    real, names = candidates(), invented()
    guesses = _said(real, names, passes)
    asked = [(e, q) for e in real for q in questions(e, passes.encode)]
    answers = ask([q for _, q in asked], forward, passes)
    right: dict[str, list[Question]] = {}
    right_at_all: Counter[str] = Counter()
    table: dict[tuple[str, str], list[int]] = {}
    for (entity, q), answer in zip(asked, answers, strict=True):
        row = table.setdefault((entity.kind, q.attribute), [0, 0, 0])
        row[2] += 1
        if not answer.right:
            continue
        said = guesses[entity.kind, q.attribute]
        guess = sum(any(words[: len(a)] == a for a in q.answers) for words in said) >= GUESSED * len(said)
        row[0] += 1
        row[1] += guess
        right_at_all[_key(entity)] += 1
        if not guess:
            right.setdefault(_key(entity), []).append(q)
    known = [e for e in real if len(right.get(_key(e), [])) >= LEAST]
    ignorant = [e for e in real if not right_at_all[_key(e)]]
    return _split(
        known, [*ignorant, *names], right, passes, per_kind, {k: (v[0], v[1], v[2]) for k, v in table.items()}
    )


def key(entity: Entity) -> str:
    """Type and name: what a question's entity is called in tables of questions."""
    return _key(entity)


def _key(entity: Entity) -> str:
    return f"{entity.kind}: {entity.name}"


def _said(
    real: Sequence[Entity], names: Sequence[Entity], passes: Passes
) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """(type, attribute) → the greedy completions for invented names."""
    attributes = {e.kind: list(e.answers) for e in real}
    asked = [(name, a) for name in names for a in attributes[name.kind]]
    prompts = [question(Entity(n.name, n.kind, {a: ()}), a, passes.encode).prompt for n, a in asked]
    found: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for (name, attribute), words in zip(asked, passes.generate(prompts, ANSWER), strict=True):
        found.setdefault((name.kind, attribute), []).append(tuple(words))
    return found


def _split(
    known: Sequence[Entity],
    unknown: Sequence[Entity],
    right: Mapping[str, list[Question]],
    passes: Passes,
    per_kind: int,
    asked: Mapping[tuple[str, str], tuple[int, int, int]],
) -> Knowledge:
    found = Knowledge([], [], [], [], [], right, asked, {})
    counts: dict[str, dict[str, int]] = {}
    for kind in sorted({e.kind for e in known}):
        ours = [e for e in known if e.kind == kind]
        theirs = [e for e in unknown if e.kind == kind]
        sizes = [[len(passes.encode(" " + e.name)) for e in side] for side in (ours, theirs)]
        matching = match_lengths(*sizes)
        pairs = [(ours[i], theirs[j]) for i, j in matching.pairs]
        fitted, measured = pairs[0::2], pairs[1::2]
        ranked = sorted((k for k, _ in measured), key=lambda e: -len(right[_key(e)]))
        targets = ranked[:per_kind]
        others = [k for k, _ in measured if k not in targets]
        found.fit_known += [k for k, _ in fitted]
        found.fit_unknown += [u for _, u in fitted]
        found.targets += targets
        found.others += others
        found.unknown += [u for _, u in measured]
        counts[kind] = {
            "known": len(ours),
            "unknown": len(theirs),
            "matched pairs": len(pairs),
            "real among matched unknown": sum(bool(u.answers) for _, u in pairs),
            "fitting pairs": len(fitted),
            "targets": len(targets),
            "other known": len(others),
        }
    found.counts = counts
    return found
