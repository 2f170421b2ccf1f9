"""`editserver sae import` and `inspect`: any format in, the layout that loads by row out, with what was checked."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from editserver.cli.sae import app
from sae_weights import SAE, Hook, load_sae, resolve, save_native, save_saelens
from tests.sae_weights.hub_server import Hub, serve

runner = CliRunner()
BUNDLED = "smollm2-135m/l15"


def run(*arguments):
    return runner.invoke(app, [str(one) for one in arguments])


def told(done):
    """The output without line breaks and frames."""
    return " ".join(done.output.replace("│", " ").split())


def unbroken(done):
    """The output without any space: for what is folded over lines."""
    return "".join(done.output.replace("│", "").split())


@pytest.fixture
def gemma(tmp_path):
    """A small dictionary in Gemma Scope's layout."""
    g = np.random.default_rng(0)
    d, n = 16, 96
    tensors = {
        "W_enc": g.normal(size=(d, n)),
        "W_dec": g.normal(size=(n, d)),
        "b_enc": g.normal(size=n),
        "b_dec": g.normal(size=d),
        "threshold": g.uniform(0.1, 1.0, size=n),
    }
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_96" / "average_l0_7"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: t.astype(np.float32) for name, t in tensors.items()})
    return folder


def matryoshka(tmp_path):
    g = torch.Generator().manual_seed(0)
    sae = SAE.from_tensors(
        architecture="matryoshka",
        hook=Hook("resid_post", 3),
        W_enc=torch.randn(48, 16, generator=g),
        W_dec=torch.randn(48, 16, generator=g),
        b_dec=torch.zeros(16),
        gate={"b_enc": torch.zeros(48), "threshold": torch.full((48,), 0.2)},
        settings={"group_sizes": [8, 16, 24]},
    )
    return save_native(sae, tmp_path / "nested")


def test_a_published_file_becomes_a_folder_with_the_same_digest_and_its_hashes(gemma, tmp_path):
    done = run("import", gemma, tmp_path / "out")
    assert done.exit_code == 0, done.output
    copy, source = load_sae(tmp_path / "out"), load_sae(gemma)
    assert copy.digest == source.digest == load_sae(gemma).compute_digest()
    assert str(copy.hook) == "resid_post(20)"
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(copy.encode(x), source.encode(x))
    provenance = json.loads((tmp_path / "out" / "sae.json").read_text())["provenance"]
    content = (gemma / "params.npz").read_bytes()
    assert provenance == {
        "path": "average_l0_7",
        "files": [{"path": "params.npz", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}],
    }
    assert copy.digest in unbroken(done)
    assert "FAILED" not in done.output
    assert done.output.count(" ok ") == 5


