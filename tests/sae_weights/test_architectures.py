"""What each architecture computes, and that a few rows compute the same as the whole dictionary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_weights import SAE, Hook
from sae_weights.architectures import ARCHITECTURES, topk_members

ROW_SEPARABLE = [name for name, form in ARCHITECTURES.items() if form.row_separable]
# The others need more than one product with W_enc: a second encoder, the input's norm, what is still unexplained.
FROM_PRE_ACTIVATIONS = [
    name
    for name, form in ARCHITECTURES.items()
    if form.execution != "sequence" and name not in ("glu", "top_afa", "matching_pursuit", "itda")
]
HOOK = Hook("resid_post", 0)


def identity_sae(architecture: str, n: int, **gate: float) -> SAE:
    """W_enc = 1, so that pre-activations are the inputs plus the bias."""
    eye = torch.eye(n)
    vectors = {name: torch.full((n,), value) for name, value in gate.items()}
    return SAE.from_tensors(
        architecture=architecture, hook=HOOK, W_enc=eye, W_dec=eye, b_dec=torch.zeros(n), gate=vectors
    )


def test_a_threshold_per_feature_is_row_separable_and_membership_needs_the_whole_dictionary():
    assert {form.kind for form in ARCHITECTURES.values() if form.row_separable} == {"relu", "jumprelu", "gated"}
    wide = {name for name, form in ARCHITECTURES.items() if form.execution == "dictionary"}
    assert wide >= {"topk", "gradient", "abstopk", "vsae", "groupmax", "top_afa", "matching_pursuit", "itda", "polysae"}
    assert {name for name, form in ARCHITECTURES.items() if form.execution == "sequence"} == {"temporal", "lorsa"}


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk"])
def test_a_feature_exactly_at_its_threshold_is_off(architecture):
    sae = identity_sae(architecture, 3, b_enc=0.0, threshold=0.5)
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    x = torch.tensor([[0.5, above, below]])
    assert sae.encode(x).tolist() == [[0.0, above, 0.0]]
    assert sae.rows([0, 1, 2]).activations(x).tolist() == [[0.0, above, 0.0]]
    assert sae.activate(x).tolist() == [[0.0, above, 0.0]]


def test_a_gate_exactly_at_zero_is_closed():
    sae = identity_sae("gated", 2, b_gate=-1.0, b_mag=2.0, r_mag=0.0)
    assert sae.encode(torch.tensor([[1.0, 1.5]])).tolist() == [[0.0, 3.5]]
    assert sae.rows([0, 1]).activations(torch.tensor([[1.0, 1.5]])).tolist() == [[0.0, 3.5]]


def test_a_negative_threshold_never_lets_a_negative_value_through():
    sae = identity_sae("jumprelu", 2, b_enc=0.0, threshold=-1.0)
    assert sae.encode(torch.tensor([[-0.5, 0.5]])).tolist() == [[0.0, 0.5]]


def test_gated_magnitude_and_gate_are_different_paths():
    sae = identity_sae("gated", 1, b_gate=0.25, b_mag=-0.5, r_mag=float(torch.tensor(2.0).log()))
    # u = 1: gate 1.25 > 0, magnitude 2·1 − 0.5; u = 0.1: gate 0.35 > 0 but magnitude 0.2 − 0.5 < 0
    torch.testing.assert_close(sae.encode(torch.tensor([[1.0], [0.1]])), torch.tensor([[1.5], [0.0]]))


@pytest.mark.parametrize("architecture", ROW_SEPARABLE)
@pytest.mark.parametrize("input_norm", ["none", "constant_norm_rescale", "layer_norm"])
@given(seed=st.integers(0, 2**31), indices=st.lists(st.integers(0, 15), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_chosen_rows_activate_as_in_the_full_encode(make_sae, architecture, input_norm, seed, indices):
    sae = make_sae(architecture, seed=seed, input_norm=input_norm)
    x = torch.randn(5, sae.d_model, generator=torch.Generator().manual_seed(seed)) * 3
    normalised, _ = sae.token_scale(x)
    rows = sae.rows(indices)
    assert rows.index.tolist() == indices
    # Another GEMM shape may round differently, and a pre-activation that close to its gate may fall on either side.
    decided = (sae.pre_activations(x)[:, indices] - rows.threshold).abs() > 1e-5
    torch.testing.assert_close(
        rows.activations(normalised) * decided, sae.encode(x)[:, indices] * decided, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("architecture", FROM_PRE_ACTIVATIONS)
def test_encode_is_the_activation_of_the_pre_activations(make_sae, architecture):
    sae = make_sae(architecture)
    x = torch.randn(9, sae.d_model, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sae.activate(sae.pre_activations(x)), sae.encode(x), rtol=1e-5, atol=1e-6)


def test_topk_keeps_the_k_largest_and_rows_give_the_value_before_membership(make_sae):
    sae = make_sae("topk", k=3)
    x = torch.randn(20, sae.d_model, generator=torch.Generator().manual_seed(2)) * 4
    f, pre = sae.encode(x), sae.pre_activations(x)
    for token in range(20):
        kept = pre[token].argsort(descending=True)[:3]
        expected = torch.zeros(sae.n_features)
        expected[kept] = pre[token, kept].relu()
        assert torch.equal(f[token], expected)
    before = sae.rows(range(sae.n_features)).activations(x)
    assert torch.equal(before, pre.relu())
    assert (before > 0).sum() > (f > 0).sum()


def test_topk_ties_go_to_the_lower_index():
    pre = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    assert topk_members(pre, 2).tolist() == [[False, True, True, False, False], [True, True, False, False, False]]


def test_topk_with_fewer_than_k_positive_values_leaves_the_rest_at_zero():
    eye = torch.eye(4)
    sae = SAE.from_tensors(
        architecture="topk", hook=HOOK, W_enc=eye, W_dec=eye, b_dec=torch.zeros(4), gate={"b_enc": torch.zeros(4)}, k=3
    )
    assert sae.encode(torch.tensor([[-1.0, 2.0, -3.0, -0.5]])).tolist() == [[0.0, 2.0, 0.0, 0.0]]


@given(rows=st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=4), k=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_topk_membership_is_exactly_k_and_a_stable_sort(rows, k):
    pre = torch.tensor(rows, dtype=torch.float32)
    expected = torch.zeros_like(pre, dtype=torch.bool)
    expected.scatter_(-1, pre.sort(dim=-1, descending=True, stable=True).indices[:, :k], True)
    members = topk_members(pre, k)
    assert members.sum(dim=-1).tolist() == [k] * len(rows)
    assert torch.equal(members, expected)
