"""`editserver calibrate`: options become the intervention that a request would carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from editserver.cli.calibrate import build
from editserver.cli.main import app

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
NONE: dict[str, Any] = {
    "sae": None,
    "feature": None,
    "op": "steer",
    "vector": None,
    "intervention": None,
    "strength": 1.0,
}
runner = CliRunner()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sae": "a/b", "feature": 0}, {"type": "steer", "sae": "a/b", "feature": 0, "strength": 1.0}),
        ({"vector": "v", "strength": -2.0}, {"type": "steer", "vector": "v", "strength": -2.0}),
        (
            {"sae": "a/b", "feature": 7, "op": "set", "strength": 3.0},
            {"type": "edit_features", "sae": "a/b", "features": [{"index": 7, "op": "set", "value": 3.0}]},
        ),
        ({"intervention": '{"type": "steer", "vector": "v"}'}, {"type": "steer", "vector": "v"}),
    ],
)
def test_options_become_the_intervention_of_a_request(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert build(**(NONE | options)) == expected


def test_an_intervention_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "edit.json"
    file.write_text(json.dumps({"type": "steer", "vector": "v", "tokens": "prompt"}))
    assert build(**(NONE | {"intervention": str(file)}))["tokens"] == "prompt"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "got none"),
        (["--vector", "v", "--intervention", "{}"], "--vector and --intervention"),
        (["--sae", "a/b"], "go together"),
        (["--feature", "0"], "go together"),
        (["--sae", "a/b", "--feature", "1", "--op", "ablate"], "steer, set, add"),
        (["--intervention", "[1]"], "neither JSON"),
        (["--intervention", "{"], "not JSON"),
        (["--intervention", "no/such/file"], "neither JSON"),
        (["--vector", "v", "--url", NOBODY], "editserver serve demo"),
    ],
)
def test_what_is_no_intervention_ends_with_2_and_says_why(arguments: list[str], said: str) -> None:
    result = runner.invoke(app, ["calibrate", "--prompt", "Hi", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_help_teaches_with_an_example() -> None:
    result = runner.invoke(app, ["calibrate", "--help"], env={"COLUMNS": "160"})
    assert "editserver calibrate --sae" in result.output
