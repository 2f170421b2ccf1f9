"""Does the greedy completion begin with an accepted answer, and how likely is one?

Greedy decoding gives an answer exactly if each of its tokens is the most likely one after those before it, so one pass over
``prompt + answer`` decides it; only answers whose first token wins after the prompt are passed. What follows the answer must
not continue its last word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reproduce.unlearning.entities import QUESTIONS, Entity
from reproduce.unlearning.passes import Ids, Passes

ARTICLES = ("", "the ")


@dataclass(frozen=True)
class Question:
    """A prompt and the token sequences that answer it.

    Attributes:
        entity, attribute: what is asked about.
        prompt: token ids.
        answers: token ids of the accepted answers, distinct.
        text: the prompt as text.
    """

    entity: str
    attribute: str
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    text: str


@dataclass(frozen=True)
class Answered:
    """Whether the greedy answer is right, and the probability of all accepted first tokens together."""

    right: bool
    probability: float


class Forward(Protocol):
    """The last layer's output ``[n, d]`` of each sequence."""

    def __call__(
        self, sequences: Sequence[Ids], lengths: Sequence[int], owners: Sequence[int] = ..., /
    ) -> list[Tensor]:
        """
        Args:
            sequences: token ids.
            lengths: of their prompts.
            owners: for each, the index of whoever it is passed for.
        """


def question(entity: Entity, attribute: str, encode: Callable[[str], list[int]], before: str = "") -> Question:
    """The question about ``attribute``; ``before`` is put in front of it."""
    text = before + QUESTIONS[entity.kind][attribute].format(entity.name)
    text = text[0].upper() + text[1:]
    answers = {tuple(encode(f" {article}{answer}")) for answer in entity.answers[attribute] for article in ARTICLES}
    return Question(entity.name, attribute, tuple(encode(text)), tuple(sorted(answers)), text)


def questions(entity: Entity, encode: Callable[[str], list[int]], before: str = "") -> list[Question]:
    """The questions about an entity whose answer is not in its name already ("Mexico City")."""
    asked = (a for a, answers in entity.answers.items() if not any(entity.name in answer for answer in answers))
    return [question(entity, attribute, encode, before) for attribute in asked]


def ask(asked: Sequence[Question], forward: Forward, passes: Passes, owners: Sequence[int] = ()) -> list[Answered]:
    """The answers to ``asked``, by ``forward``, which is told the owner of each."""
    if not asked:
        return []
    whose = list(owners) or [0] * len(asked)
    ends = forward([q.prompt for q in asked], [len(q.prompt) for q in asked], whose)
    scores = passes.logits(torch.stack([h[-1] for h in ends]))
    best = scores.argmax(-1).tolist()
    chances = scores.softmax(-1)
    likely = [float(chances[i, sorted({a[0] for a in q.answers})].sum()) for i, q in enumerate(asked)]
    tried = [(i, answer) for i, q in enumerate(asked) for answer in q.answers if answer[0] == best[i]]
    right = [False] * len(asked)
    if tried:
        longer = [(*asked[i].prompt, *answer) for i, answer in tried]
        full = forward(longer, [len(asked[i].prompt) for i, _ in tried], [whose[i] for i, _ in tried])
        for (i, answer), h in zip(tried, full, strict=True):
            at = len(asked[i].prompt)
            found = passes.logits(h[at - 1 :]).argmax(-1).tolist()
            if tuple(found[:-1]) == answer:
                after = passes.tokenizer.decode([found[-1]])
                right[i] |= not after[:1].isalpha()
    return [Answered(ok, p) for ok, p in zip(right, likely, strict=True)]
