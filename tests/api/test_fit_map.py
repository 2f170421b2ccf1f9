"""``editserver fit map`` against the shared real server: fitted, measured, stored, and used in a request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from editserver.cli.main import app
from editserver_client import Client
from interventions.maps.body import from_body, from_bytes
from interventions.maps.map import MentionTokens, TriggerTokens
from interventions.maps.transfer import Unit

EXAMPLES = Path(__file__).parents[2] / "examples" / "maps"
SAE = "smollm2-135m/l15"
runner = CliRunner()


def fit(*arguments: object):
    return runner.invoke(app, ["fit", "map", *map(str, arguments)], env={"COLUMNS": "200"})


def lines(path: Path, *kept: slice) -> str:
    rows = path.read_text().splitlines()
    return "\n".join(row for some in kept for row in rows[some]) + "\n"


@pytest.fixture(scope="module")
def client(server) -> Iterator[Client]:
    with Client(server.url) as found:
        yield found


@pytest.fixture(scope="module")
def forgotten(server, tmp_path_factory) -> SimpleNamespace:
    """Cooking forgotten: 18 texts against 30, chats in both."""
    folder = tmp_path_factory.mktemp("forget")
    (folder / "forget.jsonl").write_text(lines(EXAMPLES / "cooking.jsonl", slice(12), slice(28, 34)))
    (folder / "retain.jsonl").write_text(lines(EXAMPLES / "retain.jsonl", slice(18), slice(54, 66)))
    arguments = ["forget", "no-cooking", "--sae", SAE, "--forget", folder / "forget.jsonl", "--latents", 5]
    arguments += ["--retain", folder / "retain.jsonl", "--false-positive-rate", 0.2, "--url", server.url]
    result = fit(*arguments, "--strengths", 1, "--report", folder / "report", "--json")
    assert result.exit_code == 0, result.output
    return SimpleNamespace(arguments=arguments, folder=folder, report=json.loads(result.stdout.strip()))


def test_a_topic_is_told_apart_and_clamped_at_a_calibrated_threshold(forgotten, client) -> None:
    stored = client.library.maps.get("no-cooking")
    assert stored.digest == forgotten.report["map"]["digest"]
    made = from_body(stored.body)
    assert made.sae == client.sae(SAE).digest
    assert made.layer == 15
    assert made.scope == TriggerTokens(tuple(sorted(forgotten.report["fit"]["latents"])))
    assert all(t.unit is Unit.RESIDUAL_NORM and t.beta == -1.0 for t in made.transfers)
    assert made.gate.calibration.n == 10
    assert made.gate.calibration.alpha == 0.2
    held_out = forgotten.report["fit"]["held_out"]
    assert held_out["auroc"]["value"] > 0.9
    assert held_out["hit_rate_forget"] > 3 * held_out["hit_rate_retain"]
    assert set(held_out["opened_by_format"]) == {"chat", "text"}


def test_forgetting_costs_the_topic_more_than_other_text(forgotten) -> None:
    (measured,) = forgotten.report["measured"]
    change = measured["perplexity"]
    assert change["forget"]["ratio"] > 1.2
    assert change["forget"]["edited"] > change["retain"]["edited"]
    assert change["retain"]["ratio"] < change["forget"]["ratio"]
    assert (forgotten.folder / "report" / "report.png").stat().st_size > 10_000


def test_nothing_but_the_map_stays_in_the_library(forgotten, client) -> None:
    assert [entry.name for entry in client.library.maps.list() if "cooking" in entry.name] == ["no-cooking"]


def test_a_map_can_go_to_a_file_and_nowhere_else(forgotten, client, tmp_path) -> None:
    arguments = [argument if argument != "no-cooking" else "in-a-file" for argument in forgotten.arguments]
    result = fit(*arguments, "--no-measure", "--output", tmp_path / "a.map", "--gate", "cusum", "--tokens", "active")
    assert result.exit_code == 0, result.output
    made = from_bytes((tmp_path / "a.map").read_bytes())
    assert all(t.only_if_active for t in made.transfers)
    assert made.report["measured"] == []
    assert "in-a-file" not in [entry.name for entry in client.library.maps.list()]


def test_an_entity_is_mapped_to_what_unknown_ones_are(server, client, tmp_path) -> None:
    (tmp_path / "known.txt").write_text(lines(EXAMPLES / "known.txt", slice(1, 15)))
    (tmp_path / "invented.txt").write_text(lines(EXAMPLES / "invented.txt", slice(30)))
    (tmp_path / "questions.jsonl").write_text(lines(EXAMPLES / "questions.jsonl", slice(2), slice(8, 10)))
    arguments = ["unknown", "no-einstein", "--sae", SAE, "--known", tmp_path / "known.txt", "--strengths", 2]
    arguments += ["--unknown", tmp_path / "invented.txt", "--target", "Albert Einstein", "--url", server.url]
    arguments += ["--template", "I read about {}", "--template", "They asked me about {}"]
    arguments += ["--questions", tmp_path / "questions.jsonl", "--answer-tokens", 12]
    result = fit(*arguments, "--report", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip())
    made = from_body(client.library.maps.get("no-einstein").body)
    assert isinstance(made.scope, MentionTokens)
    assert tuple(client.tokenize(" Albert Einstein", add_special_tokens=False).tokens) in made.scope.sequences
    assert {t.latent for t in made.transfers} == {
        latent for kind in ("known", "unknown") for latent in report["fit"]["latents"][kind]
    }
    assert report["fit"]["length_auroc"]["kept"]["value"] == 0.5
    (measured,) = report["measured"]
    moved = measured["probe_auroc"]["mapped latents"]
    assert moved["before"]["value"] > 0.5
    assert moved["after"]["value"] < moved["before"]["value"]
    assert measured["recall"]["target"]["before"]["n"] == measured["recall"]["others"]["before"]["n"] == 2
    assert {a["entity"] for a in report["answers"]} == {"Albert Einstein", "Isaac Newton", "Charles Darwin"}
    asked = {"interventions": [{"type": "remap", "map": "no-einstein"}], "temperature": 0, "max_tokens": 4}
    assert client.chat("Who was Albert Einstein?", **asked).receipt.receipt[0].fired >= 1
    assert client.chat("Who was Charles Darwin?", **asked).receipt.receipt[0].tokens_edited == 0, "no mention, no edit"


def test_a_server_side_mistake_is_named_with_its_option(server) -> None:
    result = fit("forget", "x", "--forget", "a b", "--retain", "c d", "--sae", "smollm2-135m/l16", "--url", server.url)
    assert result.exit_code == 2
    assert "--sae smollm2-135m/l16: the server has no such dictionary" in " ".join(result.stderr.split())
