"""`editserver sae calibrate` on the bundled model: a threshold, what it costs, and a server's stand-in from it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from editserver.catalogue import CatalogueError, open_sae
from editserver.cli.sae import app
from sae_weights import SAE, Hook, resolve, save_native
from sae_weights.training.corpus import python_sources

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, [str(one) for one in arguments])


def told(done):
    return " ".join(done.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Source files of the standard library, one document a line."""
    path = tmp_path_factory.mktemp("text") / "own.jsonl"
    files = [d.text[:4000] for d, _ in zip(python_sources(longest=12_000), range(14), strict=False)]
    path.write_text("\n".join(json.dumps({"text": f}) for f in files))
    return path


def topk(folder, **changes):
    """The bundled dictionary's weights with membership by the 44 largest."""
    _, sae = resolve("smollm2-135m/l15")
    given = {"architecture": "topk", "hook": sae.hook, "k": 44, **changes}
    made = SAE.from_tensors(
        W_enc=sae.W_enc, W_dec=sae.W_dec, b_dec=sae.b_dec, gate={"b_enc": sae.gate["b_enc"]}, **given
    )
    return save_native(made, folder)


def test_the_threshold_is_measured_reported_and_used_only_when_asked_for(text, tmp_path):
    folder = topk(tmp_path / "mine")
    with pytest.raises(CatalogueError, match="has no calibrated threshold"):
        open_sae(str(folder)).approximate()
    done = run("calibrate", folder, "--text", text, "--tokens", "10k")
    assert done.exit_code == 0, done.output
    stated = json.loads((folder / "editserver.json").read_text())
    report = stated["calibration"]
    assert report["l0"] == pytest.approx(44, abs=0.01)
    assert report["l0_approximate"] == pytest.approx(44, rel=0.15)
    assert 0.4 < report["agreement"] < 1
    assert 0 < report["fvu"] < 0.5
    assert 0 < report["fvu_approximate"] < 0.5
    assert report["tokens"] > 3 * report["held_out_tokens"] > 1000
    assert (report["model"], report["text"]) == ("demo", ["own.jsonl"])
    assert f"{stated['calibrated_threshold']:.6g}" in told(done)
    assert "--approximate mine" in told(done)
    opened = open_sae(str(folder))
    assert opened.sae.approximates is None
    assert opened.sae.digest == report["digest"]
    stand_in = opened.approximate().sae
    assert stand_in.row_separable
    assert stand_in.approximates == "topk (k = 44)"
    assert float(stand_in.gate["threshold"][0]) == pytest.approx(stated["calibrated_threshold"])
    assert f"{stated['calibrated_threshold']:g}" in told(run("inspect", folder))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"hook": Hook("mlp_out", 3)}, [], "trained on mlp_out(3), a hook that is not served"),
        ({"architecture": "relu", "k": None}, [], "takes no calibrated threshold: it is row-separable already"),
        ({}, ["--tokens", "many"], "is not a number of tokens"),
        ({}, ["--tokens", "100"], "nothing could be held out"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(changes, options, message, text, tmp_path):
    folder = topk(tmp_path / "mine", **changes)
    done = run("calibrate", folder, "--text", text, *options)
    assert done.exit_code == 2
    assert message in told(done)
    assert not (folder / "editserver.json").exists()


def test_a_dictionary_of_another_model_is_refused(text, tmp_path):
    import torch

    g = torch.Generator().manual_seed(0)
    sae = SAE.from_tensors(
        architecture="topk",
        hook=Hook("resid_post", 3),
        W_enc=torch.randn(40, 8, generator=g),
        W_dec=torch.randn(40, 8, generator=g),
        b_dec=torch.zeros(8),
        gate={"b_enc": torch.zeros(40)},
        k=4,
    )
    done = run("calibrate", save_native(sae, tmp_path / "x"), "--text", text)
    assert done.exit_code == 2
    assert "reads 8 values per token, the model demo has 576" in told(done)
