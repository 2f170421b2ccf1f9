"""sparsify's folders mean to us what they mean to EleutherAI's own code."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_weights import Hook, SAEFormatError, load_sae
from sae_weights.formats import Hints
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws
from tests.sae_weights.oracle import needs_oracle, run_oracle

D, N, K, TOKENS = 12, 48, 6, 40
# Case → folder, settings, the architecture it is.
CASES = {
    "topk": ("layers.12", {}, "topk"),
    "raw decoder": ("layers.3", {"normalize_decoder": False, "multi_topk": True}, "topk"),
    "mlp": ("layers.15.mlp", {}, "topk"),
    "groupmax": ("h.4", {"activation": "groupmax"}, "groupmax"),
    "transcoder": ("layers.7.mlp", {"transcode": True}, "topk"),
    "skip transcoder": ("layers.7.mlp", {"transcode": True, "skip_connection": True}, "topk"),
    "skip": ("layers.8", {"skip_connection": True}, "topk"),
    "groupmax transcoder": ("layers.0.mlp", {"activation": "groupmax", "transcode": True}, "groupmax"),
}


def tensors(draws, **settings):
    state = {
        "encoder.weight": draws.normal(N, D),
        "encoder.bias": draws.normal(N, spread=0.4),
        "W_dec": draws.uneven(N, D),
        "b_dec": draws.normal(D),
    }
    return state | ({"W_skip": draws.normal(D, D, spread=0.3)} if settings.get("skip_connection") else {})


def write(folder, state, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "sae.safetensors")
    config = {
        "activation": "topk",
        "expansion_factor": 4,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
    }
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparsify")
    for seed, (case, (name, settings, _)) in enumerate(CASES.items()):
        draws = Draws(seed)
        folder = write(root / case / name, tensors(draws, **settings), **settings)
        save_file({"x": draws.tokens(TOKENS, D)}, folder / "x.safetensors")
    run_oracle("oracle_sparsify.py", root)
    return root


@needs_oracle[0]
@needs_oracle[1]
@pytest.mark.parametrize("case", CASES)
def test_a_folder_means_what_the_authors_code_computes(work, case):
    name, _, architecture = CASES[case]
    sae = load_sae(work / case / name)
    answers = load_file(work / case / name / "answers.safetensors")
    check_agreement(sae, answers["x"], answers["f"], answers["x_hat"])
    assert (sae.architecture, sae.k) == (architecture, K)


@pytest.mark.parametrize(
    ("folder", "settings", "hook", "hook_out"),
    [
        ("layers.12", {}, Hook("resid_post", 12), None),
        ("h.12", {}, Hook("resid_post", 12), None),
        ("gpt_neox.layers.12", {}, Hook("resid_post", 12), None),
        ("layers.12/seed0", {}, Hook("resid_post", 12), None),
        ("layers.12.mlp", {}, Hook("mlp_out", 12), None),
        ("layers.12.self_attn", {}, Hook("attn_out", 12), None),
        ("h.3.mlp.act", {}, Hook("mlp.act", 3), None),
        ("layers.12.mlp", {"transcode": True}, Hook("mlp_in", 12), Hook("mlp_out", 12)),
        ("layers.12", {"transcode": True}, Hook("resid_pre", 12), Hook("resid_post", 12)),
    ],
)
def test_the_folder_names_the_module(tmp_path, folder, settings, hook, hook_out):
    sae = load_sae(write(tmp_path / folder, tensors(Draws(1)), **settings))
    assert (sae.hook, sae.hook_out) == (hook, hook_out)
    assert (sae.refusal is None) == (hook.edit_layer is not None and hook_out is None)


def test_a_signed_dictionary_of_2024_keeps_the_largest_of_either_sign(tmp_path):
    draws = Draws(9)
    state = tensors(draws)
    folder = write(tmp_path / "layers.5", state)
    old = {"expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": K, "signed": True, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(old))
    sae = load_sae(folder)
    x = draws.tokens(TOKENS, D)
    p = (x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]
    top = p.abs().topk(K).indices
    f = torch.zeros(TOKENS, N).scatter(1, top, p.gather(1, top))
    check_agreement(sae, x, f, f @ state["W_dec"] + state["b_dec"])
    assert sae.architecture == "abstopk"


def test_half_precision_weights_are_the_numbers_that_they_are(tmp_path):
    state = tensors(Draws(2))
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    full = write(tmp_path / "full" / "layers.5", {name: tensor.float() for name, tensor in half.items()})
    assert load_sae(write(tmp_path / "half" / "layers.5", half)).digest == load_sae(full).digest


def refusal(path, **hints):
    with pytest.raises(SAEFormatError) as error:
        load_sae(path, hints=Hints(**hints))
    return str(error.value)


def test_what_does_not_fit_is_named_with_its_place(tmp_path):
    state = tensors(Draws(1))
    assert "activation" in refusal(write(tmp_path / "layers.1", state, activation="relu"))
    assert "'k'" in refusal(write(tmp_path / "layers.2", state, k=0))
    assert "'k'" in refusal(write(tmp_path / "layers.3", state), k=K + 1)
    assert "W_skip" in refusal(write(tmp_path / "layers.4", state, skip_connection=True))
    assert "W_skip" in refusal(write(tmp_path / "layers.5", tensors(Draws(1), skip_connection=True)))
    assert "encoder.weight" in refusal(write(tmp_path / "layers.6", state, d_in=D + 1))
    assert "divisor" in refusal(write(tmp_path / "layers.7", state, activation="groupmax", k=5))
    assert "--hook" in refusal(write(tmp_path / "embed_tokens", state))
    transposed = state | {"W_dec": state["W_dec"].T.contiguous()}
    assert "W_dec" in refusal(write(tmp_path / "layers.8", transposed))
    (tmp_path / "layers.1" / "cfg.json").unlink()
    assert "cfg.json" in refusal(tmp_path / "layers.1")