def test_the_bundled_dictionary_is_imported_with_its_knowledge_and_loses_nothing(tmp_path):
    done = run("import", BUNDLED, tmp_path / "out")
    assert done.exit_code == 0, done.output
    copy, source = load_sae(tmp_path / "out"), resolve(BUNDLED)[1]
    assert copy.digest == source.digest
    assert copy.metadata["median_norm"] == source.metadata["median_norm"]
    assert (tmp_path / "out" / "features.sqlite").exists()
    # auto: these weights were stored as bfloat16, and half the bytes hold them.
    assert (tmp_path / "out" / "sae.safetensors").stat().st_size < 2.1 * 2 * 576 * 4608


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_bfloat16_is_asked_for_and_says_what_it_costs(gemma, tmp_path, dtype, exact):
    done = run("import", gemma, tmp_path / "out", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    assert (load_sae(tmp_path / "out").digest == load_sae(gemma).digest) is exact
    assert ("rows moved by at most" in told(done)) is not exact


def test_what_the_checkpoint_does_not_say_is_given(tmp_path):
    folder = matryoshka(tmp_path)
    done = run("import", folder, tmp_path / "out", "--groups", "2")
    assert done.exit_code == 0, done.output
    copy = load_sae(tmp_path / "out")
    assert (copy.n_features, copy.settings["group_sizes"]) == (24, [8, 16])
    refused = run("import", folder, tmp_path / "other", "--groups", "4")
    assert refused.exit_code == 2
    assert "this dictionary has 1..3" in told(refused)
    assert not (tmp_path / "other").exists()


def test_nothing_is_overwritten_without_being_asked(gemma, tmp_path):
    assert run("import", gemma, tmp_path / "out").exit_code == 0
    refused = run("import", BUNDLED, tmp_path / "out")
    assert refused.exit_code == 2
    assert "--force replaces it" in told(refused)
    assert load_sae(tmp_path / "out").n_features == 96
    assert run("import", BUNDLED, tmp_path / "out", "--force").exit_code == 0
    assert load_sae(tmp_path / "out").n_features == 4608
    refused = run("import", tmp_path / "out", tmp_path / "out", "--force")
    assert "the dictionary itself" in told(refused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "smollm2-135m/l16", "out"], "nearest bundled: smollm2-135m/l15"),
        (["import", BUNDLED, "out", "--format", "gemma_scop"], "did you mean 'gemma_scope'?"),
        (["import", BUNDLED, "out", "--hook", "the middle"], "expected one like"),
        (["import", BUNDLED, "out", "--dtype", "float8"], "float8"),
        (["inspect", "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_1"], "nearest in the registry"),
    ],
)
def test_what_cannot_be_is_refused_in_words(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in told(done)
    assert not (tmp_path / "out").exists()


def test_inspect_shows_what_it_is_and_that_it_works(gemma):
    done = run("inspect", gemma, "--verify")
    assert done.exit_code == 0, done.output
    sae = load_sae(gemma)
    norms = sae.W_dec.norm(dim=1)
    for shown in (
        "gemma_scope (Gemma Scope)",
        "jumprelu (JumpReLU",
        "row by row",
        "resid_post(20) (decoder layer 20)",
        "16 × 96",
        f"{float(norms.min()):.4g} … {float(norms.median()):.4g} … {float(norms.max()):.4g}",
        "editable yes",
    ):
        assert shown in told(done)
    assert sae.digest in unbroken(done)
    assert "ok the digest is that of the content" in told(done)


def test_inspect_of_an_import_shows_where_it_is_from(gemma, tmp_path):
    run("import", gemma, tmp_path / "out")
    done = run("inspect", tmp_path / "out", "--verify")
    assert done.exit_code == 0, done.output
    assert "average_l0_7" in told(done)
    assert hashlib.sha256((gemma / "params.npz").read_bytes()).hexdigest() in unbroken(done)


def test_inspect_fails_when_the_content_is_not_what_the_digest_names(gemma, tmp_path):
    run("import", gemma, tmp_path / "out")
    weights = tmp_path / "out" / "sae.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert run("inspect", tmp_path / "out").exit_code == 0
    done = run("inspect", tmp_path / "out", "--verify")
    assert done.exit_code == 1
    assert "FAILED the digest is that of the content" in told(done)


@pytest.fixture
def published(gemma, tmp_path, monkeypatch):
    """A Hub that has it under its public id."""
    hub = Hub()
    server = serve(hub)
    name = "layer_20/width_16k/average_l0_71/params.npz"
    commit = hub.commit("google/gemma-scope-2b-pt-res", {name: (gemma / "params.npz").read_bytes()})
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("EDITSERVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    yield commit
    server.shutdown()
    server.server_close()


def test_a_public_id_is_imported_and_says_of_every_byte_where_it_is_from(published, gemma, tmp_path):
    source = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    done = run("inspect", source, "--verify")
    assert done.exit_code == 0, done.output
    sha256 = hashlib.sha256((gemma / "params.npz").read_bytes()).hexdigest()
    for shown in (f"hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71@{published}", sha256, source):
        assert shown in unbroken(done)
    assert run("import", source, tmp_path / "out").exit_code == 0
    again = run("inspect", tmp_path / "out")
    assert sha256 in unbroken(again)
    assert published in unbroken(again)
    (cached,) = (tmp_path / "hf").glob("models--*/blobs/*")
    before = cached.stat()
    data = bytearray(cached.read_bytes())
    data[-40] ^= 1
    cached.write_bytes(data)
    os.utime(cached, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused = run("inspect", source, "--verify")
    assert refused.exit_code == 2
    assert "is not the file that the Hub has" in told(refused)


@pytest.mark.parametrize(
    ("hook", "hook_out", "message"),
    [
        (Hook("mlp_out", 3), None, "no: trained on mlp_out(3), a hook that is not served"),
        (Hook("mlp_in", 3), Hook("mlp_out", 3), "no: a transcoder: it reads mlp_in(3) and writes mlp_out(3)"),
    ],
)
def test_inspect_says_why_something_cannot_be_edited(tmp_path, hook, hook_out, message):
    g = torch.Generator().manual_seed(0)
    sae = SAE.from_tensors(
        architecture="relu",
        hook=hook,
        hook_out=hook_out,
        W_enc=torch.randn(20, 8, generator=g),
        W_dec=torch.randn(20, 8, generator=g),
        b_dec=torch.zeros(8),
        gate={"b_enc": torch.zeros(20)},
    )
    done = run("inspect", save_native(sae, tmp_path / "x"))
    assert done.exit_code == 0, done.output
    assert message in told(done)


def test_a_membership_rule_is_named_as_what_it_costs(tmp_path):
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
    done = run("inspect", save_saelens(sae, tmp_path / "x"))
    assert done.exit_code == 0, done.output
    assert "topk, k = 4" in told(done)
    assert "with the full-encode path" in told(done)
    assert "ok membership keeps k at most: k = 4" in told(done)
