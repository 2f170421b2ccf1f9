"""Folding a checkpoint's conventions into its weights changes nothing it computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_weights import Folding
from sae_weights.architectures import ARCHITECTURES
from sae_weights.folding import fixed_order_sum
from sae_weights.input_norm import normalise

UNFOLDED = ("relu", "jumprelu", "gated", "topk")  # kinds whose formula is written out below


def unfolded(raw, folding, architecture, input_norm, x, k=None):
    """The checkpoint's own formula, in float64, with nothing folded → (activations, reconstruction)."""
    E, D = raw.W_enc.double(), raw.W_dec.double()
    b_dec, gate = raw.b_dec.double(), {name: vector.double() for name, vector in raw.gate.items()}
    norm = normalise(x.double(), input_norm)
    x_in = norm.x * folding.input_scale
    # The unit of f and of a threshold is that of the input, which SAELens' folding of s divides ‖d‖ by.
    row_norm = D.norm(dim=-1) / folding.input_scale if folding.decoder_norm else torch.ones(len(D), dtype=torch.float64)
    u = (x_in - b_dec * folding.subtract_b_dec) @ E.T
    if architecture == "gated":
        f = (u + gate["b_gate"] > 0) * torch.relu(u * gate["r_mag"].exp() + gate["b_mag"])
    else:
        p = (u + gate["b_enc"]) * row_norm
        threshold = gate.get("threshold", torch.zeros(()))
        if folding.decoder_norm:
            threshold = threshold / folding.input_scale
        f = p.relu() * (p > threshold)
        if k is not None:
            f = f * torch.zeros_like(p).scatter(-1, p.topk(k, dim=-1).indices, 1.0)
    out = ((f / row_norm) @ D + b_dec) / folding.input_scale
    return f, out * norm.scale + norm.shift


@pytest.mark.parametrize("architecture", [name for name, form in ARCHITECTURES.items() if form.kind in UNFOLDED])
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 0.25, 3.7]),
    decoder_norm=st.booleans(),
    subtract=st.booleans(),
    input_norm=st.sampled_from(["none", "constant_norm_rescale", "layer_norm"]),
)
@settings(max_examples=25, deadline=None)
def test_folded_equals_the_checkpoints_own_formula(
    make_sae, architecture, seed, scale, decoder_norm, subtract, input_norm
):
    decoder_norm = decoder_norm and architecture in ("topk", "batchtopk", "matryoshka", "gradient")
    folding = Folding(input_scale=scale, decoder_norm=decoder_norm, subtract_b_dec=subtract)
    raw = make_sae(architecture, seed=seed)
    folded = make_sae(architecture, seed=seed, folding=folding, input_norm=input_norm)
    x = torch.randn(6, raw.d_model, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    f, reconstruction = unfolded(raw, folding, architecture, input_norm, x, raw.k)
    rows = folded.rows(range(folded.n_features))
    # A pre-activation within rounding of its gate (or two of each other, at TopK's boundary) may fall on either side.
    near = (folded.pre_activations(x) - rows.threshold).abs() < 1e-4
    if folded.k is not None:
        top = folded.pre_activations(x).topk(folded.k + 1, dim=-1).values
        near |= (top[:, -2] - top[:, -1] < 1e-4)[:, None]
    same = ~near.any(dim=-1)
    torch.testing.assert_close(folded.encode(x)[same], f.float()[same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        folded.decode_for(x, folded.encode(x))[same], reconstruction.float()[same], rtol=1e-4, atol=1e-4
    )


def test_rows_folded_alone_are_bit_equal_to_the_whole(make_sae):
    folding = Folding(input_scale=1.3, decoder_norm=True, subtract_b_dec=True)
    alone = make_sae("batchtopk", d=37, n=50, folding=folding)
    whole = make_sae("batchtopk", d=37, n=50, folding=folding)
    rows = alone.rows([49, 3, 3])
    assert torch.equal(rows.encoder, whole.W_enc[[49, 3, 3]])
    assert torch.equal(rows.decoder, whole.W_dec[[49, 3, 3]])
    assert torch.equal(rows.gate_bias, whole.gate["b_enc"][[49, 3, 3]])
    assert torch.equal(rows.threshold, whole.gate["threshold"][[49, 3, 3]])
    assert not alone.materialised


@given(width=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_fixed_order_sum_is_a_sum(width, seed):
    values = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(fixed_order_sum(values), values.sum(dim=-1))


def test_a_dead_decoder_row_folds_without_infinities(make_sae):
    sae = make_sae("topk")
    dead = sae.W_dec.clone()
    dead[5] = 0
    folded = type(sae).from_tensors(
        architecture="topk", hook=sae.hook, W_enc=sae.W_enc, W_dec=dead, b_dec=sae.b_dec, gate=sae.gate, k=2,
        folding=Folding(decoder_norm=True),
    )  # fmt: skip
    assert folded.rows([5]).decoder.tolist() == [[0.0] * sae.d_model]
    assert bool(folded.encode(torch.randn(4, sae.d_model)).isfinite().all())
