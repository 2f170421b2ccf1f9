"""``editserver fit map``: what its options and files must be, what counts as right, and what a report shows.

Whole runs on a real server are in tests/api/test_fit_map.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from editserver.cli.fit_map_forget import _figures
from editserver.cli.fit_map_job import Measured, Options, Outcome
from editserver.cli.fit_map_measure import (
    Entity,
    Question,
    is_right,
    parse_strengths,
    perplexity,
    read_entities,
    read_questions,
    recall,
)
from editserver.cli.fit_map_report import show, write_report
from editserver.cli.fit_map_server import Prompt, _batches
from editserver.cli.fit_map_unknown import TEMPLATES, check_templates, fill
from editserver.cli.main import app
from interventions.maps.fit_topic import TopicSettings, fit_topic
from interventions.maps.map import LatentMap
from interventions.maps.reading import FitError, Reading

EXAMPLES = Path(__file__).parents[2] / "examples" / "maps"
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
runner = CliRunner()


def run(*arguments: object):
    return runner.invoke(app, ["fit", "map", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


FORGET = ("forget", "x", "--forget", EXAMPLES / "cooking.jsonl", "--retain", EXAMPLES / "retain.jsonl", "--url", NOBODY)
UNKNOWN = ("unknown", "x", "--known", EXAMPLES / "known.txt", "--unknown", EXAMPLES / "invented.txt", "--url", NOBODY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (FORGET, "editserver serve demo"),
        ((*FORGET, "--questions", EXAMPLES / "questions.jsonl"), "name it with --mention, or use: fit map unknown"),
        ((*FORGET, "--strengths", "1,much"), "--strengths 1,much: expected numbers"),
        ((*FORGET, "--gate", "sum"), "--gate"),
        (("forget", "x", "--forget", "a"), "--retain"),
        ((*UNKNOWN, "--target", "Paris"), "editserver serve demo"),
        (UNKNOWN, "--target"),
        ((*UNKNOWN, "--target", "P", "--template", "{} is here"), "needs words before {}"),
        ((*UNKNOWN, "--target", "P", "--template", "about it"), "needs {} once"),
        ((*UNKNOWN, "--target", "P", "--questions", "none.jsonl"), "--questions none.jsonl:"),
    ],
)
def test_what_is_wrong_is_named_with_its_option(arguments, said) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["forget", "unknown"])
def test_help_teaches_with_an_example_whose_files_are_there(command) -> None:
    words = run(command, "--help").stdout.replace("│", " ").split()
    assert "smollm2-135m/l10" in words or "smollm2-135m/l15" in words
    named = {word for word in words if word.startswith("examples/maps/")}
    assert len(named) >= 2
    for name in named:
        assert (EXAMPLES.parent.parent / name).is_file(), name


def test_an_answer_is_right_as_whole_words_in_any_case_and_without_accents() -> None:
    question = Question("Which city?", ("São Paulo", "Rio"), "Brazil")
    assert is_right(question, "It is SAO PAULO.")
    assert is_right(question, "rio, I think")
    assert not is_right(question, "A period of time")
    assert not is_right(question, "Paulo")


def test_questions_and_entities_are_read_or_the_line_is_named(tmp_path) -> None:
    questions = read_questions(EXAMPLES / "questions.jsonl")
    assert len(questions) > 50
    assert sum(q.entity == "Albert Einstein" for q in questions) == 8
    bad = tmp_path / "bad.jsonl"
    for line, said in (
        ('{"question": "Who?"}', "line 2: expected"),
        ("[]", "line 2: expected"),
        ('{"question": "Is it Rome?", "answer": "Rome", "entity": "Italy"}', "the answer stands in the question"),
        ('{"question": "Who?", "answer": [], "entity": "e"}', "line 2: expected"),
    ):
        bad.write_text('{"question": "Where?", "answer": "here", "entity": "e"}\n' + line + "\n")
        with pytest.raises(FitError, match=said):
            read_questions(bad)
    entities = tmp_path / "e.jsonl"
    entities.write_text('"Oslo"\n{"name": "Oslo", "type": "city"}\n"Oslo"\n')
    assert read_entities(entities, "--known") == [Entity("Oslo", "entity"), Entity("Oslo", "city")]
    entities.write_text('{"title": "Oslo"}\n')
    with pytest.raises(FitError, match=r"--known .*line 1: expected"):
        read_entities(entities, "--known")
    entities.write_text("\n")
    with pytest.raises(FitError, match="is empty"):
        read_entities(entities, "--known")
    assert parse_strengths("2,0.5,1") == [0.5, 1.0, 2.0]
    with pytest.raises(FitError, match="other than 0"):
        parse_strengths("0,1")


def test_templates_hold_the_name_once_and_not_first() -> None:
    check_templates(TEMPLATES)
    assert fill("About {}.", "Oslo") == "About Oslo."
    assert fill([{"role": "user", "content": "Who is {}?"}], "Ann") == [{"role": "user", "content": "Who is Ann?"}]
    assert any(isinstance(template, list) for template in TEMPLATES)


def test_perplexity_compares_token_by_token_and_text_by_text() -> None:
    found = perplexity([[1.0, 3.0], [2.0]], [[2.0, 4.0], [2.0]], [1, 0])
    assert found.before == pytest.approx(math.exp(2.0))
    assert found.after == pytest.approx(math.exp(8 / 3))
    assert found.ratio == pytest.approx(math.exp(0.5))  # one text by 1 nat a token, the other by none
    assert found.low < found.ratio < found.high
    assert (found.texts, found.edited) == (2, 0.5)


def test_recall_counts_right_answers_of_both_runs() -> None:
    questions = [Question("?", ("yes",), "e")] * 4
    found = recall(questions, ["yes", "Yes!", "no", "yes"], ["no", "yes", "no", "maybe"])
    assert (found.before.value, found.after.value) == (0.75, 0.25)
    assert found.after.low < 0.25 < found.after.high


def test_batches_keep_order_and_bound_the_tokens_of_a_request() -> None:
    prompts = [Prompt(tuple(range(n)), "text") for n in (3000, 1000, 200, 5000, 10)]
    batches = list(_batches(prompts))
    assert [[len(p.token_ids) for p in batch] for batch in batches] == [[3000, 1000], [200], [5000], [10]]


@pytest.fixture
def outcome(tmp_path) -> Outcome:
    """The outcome of a real fit of drawn activations."""
    draws = torch.Generator().manual_seed(0)

    def texts(n: int, rate: float) -> list[Reading]:
        rates = torch.full((20,), 0.05)
        rates[:3] = rate
        return [Reading.of((torch.rand(40, 20, generator=draws) < rates) * 1.0, range(40)) for _ in range(n)]

    forget, retain = texts(30, 0.5), texts(60, 0.01)
    fit = fit_topic(forget, retain, 20, TopicSettings(latents=3))
    figures = _figures(fit, [["text"] * 30, ["text"] * 60])
    changes = {
        name: perplexity([[1.0, 2.0], [2.0]], [[1.0 + d, 2.0], [2.0 + 2 * d]], [1, 1])
        for name, d in (("forget", 1.0), ("retain", 0.0))
    }
    questions = [Question("?", ("yes",), "e")] * 2
    measured = Measured(1.0, changes, recall(questions, ["yes", "yes"], ["no", "yes"]))
    made = LatentMap("a model", "0" * 64, 10, fit.transfers, fit.scope, fit.gate)
    options = Options("calm", None, (1.0,), report=tmp_path)
    stored = {"name": "calm", "version": 2, "digest": made.digest}
    scores = {"to forget": fit.statistics_forget, "to retain": fit.statistics_retain}
    threshold = fit.gate.gate.threshold
    return Outcome(
        "forget", options, made, "a/l10", "http://h", stored, figures, (measured,), (), scores, threshold, fit.warnings
    )


def test_the_report_says_what_was_found_and_how_sure_it_is(outcome, capsys) -> None:
    show(outcome, Console(width=200), as_json=False)
    said = capsys.readouterr().out
    for words in ("gate opens", "false positives", "behind 1600 other tokens", "recall, target", "x1.000", "version 2"):
        assert words in said, words
    assert "Warning: no retain text is a chat" in said
    assert "curl http://h/v1/chat/completions" in said


def test_the_report_is_json_and_a_picture(outcome, capsys) -> None:
    write_report(outcome)
    show(outcome, Console(), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((outcome.options.report / "report.json").read_text()) == printed
    assert (outcome.options.report / "report.png").read_bytes().startswith(b"\x89PNG")
    assert printed["fit"]["gate"]["calibration"]["alpha"] == 0.05
    assert printed["measured"][0]["recall"]["target"]["after"]["value"] == 0.5
    assert printed["measured"][0]["perplexity"]["forget"]["ratio"] > 2
    assert set(printed["fit"]["latents"]) == {0, 1, 2}


def test_nothing_measured_is_a_report_too(outcome, capsys) -> None:
    bare = replace(outcome, measured=(), stored=None, options=replace(outcome.options, output=Path("calm.map")))
    show(bare, Console(width=200), as_json=False)
    write_report(bare)
    said = capsys.readouterr().out
    assert "Written to calm.map" in said
    assert "what it does" not in said
    assert np.all([path.stat().st_size > 0 for path in outcome.options.report.iterdir()])
