from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions.concepts.density import Densities, HistogramStream
from interventions.concepts.gain import gain_table
from interventions.concepts.posterior import posterior, posteriors, posteriors_at_zero
from tests.concepts.samples import CLASSES, fitted, gaussian_pair, generator, per_class, sparse_batch


def look_up(densities: Densities, target: str, a: Tensor) -> Tensor:
    """P(target | a ``[m]``) of the first latent."""
    return gain_table(densities.edges, posterior(densities, target)).weight(a[:, None])[:, 0]


def test_two_normals_give_the_logistic_curve() -> None:
    """N(6, 1) against N(3, 1): P = σ(3(a − 4.5)) in closed form; the histogram is 0.008 off on average, over [2, 7]."""
    other, target = gaussian_pair()
    _, densities = fitted(per_class([other, target]), ("other", "target"))
    grid = torch.linspace(2, 7, 501)
    wrong = (look_up(densities, "target", grid) - torch.sigmoid(3 * (grid - 4.5))).abs()
    assert float(wrong.mean()) < 0.012
    assert float(wrong.max()) < 0.1
    assert float(look_up(densities, "target", torch.tensor([4.5]))) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("n_bins", [7, 100, 400])
def test_activations_beyond_the_fitted_range_are_not_let_through(n_bins: int) -> None:
    """Density 0 out there would say P = 0; and with many bins the 1 % of margin holds no token at all."""
    other, target = gaussian_pair()
    _, densities = fitted(per_class([other, target]), ("other", "target"), n_bins)
    beyond = look_up(densities, "target", torch.tensor([10.5, 50.0, 1e30, torch.inf]))
    assert (beyond > 0.99).all()
    below = look_up(densities, "target", torch.tensor([1e-6]))
    assert float(below) < 0.01


def zero_inflated(seed: int, rate: float, tokens: int = 20_000) -> Tensor:
    values = torch.distributions.Gamma(4.0, 1.0)
    torch.manual_seed(seed)
    drawn = values.sample((tokens,))
    return torch.where(torch.rand(tokens, generator=generator(seed)) < rate, drawn, 0.0)


def test_firing_rate_alone_decides_when_positive_values_are_alike() -> None:
    """Fires on 1 % against 60 % of tokens, the very same values: 0.984 where it fires, 0.288 where not."""
    values = torch.rand(600, generator=generator(1)) + 0.5
    rare = torch.cat([values, torch.zeros(60_000 - 600)])
    often = torch.cat([values, torch.zeros(1_000 - 600)])
    _, densities = fitted(per_class([rare, often]), ("rare", "often"))
    occupied = densities.counts.sum(0)[0] > 0
    p = posterior(densities, "often")[0]
    torch.testing.assert_close(p[occupied], torch.full_like(p[occupied], 0.6 / 0.61), rtol=0, atol=1e-4)
    assert float(p.min()) > 0.9835
    assert round(float(p.mean()), 3) == 0.984
    assert round(float(posteriors_at_zero(densities)[1, 0]), 3) == 0.288


def test_firing_rate_decides_in_samples_too() -> None:
    _, densities = fitted(per_class([zero_inflated(1, 0.01), zero_inflated(2, 0.6)]), ("rare", "often"), 50)
    assert float(posteriors_at_zero(densities)[1, 0]) == pytest.approx(0.288, abs=0.005)
    assert float(look_up(densities, "often", torch.tensor([2.0]))) == pytest.approx(0.984, abs=0.015)
    assert float(look_up(densities.spread(), "often", torch.tensor([4.0]))) == pytest.approx(0.984, abs=0.015)


