"""`editserver rules check`: the normal form of a rule set, or what is wrong and where, with and without a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner, Result

from editserver.cli.main import app
from editserver.cli.rules import excerpt
from interventions.rules.reading import parse_ruleset

SAE = "smollm2-135m/l15"
TEXT = f"""# boats
proposition boats = feature({SAE}, 617) >= 4
rule topic: at least 2 of prompt(boats) -> latch sailing
rule odd: sailing and not seen(feature(smollm2-135m/l10, 5) > 1) -> strange
on sailing: do {{"type": "steer", "sae": "{SAE}", "feature": 617}} strength 4 for 20 tokens
on strange: flag
"""
JSON = {"rules": [{"label": "r", "if": "seen(a) and\n not nobody", "then": "c"}]}
runner = CliRunner()


def check(*arguments: str, given: str | None = None) -> Result:
    return runner.invoke(app, ["rules", "check", *arguments], input=given)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "boats.rules"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_normal_form_goes_to_stdout_and_the_rest_to_stderr(file: Path) -> None:
    result = check(str(file))
    assert result.exit_code == 0, result.output
    ruleset = parse_ruleset(TEXT)
    assert result.stdout == ruleset.text
    assert "2 propositions, 2 rules, 2 conclusions, 2 actions" in result.stderr
    assert ruleset.digest in result.stderr


def test_the_json_form_reads_back_and_is_itself_checked(file: Path) -> None:
    result = check(str(file), "--json")
    assert parse_ruleset(json.loads(result.stdout)) == parse_ruleset(TEXT)
    again = check("-", given=result.stdout)
    assert again.stdout == parse_ruleset(TEXT).text


def test_quiet_prints_nothing_where_all_is_well(file: Path) -> None:
    assert check(str(file), "-q").output == ""
    assert check("-", "--quiet", given="rule").exit_code == 1


def test_an_error_has_file_line_and_column_and_shows_the_line(file: Path) -> None:
    file.write_text(TEXT.replace("sailing and", "sailng and"), encoding="utf-8")
    result = check(str(file))
    assert result.exit_code == 1
    assert result.stdout == ""
    first, line, caret = result.stderr.splitlines()
    assert first.startswith(f"{file}:4:11: no proposition, conclusion or library concept is called 'sailng'.")
    assert line.index("sailng") == caret.index("^")


def test_an_error_in_json_has_the_path_and_the_line_of_the_expression() -> None:
    first, line, caret = check("-", given=json.dumps(JSON)).stderr.splitlines()
    assert first.startswith("<stdin>: rules[0].if:1:6: no proposition")
    assert line.index("a) and") == caret.index("^")
    result = check("-", given='{"rules": [\n {"if": "a"]}')
    assert result.stderr.startswith("<stdin>:2:12: not JSON")
    assert result.exit_code == 1
    assert check("-", given="[1]").stderr.startswith("<stdin>: expected an object")
    assert "nested" in check("-", given="[" * 100_000).stderr


def test_the_bundled_dictionaries_are_looked_up_when_asked(file: Path) -> None:
    assert check(str(file), "--bundled").exit_code == 0
    for old, new, message in [
        ("617) >=", "4608) >=", f":2:29: index 4608; {SAE} has 0..4607"),
        (f"feature({SAE}, 617)", "feature(smollm2-135m/l51, 617)", "Did you mean 'smollm2-135m/l15'?"),
        (f'"sae": "{SAE}"', '"sae": "smollm2-135m/l10"', ":5:4: the action on 'sailing' writes after layer 10"),
    ]:
        file.write_text(TEXT.replace(old, new), encoding="utf-8")
        assert check(str(file)).exit_code == 0
        result = check(str(file), "--bundled")
        assert (result.exit_code, message in result.stderr) == (1, True), result.stderr


def test_what_cannot_be_read_exits_with_2(tmp_path: Path) -> None:
    assert check(str(tmp_path / "nowhere")).exit_code == 2
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert check(str(tmp_path / "bytes")).exit_code == 2
    assert check("-", "--server", "http://127.0.0.1:9", "--bundled", given=TEXT).exit_code == 2
    assert "is the server running?" in check("-", "--server", "http://127.0.0.1:9", given=TEXT).stderr


def test_a_long_line_is_cut_around_the_column() -> None:
    line, caret = excerpt("x" * 500 + "HERE" + "y" * 500, 1, 501)
    assert len(line) < 120
    assert line[caret.index("^") :].startswith("HERE")
    assert (line[0], line[-1]) == ("…", "…")
    line, caret = excerpt("\t字字 $", 1, 5)
    assert caret.index("^") == 6  # two columns for each of the two wide letters


# against a server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's own route over HTTP, with the bundled dictionaries and an empty library; no engine is needed."""
    from editserver.api import errors, routes_rulesets
    from editserver.api.capacity import Capacity
    from editserver.api.state import EditState
    from editserver.catalogue import ServedCatalogue, ServedSAE
    from editserver.engine.config import EngineConfig
    from editserver.library import ConceptLibrary, MapLibrary, RulesetLibrary, VectorLibrary
    from editserver.settings import Settings
    from interventions.errors import InterventionError
    from interventions.limits import Limits
    from sae_weights import bundled, resolve

    folder = tmp_path_factory.mktemp("library")
    saes = {name: resolve(name)[1] for name in bundled()}
    catalogue = ServedCatalogue(
        d_model=576,
        n_layers=30,
        vocab_size=49_152,
        armed_layers=(10, 15, 20),
        limits=Limits(),
        max_dose=float("inf"),
        refuse_over_dose=False,
        saes={name: ServedSAE(name, sae.hook.layer, sae, True) for name, sae in saes.items()},
        library=VectorLibrary(folder),
        concepts=ConceptLibrary(folder),
        maps=MapLibrary(folder),
        rulesets=RulesetLibrary(folder),
        tokenizer=None,
    )
    api = FastAPI()
    api.include_router(routes_rulesets.router)
    api.add_exception_handler(InterventionError, errors.handle)
    config = EngineConfig(catalogue.armed_layers)
    api.state.editserver = EditState(config, Settings(), catalogue, Capacity(8192), "0", "model", None)
    running = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        thread.join(0.01)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(10)


def test_a_server_answers_with_its_normal_form(server: str, file: Path) -> None:
    result = check(str(file), "--server", server)
    assert result.exit_code == 0, result.output
    assert result.stdout == parse_ruleset(TEXT).text
    for example in ("voyage.rules", "homework.rules", "consultation.rules", "topics.json"):
        assert check(f"examples/rules/{example}", "--server", server).exit_code == 0
    json_form = check(str(file), "--json").stdout
    assert check("-", "--server", server, given=json_form).stdout == result.stdout


def test_what_a_server_refuses_is_shown_like_what_is_refused_here(server: str, file: Path) -> None:
    for old, new in [("sailing and", "sailng and"), ("latch", ""), ("-> strange", "> strange")]:
        file.write_text(TEXT.replace(old, new, 1), encoding="utf-8")
        assert check(str(file), "--server", server).stderr == check(str(file), "--bundled").stderr
    text = json.dumps(JSON)
    assert check("-", "--server", server, given=text).stderr == check("-", "--bundled", given=text).stderr
    file.write_text(TEXT.replace(f'"sae": "{SAE}", "feature": 617', '"vector": "nobody"'), encoding="utf-8")
    result = check(str(file), "--server", server)
    assert result.exit_code != 0
    assert "nobody" in result.stderr
