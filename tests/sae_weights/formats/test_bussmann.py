"""The checkpoints of Bussmann's repositories and of their fork Top-AFA, against their equations written out."""

from __future__ import annotations

import json

import pytest
import torch

from sae_weights import Hook, SAEFormatError, load_sae
from sae_weights.formats import Hints
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws

D, N, K, TOKENS = 12, 48, 6, 40
GROUPS = [8, 16, 24]
THETA = 1.5


def tensors(draws, kind):
    state = {
        "b_dec": draws.normal(D, spread=0.5),
        "b_enc": draws.normal(N),  # not zero, so that using it where it is unused shows
        "W_enc": draws.normal(D, N),
        "W_dec": draws.uneven(N, D),
    }
    if kind == "jumprelu":
        state["jumprelu.log_threshold"] = draws.normal(N, spread=0.5)
    if kind in ("batch-topk", "global-matryoshka-topk"):
        state["threshold"] = torch.tensor(THETA)
    return state


def write(folder, state, kind, **settings):
    """What ``save_checkpoint`` writes: everything that is no number, text or flag becomes its text."""
    folder.mkdir(parents=True)
    torch.save(state, folder / "sae.pt")
    config = {
        "seed": 49,
        "seq_len": 128,
        "dtype": "torch.float32",
        "model_name": "gpt2-small",
        "site": "resid_pre",
        "layer": 8,
        "act_size": D,
        "dict_size": N,
        "device": "cuda:0",
        "dataset_path": "Skylion007/openwebtext",
        "input_unit_norm": True,
        "sae_type": kind,
        "top_k": K,
        "bandwidth": 0.001,
        "hook_point": "blocks.8.hook_resid_pre",
        "group_sizes": str(GROUPS),
    }
    (folder / "config.json").write_text(json.dumps(config | settings, indent=4))
    return folder


def write_small(folder):
    """One for tests of other modules."""
    return write(folder, tensors(Draws(0), "global-matryoshka-topk"), "global-matryoshka-topk")


def write_jumprelu(folder):
    """One for tests of other modules."""
    return write(folder, tensors(Draws(0), "jumprelu"), "jumprelu")


def write_top_afa(folder):
    """One for tests of other modules."""
    return write(folder, tensors(Draws(0), "topafa"), "topafa")


def layer_norm(x):
    """``preprocess_input``"""
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    std = centred.std(dim=-1, keepdim=True)
    return centred / (std + 1e-5), mean, std


def top(acts, k):
    kept = acts.topk(k)
    return torch.zeros_like(acts).scatter(-1, kept.indices, kept.values)


def activations(state, kind, x):
    """Each class's encode, at inference."""
    if kind == "jumprelu":
        pre = torch.relu(x @ state["W_enc"] + state["b_enc"])
        return pre * (pre > state["jumprelu.log_threshold"].exp())
    centred = (x - state["b_dec"]) @ state["W_enc"]
    if kind == "vanilla":
        return torch.relu(centred + state["b_enc"])
    acts = torch.relu(centred)
    if "threshold" in state:
        return torch.where(acts > state["threshold"], acts, 0.0)
    if kind == "batchtopk":  # one token at a time
        return torch.stack([top(row.flatten(), K) for row in acts])
    return top(acts, K)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("vanilla", "relu"),
        ("topk", "topk"),
        ("batchtopk", "topk"),
        ("batch-topk", "batchtopk"),
        ("global-matryoshka-topk", "matryoshka"),
        ("jumprelu", "jumprelu"),
    ],
)
def test_a_checkpoint_is_its_equation(tmp_path, kind, architecture, unit_norm):
    draws = Draws(len(kind))
    state = tensors(draws, kind)
    sae = load_sae(write(tmp_path / "c", state, kind, input_unit_norm=unit_norm))
    x = draws.tokens(TOKENS, D)
    seen, mean, std = layer_norm(x) if unit_norm else (x, 0.0, 1.0)
    f = activations(state, kind, seen)
    check_agreement(sae, x, f, (f @ state["W_dec"] + state["b_dec"]) * std + mean)
    assert sae.architecture == architecture
    assert sae.hook == Hook("resid_pre", 8)
    assert sae.refusal is None
    assert load_sae(tmp_path / "c" / "sae.pt").digest == sae.digest


