"""Gemma Scope 2: folders as they were published, by sae-lens' numbers; several layers by the tutorial's equations."""

from __future__ import annotations

import pytest
import torch

from sae_weights import Hints, Hook, SAEFormatError, load_sae
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.published import (
    GEMMA_2_CONFIG,
    GEMMA_2_REPOSITORY,
    GEMMA_SCOPE_2,
    answer,
    random,
    sae_tensors,
    save,
    write_json,
)
from tests.sae_weights.oracle import needs_oracle

HOOKS = {
    "gemma2-resid": (Hook("resid_post", 17), None),
    "gemma2-resid-all": (Hook("resid_post", 3), None),
    "gemma2-attn": (Hook("attn.z", 17), None),
    "gemma2-mlp": (Hook("mlp_out", 17), None),
    "gemma2-no-config": (Hook("mlp_out", 22), None),
    "gemma2-transcoder": (Hook("pre_feedforward_layernorm.output", 17), Hook("mlp_out", 17)),
    "gemma2-affine": (Hook("pre_feedforward_layernorm.output", 17), Hook("mlp_out", 17)),
}
D, PER_LAYER = 8, 12


class TestOracle:
    pytestmark = needs_oracle

    @pytest.mark.parametrize("case", GEMMA_SCOPE_2)
    def test_a_published_folder_means_to_us_what_it_means_to_sae_lens(self, case):
        path, answers = answer(case)
        sae = load_sae(path)
        assert (sae.architecture, sae.hook, sae.hook_out) == ("jumprelu", *HOOKS[case])
        assert sae.metadata["model_name"] == "google/gemma-3-4b-pt"
        assert ("W_skip" in sae.extras) == (case == "gemma2-affine")
        assert (sae.refusal is None) == case.startswith("gemma2-resid")
        assert (sae.origin.format, load_sae(path / "params.safetensors").digest) == ("gemma_scope_2", sae.digest)
        check_agreement(sae, **answers)


def layer_tensors(layers, *, affine=False):
    """The files of several layers, as the tutorial stacks them."""
    made = []
    for layer in range(layers):
        tensors = {name.lower(): t for name, t in sae_tensors(70 + layer, D, PER_LAYER).items()}
        tensors |= random(90 + layer, w_dec=(PER_LAYER, layers, D))
        made.append(tensors | (random(95 + layer, affine_skip_connection=(D, D)) if affine else {}))
    return made


def several(folder, files, **config):
    for layer, tensors in enumerate(files):
        save(folder / f"params_layer_{layer}.safetensors", tensors)
    if config:
        write_json(folder / "config.json", {**GEMMA_2_CONFIG, "affine_connection": False, **config})
    return folder


def tutorial(files, x):
    """x [N, layers, d] → f [N, layers, n], x̂ [N, layers, d]: Google's JumpReLUMultiLayerSAE, written out."""
    stacked = {name: torch.stack([tensors[name] for tensors in files]) for name in files[0]}
    p = torch.einsum("tld,ldn->tln", x, stacked["w_enc"]) + stacked["b_enc"]
    f = p.relu() * (p > stacked["threshold"])
    out = torch.einsum("tln,lnmd->tmd", f, stacked["w_dec"]) + stacked["b_dec"]
    if "affine_skip_connection" in stacked:
        out = out + torch.einsum("tld,lde->tle", x, stacked["affine_skip_connection"])
    return f, out


def test_a_crosscoder_is_one_dictionary_over_its_layers(tmp_path):
    files = layer_tensors(4)
    folder = tmp_path / GEMMA_2_REPOSITORY / "crosscoder" / "layer_9_17_22_29_width_65k_l0_medium"
    places = "model.layers.{9,17,22,29}.output"
    several(folder, files, hf_hook_point_in=places, hf_hook_point_out=places, type="crosscoder")
    sae = load_sae(folder)
    assert sae.hooks == tuple(Hook("resid_post", layer) for layer in (9, 17, 22, 29))
    assert (sae.d_model, sae.d_out, sae.n_features) == (4 * D, 4 * D, 4 * PER_LAYER)
    assert "crosscoder" in sae.refusal
    x = torch.randn(30, 4, D) * 2
    f, out = tutorial(files, x)
    check_agreement(sae, x.flatten(1), f.flatten(1), out.flatten(1))
    lazy = load_sae(folder).rows([3, 40, 13])
    assert torch.equal(lazy.encoder, sae.W_enc[[3, 40, 13]])
    assert torch.equal(lazy.decoder, sae.W_dec[[3, 40, 13]])
    with pytest.raises(SAEFormatError, match="one of the layers of a crosscoder; open its folder"):
        load_sae(folder / "params_layer_2.safetensors")


