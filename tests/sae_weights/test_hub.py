"""Dictionaries on the Hub: the real client against a small Hub of our own on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from sae_weights import Hook, Origin, SAEFormatError, load_sae, resolve, save_saelens
from sae_weights.catalogue import locate
from sae_weights.hub import HubPath, fetch
from sae_weights.registry import Registry, registry, user_file
from tests.sae_weights.formats.makers import MAKERS
from tests.sae_weights.hub_server import Hub, serve

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:huggingface_hub.*")
REPO = "someone/dictionaries"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and a client that asks it; cache and records in this test's folder."""
    hub = Hub()
    server = serve(hub)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("EDITSERVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def unused_port():
    """A port at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def saved(make_sae, tmp_path):
    """Files of one SAELens folder: name → bytes."""

    def save(seed=0):
        folder = save_saelens(make_sae(seed=seed), tmp_path / f"made-{seed}")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return save


@pytest.fixture
def published(hub, saved):
    """Two dictionaries in one repository, and much that neither needs."""
    files = {"README.md": b"# dictionaries", "cfg.json.bak": b"{}", "other/notes.json": b"{}"}
    for layer, seed in ((3, 0), (4, 1)):
        files |= {f"res/layer_{layer}/{name}": data for name, data in saved(seed).items()}
        files[f"res/layer_{layer}/sparsity.safetensors"] = b"x" * 500
        files[f"res/layer_{layer}/plot.png"] = b"x" * 500
    commit = hub.commit(REPO, files)
    return hub, commit


def test_a_dictionary_is_downloaded_alone_and_is_what_was_published(published, make_sae):
    hub, commit = published
    name, sae = resolve(f"hf://{REPO}/res/layer_3")
    assert name == f"{REPO}/res/layer_3"
    assert sae.digest == make_sae(seed=0).digest
    assert hub.fetched() == ["cfg.json", "sae_weights.safetensors"]
    provenance = sae.metadata["provenance"]
    assert (provenance["repo"], provenance["path"], provenance["commit"]) == (REPO, "res/layer_3", commit)
    weights = next(f for f in provenance["files"] if f["path"].endswith(".safetensors"))
    content = hub.repos[REPO][commit]["res/layer_3/sae_weights.safetensors"]
    assert weights == {
        "path": "res/layer_3/sae_weights.safetensors",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert load_sae(sae.origin.path).digest == sae.digest  # another process opens it from the cache


def test_the_prefix_is_optional_where_nothing_else_can_be_meant(published):
    hub, _ = published
    name, _ = resolve(f"{REPO}/res/layer_4")
    assert name == f"{REPO}/res/layer_4"
    assert resolve(f"late={REPO}/res/layer_4@main")[0] == "late"
    hub.log.clear()
    for source in ("smollm2-135m/l16/x", "someone/dictionaries", "gemma-scope-2b-pt-res/layer_20/width_16k/typo"):
        with pytest.raises(SAEFormatError, match="neither a folder or file"):
            resolve(source)
    assert hub.log == []  # nothing was asked for


def test_a_file_may_be_named_itself(published, make_sae):
    hub, commit = published
    found = locate(f"hf://{REPO}/res/layer_3/cfg.json@{commit}")
    assert found.path.name == "cfg.json"
    assert hub.fetched() == ["cfg.json"]


def test_nothing_is_downloaded_twice(published):
    hub, _ = published
    resolve(f"hf://{REPO}/res/layer_3")
    hub.log.clear()
    resolve(f"hf://{REPO}/res/layer_3")
    assert [method for method, path in hub.log if "/resolve/" in path] == []
    assert len(hub.log) == 1  # what main is by now


def test_a_pinned_revision_stays_what_it_was(published, saved, make_sae):
    hub, first = published
    hub.refs[REPO, "v1"] = first
    second = hub.commit(REPO, {f"res/layer_3/{name}": data for name, data in saved(7).items()})
    assert second != first
    for revision, seed in ((None, 7), ("main", 7), ("v1", 0), (first, 0), (second, 7)):
        source = f"hf://{REPO}/res/layer_3" + (f"@{revision}" if revision else "")
        name, sae = resolve(source)
        assert sae.digest == make_sae(seed=seed).digest, revision
        assert name == f"{REPO}/res/layer_3"
        assert sae.metadata["provenance"]["revision"] == (revision or "main")
    with pytest.raises(SAEFormatError, match="has no branch, tag or commit 'v2'"):
        resolve(f"hf://{REPO}/res/layer_3@v2")


def test_content_that_is_not_what_the_hub_states_is_refused_and_stays_refused(published):
    hub, _ = published
    hub.spoilt.add("res/layer_3/sae_weights.safetensors")
    for _ in range(2):
        with pytest.raises(
            SAEFormatError, match=r"sae_weights\.safetensors is not the file .* expected sha256 .*delete"
        ):
            resolve(f"hf://{REPO}/res/layer_3")
    resolve(f"hf://{REPO}/res/layer_4")


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_file_that_changed_in_the_cache_is_an_error(published, name):
    found = locate(f"hf://{REPO}/res/layer_3")
    path = (found.path / name).resolve()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SAEFormatError, match=rf"{name} is not the file that the Hub has"):
        resolve(f"hf://{REPO}/res/layer_3")
    path.unlink()
    assert resolve(f"hf://{REPO}/res/layer_3")[1].n_features == 16


def test_a_cache_that_cannot_be_written_costs_a_hash_and_no_more(published, monkeypatch, tmp_path, make_sae, caplog):
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("EDITSERVER_CACHE", str(tmp_path / "taken"))
    for _ in range(2):
        assert resolve(f"hf://{REPO}/res/layer_3")[1].digest == make_sae(seed=0).digest
    assert "cannot be recorded" in caplog.text


def test_verify_reads_every_byte_again(published):
    found = locate(f"hf://{REPO}/res/layer_3")
    found.fetched.verify()
    path = (found.path / "sae_weights.safetensors").resolve()
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither size nor time gives it away
    with pytest.raises(SAEFormatError, match="expected sha256"):
        found.fetched.verify()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            f"hf://{REPO}/res/layer_5",
            r"someone/dictionaries/res has no 'layer_5'; nearest: res/layer_[34], res/layer_[34]",
        ),
        (f"hf://{REPO}/rez/layer_3", r"someone/dictionaries has no 'rez'; nearest: res"),
        (f"hf://{REPO}/res/layer_3/sae_weight.safetensors", r"nearest: res/layer_3/sae_weights\.safetensors"),
        (f"hf://{REPO}/res", r"no dictionary in this folder; below it: layer_3, layer_4"),
        (f"hf://{REPO}/other", r"no dictionary in this folder"),
        ("hf://someone/nothing/x", r"no repository someone/nothing that you may read"),
    ],
)
def test_a_place_that_holds_nothing_names_what_is_near(published, source, message):
    with pytest.raises(SAEFormatError, match=message):
        resolve(source)


def test_several_files_of_tensors_in_one_folder_have_to_be_chosen_from(hub):
    hub.commit(REPO, {f"layer{i}.sae.pt": b"x" for i in range(9)})
    with pytest.raises(SAEFormatError, match=r"9 files of tensors; name one of layer0\.sae\.pt, .*…"):
        resolve(f"hf://{REPO}")


def test_a_gated_repository_says_how_to_get_access(published):
    hub, _ = published
    hub.gated.add(REPO)
    with pytest.raises(SAEFormatError, match=r"asks for its terms to be accepted.*hf auth login"):
        resolve(f"hf://{REPO}/res/layer_3")


def test_without_a_connection_the_cache_serves(published, monkeypatch, make_sae, unused_port):
    _, commit = published
    resolve(f"hf://{REPO}/res/layer_3")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused_port}")
    for revision in ("", "@main", f"@{commit}"):
        assert resolve(f"hf://{REPO}/res/layer_3{revision}")[1].digest == make_sae(seed=0).digest
    with pytest.raises(SAEFormatError, match="the Hub cannot be reached"):
        resolve(f"hf://{REPO}/res/layer_4")
    with pytest.raises(SAEFormatError, match="not in the cache, and the Hub cannot be reached"):
        resolve(f"hf://{REPO}/res/layer_3@v1")


def test_offline_the_cache_serves_and_what_is_not_in_it_is_refused(published, monkeypatch, make_sae):
    hub, commit = published
    resolve(f"hf://{REPO}/res/layer_3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    for revision in ("", "@main", f"@{commit}"):
        assert resolve(f"hf://{REPO}/res/layer_3{revision}")[1].digest == make_sae(seed=0).digest
    for source, message in (
        (f"hf://{REPO}/res/layer_4", "res has no 'layer_4'|no dictionary"),
        (f"hf://{REPO}/res/layer_3@v1", "HF_HUB_OFFLINE is set"),
        ("hf://someone/else/x", "HF_HUB_OFFLINE is set"),
        (f"hf://{REPO}/res/layer_3@{'0' * 40}", "is not in the cache"),
    ):
        with pytest.raises(SAEFormatError, match=message):
            resolve(source)
    assert hub.log == []


def test_offline_what_another_program_downloaded_is_checked_by_the_names_of_its_blobs(published, monkeypatch, make_sae):
    from huggingface_hub import snapshot_download

    hub, _ = published
    snapshot_download(REPO, allow_patterns=["res/layer_4/*"], endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = locate(f"hf://{REPO}/res/layer_4")
    assert found.open().digest == make_sae(seed=1).digest
    path = (found.path / "sae_weights.safetensors").resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(SAEFormatError, match="is not the file that the Hub has"):
        locate(f"hf://{REPO}/res/layer_4")


def test_configuration_above_the_folder_comes_along(hub, saved):
    files = {f"a/b/layer_3/{name}": data for name, data in saved().items()}
    hub.commit(REPO, files | {"config.json": b"{}", "a/wandb-config.yaml": b"x: 1", "a/b/eval.json": b"{}"})
    found = fetch(HubPath.parse(f"hf://{REPO}/a/b/layer_3"))
    assert sorted(file.path for file in found.files) == [
        "a/b/layer_3/cfg.json",
        "a/b/layer_3/sae_weights.safetensors",
        "a/wandb-config.yaml",
        "config.json",
    ]


@pytest.mark.parametrize(
    ("source", "published", "needed"),
    [
        (
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            ["layer_20/width_16k/average_l0_71/params.npz", "layer_20/width_16k/average_l0_38/params.npz"],
            ["layer_20/width_16k/average_l0_71/params.npz"],
        ),
        (
            "gemma-scope-2-4b-pt-res/layer_17_width_16k_l0_medium",
            [
                "resid_post/layer_17_width_16k_l0_medium/config.json",
                "resid_post/layer_17_width_16k_l0_medium/params.safetensors",
            ],
            [
                "resid_post/layer_17_width_16k_l0_medium/config.json",
                "resid_post/layer_17_width_16k_l0_medium/params.safetensors",
            ],
        ),
        (
            "hf://google/gemma-scope-2-1b-pt/crosscoder/x",
            ["crosscoder/x/params_layer_7.safetensors", "crosscoder/x/params_layer_13.safetensors", "README.md"],
            ["crosscoder/x/params_layer_13.safetensors", "crosscoder/x/params_layer_7.safetensors"],
        ),
        (
            "llama_scope_lxr_8x/l0r_8x",
            ["Llama3_1-8B-Base-L0R-8x/hyperparams.json", "Llama3_1-8B-Base-L0R-8x/checkpoints/final.safetensors"],
            ["Llama3_1-8B-Base-L0R-8x/checkpoints/final.safetensors", "Llama3_1-8B-Base-L0R-8x/hyperparams.json"],
        ),
        (
            "llama_scope_r1_distill/l5r_800m_slimpajama",
            [
                f"800M-Slimpajama-0-OpenR1-Math-220k/L{i}R/{n}"
                for i in (5, 6)
                for n in ("config.json", "sae_weights.safetensors", "lm.json")
            ],
            [f"800M-Slimpajama-0-OpenR1-Math-220k/L5R/{n}" for n in ("config.json", "sae_weights.safetensors")],
        ),
        (
            "qwen-scope-3-8b-base-w64k-l50/layer3",
            ["config.json", *(f"layer{i}.sae.pt" for i in range(36))],
            ["config.json", "layer3.sae.pt"],
        ),
        (
            "goodfire-llama-3.1-8b-instruct",
            ["Llama-3.1-8B-Instruct-SAE-l19.pth", "feature_labels.json", ".gitattributes"],
            ["Llama-3.1-8B-Instruct-SAE-l19.pth"],
        ),
        (
            "gpt2-small-hook-z-kk/blocks.0.hook_z",
            [
                f"gpt2-small_L{i}_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9{n}"
                for i in (0, 1)
                for n in (".pt", "_cfg.json")
            ],
            [
                f"gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9{n}"
                for n in (".pt", "_cfg.json")
            ],
        ),
        (
            "llama-3.1-8b-instruct-andyrdt/resid_post_layer_3_trainer_1",
            [
                f"resid_post_layer_3/trainer_{i}/{n}"
                for i in (0, 1)
                for n in ("ae.pt", "config.json", "eval_results.json")
            ],
            ["resid_post_layer_3/trainer_1/ae.pt", "resid_post_layer_3/trainer_1/config.json"],
        ),
        (
            "mwhanna-qwen3-4b-transcoders/layer_3",
            ["config.yaml", "wandb-config.yaml", *(f"layer_{i}.safetensors" for i in range(36))],
            ["config.yaml", "layer_3.safetensors", "wandb-config.yaml"],
        ),
        (
            "mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_3",
            ["config.yaml", *(f"W_{part}_{i}.safetensors" for part in ("enc", "dec") for i in range(5))],
            ["W_dec_3.safetensors", "W_enc_3.safetensors", "config.yaml"],
        ),
        (
            "hf://EleutherAI/sae-llama-3-8b-32x/layers.23",
            ["config.json", *(f"layers.{i}/{n}" for i in (23, 24) for n in ("cfg.json", "sae.safetensors"))],
            ["config.json", "layers.23/cfg.json", "layers.23/sae.safetensors"],
        ),
        (
            "hf://pleask/itda/run",
            ["run/atoms.pt", "run/atom_indices.pt", "run/metadata.yaml", "run/x.png"],
            ["run/atom_indices.pt", "run/atoms.pt", "run/metadata.yaml"],
        ),
        ("hf://ckkissane/crosscoder-gemma", ["cc_weights.pt", "cfg.json", "other.pt"], ["cc_weights.pt", "cfg.json"]),
    ],
)
def test_only_the_files_that_the_layout_has_are_downloaded(source, published, needed, hub):
    entry = None if source.startswith("hf://") else registry().get(source)
    where = HubPath.parse(source) if entry is None else HubPath(entry.repo, entry.hub_path)
    hub.commit(where.repo, {name: name.encode() for name in published})
    found = fetch(where)
    assert sorted(file.path for file in found.files) == needed
    assert hub.fetched() == sorted({name.rpartition("/")[2] for name in needed})


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_of_every_format_is_on_the_hub_what_it_is_on_disk(name, hub, tmp_path):
    folder = tmp_path / "published"
    path = MAKERS[name](folder)
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    hub.commit("me/zoo", files | {"README.md": b"# a zoo"})
    place = path.relative_to(folder).as_posix()
    _, sae = resolve("hf://me/zoo" + ("" if place == "." else f"/{place}"))
    expected = load_sae(path)
    assert sae.digest == expected.digest
    assert (sae.origin.format, sae.hooks, sae.hook_out) == (expected.origin.format, expected.hooks, expected.hook_out)
    assert sae.origin.open().digest == expected.digest


@pytest.mark.parametrize(
    ("source", "maker", "hook"),
    [
        ("goodfire-llama-3.1-8b-instruct/layer_19", "goodfire", "resid_post(19)"),
        ("gpt2-small-hook-z-kk/blocks.5.hook_z", "connor_rob", "attn.z(5)"),
        ("llama-3.1-8b-instruct-andyrdt/resid_post_layer_7_trainer_1", "dictionary_learning", "resid_post(7)"),
        ("mwhanna-qwen3-4b-transcoders/layer_1", "circuit_tracer", None),
        ("gemma-scope-2-4b-pt-res/layer_17_width_16k_l0_medium", "gemma_scope_2", "resid_post(17)"),
    ],
)
def test_ids_of_the_registry_open_what_their_repositories_hold(source, maker, hook, hub, tmp_path):
    entry = registry().get(source)
    path = MAKERS[maker](tmp_path / "published")
    if path.is_file():  # under the published name, its configuration beside it
        stem = entry.hub_path.rpartition("/")[2].removesuffix(path.suffix)
        files = {entry.hub_path: path.read_bytes()}
        for other in path.parent.iterdir():
            if other != path:
                files[other.name.replace(path.stem, stem)] = other.read_bytes()
    else:
        files = {
            f"{entry.hub_path}/{file.relative_to(path).as_posix()}": file.read_bytes()
            for file in path.rglob("*")
            if file.is_file()
        }
    hub.commit(entry.repo, files)
    name, sae = resolve(source)
    assert name == source
    assert hook is None or str(sae.hook) == hook
    assert sae.metadata["provenance"]["registry"]["model"] == entry.model
    assert sae.metadata["model_name"]


def test_dictionaries_of_transformerlens_centred_models_centre_their_input(hub, make_sae, tmp_path):
    entry = registry().get("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    folder = save_saelens(make_sae("relu", hook=Hook("resid_pre", 8)), tmp_path / "x")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] = {"hook_name": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}
    (folder / "cfg.json").write_text(json.dumps(config))
    hub.commit(entry.repo, {f"{entry.path}/{file.name}": file.read_bytes() for file in folder.iterdir()})
    sae = resolve(entry.id)[1]
    assert sae.input_norm == "centre"
    assert load_sae(folder).input_norm == "none"
    told = json.loads(json.dumps(sae.origin.as_dict()))  # what a server tells its other processes
    assert Origin.from_dict(told).open().digest == sae.digest


def test_a_dictionary_of_no_supported_kind_is_refused_before_it_is_downloaded(hub):
    with pytest.raises(SAEFormatError, match=r"not supported: .*sequence"):
        resolve("temporal-sae-llama-3.1-8b/blocks.15.hook_resid_post")
    assert hub.log == []


def gemma_scope_files(n=24, d=8):
    """One Gemma Scope dictionary in its published layout."""
    g = np.random.default_rng(0)
    tensors = {
        "W_enc": g.normal(size=(d, n)),
        "W_dec": g.normal(size=(n, d)),
        "b_enc": g.normal(size=n),
        "b_dec": g.normal(size=d),
        "threshold": g.uniform(0.1, 1.0, size=n),
    }
    file = io.BytesIO()
    np.savez(file, **{name: t.astype(np.float32) for name, t in tensors.items()})
    return tensors, file.getvalue()


def test_an_id_of_the_registry_is_downloaded_and_knows_its_hook(hub):
    tensors, data = gemma_scope_files()
    hub.commit("google/gemma-scope-2b-pt-res", {"layer_20/width_16k/average_l0_71/params.npz": data})
    source = "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"
    name, sae = resolve(source)
    assert name == source
    assert (str(sae.hook), sae.architecture, sae.n_features) == ("resid_post(20)", "jumprelu", 24)
    assert torch.allclose(sae.rows([5]).encoder[0], torch.tensor(tensors["W_enc"][:, 5], dtype=torch.float32))
    assert sae.metadata["provenance"]["registry"]["neuronpedia"] == "gemma-2-2b/20-gemmascope-res-16k"
    assert "gemma-2-2b" in sae.metadata["model_name"]
    pinned = resolve(f"{source}@{sae.metadata['provenance']['commit']}")
    assert (pinned[0], pinned[1].digest) == (source, sae.digest)
    # The same place named on the Hub is known to the registry as well.
    name, same = resolve("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    assert name == "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    assert same.digest == sae.digest
    assert same.metadata["provenance"]["registry"]["id"].startswith("gemma-scope-2b-pt-res")


def test_the_registrys_factor_is_folded_in(hub, saved, make_sae, tmp_path):
    files = saved()
    config = json.loads(files["cfg.json"])
    config["normalize_activations"] = "expected_average_only_in"
    files["cfg.json"] = json.dumps(config).encode()
    hub.commit("me/scaled", {f"x/{name}": data for name, data in files.items()})
    text = "scaled: {model: m, repo_id: me/scaled, saes: [{id: a, path: x, norm_scaling_factor: 2.5}]}"
    Registry.of_yaml(text, "1").write(user_file())
    _, sae = resolve("scaled/a")
    plain = make_sae()
    assert torch.allclose(sae.rows([3]).encoder, 2.5 * plain.rows([3]).encoder)
    assert torch.allclose(sae.rows([3]).decoder, plain.rows([3]).decoder / 2.5)


def test_the_registrys_overrides_take_the_place_of_the_configs(hub, saved):
    hub.commit("me/unscaled", {f"x/{name}": data for name, data in saved().items()})
    text = """
    unscaled: {model: m, repo_id: me/unscaled, config_overrides: {normalize_activations: constant_norm_rescale},
               saes: [{id: a, path: x, norm_scaling_factor: 2.5}]}
    """
    Registry.of_yaml(text, "1").write(user_file())
    _, sae = resolve("unscaled/a")
    assert sae.input_norm == "constant_norm_rescale"
    # Not scaled by a constant: SAELens ignores the factor, and so does this.
    _, plain = resolve("hf://me/unscaled/x")
    assert plain.metadata["provenance"]["registry"]["id"] == "unscaled/a"
    assert sae.origin.open().digest == sae.digest


def test_the_environment_alone_decides_which_hub_is_asked(published, tmp_path, make_sae):
    hub, _ = published
    code = "import sys; from sae_weights import resolve; name, sae = resolve(sys.argv[1]); print(name, sae.digest, sep='\\n')"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, f"hf://{REPO}/res/layer_3"]
    expected = [f"{REPO}/res/layer_3", make_sae(seed=0).digest]
    online = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert online.stdout.split() == expected
    hub.log.clear()
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert subprocess.run(command, env=offline, capture_output=True, text=True, check=True).stdout.split() == expected
    assert hub.log == []