def test_the_first_groups_are_the_active_groups(tmp_path):
    draws = Draws(3)
    state = tensors(draws, "global-matryoshka-topk")
    folder = write(tmp_path / "m", state, "global-matryoshka-topk", input_unit_norm=False)
    sae = load_sae(folder, hints=Hints(groups=2))
    x, n = draws.tokens(TOKENS, D), sum(GROUPS[:2])
    f = activations(state, "global-matryoshka-topk", x)[:, :n]
    check_agreement(sae, x, f, f @ state["W_dec"][:n] + state["b_dec"])


def test_a_threshold_may_be_given_where_the_checkpoint_has_none(tmp_path):
    draws = Draws(4)
    state = tensors(draws, "batchtopk")
    folder = write(tmp_path / "b", state, "batchtopk", input_unit_norm=False)
    sae = load_sae(folder, hints=Hints(threshold=THETA))
    x = draws.tokens(TOKENS, D)
    f = activations(state | {"threshold": torch.tensor(THETA)}, "batchtopk", x)
    check_agreement(sae, x, f, f @ state["W_dec"] + state["b_dec"])
    assert sae.approximates == f"topk (k = {K})"


@pytest.mark.parametrize("unit_norm", [True, False])
def test_top_afa_keeps_as_many_latents_as_the_norm_asks_for(tmp_path, unit_norm):
    draws = Draws(5)
    # Activations of the size that training brings about: their energy is around the input's.
    state = tensors(draws, "topafa") | {"W_enc": draws.normal(D, N, spread=0.06)}
    sae = load_sae(write(tmp_path / "t", state, "topafa", input_unit_norm=unit_norm))
    x = draws.tokens(TOKENS, D)
    seen, mean, std = layer_norm(x) if unit_norm else (x, 0.0, 1.0)
    centred = seen - state["b_dec"]
    acts = torch.relu(centred @ state["W_enc"])
    energy = (acts * state["W_dec"].norm(dim=-1)).square()
    order = energy.argsort(dim=-1, descending=True, stable=True)
    explained = energy.gather(-1, order).cumsum(-1)
    explained[:, -1] = 1e8
    k = (explained.sqrt() - centred.norm(dim=-1, keepdim=True)).abs().argmin(-1) + 1
    f = acts * torch.zeros_like(acts).scatter(1, order, (torch.arange(N) < k[:, None]).float())
    assert len(k.unique()) > 3
    check_agreement(sae, x, f, (f @ state["W_dec"] + state["b_dec"]) * std + mean)
    assert sae.architecture == "top_afa"


def refusal(path, **hints):
    with pytest.raises(SAEFormatError) as error:
        load_sae(path, hints=Hints(**hints))
    return str(error.value)


def test_what_does_not_fit_is_named_with_its_place(tmp_path):
    state = tensors(Draws(1), "topk")
    assert "sae_type" in refusal(write(tmp_path / "1", state, "gated"))
    assert "top_k" in refusal(write(tmp_path / "2", state, "topk", top_k=0))
    assert "top_k" in refusal(write(tmp_path / "3", state, "topk"), k=K + 1)
    assert "W_enc" in refusal(write(tmp_path / "4", state, "topk", act_size=D + 1))
    assert "log_threshold" in refusal(write(tmp_path / "5", state, "jumprelu"))
    matryoshka = tensors(Draws(1), "global-matryoshka-topk")
    assert "group_sizes" in refusal(write(tmp_path / "6", matryoshka, "global-matryoshka-topk", group_sizes="[8, a]"))
    assert "group_sizes" in refusal(write(tmp_path / "7", matryoshka, "global-matryoshka-topk", group_sizes="[8, 9]"))
    assert "threshold" in refusal(write(tmp_path / "8", state | {"threshold": torch.tensor(1.0)}, "topk"))
    assert "norm_scaling_factor" in refusal(write(tmp_path / "9", state, "topafa"), norm_scaling_factor=2.0)
    assert "hook" in refusal(write(tmp_path / "10", state, "topk", hook_point="head"))
    (tmp_path / "11").mkdir()
    (tmp_path / "11" / "config.json").write_text((tmp_path / "2" / "config.json").read_text())
    (tmp_path / "11" / "sae.pt").write_bytes(b"PK\x03\x04 truncated")
    assert "sae.pt" in refusal(tmp_path / "11")
