"""Releases that are single PyTorch files (Qwen-Scope, Goodfire, qresearch, Kissane & Krzyzanowski), by sae-lens' numbers."""

from __future__ import annotations

import shutil

import pytest
import torch

from sae_weights import Hints, Hook, SAEFormatError, load_sae
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.published import CONNOR_ROB, D, N, answer, random, save_pt, write_json
from tests.sae_weights.oracle import needs_oracle

CASES = {
    "qwen": ("qwen_scope", "topk", Hook("resid_post", 5), "Qwen/Qwen3-1.7B-Base"),
    "goodfire-8b": ("goodfire", "relu", Hook("resid_post", 19), "Llama-3.1-8B-Instruct"),
    "goodfire-70b": ("goodfire", "relu", Hook("resid_post", 50), "Llama-3.3-70B-Instruct"),
    "qresearch": ("goodfire", "relu", Hook("resid_post", 19), "DeepSeek-R1-Distill-Llama-8B"),
    "connor-rob": ("connor_rob", "relu", Hook("attn.z", 5), "gpt2-small"),
}


class TestOracle:
    pytestmark = needs_oracle

    @pytest.mark.parametrize("case", CASES)
    def test_a_published_file_means_to_us_what_it_means_to_sae_lens(self, case):
        path, answers = answer(case)
        sae = load_sae(path)
        assert (sae.origin.format, sae.architecture, sae.hook, sae.metadata["model_name"]) == CASES[case]
        assert sae.k == (7 if case == "qwen" else None)
        check_agreement(sae, **answers)


# Qwen-Scope

QWEN_CONFIG = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-8B-Base", "d_model": D, "d_sae": N, "k": 7}


def qwen(folder, layer=5, config=QWEN_CONFIG, seed=0):
    tensors = random(seed, W_enc=(N, D), b_enc=(N,), W_dec=(D, N), b_dec=(D,))
    save_pt(folder / f"layer{layer}.sae.pt", tensors)
    if config is not None:
        write_json(folder / "config.json", config)
    return tensors


def test_qwen_rectifies_and_then_keeps_the_k_largest(tmp_path):
    raw = qwen(tmp_path)
    x = torch.randn(30, D)
    p = (x @ raw["W_enc"].T + raw["b_enc"]).relu()
    top = p.topk(7, dim=-1)
    f = torch.zeros(30, N).scatter(-1, top.indices, top.values)
    check_agreement(load_sae(tmp_path), x, f, f @ raw["W_dec"].T + raw["b_dec"])


def test_of_a_folder_of_layers_one_is_chosen_by_its_file_or_its_hook(tmp_path):
    qwen(tmp_path, 5, seed=1)
    qwen(tmp_path, 12, seed=2)
    with pytest.raises(
        SAEFormatError, match=r"dictionaries of 2 layers; expected the file of one, e\.g\. .*layer5\.sae\.pt"
    ):
        load_sae(tmp_path)
    chosen = load_sae(tmp_path, hints=Hints(hook="blocks.12.hook_resid_post"))
    assert chosen.digest == load_sae(tmp_path / "layer12.sae.pt").digest
    with pytest.raises(SAEFormatError, match="are different places"):
        load_sae(tmp_path / "layer5.sae.pt", hints=Hints(hook="blocks.12.hook_resid_post"))


def test_qwens_k_is_in_the_config_or_the_repositorys_name_or_given(tmp_path):
    named = tmp_path / "SAE-Res-Qwen3.5-27B-W80K-L0_9"
    qwen(named, config=None)
    assert (load_sae(named).k, load_sae(named).metadata["model_name"]) == (9, "Qwen/Qwen3.5-27B")
    qwen(tmp_path / "copy", config=None)
    with pytest.raises(SAEFormatError, match=r"layer5\.sae\.pt: no config\.json beside it says how many"):
        load_sae(tmp_path / "copy")
    assert load_sae(tmp_path / "copy", hints=Hints(k=4)).k == 4
    qwen(tmp_path / "full")
    with pytest.raises(SAEFormatError, match=r"config\.json: field 'k' is 7; expected 4, as given"):
        load_sae(tmp_path / "full", hints=Hints(k=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "sae"}, "field 'model_type' is 'sae'; expected one of topk_sae"),
        ({"hook_point": "mlp_out"}, "field 'hook_point' is 'mlp_out'; expected one of resid_post"),
        ({"d_sae": 50}, r"field 'd_sae' is 50; expected 96, which is what layer5\.sae\.pt has"),
        ({"k": 0}, "field 'k' is 0; expected a whole number of at least 1"),
        ({"k": 97}, r"k: 97; expected 1\.\.96"),
    ],
)
def test_a_wrong_field_of_qwens_config_is_named(tmp_path, changes, message):
    qwen(tmp_path, config=QWEN_CONFIG | changes)
    with pytest.raises(SAEFormatError, match=message):
        load_sae(tmp_path)


