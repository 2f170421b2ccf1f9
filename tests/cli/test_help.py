"""``--help`` teaches: examples that can be typed as they stand, with files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from editserver.cli import fit_concept, rules
from editserver.cli.main import SERVE_EXAMPLES, app
from interventions.rules.reading import parse_ruleset

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["serve"], ["editserver serve demo --port 8000", "--limit", "--approximate", "--vllm-help"]),
        (["demo"], ["editserver serve demo"]),
        (["doctor"], ["editserver doctor demo --max-model-len 2048", "--selftest"]),
        (["rules", "check"], ["editserver rules check examples/rules/voyage.rules --bundled", "--server"]),
        (["fit", "concept"], ["editserver fit concept music --sae", "--detector", "--labels"]),
    ],
)
def test_a_command_shows_how_it_is_used(command: list[str], words: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    text = " ".join(done.output.replace("│", " ").split())
    for word in words:
        assert word in text, word


@pytest.mark.parametrize("examples", [SERVE_EXAMPLES, rules.EXAMPLES, fit_concept.EXAMPLES])
def test_the_files_of_the_examples_are_there(examples: str) -> None:
    for name in re.findall(r"examples/[\w./-]+", examples):
        assert (ROOT / name).is_file(), name


def test_the_rule_set_of_the_example_is_one() -> None:
    (text,) = re.findall(r"echo '(.*)'", rules.EXAMPLES)
    assert [action.conclusion for action in parse_ruleset(text).actions] == ["sailing"]
