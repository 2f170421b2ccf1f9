"""AbsTopK, the variational TopK and GroupMax: who survives, written out token by token."""

from __future__ import annotations

import pytest
import torch

from sae_weights import SAE, Hook, SAEFormatError

HOOK = Hook("resid_post", 0)


def identity(architecture, n, k, **more):
    """W_enc = 1, so that pre-activations are the inputs."""
    eye = torch.eye(n)
    gate = {"b_enc": torch.zeros(n), **more.pop("gate", {})}
    return SAE.from_tensors(
        architecture=architecture, hook=HOOK, W_enc=eye, W_dec=eye, b_dec=torch.zeros(n), gate=gate, k=k, **more
    )


def tokens(n, count=40, seed=1):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed)) * 2


def strongest(values, k):
    """Indices of the k largest, the lower index first where equal."""
    return sorted(range(len(values)), key=lambda j: (-values[j], j))[:k]


@pytest.mark.parametrize("k", [1, 4, 10])
def test_abstopk_keeps_the_largest_magnitudes_with_their_sign(k):
    x = tokens(10)
    expected = torch.zeros_like(x)
    for token, p in enumerate(x.tolist()):
        for j in strongest([abs(value) for value in p], k):
            expected[token, j] = p[j]
    f = identity("abstopk", 10, k).encode(x)
    assert torch.equal(f, expected)
    assert (f < 0).any()
    assert ((f != 0).sum(dim=1) == k).all()


def test_abstopk_can_rank_in_other_units():
    sae = identity("abstopk", 4, 2, gate={"rank_scale": torch.tensor([1.0, 10.0, 0.1, 1.0])})
    assert sae.encode(torch.tensor([[2.0, -0.5, 3.0, -1.0]])).tolist() == [[2.0, -0.5, 0.0, 0.0]]


def test_of_opposite_values_of_equal_size_the_lower_index_wins():
    x = torch.tensor([[3.0, -3.0, 3.0, -3.0], [-1.0, 1.0, 2.0, 0.0]])
    assert identity("abstopk", 4, 2).encode(x).tolist() == [[3.0, -3.0, 0.0, 0.0], [-1.0, 0.0, 2.0, 0.0]]
    assert identity("vsae", 4, 2, settings={"signed": True}).encode(x).tolist()[0] == [3.0, -3.0, 0.0, 0.0]


def test_a_variational_dictionary_uses_the_mean_by_either_rule(make_sae):
    rectified, signed = (make_sae("vsae", settings={"signed": choice}) for choice in (False, True))
    x = torch.randn(30, rectified.d_model, generator=torch.Generator().manual_seed(2)) * 2
    mu = rectified.pre_activations(x)
    first, second = torch.zeros_like(mu), torch.zeros_like(mu)
    for token, values in enumerate(mu.tolist()):
        for j in strongest([max(value, 0.0) for value in values], 4):
            first[token, j] = max(values[j], 0.0)
        for j in strongest([abs(value) for value in values], 4):
            second[token, j] = values[j]
    torch.testing.assert_close(rectified.encode(x), first)
    torch.testing.assert_close(signed.encode(x), second)
    assert (second < 0).any()
    assert rectified.digest != signed.digest
    # Two calls agree: nothing is sampled.
    assert torch.equal(signed.encode(x), signed.encode(x))


@pytest.mark.parametrize("k", [1, 3, 6, 12])
def test_groupmax_keeps_one_of_each_group(k):
    x = tokens(12)
    expected, size = torch.zeros_like(x), 12 // k
    for token, p in enumerate(x.tolist()):
        for start in range(0, 12, size):
            best = max(range(start, start + size), key=lambda j: (p[j], -j))
            expected[token, best] = max(p[best], 0.0)
    f = identity("groupmax", 12, k).encode(x)
    assert torch.equal(f, expected)
    assert ((f != 0).unflatten(1, (k, size)).sum(dim=2) <= 1).all()


def test_a_group_without_a_positive_value_has_no_active_latent():
    f = identity("groupmax", 6, 2).encode(torch.tensor([[-1.0, -2.0, -3.0, 5.0, 5.0, 1.0]]))
    assert f.tolist() == [[0.0, 0.0, 0.0, 5.0, 0.0, 0.0]]


@pytest.mark.parametrize("k", [5, 7])
def test_groups_of_unequal_size_are_refused_when_the_dictionary_opens(k):
    with pytest.raises(SAEFormatError, match="divisor of 12"):
        identity("groupmax", 12, k)


@pytest.mark.parametrize("architecture", ["abstopk", "vsae", "groupmax"])
def test_no_threshold_stands_in_for_a_rule_that_is_none(make_sae, architecture):
    with pytest.raises(SAEFormatError, match="no threshold decides its membership"):
        make_sae(architecture).thresholded(0.5)
