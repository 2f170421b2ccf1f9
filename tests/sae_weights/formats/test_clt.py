"""One layer of a cross-layer transcoder reads and writes what circuit-tracer's whole one reads and writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_weights import SAEFormatError
from sae_weights.formats import Hints, load_sae
from tests.sae_weights.formats.agreement import assert_near, check_agreement
from tests.sae_weights.oracle import needs_oracle, run_oracle

D, LAYERS = 12, 3
CONFIG = """model_name: tiny/model
model_kind: cross_layer_transcoder
feature_input_hook: hook_resid_mid
feature_output_hook: hook_mlp_out
"""


def small_tensors(layer=1, layers=3):
    generator = torch.Generator().manual_seed(0)
    encoder = {
        f"W_enc_{layer}": torch.randn(18, 6, generator=generator),
        f"b_enc_{layer}": torch.randn(18, generator=generator),
        f"b_dec_{layer}": torch.randn(6, generator=generator),
        f"threshold_{layer}": torch.rand(18, generator=generator),
    }
    return encoder, {f"W_dec_{layer}": torch.randn(18, layers - layer, 6, generator=generator)}


def write_small(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    encoder, decoder = small_tensors()
    save_file(encoder, folder / "W_enc_1.safetensors")
    save_file(decoder, folder / "W_dec_1.safetensors")
    return folder / "W_enc_1.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("clt")
    run_oracle("oracle_circuit_tracer.py", root)
    return root


def by_oracle(test):
    for mark in needs_oracle:
        test = mark(test)
    return test


@by_oracle
@pytest.mark.parametrize("kind", ["relu", "jump_relu"])
def test_the_layers_add_up_to_the_whole(work, kind):
    folder = work / f"clt.{kind}"
    answers = load_file(folder / "answers.safetensors")
    x, f = answers["x"], answers["f"]
    total = torch.zeros_like(answers["x_hat"])
    for layer in range(LAYERS):
        sae = load_sae(folder / f"W_enc_{layer}.safetensors")
        assert sae.origin.format == "clt"
        assert (str(sae.hook), str(sae.hook_out)) == (f"resid_mid({layer})", f"mlp_out({layer})")
        assert sae.metadata["hook_names_out"] == [f"blocks.{out}.hook_mlp_out" for out in range(layer, LAYERS)]
        own_bias = load_file(folder / f"W_enc_{layer}.safetensors")[f"b_dec_{layer}"]
        # [layer, token, d] of what this layer's features write alone → one row per token
        alone = answers["alone"][layer, layer:].transpose(0, 1).flatten(1)
        x_hat = alone + torch.cat([own_bias, torch.zeros(D * (LAYERS - layer - 1))])
        check_agreement(sae, x[layer], f[layer], x_hat)
        total[layer:] += sae.decode_for(x[layer], f[layer]).unflatten(1, (LAYERS - layer, D)).transpose(0, 1)
    assert_near(total, answers["x_hat"], "the sum of all layers")


def test_opening_reads_by_row(tmp_path):
    sae = load_sae(write_small(tmp_path))
    encoder, decoder = small_tensors()
    rows = sae.rows([3, 17])
    assert not sae.materialised
    assert torch.equal(rows.encoder, encoder["W_enc_1"][[3, 17]])
    assert torch.equal(rows.decoder, decoder["W_dec_1"][[3, 17]].flatten(1))


def test_a_folder_of_several_layers_asks_which(tmp_path):
    write_small(tmp_path)
    assert load_sae(tmp_path).hook.layer == 1
    encoder, decoder = small_tensors(2)
    save_file(encoder, tmp_path / "W_enc_2.safetensors")
    save_file(decoder, tmp_path / "W_dec_2.safetensors")
    with pytest.raises(SAEFormatError, match=r"holds 2 layers.*W_enc_1\.safetensors, W_enc_2\.safetensors"):
        load_sae(tmp_path)
    assert load_sae(tmp_path, hints=Hints(hook="blocks.2.hook_resid_mid")).d_out == 6


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    path = write_small(tmp_path)
    save_file({"W_dec_1": torch.randn(18, 2, 8)}, tmp_path / "W_dec_1.safetensors")
    with pytest.raises(
        SAEFormatError, match=r"W_dec_1\.safetensors: tensor 'W_dec_1' has shape \[18, 2, 8\]; expected"
    ):
        load_sae(path)
    (tmp_path / "W_dec_1.safetensors").unlink()
    with pytest.raises(SAEFormatError, match=r"W_dec_1\.safetensors: no such file"):
        load_sae(path)
