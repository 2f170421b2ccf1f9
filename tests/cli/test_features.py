"""`editserver features`: found by words, shown with its contexts, without a server and without vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from editserver.cli.features import highlighted
from editserver.cli.main import app
from editserver.cli.remote import read_texts
from sae_weights.knowledge import FILE, Context, Feature, KnowledgeStore

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE's folder with knowledge of two of its eight features."""
    path = tmp_path_factory.mktemp("sae")
    violin = Feature(
        index=3,
        label="music and instruments",
        label_source="hand",
        density=0.012,
        max_activation=9.5,
        mean_activation=2.5,
        quantiles={"0.5": 2.0, "0.999": 8.0},
        contexts=(Context((" she", " played", " the", " violin", "\n"), (0.0, 1.0, 0.0, 9.5, 0.0), 3, "brown"),),
        promoted=((" music", 0.4), (" orchestra", 0.3)),
        suppressed=((" tax", -0.2),),
        neighbours=((5, 0.61),),
    )
    with KnowledgeStore.create(path / FILE, sae_digest="ab" * 32, n_features=8, meta={}) as writer:
        writer.add([violin, Feature(index=5, label="courts and [bold]law[/bold]", density=0.02)])
    return path


def test_search_finds_a_feature_by_its_label(folder: Path) -> None:
    result = runner.invoke(app, ["features", "search", "instruments", "--sae", str(folder)], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    assert "music and instruments" in result.output
    assert "1.2 %" in result.output
    assert "courts" not in result.output


def test_search_prints_the_contracts_items_as_json(folder: Path) -> None:
    result = runner.invoke(app, ["features", "search", "music", "--sae", str(folder), "--json"])
    (item,) = json.loads(result.output)
    assert item["sae"] == str(folder)
    assert {"index", "label", "density", "max_activation", "score"} <= set(item)
    assert item["index"] == 3


def test_a_search_without_a_hit_says_so_and_exits_with_1(folder: Path) -> None:
    result = runner.invoke(app, ["features", "search", "xyzzy", "--sae", str(folder)])
    assert result.exit_code == 1
    assert "xyzzy" in result.output


def test_show_prints_facts_contexts_and_neighbours_with_their_labels(folder: Path) -> None:
    result = runner.invoke(app, ["features", "show", str(folder), "3"], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    for part in (
        "music and instruments",
        "(hand)",
        "orchestra",
        "tax",
        "5 courts",
        "played the «violin»⏎",
        "brown",
        "99.9 % below 8",
    ):
        assert part in result.output, part


def test_labels_are_shown_as_they_are_not_as_markup(folder: Path) -> None:
    result = runner.invoke(app, ["features", "show", str(folder), "5"], env={"COLUMNS": "140"})
    assert "courts and [bold]law[/bold]" in result.output


def test_show_prints_the_contracts_card_as_json(folder: Path) -> None:
    card = json.loads(runner.invoke(app, ["features", "show", str(folder), "3", "--json"]).output)
    assert card["contexts"][0]["peak"] == 3
    assert card["promoted"][0] == {"token": " music", "weight": 0.4}
    assert card["neighbours"] == [{"index": 5, "label": "courts and [bold]law[/bold]", "cosine": 0.61}]
    assert card["quantiles"] == {"0.5": 2.0, "0.999": 8.0}


def test_a_feature_of_which_nothing_is_known_is_shown_all_the_same(folder: Path) -> None:
    result = runner.invoke(app, ["features", "show", str(folder), "0"])
    assert result.exit_code == 0, result.output
    assert "—" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "{folder}", "8"], "0..7"),
        (["show", "nope/l15", "3"], "no SAE"),
        (["search", "music", "--sae", "nope/l15"], "no SAE"),
        (["search", "music", "--url", NOBODY], "editserver serve demo"),
        (
            ["contrast", "--sae", "x/y", "--positive", "a b", "--negative", "c d", "--url", NOBODY],
            "editserver serve demo",
        ),
    ],
)
def test_what_cannot_be_done_ends_with_2_and_says_why(folder: Path, arguments: list[str], said: str) -> None:
    filled = [argument.replace("{folder}", str(folder)) for argument in arguments]
    result = runner.invoke(app, ["features", *filled], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_a_terminal_shows_activations_as_warmth() -> None:
    context = {"tokens": [" a", " b"], "activations": [0.0, 8.0], "peak": 1}
    text = highlighted(context, 8.0, plain=False)
    assert text.plain == " a b"
    assert [str(span.style) for span in text.spans] == ["black on rgb(255,170,0)"]
    assert highlighted(context, 8.0, plain=True).plain == " a «b»"


def test_texts_come_from_the_command_line_and_from_files(tmp_path: Path) -> None:
    lines, records = tmp_path / "t.txt", tmp_path / "t.jsonl"
    lines.write_text("one\n\n two \n", encoding="utf-8")
    chat = [{"role": "user", "content": "Hi"}]
    records.write_text("\n".join(map(json.dumps, ["three", {"text": "four"}, {"messages": chat}, chat])))
    given = ["a text", str(lines), str(records), "x" * 5000]
    assert read_texts(given, "--positive") == ["a text", "one", " two ", "three", "four", chat, chat, "x" * 5000]


@pytest.mark.parametrize("content", ["", "{", "3", '{"other": 1}'])
def test_a_file_without_texts_is_refused_by_its_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(content)
    arguments = ["features", "contrast", "--sae", "x/y", "--positive", str(file), "--negative", "c", "--url", NOBODY]
    result = runner.invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "--positive" in result.output


@pytest.mark.parametrize("command", [["search"], ["show"], ["contrast"]])
def test_every_command_teaches_with_an_example(command: list[str]) -> None:
    result = runner.invoke(app, ["features", *command, "--help"], env={"COLUMNS": "140"})
    assert result.exit_code == 0
    assert f"editserver features {command[0]}" in result.output
