"""Cells of the multi-hop questions: detection, conclusions, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from interventions.rules.chunked import Outcome, State, advance
from interventions.rules.proof import Proof
from interventions.rules.reading import parse_ruleset
from interventions.rules.reference import evaluate
from reproduce.model import Runner
from reproduce.rules import hops, steer
from reproduce.rules.detectors import Counts, Detectors, features
from reproduce.rules.hops import Question
from reproduce.rules.settings import DETECTORS, EFFECT_LAYER, EVIDENCE_LAYER, MAIN, How
from reproduce.rules.texts import Prompt, prompt, readings, residuals
from sae_weights.sae import SAE

HOLDS, FAILS = "holds", "fails"
TRUTH = {True: frozenset([HOLDS]), False: frozenset([FAILS])}


@dataclass
class Tally:
    """One way to detect, over the questions of a cell.

    Attributes:
        names, marks: detection of the names (individuals, categories) and of the marks (what is asked, denials, the property).
        facts: questions whose facts were found, all of them and no other.
        asked: questions of which individual and denial were found.
        concluded: questions that were concluded as they should be.
        opposite, silent: concluded the other way round (or both); not at all.
        steered: questions with one conclusion, where the model says it.
        right: questions answered right.
    """

    names: Counts = field(default_factory=Counts)
    marks: Counts = field(default_factory=Counts)
    facts: int = 0
    asked: int = 0
    concluded: int = 0
    opposite: int = 0
    silent: int = 0
    steered: int = 0
    right: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return vars(self) | {"names": self.names.as_dict(), "marks": self.marks.as_dict()}


def measure(
    runner: Runner,
    tokenizer: Any,
    saes: Mapping[int, SAE],
    ids: Mapping[int, str],
    detectors: Detectors,
    questions: Sequence[Question],
) -> dict[str, Any]:
    """Everything about ``questions`` but chains of thought."""
    words = answer_tokens(tokenizer)
    spoken = {HOLDS: words[True], FAILS: words[False]}
    ways = steer.by_effect(runner, saes[EFFECT_LAYER], spoken)
    prompts = [prompt(tokenizer, q.message()) for q in questions]
    reads = features(detectors)
    tallies: dict[str, Tally] = {how: Tally() for how in DETECTORS}
    plain = {"right": 0, "neither": 0, "choice": 0, "said true": 0}
    given = 0
    example: dict[str, Any] | None = None
    for started in runner.start([p.ids for p in prompts], (EVIDENCE_LAYER, EFFECT_LAYER), 8):
        concluded: dict[int, dict[How, frozenset[str]]] = {}
        for i, h in residuals(started, EVIDENCE_LAYER):
            found = readings(saes[EVIDENCE_LAYER], ids[EVIDENCE_LAYER], h, reads)
            concluded[i] = {}
            for how in DETECTORS:
                ruleset = parse_ruleset(hops.rules(questions[i], detectors[how], ids[EVIDENCE_LAYER]))
                n = len(h)
                outcome, _ = advance(ruleset, State(), found, n, n)
                concluded[i][how] = _count(tallies[how], questions[i], prompts[i], outcome)
                if how == MAIN and i == 0:
                    steps = evaluate(ruleset, found, n, n)
                    same = all(
                        {name for name, where in outcome.conclusions.items() if where[step.position]}
                        == step.conclusions
                        for step in steps
                    )
                    assert same, "the two evaluators differ"
                    example = _example(questions[i], ruleset.text, steps[-1].proofs, tokenizer, prompts[i])
        truth = {i: TRUTH[questions[i].answer] for i in started.tokens.index}
        wanted = {i: [truth[i], *sets.values()] for i, sets in concluded.items()}
        says = steer.steered(runner, started, ways, spoken, wanted)
        for i, sets in concluded.items():
            token = words[questions[i].answer]
            unedited = says[i][frozenset()]
            plain["right"] += unedited.token == token
            plain["neither"] += unedited.token not in words.values()
            plain["said true"] += unedited.token == words[True]
            plain["choice"] += frozenset([unedited.choice]) == truth[i]
            given += says[i][truth[i]].token == token
            for how, conclusions in sets.items():
                heard = says[i][conclusions].token
                tallies[how].right += heard == token
                tallies[how].steered += len(conclusions) == 1 and heard == spoken[next(iter(conclusions))]
    return {
        "questions": len(questions),
        "tokens": float(np.mean([len(p.ids) for p in prompts])),
        "plain": plain,
        "facts given": given,
        "rules": {how: tally.as_dict() for how, tally in tallies.items()},
        "example": example,
    }


def _count(tally: Tally, question: Question, words: Prompt, outcome: Outcome) -> frozenset[str]:
    """Take one question in; returns what was concluded."""
    names = {*question.chains, *question.categories}
    for name, holds in outcome.propositions.items():
        (tally.names if name in names else tally.marks).add(holds, words.at.get(name, ()))
    at_end = {name for name, where in outcome.conclusions.items() if len(where) and where[-1]}
    told = {f"{x}.{c}" for x in question.chains for c in question.categories}
    tally.facts += at_end & told == question.facts
    asked = {name for name in at_end if name.startswith("asked.")}
    tally.asked += asked == {f"asked.{question.person}"} and ("denied" in at_end) == question.denied
    conclusions = frozenset(at_end & {HOLDS, FAILS})
    tally.concluded += conclusions == TRUTH[question.answer]
    tally.silent += not conclusions
    tally.opposite += bool(conclusions) and conclusions != TRUTH[question.answer]
    return conclusions


def answer_tokens(tokenizer: Any) -> dict[bool, int]:
    """The token of each answer."""
    return {value: tokenizer.encode(f" {value}", add_special_tokens=False)[0] for value in (True, False)}


def measure_thoughts(runner: Runner, tokenizer: Any, questions: Sequence[Question], tokens: int) -> dict[str, Any]:
    """Chain-of-thought prompting, greedy; who has come to no answer is asked for it after so many ``tokens``."""
    prompts = [prompt(tokenizer, q.message("", hops.THINK)).ids for q in questions]
    texts = steer.think(runner, tokenizer, prompts, tokens)
    verdicts = [steer.verdict(text) for text in texts]
    open_ = [i for i, found in enumerate(verdicts) if found is None]
    asked = [(*prompts[i], *tokenizer.encode(f"{texts[i]}\nAnswer:", add_special_tokens=False)) for i in open_]
    words = answer_tokens(tokenizer)
    for started in runner.start(asked, (), 8):
        for number, says in steer.said(
            runner, started, started.last, {HOLDS: words[True], FAILS: words[False]}
        ).items():
            verdicts[open_[number]] = says.choice == HOLDS
    return {
        "questions": len(questions),
        "right": sum(found == q.answer for found, q in zip(verdicts, questions, strict=True)),
        "asked for it": len(open_),
        "said true": sum(found is True for found in verdicts),
        "example": texts[0],
    }


def calibrate(
    runner: Runner,
    tokenizer: Any,
    saes: Mapping[int, SAE],
    questions: Sequence[Question],
    ways: Mapping[str, steer.Ways],
) -> dict[str, dict[str, int]]:
    """How often the model says what it is pushed to say, on training questions: way of choosing latents → strength → times."""
    words = answer_tokens(tokenizer)
    prompts = [prompt(tokenizer, q.message()).ids for q in questions]
    found: dict[str, dict[str, int]] = {name: {} for name in ways}
    for started in runner.start(prompts, (EFFECT_LAYER,), 8):
        truth = {i: TRUTH[questions[i].answer] for i in started.tokens.index}
        for name, way in ways.items():
            for strength in (0.25, 0.5, 1.0):
                last = runner.edited(started, {EFFECT_LAYER: steer.push(way, truth, strength)})
                says = steer.said(runner, started, last, {HOLDS: words[True], FAILS: words[False]})
                hits = sum(says[i].token == words[questions[i].answer] for i in truth)
                found[name][f"{strength:g}"] = found[name].get(f"{strength:g}", 0) + hits
    return found


def _example(question: Question, text: str, proofs: Sequence[Proof], tokenizer: Any, words: Prompt) -> dict[str, Any]:
    tokens = [tokenizer.decode([i]) for i in words.ids]
    proof = next((one for one in proofs if one.conclusion in (HOLDS, FAILS)), None)
    return {
        "context": question.context,
        "ask": question.ask,
        "answer": question.answer,
        "propositions": sum(line.startswith("proposition") for line in text.splitlines()),
        "rules": [line for line in text.splitlines() if not line.startswith("proposition")],
        "proof": _lines(proof, tokens) if proof else [],
    }


def _lines(proof: Proof, tokens: Sequence[str], depth: int = 0) -> list[str]:
    """A proof as an indented list; pieces of evidence with the tokens where they were found."""
    found = [f"{'  ' * depth}{proof.conclusion} (rule {proof.rule}), because"]
    for reason in proof.because:
        if reason.premise is not None:
            found += _lines(reason.premise, tokens, depth + 1)
        else:
            seen = ", ".join(f"{p}:{tokens[p].strip()!r}" for p in reason.positions)
            found.append(f"{'  ' * (depth + 1)}{reason.text}" + (f" at {seen}" if seen else ""))
    return found
