"""`editserver sae train`, from a user's own text to a dictionary that loads, with its card; stopped and gone on."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from editserver.cli.sae import app
from sae_weights import load_sae
from sae_weights.training import run
from sae_weights.training.corpus import python_sources
from sae_weights.training.stream import Streamed
from sae_weights.training.trainer import State

runner = CliRunner()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few source files of the standard library, one document a line."""
    path = tmp_path_factory.mktemp("text") / "own.jsonl"
    files = [d.text[:6000] for d, _ in zip(python_sources(longest=12_000), range(30), strict=False)]
    path.write_text("\n".join(json.dumps({"text": f}) for f in files))
    return path


def train(text, out, work, *options, layers=("2",), tokens="40k"):
    command = ["train", "--out", str(out), "--work", str(work), "--text", str(text), "--tokens", tokens]
    for layer in layers:
        command += ["--layer", layer]
    command += ["--features", "96", "--k", "8", "--batch", "512", "--device", "cpu", *options]
    return runner.invoke(app, command)


def test_two_layers_from_one_pass_each_with_its_card(text, tmp_path):
    done = train(text, tmp_path / "out", tmp_path / "work", layers=("2", "4"))
    assert done.exit_code == 0, done.output
    for layer in (2, 4):
        folder = tmp_path / "out" / f"l{layer}"
        sae = load_sae(folder)
        assert (str(sae.hook), sae.architecture, sae.n_features) == (f"resid_post({layer})", "jumprelu", 96)
        card = json.loads((folder / "card.json").read_text())
        assert card["training_tokens"] == 40_000 // 512 * 512
        assert 0 < card["held_out"]["text"]["fvu"] < 1
        assert card["held_out"]["text"]["l0"] == pytest.approx(8, rel=0.5)
        assert card["curve"][-1]["tokens"] == card["training_tokens"]
        readme = (folder / "README.md").read_text()
        assert "The user's own files." in readme
        assert "Licence" not in readme
        assert "--layer 2 --layer 4 --features 96 --k 8" in readme
    assert "tokens/s" in done.output
    assert "min left" in done.output


def test_a_finished_run_goes_on_when_more_tokens_are_asked_for(text, tmp_path):
    assert train(text, tmp_path / "a", tmp_path / "work").exit_code == 0
    first = State.load(tmp_path / "work" / "layer-2.pt")
    done = train(text, tmp_path / "b", tmp_path / "work", tokens="60k")
    assert done.exit_code == 0, done.output
    second = State.load(tmp_path / "work" / "layer-2.pt")
    assert (first.step, second.step) == (40_000 // 512, 60_000 // 512)
    refused = train(text, tmp_path / "c", tmp_path / "work", "--lr", "0.01")
    assert refused.exit_code == 2
    assert "another recipe" in refused.output


@pytest.mark.parametrize(("objective", "architecture"), [("topk", "topk"), ("jumprelu", "jumprelu")])
def test_a_stream_keeps_no_activations_and_other_objectives_are_saved_as_themselves(
    objective, architecture, text, tmp_path, monkeypatch
):
    class Small(Streamed):
        """With a buffer of as many tokens as are trained on, not thirteen times as many."""

        def __init__(self, model, sequences, seed):
            super().__init__(model, sequences, seed, buffer=20_000)

    monkeypatch.setattr(run, "Streamed", Small)
    done = train(text, tmp_path / "out", tmp_path / "work", "--stream", "--objective", objective, tokens="20k")
    assert done.exit_code == 0, done.output
    assert load_sae(tmp_path / "out").architecture == architecture
    assert not list((tmp_path / "work").glob("*.bf16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "0"], "k = 0; expected 1..96"),
        (["--objective", "l1"], "batchtopk"),
        (["--tokens", "many"], "is not a number of tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, text, tmp_path):
    done = train(text, tmp_path / "out", tmp_path / "work", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["--text", "--chats"])
def test_a_file_that_is_not_there_is_named(option, text, tmp_path):
    done = train(text, tmp_path / "out", tmp_path / "work", option, str(tmp_path / "missing.jsonl"))
    assert done.exit_code == 2
    shown = "".join(done.output.replace("│", "").split())
    assert option in shown
    assert "missing.jsonl" in shown
    assert not (tmp_path / "work").exists()


def test_a_layer_that_the_model_lacks_is_refused(text, tmp_path):
    done = train(text, tmp_path / "out", tmp_path / "work", layers=("30",))
    assert done.exit_code == 2
    assert "layer 30; the model has 0..29" in done.output
