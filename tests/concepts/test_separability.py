"""methods.md's figures: D_JS of densities that are known, and of samples of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions.concepts.separability import (
    jensen_shannon_distance,
    layer_score,
    separability,
    separability_from_rest,
)
from tests.concepts.samples import fitted, generator, per_class

GRID = torch.linspace(-12, 18, 60_001, dtype=torch.float64)


def normal(mean: float, std: float = 1.0) -> Tensor:
    """Masses of N(mean, std²) on the grid."""
    density = torch.exp(-0.5 * ((GRID - mean) / std) ** 2)
    return density / density.sum()


def distance(*masses: Tensor) -> float:
    return float(jensen_shannon_distance(torch.stack(masses)))


def test_equal_distributions_are_at_0_and_disjoint_ones_at_1() -> None:
    assert distance(normal(0), normal(0)) == pytest.approx(0, abs=1e-7)
    assert distance(normal(-6, 0.3), normal(6, 0.3)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("shift", "expected"), [(0.5, 0.2091), (1, 0.4009), (2, 0.6971), (3, 0.8718), (4, 0.9554)])
def test_two_normals_are_as_far_apart_as_quadrature_says(shift: float, expected: float) -> None:
    assert distance(normal(0), normal(shift)) == pytest.approx(expected, abs=5e-5)


def test_three_classes_of_which_two_are_alike() -> None:
    expected = math.sqrt((math.log2(3) - 2 / 3) / math.log2(3))
    assert expected == pytest.approx(0.7612, abs=5e-5)
    assert distance(normal(-6, 0.3), normal(-6, 0.3), normal(6, 0.3)) == pytest.approx(expected, abs=1e-9)


def test_a_hundred_bins_of_20000_draws_give_the_quadrature_value() -> None:
    """0.6963 for the seed of methods.md, 0.6971 exactly; moved by 8 so that every value is positive."""
    columns = [8 + shift + torch.randn(20_000, generator=generator(seed)) for seed, shift in ((3, 0.0), (4, 2.0))]
    _, densities = fitted(per_class(columns), ("a", "b"))
    assert densities.firing_rate.tolist() == [[1.0], [1.0]]
    assert float(separability(densities)[0]) == pytest.approx(0.6963, abs=0.006)


def test_firing_rates_separate_what_positive_values_do_not() -> None:
    """1 % against 60 % with identical positive values: the distance of two coins, not 0."""
    values = 1 + torch.rand(600, generator=generator(5))
    rare = torch.cat([values, torch.zeros(59_400)])
    often = torch.cat([values, torch.zeros(400)])
    _, densities = fitted(per_class([rare, often]), ("rare", "often"), smoothing=0.0)
    coins = jensen_shannon_distance(torch.tensor([[0.99, 0.01], [0.4, 0.6]], dtype=torch.float64))
    assert float(separability(densities)[0]) == pytest.approx(float(coins), abs=1e-12)
    assert float(coins) > 0.6
    assert float(jensen_shannon_distance(densities.positive)[0]) == pytest.approx(0, abs=1e-7)


def test_one_class_against_the_mixture_of_the_others() -> None:
    columns = [torch.tensor([v, v]) for v in (1.0, 1.0, 9.0)]
    _, densities = fitted(per_class(columns), ("a", "b", "c"), smoothing=0.0)
    assert float(separability_from_rest(densities, 2)[0]) == pytest.approx(1, abs=1e-12)
    half = jensen_shannon_distance(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert float(separability_from_rest(densities, 0)[0]) == pytest.approx(float(half), abs=1e-12)


def test_layer_score_is_the_mean_over_latents() -> None:
    assert layer_score(torch.tensor([0.0, 0.5, 1.0])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="distances"):
        layer_score(torch.zeros(0))


@pytest.mark.parametrize(
    ("masses", "message"),
    [
        ([[1.0, 0.0]], "at least two"),
        ([[1.0, 0.0], [0.5, 0.4]], "sum to 1"),
        ([[1.0, 0.0], [1.5, -0.5]], "≥ 0"),
    ],
)
def test_what_is_no_distribution_is_refused(masses: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jensen_shannon_distance(torch.tensor(masses))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(1, 20), st.integers(0, 10_000))
def test_distance_lies_within_0_and_1_and_ignores_the_order_of_classes(k: int, bins: int, seed: int) -> None:
    masses = torch.rand(k, 3, bins, generator=generator(seed), dtype=torch.float64) ** 4 + 1e-12
    masses /= masses.sum(-1, keepdim=True)
    found = jensen_shannon_distance(masses)
    assert found.shape == (3,)
    assert ((found >= 0) & (found <= 1)).all()
    # Near zero, a rounding error of 1e-16 in JSD is one of 1e-8 in its root.
    torch.testing.assert_close(jensen_shannon_distance(masses.flip(0)) ** 2, found**2, rtol=0, atol=1e-13)
