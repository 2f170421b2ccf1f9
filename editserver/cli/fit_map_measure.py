"""What a stored map does: perplexity of texts and recall of answers, without it and at each strength."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interventions.concepts.report import mean_interval
from interventions.maps.calibration import Rate, rate_above
from interventions.maps.reading import FitError
from interventions.wording import show


@dataclass(frozen=True)
class Question:
    """A question with its right answers, and the entity that it is about."""

    text: str
    answers: tuple[str, ...]
    entity: str


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a set of texts.

    Attributes:
        before, after: exp of the mean nats per token, unedited and edited.
        ratio, low, high: exp of the mean over texts of the change of nats per token, and its 95 % interval.
        edited: share of the texts in which a token was edited.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    texts: int
    edited: float


@dataclass(frozen=True)
class Recall:
    """Right answers, unedited and edited."""

    before: Rate
    after: Rate


def perplexity(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], edited: Sequence[int]
) -> Perplexity:
    """Compare the nats of each text's tokens."""
    total = [math.exp(sum(map(sum, side)) / sum(map(len, side))) for side in (before, after)]
    changes = [float(np.mean(b) - np.mean(a)) for a, b in zip(before, after, strict=True)]
    found = mean_interval(changes)
    ratio, low, high = (math.exp(min(v, 700.0)) for v in (found.mean, found.low, found.high))
    return Perplexity(total[0], total[1], ratio, low, high, len(before), float(np.mean(np.asarray(edited) > 0)))


def recall(questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> Recall:
    """Share of right answers of both runs."""
    rates = []
    for side in (before, after):
        right = [float(is_right(q, answer)) for q, answer in zip(questions, side, strict=True)]
        rates.append(rate_above(right, 0.5))
    return Recall(rates[0], rates[1])


def is_right(question: Question, answer: str) -> bool:
    """Whether one of the right answers stands in ``answer`` as whole words; case and accents do not matter."""
    said = _plain(answer)
    return any(re.search(rf"(?<!\w){re.escape(_plain(right))}(?!\w)", said) for right in question.answers)


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in decomposed if not unicodedata.combining(c)).strip()


def read_questions(path: Path) -> list[Question]:
    """One JSON object a line: ``{"question", "answer": text or list, "entity"}``.

    Raises:
        FitError: what stands in which line instead.
    """
    found = []
    for number, line in _lines(path, "--questions"):
        try:
            fields = json.loads(line)
            answers = fields["answer"]
            answers = [answers] if isinstance(answers, str) else answers
            question = Question(fields["question"], tuple(answers), fields["entity"])
            if not all(isinstance(v, str) and v.strip() for v in (question.text, question.entity, *question.answers)):
                raise ValueError
            if not question.answers:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            expected = '{"question": "…", "answer": "…" or […], "entity": "…"}'
            raise FitError(f"--questions {path}, line {number}: expected {expected}, got {show(line)}") from None
        if is_right(question, question.text):
            raise FitError(
                f"--questions {path}, line {number}: the answer stands in the question, so repeating it would be right"
            )
        found.append(question)
    return found


@dataclass(frozen=True)
class Entity:
    """A name and its type."""

    name: str
    kind: str


def read_entities(path: Path, option: str) -> list[Entity]:
    """One name a line, or (.jsonl) ``{"name", "type"?}``; without a type it is "entity". Repeated ones count once.

    Raises:
        FitError: what stands in which line instead.
    """
    found: dict[Entity, None] = {}
    for number, line in _lines(path, option):
        if path.suffix not in (".jsonl", ".json"):
            found[Entity(line.strip(), "entity")] = None
            continue
        try:
            fields = json.loads(line)
            fields = {"name": fields} if isinstance(fields, str) else fields
            name, kind = fields["name"], fields.get("type", "entity")
            if not (isinstance(name, str) and name.strip() and isinstance(kind, str) and kind):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            expected = '{"name": "…", "type": "…"}'
            raise FitError(f"{option} {path}, line {number}: expected {expected}, got {show(line)}") from None
        found[Entity(name.strip(), kind)] = None
    return list(found)


def _lines(path: Path, option: str) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FitError(f"{option} {path}: {error}") from error
    found = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise FitError(f"{option} {path}: is empty")
    return found


def parse_strengths(text: str) -> list[float]:
    """``0.5,1,2``: the strengths at which the map is measured.

    Raises:
        FitError: not numbers, or 0, which is the unedited run.
    """
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise FitError(f"--strengths {text}: expected numbers with commas between them, as 0.5,1,2") from None
    if not all(math.isfinite(s) and s != 0 for s in found):
        raise FitError(
            f"--strengths {text}: expected finite numbers other than 0 (the unedited run is always measured)"
        )
    return found


def as_json(value: Perplexity | Recall | None) -> dict[str, Any] | None:
    """The figures as JSON."""
    return None if value is None else asdict(value)
