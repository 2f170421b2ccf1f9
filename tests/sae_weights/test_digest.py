"""The digest names the content: equal for equal functions, different as soon as one number differs."""

from __future__ import annotations

import shutil

import pytest
import torch

from sae_weights import SAE, Folding, Hook, load_sae, save_saelens
from sae_weights.architectures import ARCHITECTURES


def rebuilt(sae, **changes):
    parts = {
        "architecture": sae.architecture,
        "hook": sae.hook,
        "W_enc": sae.W_enc.clone(),
        "W_dec": sae.W_dec.clone(),
        "b_dec": sae.b_dec.clone(),
        "gate": {name: vector.clone() for name, vector in sae.gate.items()},
        "extras": {name: tensor.clone() for name, tensor in sae.extras.items()},
        "settings": dict(sae.settings),
        "input_norm": sae.input_norm,
        "k": sae.k,
        "metadata": dict(sae.metadata),
    }
    return SAE.from_tensors(**{**parts, **changes})


def nudged(tensor):
    changed = tensor.clone()
    flat = changed.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(10.0))
    return changed


@pytest.mark.parametrize("architecture", [name for name, form in ARCHITECTURES.items() if form.execution != "sequence"])
def test_one_number_one_bit_apart_changes_the_digest(make_sae, architecture):
    sae = make_sae(architecture)
    assert rebuilt(sae).digest == sae.digest
    different = [rebuilt(sae, **{name: nudged(getattr(sae, name))}).digest for name in ("W_enc", "W_dec", "b_dec")]
    for name in sae.gate:
        different.append(rebuilt(sae, gate={**sae.gate, name: nudged(sae.gate[name])}).digest)
    assert len({sae.digest, *different}) == 1 + len(different)


def test_hook_norm_k_and_architecture_are_content(make_sae):
    topk, relu = make_sae("topk", k=4), make_sae("relu")
    digests = [
        topk.digest,
        relu.digest,  # the same tensors
        rebuilt(topk, k=5).digest,
        rebuilt(relu, hook=Hook("resid_post", 4)).digest,
        rebuilt(relu, hook=Hook("resid_pre", 3)).digest,
        rebuilt(relu, input_norm="layer_norm").digest,
        rebuilt(relu, input_norm="constant_norm_rescale").digest,
        rebuilt(relu, gate={**relu.gate}, W_enc=relu.W_dec, W_dec=relu.W_enc).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_metadata_is_not_content(make_sae):
    sae = make_sae()
    assert rebuilt(sae, metadata={"median_norm": 170.0}).digest == sae.digest


def test_folder_name_and_file_dtype_are_not_content(make_sae, tmp_path):
    W_enc, W_dec = (torch.randn(16, 6).bfloat16().float() for _ in range(2))
    sae = rebuilt(make_sae(), W_enc=W_enc, W_dec=W_dec, b_dec=torch.zeros(6))
    first = save_saelens(sae, tmp_path / "a")
    shutil.copytree(first, tmp_path / "quite" / "elsewhere")
    bf16 = save_saelens(sae, tmp_path / "b", dtype=torch.bfloat16)
    digests = {load_sae(folder).digest for folder in (first, tmp_path / "quite" / "elsewhere", bf16)}
    assert digests == {sae.digest}


def test_a_folded_and_an_unfolded_checkpoint_of_one_dictionary_share_a_digest(make_sae, tmp_path):
    sae = make_sae("batchtopk", folding=Folding(input_scale=0.7, decoder_norm=True, subtract_b_dec=True))
    assert load_sae(save_saelens(sae, tmp_path / "folded")).digest == sae.digest


@pytest.mark.parametrize("block_elements", [1, 6, 20, 1 << 24])
def test_the_digest_does_not_depend_on_how_much_is_read_at_a_time(make_sae, monkeypatch, block_elements):
    expected = make_sae(folding=Folding(subtract_b_dec=True)).digest
    monkeypatch.setattr("sae_weights.sae._BLOCK_ELEMENTS", block_elements)
    sae = make_sae(folding=Folding(subtract_b_dec=True))
    assert sae.digest == expected
    assert not sae.materialised
    sae.encode(torch.randn(1, sae.d_model))
    assert torch.equal(sae.W_enc, make_sae(folding=Folding(subtract_b_dec=True)).W_enc)
