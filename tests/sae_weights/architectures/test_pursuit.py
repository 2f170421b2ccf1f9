"""Matching pursuit and ITDA: chosen one after another, by what is still unexplained."""

from __future__ import annotations

import itertools

import pytest
import torch

from sae_weights import SAE, Folding, Hook, SAEFormatError

HOOK = Hook("resid_post", 0)
D, N = 10, 40


def atoms(seed=0):
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def tokens(count=25, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) * 3


def pursuit(architecture="matching_pursuit", *, b_dec=None, folding=None, rows=None, norm="none", k=None, **settings):
    return SAE.from_tensors(
        architecture=architecture,
        hook=HOOK,
        W_dec=atoms() if rows is None else rows,
        b_dec=torch.zeros(D) if b_dec is None else b_dec,
        gate={"b_enc": torch.zeros(N)},
        folding=folding,
        input_norm=norm,
        k=k,
        settings=settings,
    )


EXACTLY = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}


def by_hand(x, rows, iterations, *, choose=lambda c: c, rectify=False):
    """Plain matching pursuit of one token, float64."""
    rest, f = x.double(), torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(iterations):
        correlations = [float(row.double() @ rest) for row in rows]
        best = max(range(len(rows)), key=lambda j: (choose(correlations[j]), -j))
        c = max(correlations[best], 0.0) if rectify else correlations[best]
        f[best] += c
        rest = rest - c * rows[best].double()
    return f.float()


@pytest.mark.parametrize("rectify", [True, False])
def test_each_iteration_takes_the_atom_that_explains_most(rectify):
    sae, x = pursuit(max_iterations=6, rectify=rectify, **EXACTLY), tokens()
    expected = torch.stack([by_hand(token, atoms(), 6, rectify=rectify) for token in x])
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-5, atol=1e-5)


def test_itda_takes_the_largest_magnitude_of_either_sign():
    sae, x = pursuit("itda", k=7), tokens()
    expected = torch.stack([by_hand(token, atoms(), 7, choose=abs) for token in x])
    f = sae.encode(x)
    torch.testing.assert_close(f, expected, rtol=1e-5, atol=1e-5)
    assert (f < 0).any()
    assert (f != 0).sum(dim=1).max() <= 7
    torch.testing.assert_close(sae.decode(f), f @ atoms())


@pytest.mark.parametrize("architecture", ["matching_pursuit", "itda"])
def test_the_error_falls_with_every_iteration(architecture):
    x = tokens()
    errors = []
    for iterations in range(1, 9):
        itda = architecture == "itda"
        sae = pursuit("itda", k=iterations) if itda else pursuit(max_iterations=iterations, **EXACTLY)
        errors.append((x - sae.decode_for(x, sae.encode(x))).norm(dim=1))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
        assert after.mean() < before.mean()


def test_the_rest_is_the_input_without_the_reconstruction():
    b_dec, x = torch.linspace(-1, 1, D), tokens()
    stop = {"residual_threshold": 1.0, "stop_on_duplicate_support": False, "max_iterations": 200}
    sae = pursuit(b_dec=b_dec, folding=Folding(subtract_b_dec=True), **stop)
    error = (x - sae.decode_for(x, sae.encode(x))).norm(dim=1)
    # Every token went on until what is left was that small, and no further.
    assert (error < 1.0).all()
    assert error.min() > 0.1
    # It subtracts what its decoder adds, whether or not pre-activations were told so.
    assert torch.equal(pursuit(b_dec=b_dec, **stop).encode(x), sae.encode(x))


def test_an_iteration_that_adds_no_latent_is_the_last():
    # The atoms point away from each other, so subtracting the second calls for more of the first: a₀, a₁, a₀ again.
    rows = torch.zeros(N, D)
    rows[0, 0] = 1.0
    rows[1, :2] = torch.tensor([-0.6, 0.8])
    rows[2:, 9] = 1.0
    x = 3 * rows[:1] + torch.eye(D)[1]
    stopped, on = (
        pursuit(rows=rows, residual_threshold=0.0, stop_on_duplicate_support=stop).encode(x) for stop in (True, False)
    )
    torch.testing.assert_close(stopped[0], by_hand(x[0], rows, 3))
    torch.testing.assert_close(on[0], by_hand(x[0], rows, D))
    assert (stopped - on).abs().max() > 1e-4


def test_a_token_that_points_away_from_every_atom_has_no_latents_unless_negative_ones_are_allowed():
    rows = atoms().abs()
    x = -tokens(4).abs()
    assert not pursuit(rows=rows).encode(x).any()
    assert (pursuit(rows=rows, rectify=False, max_iterations=1, **EXACTLY).encode(x).min(dim=1).values < 0).all()


def test_a_constant_input_scale_folds_with_the_threshold_in_the_same_unit():
    # Trained on s·x, stopping where the rest of s·x is below 2: in units of x that is 2 / s.
    s, x, b_dec = 0.37, tokens(), torch.linspace(-1, 1, D)
    plain = pursuit(b_dec=b_dec, folding=Folding(subtract_b_dec=True), residual_threshold=2.0)
    folded = pursuit(b_dec=b_dec, folding=Folding(input_scale=s, subtract_b_dec=True), residual_threshold=2.0 / s)
    f = plain.encode(s * x)
    assert (f != 0).sum(dim=1).unique().numel() > 2
    torch.testing.assert_close(folded.encode(x), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.decode(f) * s, plain.decode(f), rtol=1e-5, atol=1e-5)


def test_the_first_correlations_are_the_pre_activations():
    b_dec, x = torch.linspace(-1, 1, D), tokens()
    sae = pursuit(b_dec=b_dec, folding=Folding(subtract_b_dec=True))
    torch.testing.assert_close(sae.pre_activations(x), (x - b_dec) @ atoms().T, rtol=1e-4, atol=1e-5)


def test_what_the_first_correlations_cannot_tell_is_refused():
    for sae in (pursuit(), pursuit("itda", k=3)):
        with pytest.raises(ValueError, match="encode the input"):
            sae.activate(sae.pre_activations(tokens()))
        with pytest.raises(SAEFormatError, match="no threshold decides"):
            sae.thresholded(1.0)


def test_a_decoder_norm_would_change_the_choice_and_is_refused():
    sae = pursuit(folding=Folding(decoder_norm=True))
    with pytest.raises(SAEFormatError, match="takes no decoder norm"):
        sae.encode(tokens())


def test_one_matrix_is_held_once():
    sae = pursuit()
    assert sae.W_enc is sae.W_dec
