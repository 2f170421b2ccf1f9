from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions.concepts.gain import GainTable, Range, Transfer, Whole, apply, delta, gain_table
from interventions.concepts.posterior import posterior
from interventions.concepts.report import attenuated_fraction
from tests.concepts.samples import fitted, gaussian_pair, generator, per_class

N = 6


def random_table(seed: int, n: int = N, n_bins: int = 20) -> GainTable:
    rng = generator(seed)
    low = torch.rand(n, generator=rng)
    return gain_table(
        torch.stack([low, low + 0.5 + torch.rand(n, generator=rng)], 1), torch.rand(n, n_bins, generator=rng)
    )


def random_range(seed: int, tau: float = 1.0) -> Range:
    rng = generator(seed)
    return Range(torch.rand(N, generator=rng) * 3, torch.rand(N, generator=rng), tau)


def transfers(seed: int) -> list[Transfer]:
    return [Whole(), random_range(seed), random_table(seed), random_table(seed).hard(0.3)]


def activations(seed: int, tokens: int = 50) -> Tensor:
    rng = generator(seed)
    return torch.relu(torch.randn(tokens, N, generator=rng)) * 4


@pytest.fixture(scope="module")
def target_and_other() -> tuple[Tensor, Tensor]:
    """Held-out draws of N(6, 1) and N(3, 1), as columns."""
    other = 3 + torch.randn(200_000, generator=generator(11))
    target = 6 + torch.randn(200_000, generator=generator(12))
    return target[target > 0][:, None], other[other > 0][:, None]


@functools.cache
def methods() -> dict[str, Transfer]:
    other, target = gaussian_pair(200_000)
    moments, densities = fitted(per_class([other, target]), ("other", "target"))
    table = gain_table(densities.edges, posterior(densities, "target"))
    mean, std = moments.mean[1], moments.std[1]
    return {
        "mask": Whole(),
        "range 2": Range(mean, std, 2.0),
        "range 1": Range(mean, std, 1.0),
        "hard": table.hard(0.3),
        "app": table,
    }


GRID = torch.linspace(-3, 12, 150_001, dtype=torch.float64)
LOGISTIC = torch.sigmoid(3 * (GRID - 4.5))
EXACT = {
    "mask": torch.ones_like(GRID),
    "range 2": ((GRID - 6).abs() <= 2).double(),
    "range 1": ((GRID - 6).abs() <= 1).double(),
    "hard": (LOGISTIC >= 0.3).double(),
    "app": LOGISTIC,
}
"""Weights for N(6, 1) against N(3, 1) in closed form."""


@pytest.mark.parametrize(
    ("name", "on_target", "on_other", "tolerance"),
    [
        ("mask", 1.0, 1.0, 0.0),
        ("range 2", 0.952, 0.237, 0.005),
        ("range 1", 0.678, 0.041, 0.005),
        ("hard", 0.977, 0.181, 0.02),  # the threshold falls on the edge of some bin
        ("app", 0.926, 0.147, 0.003),
    ],
)
def test_attenuated_fractions_are_those_of_the_closed_form(
    name: str, on_target: float, on_other: float, tolerance: float, target_and_other: tuple[Tensor, Tensor]
) -> None:
    """∫|a|·w(a)·φ(a − m) / ∫|a|·φ(a − m), which the design's figures (20,000 draws) agree with to 0.01."""
    for a, mean, designed in zip(target_and_other, (6, 3), (on_target, on_other), strict=True):
        mass = GRID.abs() * torch.exp(-0.5 * (GRID - mean) ** 2)
        exact = float((mass * EXACT[name]).sum() / mass.sum())
        assert exact == pytest.approx(designed, abs=0.01)
        assert attenuated_fraction(a, apply(methods()[name], a)) == pytest.approx(exact, abs=tolerance)


def test_app_attenuates_926_and_148_thousandths() -> None:
    exact = []
    for mean in (6, 3):
        mass = GRID.abs() * torch.exp(-0.5 * (GRID - mean) ** 2)
        exact.append(float((mass * LOGISTIC).sum() / mass.sum()))
    assert exact == pytest.approx([0.9260, 0.1479], abs=5e-5)


def test_a_row_is_low_end_inverse_width_and_posteriors() -> None:
    table = gain_table(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.25, 0.5, 1.0]]))
    assert table.rows.tolist() == [[1.0, 2.0, 0.0, 0.25, 0.5, 1.0]]
    a = torch.tensor([[0.2], [1.4], [1.5], [2.2], [2.9], [77.0]])
    assert table.weight(a)[:, 0].tolist() == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


def test_looking_up_equals_a_loop() -> None:
    table, a = random_table(3), activations(3)
    for t in range(len(a)):
        for j in range(N):
            low, inverse, *p = table.rows[j].tolist()
            place = math.floor((a[t, j].item() - low) * inverse)
            near_edge = abs((a[t, j].item() - low) * inverse - round((a[t, j].item() - low) * inverse)) < 1e-4
            expected = p[min(max(place, 0), len(p) - 1)]
            assert near_edge or table.weight(a)[t, j].item() == expected


def test_weights_take_any_leading_shape() -> None:
    a = activations(4, 24)
    for transfer in transfers(4):
        torch.testing.assert_close(transfer.weight(a.view(2, 3, 4, N)).view(24, N), transfer.weight(a), rtol=0, atol=0)
        assert transfer.weight(a[0]).shape == (N,)


