"""Kissane's crosscoder between two models, against its equation."""

from __future__ import annotations

import json

import pytest
import torch

from sae_weights import Hook, SAEFormatError, load_sae
from sae_weights.formats import Hints
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws

D, N, TOKENS, MODELS = 12, 48, 40, 2


def tensors(draws):
    return {
        "W_enc": draws.normal(MODELS, D, N, spread=0.5),
        "W_dec": draws.normal(N, MODELS, D),
        "b_enc": draws.normal(N, spread=0.4),
        "b_dec": draws.normal(MODELS, D),
    }


def write(folder, state, weights="cc_weights.pt", config="cfg.json", **settings):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / weights)
    stated = {
        "d_in": D,
        "dict_size": N,
        "enc_dtype": "fp32",
        "model_name": "gemma-2-2b",
        "site": "resid_pre",
        "hook_point": "blocks.14.hook_resid_pre",
    }
    (folder / config).write_text(json.dumps(stated | settings))
    return folder


def write_small(folder):
    """One for tests of other modules."""
    return write(folder, tensors(Draws(0)))


@pytest.mark.parametrize("scale", [None, 0.27])
def test_two_models_are_read_one_after_the_other(tmp_path, scale):
    draws = Draws(1)
    state = tensors(draws)
    sae = load_sae(write(tmp_path / "cc", state), hints=Hints(norm_scaling_factor=scale))
    x = draws.tokens(TOKENS * MODELS, D).reshape(TOKENS, MODELS, D)
    s = scale or 1.0
    f = torch.relu(torch.einsum("bmd,mdn->bn", x * s, state["W_enc"]) + state["b_enc"])
    x_hat = (torch.einsum("bn,nmd->bmd", f, state["W_dec"]) + state["b_dec"]) / s
    check_agreement(sae, x.flatten(1), f, x_hat.flatten(1))
    assert sae.hooks == (Hook("resid_pre", 14),) * MODELS
    assert "crosscoder" in (sae.refusal or "")


def test_a_version_of_a_training_is_the_same_crosscoder(tmp_path):
    state = tensors(Draws(2))
    folder = write(tmp_path / "version_0", state, "3.pt", "3_cfg.json")
    hub = write(tmp_path / "hub", state)
    assert load_sae(folder / "3.pt").digest == load_sae(hub).digest


def refusal(path):
    with pytest.raises(SAEFormatError) as error:
        load_sae(path)
    return str(error.value)


def test_what_does_not_fit_is_named_with_its_place(tmp_path):
    state = tensors(Draws(1))
    for missing in state:
        folder = write(tmp_path / missing, {name: t for name, t in state.items() if name != missing})
        assert missing in refusal(folder)
    assert "W_dec" in refusal(write(tmp_path / "wide", state, d_in=D + 1))
    assert "W_dec" in refusal(write(tmp_path / "flat", state | {"W_dec": state["W_dec"].flatten(1)}))
    assert "stray" in refusal(write(tmp_path / "stray", state | {"stray": torch.zeros(3)}))
    (tmp_path / "wide" / "cfg.json").unlink()
    assert "cfg.json" in refusal(tmp_path / "wide")