def test_priors_and_a_background_class_enter_by_bayes() -> None:
    """One value; firing rates 0.5, 0.1, 0.02: P = π_c q_c / Σ π q."""
    rates = (0.5, 0.1, 0.02)
    columns = [torch.cat([torch.full((int(100 * q),), 2.0), torch.zeros(100 - int(100 * q))]) for q in rates]
    _, densities = fitted(per_class(columns), CLASSES, smoothing=0.0)
    assert posterior(densities, "sports")[0].tolist() == pytest.approx([0.5 / 0.62] * 100)
    weights = {"background": 8.0, "sports": 1.0, "world": 1.0}
    joint = (0.1 * 0.5, 0.1 * 0.1, 0.8 * 0.02)
    for name, expected in zip(CLASSES, joint, strict=True):
        assert posterior(densities, name, weights)[0].tolist() == pytest.approx([expected / sum(joint)] * 100)
    zero = (0.1 * 0.5, 0.1 * 0.9, 0.8 * 0.98)
    assert posteriors_at_zero(densities, weights)[:, 0].tolist() == pytest.approx([z / sum(zero) for z in zero])


def test_a_latent_that_never_fires_says_what_the_prior_says() -> None:
    stream = HistogramStream(CLASSES, torch.tensor([[0.0, 1.0]]))
    for c in range(3):
        stream.add(torch.zeros(5, 1), c)
    for smoothing in (0.0, 1e-5):
        assert (posteriors(stream.densities(smoothing), {"sports": 2, "world": 1, "background": 1})[0] == 0.5).all()


def test_a_class_in_which_a_latent_never_fires_has_no_share() -> None:
    _, densities = fitted(per_class([torch.tensor([1.0, 3.0]), torch.zeros(2)]), ("a", "b"))
    assert (posterior(densities, "a") == 1).all()


@pytest.mark.parametrize("smoothing", [0.0, 1e-5])
def test_bins_without_tokens_take_the_nearest_bin_that_has_some(smoothing: float) -> None:
    """No ε: where nobody was seen the answer is the neighbour's, not zero for every class."""
    stream = HistogramStream(("a", "b"), torch.tensor([[0.0, 10.0]]), n_bins=10)
    stream.add(torch.tensor([[2.5], [2.5]]), 0)
    stream.add(torch.tensor([[8.5], [8.5]]), 1)
    p = posterior(stream.densities(smoothing), "b")[0]
    assert p.round(decimals=3).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]  # bin 5 lies between: the lower wins


def test_priors_that_are_none_are_refused() -> None:
    _, densities = fitted([sparse_batch(0)], CLASSES)
    for priors, message in (
        ({"sports": 1.0}, "a weight for each of sports, world, background"),
        (dict.fromkeys(CLASSES, 0.0), "not all zero"),
        ({"sports": -1.0, "world": 1.0, "background": 1.0}, "≥ 0"),
        ({"sports": float("nan"), "world": 1.0, "background": 1.0}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            posteriors(densities, priors)
    with pytest.raises(ValueError, match=r"'sport' is not a class.* Did you mean 'sports'"):
        posterior(densities, "sport")


def test_a_class_without_tokens_is_refused() -> None:
    stream = HistogramStream(CLASSES, torch.tensor([[0.0, 1.0]]))
    stream.add(torch.ones(5, 1), 0)
    with pytest.raises(ValueError, match="'world' has no tokens"):
        posteriors(stream.densities())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(3, 300),
    n_bins=st.integers(1, 130),
    smoothing=st.sampled_from([0.0, 1e-5, 1.0]),
    weights=st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3),
    spread=st.booleans(),
)
def test_posteriors_are_probabilities_that_sum_to_one(
    seed: int, tokens: int, n_bins: int, smoothing: float, weights: list[float], spread: bool
) -> None:
    activations, labels = sparse_batch(seed, tokens)
    labels[:3] = torch.tensor([0, 1, 2])
    _, densities = fitted([(activations, labels)], CLASSES, n_bins, smoothing=smoothing)
    p = posteriors(densities.spread() if spread else densities, dict(zip(CLASSES, weights, strict=True)))
    assert p.shape == (3, 6, n_bins)
    assert ((p >= 0) & (p <= 1)).all()
    torch.testing.assert_close(p.sum(0), torch.ones(6, n_bins, dtype=torch.float64))