# Goodfire, qresearch

LINEAR = {"encoder_linear.weight": (N, D), "encoder_linear.bias": (N,)}
LINEAR |= {"decoder_linear.weight": (D, N), "decoder_linear.bias": (D,)}


def test_goodfires_two_linear_layers(tmp_path):
    raw = random(1, **LINEAR)
    save_pt(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth", raw)
    x = torch.randn(30, D)
    f = (x @ raw["encoder_linear.weight"].T + raw["encoder_linear.bias"]).relu()
    sae = load_sae(tmp_path)  # the only such file of the folder
    check_agreement(sae, x, f, f @ raw["decoder_linear.weight"].T + raw["decoder_linear.bias"])
    given = load_sae(tmp_path, hints=Hints(hook="blocks.19.hook_resid_pre"))
    assert given.hook == Hook("resid_pre", 19)


def test_a_file_of_another_name_is_read_when_its_format_is_named(tmp_path):
    save_pt(tmp_path / "renamed.pt", random(1, **LINEAR))
    with pytest.raises(SAEFormatError, match="no known layout of an SAE"):
        load_sae(tmp_path / "renamed.pt")
    with pytest.raises(SAEFormatError, match="--hook"):
        load_sae(tmp_path / "renamed.pt", format="goodfire")
    sae = load_sae(tmp_path / "renamed.pt", format="goodfire", hints=Hints(hook="model.layers.3"))
    assert sae.hook == Hook("resid_post", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_linear.bias": None}, r"SAE-l19\.pth: no tensor 'decoder_linear\.bias'"),
        ({"encoder_linear.weight": torch.zeros(N, D + 1)}, "W_dec has width 24 and W_enc 25"),
        ({"optimizer.step": torch.zeros(3)}, r"tensor 'optimizer\.step' of shape \[3\] does not belong"),
    ],
)
def test_a_wrong_tensor_of_goodfires_is_named(tmp_path, changes, message):
    tensors = {name: t for name, t in (random(1, **LINEAR) | changes).items() if t is not None}
    save_pt(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth", tensors)
    with pytest.raises(SAEFormatError, match=message):
        load_sae(tmp_path)


class Explosive:
    def __reduce__(self):
        return (exec, ("raise SystemError('unpickled')",))


@pytest.mark.parametrize("name", ["layer5.sae.pt", "Llama-3.1-8B-Instruct-SAE-l19.pth", "run.pt"])
@pytest.mark.parametrize("content", ["code", "nothing", "half"])
def test_a_hostile_or_broken_file_is_refused_and_never_run(tmp_path, name, content):
    path = tmp_path / name
    write_json(tmp_path / "run_cfg.json", {"act_name": "blocks.5.attn.hook_z", "act_size": D, "dict_size": N})
    if content == "code":
        torch.save({"W_enc": Explosive(), "encoder_linear.weight": Explosive()}, path)
    else:
        save_pt(path, random(1, **LINEAR))
        path.write_bytes(b"" if content == "nothing" else path.read_bytes()[:1000])
    with pytest.raises(SAEFormatError, match=f"{name}: not a readable PyTorch file"):
        load_sae(path, hints=Hints(k=3))


# Kissane & Krzyzanowski


def attention(folder, **config):
    tensors = random(1, W_enc=(D, N), b_enc=(N,), W_dec=(N, D), b_dec=(D,))
    save_pt(folder / "run.pt", tensors)
    write_json(
        folder / "run_cfg.json",
        {"act_name": "blocks.5.attn.hook_z", "act_size": D, "dict_size": N, "model_name": "gpt2-small"} | config,
    )
    return tensors


def test_heads_are_taken_concatenated_and_centred_by_the_decoder_bias(tmp_path):
    raw = attention(tmp_path)
    sae = load_sae(tmp_path / "run.pt")
    x = torch.randn(30, D)
    f = ((x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"]).relu()
    check_agreement(sae, x, f, f @ raw["W_dec"] + raw["b_dec"])
    assert torch.equal(sae.encode(x.unflatten(-1, (4, 6))), sae.encode(x))
    assert "not served" in sae.refusal


def test_its_config_is_checked(tmp_path):
    attention(tmp_path, dict_size=5)
    with pytest.raises(SAEFormatError, match=r"run_cfg\.json: field 'dict_size' is 5; expected 96"):
        load_sae(tmp_path / "run.pt")
    attention(tmp_path, act_name="somewhere")
    with pytest.raises(SAEFormatError, match=r"field 'act_name' is 'somewhere'; expected a hook"):
        load_sae(tmp_path / "run.pt")
    shutil.copy(tmp_path / "run.pt", tmp_path / CONNOR_ROB[1])
    with pytest.raises(SAEFormatError, match="no known layout of an SAE"):
        load_sae(tmp_path / CONNOR_ROB[1])
