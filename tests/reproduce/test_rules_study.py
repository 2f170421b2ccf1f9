"""The pieces of the rules study: questions and their truth, rules over planted evidence, pushes, tables."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from interventions.concepts.detector import Detector
from interventions.rules.chunked import State, advance
from interventions.rules.proposition import Leaf, Split, Sum, Tree
from interventions.rules.reading import parse_ruleset
from reproduce.model import batches
from reproduce.page import shown
from reproduce.rules import hops, rail
from reproduce.rules.__main__ import COMMAND
from reproduce.rules.detectors import as_json, from_json
from reproduce.rules.settings import HOPS
from reproduce.rules.steer import push, verdict
from reproduce.rules.tables import tables

SAE = "s/l15"


@pytest.fixture(scope="module")
def questions():
    return {n: hops.generate(hops.MADE, n, "test", 24, 5) for n in HOPS}


def told(text):
    """Facts and rules of a context, read from its words alone: (individual, category), (category, what follows, affirmed)."""
    facts, rules = [], []
    rule = r"(?:Any|Every|Each|something is a|Whatever is a) (\w+)(?:, then it)? is (?:always )?(not )?(?:a )?(\w+)$"
    for sentence in map(str.strip, text.split(".")):
        fact = re.search(r"(\w+) (?:is|has always been|happens to be) a (\w+)$", sentence)
        if fact and fact[1] in hops.PEOPLE:
            facts.append(fact.groups())
        elif found := re.search(rule, sentence):
            rules.append((found[1], found[3], not found[2]))
    return facts, rules


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("n", HOPS)
def test_answers_are_what_a_forward_chainer_makes_of_the_words(n, split):
    for question in hops.generate(hops.MADE, n, split, 24, 5):
        facts, rules = told(question.context)
        assert len(facts) == 2
        assert len(rules) == 2 * n
        known = {category for person, category in facts if person == question.person}
        properties, steps = {}, 0
        while True:
            new = (
                {(head, yes) for body, head, yes in rules if body in known}
                - {(k, True) for k in known}
                - set(properties.items())
            )
            if not new:
                break
            steps += 1
            for head, yes in new:
                if head in hops.PROPERTIES:
                    properties[head] = yes
                else:
                    known.add(head)
        assert steps == n
        asked = re.search(r"(\w+) is (not )?(\w+)\.$", question.ask)
        assert asked[1] == question.person
        assert question.answer == (properties[asked[3]] == (not asked[2]))


def test_questions_are_balanced_and_worded_unlike_those_that_detectors_are_fitted_to(questions):
    for found in questions.values():
        assert sum(q.answer for q in found) == sum(q.denied for q in found) == len(found) // 2
        assert sum(q.affirms[q.person] for q in found) == len(found) // 2
    train, test = hops.TEMPLATES["train"], hops.TEMPLATES["test"]
    for part in ("fact", "rule", "ask"):
        assert not set(getattr(train, part)) & set(getattr(test, part))
    for colour, things in rail.THINGS.items():
        assert len(set(things)) == len(things) > rail.KNOWN, colour
    assert len(set(rail.FLAGS.values())) == len(rail.FLAGS)


def planted(message, concepts):
    """A detector of each concept, on a latent of its own, and readings of words that are true to the labels."""
    number = {name: i for i, name in enumerate(concepts)}
    ends = []
    for word in re.finditer(r"[\w-]+|[^\w\s]", message.text):  # as a tokenizer would: an invented name is two tokens
        ends += [word.start() + 2, word.end()] if word[0] in hops.MADE else [word.end()]
    readings = {(SAE, i): np.zeros(len(ends) + 1, np.float32) for i in number.values()}
    for phrase, concept in message.words.items():
        for found in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", message.text):
            readings[SAE, number[concept]][ends.index(found.end()) + 1] = 1
    return {name: Detector("single", Sum(((i, 1.0),)), 0.5) for name, i in number.items()}, readings, len(ends) + 1


def concluded(text, readings, n):
    ruleset = parse_ruleset(text)
    outcome, _ = advance(ruleset, State(), readings, n, n)
    return ruleset, {name for name, where in outcome.conclusions.items() if where[-1]}


def test_rules_conclude_the_answer_from_true_evidence_whatever_the_hops(questions):
    concepts = [*hops.MADE, *hops.PEOPLE, *hops.PROPERTIES, hops.ASKS, hops.DENIES]
    for n, found in questions.items():
        for question in found[:3]:
            detectors, readings, length = planted(question.message(), concepts)
            ruleset, at_end = concluded(hops.rules(question, detectors, SAE), readings, length)
            assert len(ruleset.rules) <= 64, n
            assert at_end & {"holds", "fails"} == {"holds" if question.answer else "fails"}
            assert at_end & {f"{x}.{c}" for x in question.chains for c in question.categories} == question.facts


def test_rules_of_a_question_do_not_say_who_is_what(questions):
    question = questions[3][0]
    other = hops.Question(
        question.context, question.ask, question.chains, question.affirms,
        next(x for x in question.chains if x != question.person), question.what, not question.denied,
    )  # fmt: skip
    detectors, _, _ = planted(question.message(), [*hops.MADE, *hops.PEOPLE, *hops.PROPERTIES, "asks", "denies"])
    assert hops.rules(question, detectors, SAE) == hops.rules(other, detectors, SAE)


@pytest.mark.parametrize("hints", rail.HINTS)
def test_flags_are_concluded_from_true_colours_and_their_order(hints):
    for train in rail.generate(hints, "test", 14, 1):
        detectors, readings, length = planted(train.message(), rail.COLOURS)
        _, at_end = concluded(rail.rules(train, detectors, SAE), readings, length)
        assert at_end == {train.country, f"says.{train.letter}"}


def test_a_push_has_its_dose_on_the_last_token_and_nowhere_else():
    torch.manual_seed(0)
    (tokens,) = batches([[1, 2, 3], [4, 5]], 2)
    h = torch.randn(2, 3, 8)
    delta = push({"holds": torch.randn(8)}, {0: frozenset(["holds"])}, 0.5)(h, tokens)
    row = tokens.index.index(0)
    assert float(delta[row, 2].norm()) == pytest.approx(0.5 * float(h[row, 2].norm()), rel=1e-5)
    delta[row, 2] = 0
    assert not delta.any()


def test_the_last_word_of_a_chain_of_thought_is_its_answer():
    assert verdict("It is true that Max is a gaft. Answer: False.") is False
    assert verdict("Answer: True") is True
    assert verdict("untrue") is None


def test_the_page_shows_the_tables_of_the_recorded_run():
    results = json.loads(COMMAND.results.read_text())
    written = tables(results)
    assert shown(COMMAND.page) == written.strip()
    cell = results["cells"]["hops-made-1"]
    share = 100 * cell["rules"]["weighted"]["right"] / cell["questions"]
    assert f"| **rules, 64 latents, fitted weights** | {share:.1f} [" in written


def test_detectors_are_kept_as_plain_json_and_come_back_as_they_were():
    summed = Detector("multi", Sum(((3, 0.1), (617, -0.3333))), float(np.float32(0.123456789)))
    tree = Detector("relation", Tree(Split(5, ">=", float(np.float32(0.7)), Leaf(1.0), Leaf(0.25))), 0.5)
    found = {"weighted": {"gaft": summed}, "relation": {"gaft": tree}}
    back = from_json(json.loads(json.dumps(as_json(found))))
    activation = {index: np.linspace(0, 3, 50, dtype=np.float32) for index in (3, 5, 617)}
    for how, kind in found.items():
        for name, detector in kind.items():
            assert back[how][name].kind == detector.kind
            scores = detector.scores(activation)
            assert np.array_equal(back[how][name].scores(activation), scores)
            assert np.array_equal(back[how][name].tokens(scores), detector.tokens(scores))
            assert back[how][name].threshold == detector.threshold
