"""PolySAE's folders, against the polynomial decoder written out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from sae_weights import Hook, SAEFormatError, load_sae
from sae_weights.formats import Hints
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws

D, N, K, TOKENS = 12, 48, 6, 40
RANKS = (10, 6, 4)
SCALE = 0.37


def tensors(draws, architecture, *, shared=False, order=3):
    R1, R2, R3 = RANKS
    state = {
        "W_enc": draws.normal(D, N, spread=0.3),
        "b_enc": draws.normal(N, spread=0.2),
        "b_dec": draws.normal(D, spread=0.5),
        "W_dec": draws.uneven(N, D),  # nobody reads it
    }
    for i, rank in enumerate((R1, R2, R3), start=1):
        used = i <= order
        state[f"U{i}"] = draws.normal(N, rank, spread=0.3) if used and not shared else torch.zeros(N, rank)
        state[f"C{i}"] = draws.normal(D, rank) if used else torch.zeros(D, rank)
        if i > 1:
            state[f"lambda{i}"] = draws.normal(1)[0] if used else torch.tensor(0.0)
    if shared:
        state["U_shared"] = draws.normal(N, R1, spread=0.3)
    if architecture == "poly_jumprelu":
        state["threshold"] = draws.normal(N, spread=0.4).abs()
    if architecture in ("poly_batchtopk", "poly_matryoshka"):
        state["topk_threshold"] = torch.tensor(0.6, dtype=torch.float64)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write(folder, state, architecture, *, shared=False, order=3, **settings):
    folder.mkdir(parents=True)
    save_file(state, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "k": K,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "poly_rank": None,
        "poly_ranks": list(RANKS),
        "poly_order": order,
        "shared_u": shared,
        "lambda2_init": -0.5,
        "lambda3_init": 0.5,
        "metadata": {"sae_lens_version": "6.22.1", "model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre"},
    }
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    return folder


def write_small(folder):
    """One for tests of other modules."""
    return write(folder, tensors(Draws(0), "poly_jumprelu"), "poly_jumprelu")


def write_shared(folder):
    """One for tests of other modules."""
    return write(folder, tensors(Draws(0), "poly_topk", shared=True), "poly_topk", shared=True)


def decoded(state, f, *, shared, order):
    _, R2, R3 = RANKS
    U1 = state["U_shared"] if shared else state["U1"]
    U2, U3 = (U1[:, :R2], U1[:, :R3]) if shared else (state["U2"], state["U3"])
    total = state["b_dec"] + f @ U1 @ state["C1"].T
    if order >= 2:
        total = total + state["lambda2"] * ((f @ U1)[:, :R2] * (f @ U2)) @ state["C2"].T
    if order >= 3:
        cubic = (f @ U1)[:, :R3] * (f @ U2)[:, :R3] * (f @ U3)
        total = total + state["lambda3"] * cubic @ state["C3"].T
    return total


def encoded(state, x, architecture, *, centred):
    pre = (x - state["b_dec"] if centred else x) @ state["W_enc"] + state["b_enc"]
    if architecture == "poly_topk":
        top = pre.topk(K)
        return torch.zeros_like(pre).scatter(-1, top.indices, torch.relu(top.values))
    threshold = state["threshold"] if architecture == "poly_jumprelu" else state["topk_threshold"].float()
    return torch.relu(pre) * (pre > threshold)


@pytest.mark.parametrize("architecture", ["poly_topk", "poly_jumprelu", "poly_batchtopk", "poly_matryoshka"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_folder_is_its_equation(tmp_path, architecture, shared, order):
    draws = Draws(order)
    state = tensors(draws, architecture, shared=shared, order=order)
    centred = order != 2
    folder = write(
        tmp_path / "p", state, architecture, shared=shared, order=order, apply_b_dec_to_input=centred, poly_order=order
    )
    sae = load_sae(folder)
    x = draws.tokens(TOKENS, D)
    f = encoded(state, x, architecture, centred=centred)
    x_hat = decoded(state, f, shared=shared, order=order)
    feature = int((f != 0).sum(dim=0).argmax())
    edited = f.clone()
    edited[:, feature] = 2.5
    check_agreement(sae, x, f, x_hat, edited=(feature, 2.5, decoded(state, edited, shared=shared, order=order)))
    assert (sae.architecture, sae.hook) == ("polysae", Hook("resid_pre", 8))
    assert not sae.additive


def test_a_constant_input_scale_is_folded_into_what_the_decoder_writes(tmp_path):
    draws = Draws(7)
    state = tensors(draws, "poly_topk")
    folder = write(tmp_path / "p", state, "poly_topk", normalize_activations="expected_average_only_in")
    sae = load_sae(folder, hints=Hints(norm_scaling_factor=SCALE))
    x = draws.tokens(TOKENS, D)
    f = encoded(state, x * SCALE, "poly_topk", centred=True)
    x_hat = decoded(state, f, shared=False, order=3) / SCALE
    edited = f.clone()
    edited[:, 3] = 2.5
    check_agreement(sae, x, f, x_hat, edited=(3, 2.5, decoded(state, edited, shared=False, order=3) / SCALE))


def refusal(path, **hints):
    with pytest.raises(SAEFormatError) as error:
        load_sae(path, hints=Hints(**hints))
    return str(error.value)


def test_what_does_not_fit_is_named_with_its_place(tmp_path):
    state = tensors(Draws(1), "poly_topk")
    assert "architecture" in refusal(write(tmp_path / "1", state, "poly_gated"))
    assert "'k'" in refusal(write(tmp_path / "2", state, "poly_topk", k=N + 1))
    assert "norm_scaling_factor" in refusal(
        write(tmp_path / "3", state, "poly_topk", normalize_activations="expected_average_only_in")
    )
    assert "rescale_acts_by_decoder_norm" in refusal(
        write(tmp_path / "4", state, "poly_topk", rescale_acts_by_decoder_norm=True)
    )
    assert "threshold" in refusal(write(tmp_path / "5", state, "poly_jumprelu"))
    assert "U_shared" in refusal(write(tmp_path / "6", state, "poly_topk", shared=True))
    for number, missing in enumerate(("C2", "U3", "lambda2", "W_enc"), start=7):
        less = {name: tensor for name, tensor in state.items() if name != missing}
        assert missing in refusal(write(tmp_path / str(number), less, "poly_topk"))
    assert "poly_order" in refusal(write(tmp_path / "11", state, "poly_topk", poly_order=4))
    more = state | {"stray": torch.zeros(3)}
    assert "stray" in refusal(write(tmp_path / "12", more, "poly_topk"))