@pytest.mark.parametrize("affine", [False, True])
def test_the_layers_of_a_cross_layer_transcoder_add_up_to_it(tmp_path, affine):
    files = layer_tensors(3, affine=affine)
    folder = tmp_path / "google/gemma-scope-2-270m-pt" / "clt" / "width_262k_l0_big"
    several(folder, files, hf_hook_point_in="model.layers.{all}.pre_feedforward_layernorm.output", type="clt")
    with pytest.raises(SAEFormatError, match=r"cross-layer transcoder, 3 layers .*params_layer_0\.safetensors"):
        load_sae(folder)
    x = torch.randn(30, 3, D) * 2
    f, whole = tutorial(files, x)
    total = torch.zeros(30, 3 * D)
    for layer in range(3):
        sae = load_sae(folder / f"params_layer_{layer}.safetensors")
        assert (sae.hook, sae.hook_out) == (Hook("pre_feedforward_layernorm.output", layer), Hook("mlp_out", layer))
        assert (sae.d_model, sae.d_out) == (D, 3 * D)
        part = sae.decode_for(x[:, layer], sae.encode(x[:, layer]))
        alone = [
            {name: t * (name not in ("b_dec", "affine_skip_connection")) for name, t in file.items()} for file in files
        ]
        alone[layer] = files[layer]
        for other in range(3):
            if other != layer:
                alone[other] = alone[other] | {"threshold": torch.full((PER_LAYER,), torch.inf)}
        _, expected = tutorial(alone, x)
        check_agreement(sae, x[:, layer], f[:, layer], expected.flatten(1))
        total = total + part
    torch.testing.assert_close(total, whole.flatten(1), rtol=1e-5, atol=1e-4)


def test_a_folder_outside_a_repository_needs_its_hook(tmp_path):
    save(tmp_path / "here" / "params.safetensors", {name.lower(): t for name, t in sae_tensors(0).items()})
    with pytest.raises(SAEFormatError, match="--hook"):
        load_sae(tmp_path / "here")
    assert load_sae(tmp_path / "here", hints=Hints(hook="model.layers.6")).hook == Hook("resid_post", 6)
    save(tmp_path / "layer_4_width_16k" / "params.safetensors", {n.lower(): t for n, t in sae_tensors(0).items()})
    with pytest.raises(SAEFormatError, match="its path does not say which site"):
        load_sae(tmp_path / "layer_4_width_16k")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "topk"}, r"config\.json: field 'architecture' is 'topk'; expected one of jump_relu"),
        ({"hf_hook_point_in": 17}, r"config\.json: field 'hf_hook_point_in' is 17; expected a hook"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, config, message):
    folder = tmp_path / "resid_post" / "layer_17_width_16k_l0_big"
    save(folder / "params.safetensors", {name.lower(): t for name, t in sae_tensors(0).items()})
    write_json(folder / "config.json", GEMMA_2_CONFIG | config)
    with pytest.raises(SAEFormatError, match=message):
        load_sae(folder)


def test_a_wrong_tensor_is_named(tmp_path):
    folder = tmp_path / "resid_post" / "layer_17_width_16k_l0_big"
    tensors = {name.lower(): t for name, t in sae_tensors(0).items()}
    save(folder / "params.safetensors", tensors | {"affine_skip_connection": torch.zeros(3, 3)})
    with pytest.raises(SAEFormatError, match=r"params\.safetensors: .* has shape \[3, 3\]; expected"):
        load_sae(folder)
    save(folder / "params.safetensors", {name: t for name, t in tensors.items() if name != "threshold"})
    with pytest.raises(SAEFormatError, match=r"params\.safetensors: no tensor 'threshold'"):
        load_sae(folder)
    files = layer_tensors(2)
    files[1] |= {"w_dec": torch.zeros(PER_LAYER, 3, D)}
    several(tmp_path / "crosscoder" / "layer_9_17_width_65k_l0_medium", files)
    with pytest.raises(SAEFormatError, match="writes to 3 layers; expected 8 and 2"):
        load_sae(tmp_path / "crosscoder" / "layer_9_17_width_65k_l0_medium")
