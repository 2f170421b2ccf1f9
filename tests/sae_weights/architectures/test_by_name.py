"""Architectures that differ in training only: by name, and one function with the plain form."""

from __future__ import annotations

import pytest
import torch

from sae_weights import SAE, Hook, SAEFormatError
from sae_weights.architectures import ARCHITECTURES

SAME = {
    "matryoshka": "jumprelu",
    "batchtopk": "jumprelu",
    "feature_choice": "jumprelu",
    "mutual_choice": "jumprelu",
    "p_anneal": "relu",
    "structured": "relu",
    "group_sparse": "relu",
    "e2e": "relu",
    "gradient": "topk",
}


@pytest.mark.parametrize(("name", "plain"), SAME.items())
def test_the_same_tensors_are_the_same_function_with_the_same_digest(make_sae, name, plain):
    ours, theirs = make_sae(name, seed=4), make_sae(plain, seed=4)
    x = torch.randn(20, ours.d_model, generator=torch.Generator().manual_seed(1)) * 2
    assert ours.architecture == name
    assert torch.equal(ours.encode(x), theirs.encode(x))
    assert torch.equal(ours.decode(ours.encode(x)), theirs.decode(ours.encode(x)))
    assert ours.digest == theirs.digest
    assert (ours.execution, ours.k) == (theirs.execution, theirs.k)


def test_each_feature_has_a_threshold_of_its_own(make_sae):
    sae = make_sae("feature_choice", seed=2)
    x = torch.randn(60, sae.d_model, generator=torch.Generator().manual_seed(2))
    p, theta = sae.pre_activations(x), sae.gate["threshold"]
    assert theta.unique().numel() == sae.n_features
    expected = torch.zeros_like(p)
    for token in range(60):
        for j in range(sae.n_features):
            if p[token, j] > theta[j]:
                expected[token, j] = p[token, j]
    assert torch.equal(sae.encode(x), expected)
    assert (expected > 0).any()


def test_a_prefix_of_groups_is_the_dictionary_of_its_features(make_sae):
    sizes = [3, 5, 8]
    sae = make_sae("matryoshka", settings={"group_sizes": sizes})
    x = torch.randn(9, sae.d_model, generator=torch.Generator().manual_seed(3)) * 2
    f = sae.encode(x)
    for groups, n in ((1, 3), (2, 8), (3, 16)):
        prefix = sae.prefix(groups)
        assert prefix.n_features == n
        assert list(prefix.settings["group_sizes"]) == sizes[:groups]
        torch.testing.assert_close(prefix.encode(x), f[:, :n])
        only = torch.cat([f[:, :n], torch.zeros(9, 16 - n)], dim=1)
        torch.testing.assert_close(prefix.decode_for(x, prefix.encode(x)), sae.decode_for(x, only))
    assert sae.prefix(1).digest != sae.digest


@pytest.mark.parametrize("groups", [0, 4, -1])
def test_groups_that_are_not_there_are_refused(make_sae, groups):
    with pytest.raises(SAEFormatError, match=r"1\.\.3"):
        make_sae("matryoshka", settings={"group_sizes": [3, 5, 8]}).prefix(groups)


def test_groups_say_nothing_about_the_function(make_sae):
    with_groups = make_sae("matryoshka", settings={"group_sizes": [3, 5, 8]})
    assert with_groups.digest == make_sae("matryoshka").digest == make_sae("jumprelu").digest


@pytest.mark.parametrize("sizes", [[3, 5], [3, 5, 9], [16, 0], [20, -4], [3.0, 5.0, 8.0], "abc"])
def test_groups_must_add_up_to_the_features(make_sae, sizes):
    with pytest.raises(SAEFormatError, match="group_sizes"):
        make_sae("matryoshka", settings={"group_sizes": sizes})


@pytest.mark.parametrize("name", ["temporal", "lorsa"])
def test_dictionaries_over_a_sequence_are_refused_with_the_reason(name):
    with pytest.raises(SAEFormatError, match=f"(?s){name}.*earlier tokens"):
        SAE.from_tensors(
            architecture=name,
            hook=Hook("resid_post", 3),
            W_enc=torch.zeros(4, 3),
            W_dec=torch.zeros(4, 3),
            b_dec=torch.zeros(3),
            gate={},
        )
    with pytest.raises(NotImplementedError, match="earlier tokens"):
        ARCHITECTURES[name].row_form({})


def test_settings_of_the_wrong_type_or_name_are_refused(make_sae):
    with pytest.raises(SAEFormatError, match="did you mean 'max_iterations'"):
        make_sae("matching_pursuit", settings={"max_iteration": 3})
    for settings in ({"max_iterations": "3"}, {"max_iterations": 1.5}, {"rectify": 1}, {"residual_threshold": "0"}):
        with pytest.raises(SAEFormatError, match=f"settings: {next(iter(settings))}"):
            make_sae("matching_pursuit", settings=settings)
    for value in (float("nan"), float("inf"), -0.5):
        with pytest.raises(SAEFormatError, match="residual_threshold"):
            make_sae("matching_pursuit", settings={"residual_threshold": value})


def test_a_whole_number_is_the_number(make_sae):
    one, same = (make_sae("matching_pursuit", settings={"residual_threshold": value}) for value in (1, 1.0))
    assert one.digest == same.digest != make_sae("matching_pursuit").digest
