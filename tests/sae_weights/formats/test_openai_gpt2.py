"""OpenAI's GPT-2 autoencoders, against the equations of their model.py."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from sae_weights import Hook, SAEFormatError, load_sae
from sae_weights.formats import Hints
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws

D, N, K, TOKENS = 12, 48, 6, 40


def tensors(draws, activation="TopK"):
    """``Autoencoder.state_dict()``: parameters, statistics and the activation."""
    return OrderedDict(
        pre_bias=draws.normal(D),
        latent_bias=draws.normal(N, spread=0.4),
        stats_last_nonzero=torch.arange(N),
        latents_activation_frequency=torch.ones(N),
        latents_mean_square=torch.zeros(N),
        **{"encoder.weight": draws.normal(N, D), "decoder.weight": draws.uneven(N, D).T.contiguous()},
        activation=activation,
        activation_state_dict=OrderedDict(k=K, postact_fn="ReLU") if activation == "TopK" else OrderedDict(),
    )


def write(folder, state, layer=6):
    folder.mkdir(parents=True)
    torch.save(state, folder / f"{layer}.pt")
    return folder / f"{layer}.pt"


def write_small(folder):
    """One for tests of other modules."""
    return write(folder / "resid_post_mlp_v5_32k" / "autoencoders", tensors(Draws(0)))


def test_a_topk_autoencoder_reads_layer_normed_inputs(tmp_path):
    draws = Draws(1)
    state = tensors(draws)
    sae = load_sae(write(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders", state))
    x = draws.tokens(TOKENS, D)
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    seen = (x - mean) / (std + 1e-5)
    pre = (seen - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    top = pre.topk(K)
    f = torch.zeros_like(pre).scatter(-1, top.indices, torch.relu(top.values))
    x_hat = (f @ state["decoder.weight"].T + state["pre_bias"]) * std + mean
    check_agreement(sae, x, f, x_hat)
    assert (sae.architecture, sae.k, sae.input_norm) == ("topk", K, "layer_norm")
    assert sae.refusal is None


def test_a_relu_autoencoder_reads_inputs_as_they_are(tmp_path):
    draws = Draws(2)
    state = tensors(draws, "ReLU")
    sae = load_sae(write(tmp_path / "mlp_post_act" / "autoencoders", state))
    x = draws.tokens(TOKENS, D)
    f = torch.relu((x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"])
    check_agreement(sae, x, f, f @ state["decoder.weight"].T + state["pre_bias"])
    assert sae.hook == Hook("mlp.post", 6)


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("resid_post_mlp_v5_128k/autoencoders", Hook("resid_post", 6)),
        ("resid_post_attn_v5_32k/autoencoders", Hook("resid_mid", 6)),
        ("resid_delta_attn_v5_32k/autoencoders", Hook("attn_out", 6)),
        ("resid_delta_mlp_v4/autoencoders", Hook("mlp_out", 6)),
    ],
)
def test_the_folders_name_the_place(tmp_path, folder, hook):
    assert load_sae(write(tmp_path / folder, tensors(Draws(1)))).hook == hook


def test_the_activation_may_be_written_twice_as_the_authors_state_dict_does(tmp_path):
    state = tensors(Draws(1))
    once = load_sae(write(tmp_path / "resid_post_mlp", state))
    twice = state | {"activation.k": K, "activation.postact_fn": "ReLU"}
    assert load_sae(write(tmp_path / "resid_post_mlp_v5_32k", twice)).digest == once.digest


def refusal(path, **hints):
    with pytest.raises(SAEFormatError) as error:
        load_sae(path, hints=Hints(**hints))
    return str(error.value)


def test_what_does_not_fit_is_named_with_its_place(tmp_path):
    place = tmp_path / "resid_post_mlp_v5_32k"
    state = tensors(Draws(1))
    assert "--hook" in refusal(write(tmp_path / "elsewhere", state))
    assert "activation" in refusal(write(place / "1", state | {"activation": "Identity"}))
    identity = {"k": K, "postact_fn": "Identity"}
    assert "postact_fn" in refusal(write(place / "2", state | {"activation_state_dict": identity}))
    assert "activation_state_dict.k" in refusal(write(place / "3", state | {"activation_state_dict": {}}))
    assert "decoder.weight" in refusal(write(place / "4", {n: t for n, t in state.items() if n != "decoder.weight"}))
    assert "given k" in refusal(write(place / "5", state), k=K + 1)


def test_a_constant_scale_is_refused_where_tokens_are_normalised_and_folded_elsewhere(tmp_path):
    topk = write(tmp_path / "resid_post_mlp_v5_32k", tensors(Draws(1)))
    assert "token by token" in refusal(topk, norm_scaling_factor=2.0)
    draws = Draws(2)
    state = tensors(draws, "ReLU")
    relu = write(tmp_path / "resid_post_mlp", state)
    sae, scaled = load_sae(relu), load_sae(relu, hints=Hints(norm_scaling_factor=2.0))
    x = draws.tokens(TOKENS, D)
    f = sae.encode(2.0 * x)
    check_agreement(scaled, x, f, sae.decode_for(2.0 * x, f) / 2.0)
