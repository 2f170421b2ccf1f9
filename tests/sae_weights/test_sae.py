"""The canonical SAE: shapes, per-token scales, refusals."""

from __future__ import annotations

import pytest
import torch

from sae_weights import SAE, Hook, SAEFormatError
from sae_weights.architectures import ARCHITECTURES


def tokens(sae, count=5, seed=3):
    return torch.randn(count, sae.d_model, generator=torch.Generator().manual_seed(seed)) * 4 + 0.5


@pytest.mark.parametrize("architecture", [name for name, form in ARCHITECTURES.items() if form.execution != "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_fp32_whatever_comes_in(make_sae, architecture, dtype):
    sae = make_sae(architecture)
    x = tokens(sae).to(dtype)
    f = sae.encode(x)
    assert f.shape == sae.pre_activations(x).shape == (5, 16)
    assert sae.decode(f).shape == sae.decode_for(x, f).shape == (5, 6)
    assert f.dtype == sae.decode(f).dtype == torch.float32
    rows = sae.rows([2, 9, 2])
    assert len(rows) == 3
    assert rows.encoder.shape == rows.decoder.shape == (3, 6)
    assert rows.gate_bias.shape == rows.threshold.shape == rows.mag_scale.shape == rows.mag_bias.shape == (3,)
    assert {t.dtype for t in (rows.encoder, rows.decoder, rows.gate_bias, rows.threshold, rows.mag_scale)} == {
        torch.float32
    }
    assert rows.index.dtype == torch.int64
    assert len(sae.rows([])) == 0
    assert sae.encode(x[:0]).shape == (0, 16)


@pytest.mark.parametrize("input_norm", ["none", "constant_norm_rescale", "layer_norm"])
def test_a_change_of_one_latent_moves_x_by_the_scaled_decoder_row(make_sae, input_norm):
    sae = make_sae("jumprelu", input_norm=input_norm)
    x = tokens(sae)
    f = sae.encode(x)
    changed = f.clone()
    changed[:, 7] += 2.5
    _, delta_scale = sae.token_scale(x)
    expected = delta_scale[:, None] * 2.5 * sae.rows([7]).decoder
    torch.testing.assert_close(sae.decode_for(x, changed) - sae.decode_for(x, f), expected, rtol=1e-4, atol=1e-5)


def test_constant_norm_rescale_gives_every_token_norm_root_d(make_sae):
    sae = make_sae(input_norm="constant_norm_rescale")
    normalised, scale = sae.token_scale(tokens(sae))
    torch.testing.assert_close(normalised.norm(dim=-1), torch.full((5,), 6**0.5))
    torch.testing.assert_close(normalised * scale[:, None], tokens(sae))


def test_a_zero_vector_stays_finite_under_every_norm(make_sae):
    for input_norm in ("none", "constant_norm_rescale", "layer_norm"):
        sae = make_sae(input_norm=input_norm)
        zero = torch.zeros(1, sae.d_model)
        assert bool(sae.encode(zero).isfinite().all())
        assert bool(sae.decode_for(zero, sae.encode(zero)).isfinite().all())


def test_layer_norm_uses_the_unbiased_deviation_and_returns_it_without_epsilon(make_sae):
    sae = make_sae(input_norm="layer_norm")
    x = tokens(sae)
    normalised, scale = sae.token_scale(x)
    std = x.std(dim=-1, unbiased=True)
    torch.testing.assert_close(scale, std)
    torch.testing.assert_close(normalised, (x - x.mean(-1, keepdim=True)) / (std[:, None] + 1e-5))


def test_a_hook_z_dictionary_takes_heads_and_gives_them_back(make_sae):
    sae = make_sae(hook=Hook("attn.z", 2))
    x = tokens(sae).reshape(5, 2, 3)
    f = sae.encode(x)
    assert torch.equal(f, sae.encode(x.reshape(5, 6)))
    assert sae.decode_for(x, f).shape == (5, 2, 3)
    assert sae.hook.edit_layer is None


def test_an_index_out_of_range_names_the_range(make_sae):
    sae = make_sae()
    for bad in (16, -1):
        with pytest.raises(IndexError, match=rf"feature {bad}; this SAE has 0\.\.15"):
            sae.rows([0, bad])


def test_a_wrong_width_names_both_widths(make_sae):
    with pytest.raises(ValueError, match="x has width 7; this SAE reads 6"):
        make_sae().encode(torch.randn(2, 7))


def good(**changes):
    n, d = 4, 3
    return {
        "architecture": "relu",
        "hook": Hook("resid_post", 0),
        "W_enc": torch.randn(n, d),
        "W_dec": torch.randn(n, d),
        "b_dec": torch.randn(d),
        "gate": {"b_enc": torch.randn(n)},
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "relux"}, "architecture: 'relux'; .*batchtopk.*relu.*topk"),
        ({"W_enc": torch.zeros(4)}, r"W_enc: shape \[4\]; expected \[n_features, d_model\]"),
        ({"W_dec": torch.zeros(3, 4)}, r"W_enc: shape \[4, 3\]; expected \[3, .any.\]"),
        ({"b_dec": torch.zeros(4)}, r"b_dec: shape \[4\]; expected \[3\]"),
        ({"gate": {"b_enc": torch.zeros(3)}}, r"b_enc: shape \[3\]; expected \[4\]"),
        ({"gate": {}}, r"gate: \[\]; architecture .* also needs \['b_enc'\]"),
        ({"architecture": "gated"}, r"gate: \['b_enc'\]; .* also needs \['b_gate', 'b_mag', 'r_mag'\]"),
        ({"input_norm": "rms"}, "input_norm: 'rms'; expected one of none, constant_norm_rescale, layer_norm"),
        ({"architecture": "topk"}, "k: None; architecture 'topk' takes one"),
        ({"k": 2}, "k: 2; architecture 'relu' takes none"),
        ({"architecture": "topk", "k": 5}, r"k: 5; expected 1\.\.4"),
        ({"architecture": "topk", "k": 0}, r"k: 0; expected 1\.\.4"),
        ({"b_dec": torch.tensor([0.0, float("nan"), 0.0])}, "b_dec holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(SAEFormatError, match=message):
        SAE.from_tensors(**good(**changes))


def test_a_weight_that_is_not_finite_is_refused_when_read_and_names_the_feature():
    W_enc = torch.randn(4, 3)
    W_enc[2, 1] = float("inf")
    sae = SAE.from_tensors(**good(W_enc=W_enc))
    assert len(sae.rows([0, 3])) == 2
    with pytest.raises(SAEFormatError, match="tensor W_enc is not finite at feature 2"):
        sae.rows([3, 2])
    with pytest.raises(SAEFormatError, match="tensor W_enc is not finite at feature 2"):
        sae.encode(torch.randn(1, 3))
