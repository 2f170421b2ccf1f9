"""The registry of published dictionaries: every id leads to a place, known ids to the right one, slips to near ids."""

from __future__ import annotations

import lzma
import re
from collections import Counter

import pytest

from sae_weights import SAEFormatError
from sae_weights import registry as registry_module
from sae_weights.hub import HubPath
from sae_weights.registry import SHIPPED, Registry, registry, user_file

LOADERS = {
    "sae_lens",
    "gemma_2",
    "gemma_2_transcoder",
    "gemma_3",
    "llama_scope",
    "llama_scope_r1_distill",
    "dictionary_learning_1",
    "deepseek_r1",
    "qwen_scope",
    "goodfire",
    "mwhanna_transcoder",
    "mntss_clt_layer_transcoder",
    "connor_rob_hook_z",
    "temporal",
}

SMALL = """
one-release:
  conversion_func: qwen_scope
  model: Qwen/Qwen3-1.7B-Base
  repo_id: Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50
  saes:
  - {id: layer0, path: layer0.sae.pt, l0: 50}
  - {id: layer1, path: layer1.sae.pt}
single:
  conversion_func: null
  config_overrides: {hook_name: blocks.3.hook_resid_pre}
  model: gpt2-small
  repo_id: me/single
  saes: [{id: only, path: 7, norm_scaling_factor: 2.5, neuronpedia: gpt2-small/3-x}]
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDITSERVER_CACHE", str(tmp_path / "cache"))


def test_every_id_leads_to_a_repository_a_path_and_a_loader():
    found = registry()
    assert found.version == "6.54.12"
    assert (len(found.releases), len(found)) == (170, 13857)
    ids = Counter()
    for entry in found:
        where = HubPath.parse(f"hf://{entry.repo}/{entry.hub_path}")
        assert (where.repo, where.path, where.revision) == (entry.repo, entry.hub_path, None)
        assert entry.loader in LOADERS
        assert entry.model
        assert entry.id in found
        ids[entry.id] += 1
        hints = entry.hints()
        assert hints.model_name == entry.model
        if entry.loader in ("gemma_2", "gemma_2_transcoder", "goodfire", "deepseek_r1", "temporal"):
            assert re.fullmatch(r"blocks\.\d+\.[\w.]+|hook_embed", hints.hook), entry
        if entry.loader == "qwen_scope":
            assert hints.k in (50, 100)
    assert set(ids.values()) == {1}


@pytest.mark.parametrize(
    ("source", "repo", "path", "hook", "more"),
    [
        (
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            "google/gemma-scope-2b-pt-res",
            "layer_20/width_16k/average_l0_71",
            "blocks.20.hook_resid_post",
            {"loader": "gemma_2", "l0": 71},
        ),
        (
            "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical",
            "google/gemma-scope-2b-pt-res",
            "layer_20/width_16k/average_l0_71",
            "blocks.20.hook_resid_post",
            {"neuronpedia": "gemma-2-2b/20-gemmascope-res-16k"},
        ),
        (
            "gemma-scope-9b-pt-att-canonical/layer_0/width_16k/canonical",
            "google/gemma-scope-9b-pt-att",
            None,
            "blocks.0.attn.hook_z",
            {},
        ),
        (
            "gemma-scope-2-4b-pt-res/layer_17_width_16k_l0_medium",
            "google/gemma-scope-2-4b-pt",
            "resid_post/layer_17_width_16k_l0_medium",
            None,
            {"loader": "gemma_3"},
        ),
        (
            "goodfire-llama-3.1-8b-instruct/layer_19",
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
            "Llama-3.1-8B-Instruct-SAE-l19.pth",
            "blocks.19.hook_resid_post",
            {"model": "meta-llama/Llama-3.1-8B-Instruct"},
        ),
        (
            "mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_3",
            "mntss/clt-gemma-2-2b-2.5M",
            "W_enc_3.safetensors",
            None,
            {},
        ),
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", "jbloom/GPT2-Small-SAEs-Reformatted", None, None, {}),
    ],
)
def test_known_ids(source, repo, path, hook, more):
    entry = registry().get(source)
    assert entry.repo == repo
    assert path is None or entry.hub_path == path
    assert entry.hints().hook == hook
    assert {name: getattr(entry, name) for name in more} == more


def test_scaled_dictionaries_carry_their_factor():
    assert registry().get("llama_scope_lxr_8x/l0r_8x").hints().norm_scaling_factor > 1
    assert registry().get("qwen-scope-3-8b-base-w64k-l100/layer3").hints().k == 100


def test_a_release_with_one_dictionary_may_be_named_alone():
    assert registry().get("goodfire-llama-3.1-8b-instruct").sae_id == "layer_19"
    assert registry().get("gemma-scope-2b-pt-res") is None


def test_slips_find_what_was_meant():
    found = registry()
    assert found.get("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_72") is None
    near = found.nearest("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_72")
    assert "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71" in near
    assert found.nearest("gemma-scop-2b-pt-res/layer_20/width_16k/average_l0_71")[0].startswith(
        "gemma-scope-2b-pt-res/"
    )
    assert all(one in found for one in near)
    assert found.nearest("nothing-like-it/at-all") == []


def test_search_wants_every_word():
    found = [entry.id for entry in registry().search("qwen3-8b l100 layer35")]
    assert found == ["qwen-scope-3-8b-base-w64k-l100/layer35"]
    assert not list(registry().search("qwen3-8b no-such-word"))


def test_the_yaml_is_taken_over_and_a_refreshed_file_wins(tmp_path):
    made = Registry.of_yaml(SMALL, "9.9.9")
    assert made.get("single").as_dict() == {
        "id": "single/only",
        "loader": "sae_lens",
        "model": "gpt2-small",
        "neuronpedia": "gpt2-small/3-x",
        "norm_scaling_factor": 2.5,
        "overrides": {"hook_name": "blocks.3.hook_resid_pre"},
    }
    assert (made.get("single").path, made.get("single").hints().hook) == ("7", "blocks.3.hook_resid_pre")
    assert made.get("one-release/layer1").hub_path == "layer1.sae.pt"
    before = registry()
    made.write(user_file())
    assert (registry().version, len(registry()), registry().path) == ("9.9.9", 3, user_file())
    assert list(registry()) == list(made)
    assert before.version == "6.54.12"


def test_the_same_facts_give_the_same_bytes(tmp_path):
    shipped = Registry.read(SHIPPED)
    shipped.write(tmp_path / "again.xz")
    assert (tmp_path / "again.xz").read_bytes() == SHIPPED.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("[]", "expected a mapping"),
        ("a: {repo_id: x/y, model: m}", "release 'a': no list 'saes'"),
        ("a: {model: m, saes: [{id: i, path: p}]}", "release 'a': no 'repo_id'"),
        ("a: {repo_id: x/y, model: m, saes: [{id: i}]}", r"saes\[0\]: no 'id' or 'path'"),
        ("a/b: {repo_id: x/y, model: m, saes: [{id: i, path: p}]}", "a release's name has no '/'"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_file_that_is_no_registry_is_refused_by_release_and_key(text, message):
    with pytest.raises(SAEFormatError, match=message):
        Registry.of_yaml(text, "1")


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", lzma.compress(b"{}"), lzma.compress(b'{"version": 1, "releases": {"a": {}}}')]
)
def test_a_damaged_refreshed_file_names_itself_and_the_mend(data):
    user_file().parent.mkdir(parents=True)
    user_file().write_bytes(data)
    with pytest.raises(SAEFormatError, match=r"saelens\.json\.xz: .*editserver sae registry --refresh"):
        registry()
    assert registry_module.SHIPPED.exists()
