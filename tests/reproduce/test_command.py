"""What every study shares: cells that are measured once, and a command that records full runs alone."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from reproduce.cells import measured
from reproduce.command import Command
from reproduce.page import BEGIN, END, shown
from reproduce.wheel import DataError

QUIET = Console(file=io.StringIO())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    asked = []

    def cell(name, say):
        say("thinking")
        asked.append(name)
        return {"τ": name}

    def interrupted(say):
        raise KeyboardInterrupt

    first, second = (lambda say: cell("first", say)), (lambda say: cell("second", say))
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "new", {"first": first, "second": interrupted}, QUIET)
    found = measured(tmp_path / "new", {"first": first, "second": second}, QUIET)
    assert asked == ["first", "second"]
    assert list(found.items()) == [("first", {"τ": "first"}), ("second", {"τ": "second"})]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["first.json", "second.json"]


def test_what_a_cell_draws_does_not_depend_on_the_cells_before_it(tmp_path):
    def drawn(say):
        return torch.rand(3).tolist()

    after_another = measured(tmp_path / "two", {"a": drawn, "b": drawn}, QUIET)
    assert measured(tmp_path / "one", {"b": drawn}, QUIET)["b"] == after_another["b"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    places = {"results": "results.json", "page": "page.md", "picture": "picture.png"}
    for name, file in places.items():
        monkeypatch.setattr(Command, name, tmp_path / file)
    (tmp_path / "page.md").write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    return Command("none", lambda found: f"| {found['x']} |", lambda found, path: path.write_text("drawn"))


def run(command, measure, full, *arguments):
    command.carry_out(command.parser("A study.", "little").parse_args(arguments), measure, full)


def test_only_a_full_run_is_recorded(command, capsys):
    run(command, lambda: {"x": 1}, False, "--quick")
    assert capsys.readouterr().out == "| 1 |\n"
    assert not command.results.exists()
    assert shown(command.page) == ""
    run(command, lambda: {"x": 2}, True)
    assert capsys.readouterr().out == "| 2 |\nwritten: results.json, picture.png, page.md\n"
    assert json.loads(command.results.read_text()) == {"x": 2}
    assert shown(command.page) == "| 2 |"
    assert command.picture.read_text() == "drawn"
    run(command, lambda: pytest.fail("something was measured"), True, "--tables")
    assert capsys.readouterr().out == "| 2 |\n"


def test_texts_that_cannot_be_had_end_the_command_with_a_sentence(command):
    def without_texts():
        raise DataError("pip could not fetch them")

    with pytest.raises(SystemExit, match=r"^reproduce-none: pip could not fetch them$"):
        run(command, without_texts, True)
    assert not command.results.exists()
