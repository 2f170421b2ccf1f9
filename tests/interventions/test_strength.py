"""The search finds the strength of a wanted effect on curves whose answer is known, in few measurements."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.fitting.strength import REFUSED, TargetNotReached, calibrate, kl_divergence


def gaussian_kl(strength: float) -> float:
    """KL between two normals whose means differ by strength / 30 standard deviations."""
    return (strength / 30) ** 2 / 2


def saturating(strength: float) -> float:
    return 3 * (1 - math.exp(-((strength / 50) ** 2)))


async def test_a_quadratic_effect_is_found_in_three_measurements() -> None:
    asked: list[float] = []

    def measure(strength: float) -> float:
        asked.append(strength)
        return gaussian_kl(strength)

    found = await calibrate(measure, 0.5, start=1.0)
    assert found.converged
    assert found.strength == pytest.approx(30, rel=0.03)
    assert found.effect == pytest.approx(0.5, rel=0.05)
    assert len(asked) <= 3
    assert [point.strength for point in found.curve] == sorted(asked)


@settings(max_examples=150, deadline=None)
@given(
    answer=st.floats(1e-3, 1e3),
    exponent=st.floats(0.5, 6),
    target=st.floats(0.01, 5),
    start=st.floats(0.1, 10),
)
async def test_any_power_law_is_found_within_the_tolerance(
    answer: float, exponent: float, target: float, start: float
) -> None:
    found = await calibrate(lambda s: target * (s / answer) ** exponent, target, start=start)
    assert found.converged
    assert found.strength == pytest.approx(answer, rel=0.11)
    assert found.effect == pytest.approx(target, rel=0.05)
    assert len(found.curve) <= 20


async def test_noise_above_the_tolerance_still_ends_near_the_target() -> None:
    rng = np.random.default_rng(0)
    found = await calibrate(lambda s: saturating(s) * float(rng.uniform(0.9, 1.1)), 0.5, tolerance=0.02)
    assert saturating(found.strength) == pytest.approx(0.5, rel=0.3)


async def test_measurements_may_be_awaited() -> None:
    async def measure(strength: float) -> float:
        return saturating(strength)

    assert (await calibrate(measure, 0.5)).effect == pytest.approx(0.5, rel=0.05)


async def test_an_effect_that_ends_below_the_target_is_reported_with_its_largest() -> None:
    with pytest.raises(TargetNotReached) as caught:
        await calibrate(saturating, 4.0)
    assert caught.value.nearest is not None
    assert caught.value.nearest.effect == pytest.approx(3.0, rel=0.02)
    assert not caught.value.above
    assert not caught.value.refused
    assert len(caught.value.curve) < 12  # a plateau is seen, not climbed to the end


@pytest.mark.parametrize("effect", [0.0, 1e-5])
async def test_an_edit_without_effect_is_given_up(effect: float) -> None:
    with pytest.raises(TargetNotReached) as caught:
        await calibrate(lambda _: effect, 0.5)
    assert caught.value.nearest is not None
    assert caught.value.nearest.effect == effect


async def test_an_edit_that_acts_however_small_is_reported_from_above() -> None:
    with pytest.raises(TargetNotReached) as caught:
        await calibrate(lambda s: 0.8 + gaussian_kl(s), 0.5)
    assert caught.value.above
    assert caught.value.nearest is not None
    assert caught.value.nearest.effect == pytest.approx(0.8, rel=0.02)


@pytest.mark.parametrize("bound", [5.0, 20.0, 200.0])
async def test_refused_strengths_bound_the_search(bound: float) -> None:
    def measure(strength: float) -> float:
        return REFUSED if strength > bound else gaussian_kl(strength)

    if bound > 30:
        found = await calibrate(measure, 0.5, start=1e4)
        assert found.effect == pytest.approx(0.5, rel=0.05)
        return
    with pytest.raises(TargetNotReached) as caught:
        await calibrate(measure, 0.5)
    assert caught.value.refused
    assert caught.value.nearest is not None
    assert caught.value.nearest.effect == pytest.approx(gaussian_kl(bound), rel=0.05)


async def test_nothing_that_runs_is_reported_without_a_nearest() -> None:
    with pytest.raises(TargetNotReached) as caught:
        await calibrate(lambda _: REFUSED, 0.5)
    assert caught.value.nearest is None


async def test_a_jump_across_the_target_ends_at_its_nearer_side() -> None:
    def measure(strength: float) -> float:
        return 0.1 if strength < 7 else 0.6

    found = await calibrate(measure, 0.5)
    assert not found.converged
    assert found.effect == 0.6
    assert found.strength == pytest.approx(7, rel=0.01)


async def test_measurements_that_are_no_number_count_as_too_strong() -> None:
    found = await calibrate(lambda s: math.nan if s > 40 else gaussian_kl(s), 0.5, start=1000)
    assert found.effect == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("effect", [gaussian_kl, saturating, lambda s: 0.1 if s < 7 else 0.6, lambda s: 0.0])
async def test_it_never_measures_more_often_than_allowed(effect: Callable[[float], float]) -> None:
    calls = 0

    def measure(strength: float) -> float:
        nonlocal calls
        calls += 1
        return effect(strength)

    with contextlib.suppress(TargetNotReached):
        await calibrate(measure, 0.5, tolerance=1e-9, evaluations=6)
    assert calls <= 6


@pytest.mark.parametrize("argument", ["target", "start", "tolerance"])
async def test_arguments_must_be_above_zero(argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        await calibrate(gaussian_kl, **({"target": 0.5} | {argument: 0.0}))


def test_the_divergence_is_that_of_the_textbook() -> None:
    p, q = np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.25, 0.25, 0.4, 0.1])
    with np.errstate(divide="ignore"):
        p_log, q_log = np.log(p), np.log(q)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.4)
    assert kl_divergence(p_log, q_log) == pytest.approx(expected)
    assert kl_divergence(q_log, q_log) == 0.0
    assert kl_divergence(q_log, p_log) == math.inf