def test_what_is_not_finite_has_a_bin_and_stays_what_it_is() -> None:
    a = torch.tensor([[math.nan] * N, [math.inf] * N])
    table = random_table(9)
    assert torch.equal(table.weight(a), table.rows[:, -1].expand(2, N))
    assert apply(table, a)[0].isnan().all()


def test_strength_above_one_takes_latents_below_zero() -> None:
    a = torch.full((1, N), 2.0)
    assert apply(Whole(), a, 3.0).tolist() == [[-4.0] * N]
    table = gain_table(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.75]]))
    assert apply(table, torch.tensor([[2.0]]), 4.0).tolist() == [[-4.0]]


def test_a_mask_is_an_attenuation_of_strength_one() -> None:
    a = activations(5)
    assert (apply(Whole(), a) == 0).all()
    torch.testing.assert_close(apply(Whole(), a, 0.25), 0.75 * a)


def test_range_is_zero_inside_and_untouched_outside() -> None:
    mask = Range(torch.tensor([4.0]), torch.tensor([1.0]), 2.0)
    a = torch.tensor([[1.9], [2.0], [4.0], [6.0], [6.1]])
    assert apply(mask, a)[:, 0].tolist() == [a[0, 0].item(), 0.0, 0.0, 0.0, a[4, 0].item()]


def test_suppressions_of_one_latent_compose_as_functions_of_its_current_value() -> None:
    a, one, two = activations(6), random_table(6), random_table(7)
    left = apply(one, a, 1.3)
    both = apply(two, left, 0.7)
    torch.testing.assert_close(both, left * (1 - 0.7 * two.weight(left)))
    assert not torch.allclose(both, left * (1 - 0.7 * two.weight(a)))


def test_a_range_masks_positive_values_only() -> None:
    wide = Range(torch.tensor([1.0]), torch.tensor([4.0]), 1.0)
    x = torch.tensor([[-2.0], [0.0], [3.0], [5.0], [5.5]])
    assert apply(wide, x)[:, 0].tolist() == [-2.0, 0.0, 0.0, 0.0, 5.5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 4), st.floats(0, 4))
def test_gain_falls_with_strength(seed: int, one: float, two: float) -> None:
    a = activations(seed)
    weak, strong = sorted((one, two))
    for transfer in transfers(seed):
        assert (apply(transfer, a, strong) <= apply(transfer, a, weak)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 10))
def test_zero_stays_zero_and_strength_zero_changes_no_bit(seed: int, strength: float) -> None:
    a = activations(seed)
    for transfer in transfers(seed):
        assert (apply(transfer, a, strength)[a == 0] == 0).all()
        assert torch.equal(apply(transfer, a, 0.0), a)
        assert ((transfer.weight(a) >= 0) & (transfer.weight(a) <= 1)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 10), st.floats(0, 10))
def test_wider_ranges_mask_more_and_the_widest_everything(seed: int, one: float, two: float) -> None:
    a = activations(seed)
    narrow, wide = sorted((one, two))
    assert (random_range(seed, narrow).weight(a) <= random_range(seed, wide).weight(a)).all()
    full = random_range(seed, math.inf)
    assert torch.equal(apply(full, a, 1.5), apply(Whole(), a, 1.5))
    assert torch.equal(apply(Range(full.mean, torch.zeros(N), math.inf), a), apply(Whole(), a))
    assert torch.equal(apply(random_range(seed, 1e30), a[a.any(1)]), apply(Whole(), a[a.any(1)]))


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.5])
def test_delta_form_equals_the_full_form(strength: float) -> None:
    """decode(f') + (h − decode(f)), in float64, with latents that are left alone."""
    rng = generator(8)
    d, n_features, chosen = 32, 40, torch.tensor([3, 5, 17, 20, 21, 39])
    decoder, bias = torch.randn(n_features, d, generator=rng).double(), torch.randn(d, generator=rng).double()
    h = torch.randn(50, d, generator=rng).double() * 5
    f = torch.relu(torch.randn(50, n_features, generator=rng)).double() * 4
    for transfer in transfers(8):
        edited = f.clone()
        edited[:, chosen] = apply(transfer, f[:, chosen], strength).double()
        full = (edited @ decoder + bias) + (h - (f @ decoder + bias))
        short = h + delta(f[:, chosen], edited[:, chosen], decoder[chosen])
        torch.testing.assert_close(short, full, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.0, 1.0]], "rows: expected"),
        ([[0.0, 1.0, 0.5], [0.0, 0.0, 0.5]], r"rows\[1\]"),
        ([[0.0, 1.0, 1.5]], r"rows\[0\]"),
        ([[0.0, 1.0, -0.1]], r"rows\[0\]"),
        ([[math.nan, 1.0, 0.5]], r"rows\[0\]"),
        ([[0.0, math.inf, 0.5]], r"rows\[0\]"),
    ],
)
def test_rows_that_are_no_table_are_refused(rows: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GainTable(torch.tensor(rows))


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="tau"):
        Range(torch.ones(1), torch.ones(1), -1.0)
    with pytest.raises(ValueError, match="tau"):
        Range(torch.ones(1), torch.ones(1), math.nan)
    with pytest.raises(ValueError, match="std"):
        Range(torch.ones(1), -torch.ones(1))
    with pytest.raises(ValueError, match="mean"):
        Range(torch.full((1,), math.inf), torch.ones(1))
    with pytest.raises(ValueError, match="threshold"):
        random_table(0).hard(1.5)
    with pytest.raises(ValueError, match="posterior: expected"):
        gain_table(torch.tensor([[0.0, 1.0]]), torch.rand(2, 5))
