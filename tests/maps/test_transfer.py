"""Each transfer does what its equation says, and the delta form is the upstream form Dec(f') + (h − Dec(f))."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions.errors import InterventionError
from interventions.maps.transfer import (
    Route,
    Transfer,
    Unit,
    apply,
    canonical,
    clamp_active,
    clamp_hit,
    delta,
    hit,
    interpolate,
    mean_row,
    median_norms,
    move,
    moves,
    reads,
    units,
)
from tests.maps.published import SELECTED, TinySAE, published_draws

ALL_FEATURES = range(128)


@pytest.fixture(scope="module")
def h() -> np.ndarray:
    return published_draws().h


@pytest.fixture(scope="module")
def sae() -> TinySAE:
    return TinySAE(32, 128, 1)


def everywhere(a: Tensor) -> Tensor:
    return torch.ones(len(a), dtype=torch.bool)


def edited(sae: TinySAE, h: np.ndarray, transfers: tuple[Transfer, ...], acts: np.ndarray) -> np.ndarray:
    """h' by our delta form: only the latents that the transfers read are looked at."""
    latents = list(reads(transfers))
    a = torch.from_numpy(sae.encode(h)[:, latents])
    s = units(torch.from_numpy(h), mean_preactivation=torch.from_numpy(sae.pre_activations(h).mean(axis=1)))
    x = apply(a, latents, transfers, torch.from_numpy(acts), s)
    return h + delta(a, x, torch.from_numpy(sae.W_dec[latents])).numpy()


def upstream(sae: TinySAE, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    """The published form: decode everything, keep the error."""
    return sae.decode(f) + (h - sae.decode(sae.encode(h)))


def upstream_latents(name: str, sae: TinySAE, h: np.ndarray) -> tuple[tuple[Transfer, ...], np.ndarray, np.ndarray]:
    """Transfers, the tokens where they act, and the edited f as the paper or code computes it on all latents."""
    f, f2, norm = sae.encode(h), sae.encode(h), np.linalg.norm(h, axis=1)
    live = np.arange(len(h)) > 0  # position 0 is never edited
    hits = (f[:, SELECTED] > 0).any(axis=1) & live
    if name == "interpolate":
        f2[np.ix_(live, SELECTED)] = 0.7 * f[np.ix_(live, SELECTED)] + 0.3 * np.array([1.0, 2.0, 0.0])
        return tuple(interpolate(i, mu, 0.3) for i, mu in zip(SELECTED, (1.0, 2.0, 0.0), strict=True)), live, f2
    if name == "clamp active":
        f2[:, SELECTED] = np.where((f[:, SELECTED] > 0) & live[:, None], -25.0, f[:, SELECTED])
        return tuple(clamp_active(i, 25.0) for i in SELECTED), live, f2
    if name == "clamp hit":
        f2[np.ix_(hits, SELECTED)] = -500.0
        return clamp_hit(SELECTED, 500.0), hits, f2
    if name == "clamp hit by norm":
        f2[np.ix_(hits, SELECTED)] = -0.5 * norm[hits, None]
        return clamp_hit(SELECTED, 0.5, Unit.RESIDUAL_NORM), hits, f2
    if name == "clamp by pre-activation":
        scale = np.abs(5.0 * sae.pre_activations(h).mean(axis=1))[:, None]
        f2[:, SELECTED] = np.where((f[:, SELECTED] > 0) & live[:, None], -scale, f[:, SELECTED])
        return tuple(clamp_active(i, 5.0, Unit.PREACT_MEAN) for i in SELECTED), live, f2
    f2[live, 17] = f[live, 17] + 1.5 * f[live, 3]
    f2[live, 3] = 0.25 * f[live, 3]
    return move(3, 17, gain=1.5, removed=0.75), live, f2


@pytest.mark.parametrize(
    "name",
    ["interpolate", "clamp active", "clamp hit", "clamp hit by norm", "clamp by pre-activation", "move"],
)
def test_the_delta_form_is_the_upstream_form(name: str, sae: TinySAE, h: np.ndarray) -> None:
    transfers, acts, f2 = upstream_latents(name, sae, h)
    ours, theirs = edited(sae, h, transfers, acts), upstream(sae, h, f2)
    assert not np.allclose(theirs, h)  # the edit does something
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * max(1.0, np.abs(f2).max()))
    np.testing.assert_array_equal(ours[~acts], h[~acts])


def test_dsg_hits_are_those_of_the_published_check(sae: TinySAE, h: np.ndarray) -> None:
    hits = hit(torch.from_numpy(sae.encode(h)[:, SELECTED])).numpy()
    hits[0] = False
    assert hits.sum() == 31
    ours = edited(sae, h, clamp_hit(SELECTED, 500.0), hits)
    f2 = sae.encode(h)
    f2[np.ix_(hits, SELECTED)] = -500.0
    assert np.abs(ours - upstream(sae, h, f2)).max() < 1e-12 * 500  # published: 2.8e-13


def test_a_clamp_in_units_of_the_norm_writes_that_dose_whatever_the_input_scaling() -> None:
    h = torch.randn(5, 8, dtype=torch.float64) * 300
    row = torch.nn.functional.normalize(torch.randn(1, 8, dtype=torch.float64))
    for scale in (None, torch.rand(5, dtype=torch.float64) + 0.5):
        a = torch.zeros(5, 1, dtype=torch.float64)
        x = apply(a, [4], clamp_hit([4], 0.5, Unit.RESIDUAL_NORM), everywhere(a), units(h, scale))
        change = delta(a, x, row, scale)
        torch.testing.assert_close(change.norm(dim=-1) / h.norm(dim=-1), torch.full((5,), 0.5, dtype=torch.float64))
        assert (change @ row[0] < 0).all()


def test_the_mean_pre_activation_of_all_latents_is_one_row(sae: TinySAE, h: np.ndarray) -> None:
    bias = torch.full((128,), sae.b_enc, dtype=torch.float64)
    row, offset = mean_row(torch.from_numpy(sae.W_dec), bias)
    one = (torch.from_numpy(h - sae.b_dec) @ row + offset).numpy()
    np.testing.assert_allclose(one, sae.pre_activations(h).mean(axis=1), rtol=0, atol=1e-14)
    assert Unit.PREACT_MEAN.reads_all_latents
    assert not Unit.RESIDUAL_NORM.reads_all_latents


def test_sources_are_original_activations_so_a_chain_of_moves_shifts_each_by_one() -> None:
    a = torch.tensor([[2.0, 0.5, 0.0]], dtype=torch.float64)
    for routes in ([Route(0, 1), Route(1, 2)], [Route(1, 2), Route(0, 1)]):
        assert apply(a, [0, 1, 2], moves(routes), everywhere(a), {}).tolist() == [[0.0, 2.0, 0.5]]
    swap = moves([Route(0, 1), Route(1, 0)])
    assert apply(a, [0, 1, 2], swap, everywhere(a), {}).tolist() == [[0.5, 2.0, 0.0]]
    shared = moves([Route(0, 1, removed=0.25), Route(0, 2, gain=2.0, removed=0.5)])
    assert apply(a, [0, 1, 2], shared, everywhere(a), {}).tolist() == [[0.5, 2.5, 4.0]]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_known_to_unknown_at_both_ends(strength: float) -> None:
    """λ = 0 moves nothing; λ = 1 moves h by exactly the decoder-side norm, 13.3633 in the published check."""
    draws, sae = published_draws(), TinySAE(64, 200, 2)
    latents = [5, 6, 7, 8, 50, 51]
    mu = draws.unknown.mean(axis=0)
    h = sae.decode(draws.target)[None]
    transfers = canonical([interpolate(i, float(mu[i]), strength) for i in latents])
    f = sae.encode(h)
    decoder_side = np.linalg.norm(strength * (mu[latents] - f[0, latents]) @ sae.W_dec[latents])
    moved = np.linalg.norm(edited(sae, h, transfers, np.ones(1, bool)) - h) if transfers else 0.0
    assert moved == pytest.approx(decoder_side, abs=1e-10)
    assert moved == pytest.approx(13.3633 * strength, abs=5e-5)
    assert (transfers == ()) == (strength == 0.0)


VALUES = st.floats(-50, 50)
COLUMN = st.integers(0, 3)


@st.composite
def any_transfer(draw: st.DrawFn) -> Transfer:
    source = draw(st.none() | COLUMN)
    lo, hi = sorted([draw(VALUES), draw(VALUES)])
    return Transfer(
        latent=draw(COLUMN),
        alpha=draw(VALUES),
        beta=draw(VALUES),
        gamma=draw(VALUES.filter(bool)) if source is not None else 0.0,
        source=source,
        lo=draw(st.sampled_from([-math.inf, lo])),
        hi=draw(st.sampled_from([math.inf, hi])),
        unit=draw(st.sampled_from([Unit.ABSOLUTE, Unit.RESIDUAL_NORM])),
        only_if_active=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(transfers=st.lists(any_transfer(), max_size=8), seed=st.integers(0, 2**16))
def test_any_program_of_transfers_is_the_loop_of_its_docstring(transfers: list[Transfer], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 4, generator=g, dtype=torch.float64) * (torch.rand(6, 4, generator=g) < 0.6)
    acts = torch.rand(6, generator=g) < 0.7
    norm = torch.rand(6, generator=g, dtype=torch.float64) * 100
    s = {Unit.ABSOLUTE: torch.ones(6, dtype=torch.float64), Unit.RESIDUAL_NORM: norm}
    x = apply(a, range(4), transfers, acts, s)
    for token in range(6):
        values = a[token].tolist()
        for t in transfers:
            if not acts[token] or (t.only_if_active and a[token, t.latent] == 0):
                continue
            value = t.alpha * values[t.latent] + t.beta * (norm[token].item() if t.unit is Unit.RESIDUAL_NORM else 1.0)
            value += t.gamma * (a[token, t.source].item() if t.source is not None else 0.0)
            values[t.latent] = min(max(value, t.lo), t.hi)
        assert x[token].tolist() == pytest.approx(values, rel=1e-12, abs=1e-12)
    assert torch.equal(x[~acts], a[~acts])
    torch.testing.assert_close(apply(a, range(4), canonical(transfers), acts, s), x, rtol=0, atol=0)


@settings(max_examples=150, deadline=None)
@given(transfer=any_transfer(), strength=st.floats(-2, 4))
def test_strength_interpolates_between_the_identity_and_the_transfer(transfer: Transfer, strength: float) -> None:
    unbounded = Transfer(
        transfer.latent, transfer.alpha, transfer.beta, transfer.gamma, transfer.source, unit=transfer.unit
    )
    a = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = dict.fromkeys(Unit, torch.full((5,), 7.0, dtype=torch.float64))
    full = apply(a, range(4), [unbounded], everywhere(a), s)
    part = apply(a, range(4), [unbounded.at(strength)], everywhere(a), s)
    torch.testing.assert_close(part, (1 - strength) * a + strength * full, rtol=1e-9, atol=1e-9)
    assert transfer.at(1.0) == transfer
    assert transfer.at(0.0).is_identity


def test_activity_is_judged_on_the_original_value_also_of_signed_latents() -> None:
    a = torch.tensor([[0.0, -1.0, 2.0]])
    transfers = [Transfer(0, beta=5.0), *(clamp_active(i, 3.0) for i in range(3))]
    assert apply(a, [0, 1, 2], transfers, everywhere(a), units(torch.ones(1, 2))).tolist() == [[5.0, -3.0, -3.0]]
    assert hit(a).tolist() == [True]
    assert hit(torch.tensor([[0.0, -0.0]])).tolist() == [False]


def test_a_fixed_clamp_carries_over_through_the_median_norm() -> None:
    """500 at a median ‖h‖ of 91.7 (Gemma-2-2B layer 3) is the same dose per latent as 168,653 at 30,931 (Gemma-3-4B)."""
    assert median_norms(500 / 91.7, 30931.0) == pytest.approx(168653, abs=1)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: Transfer(-1), "latent"),
        (lambda: Transfer(1, source=-4, gamma=1.0), "source"),
        (lambda: Transfer(1, alpha=math.nan), "alpha"),
        (lambda: Transfer(1, beta=math.inf), "beta"),
        (lambda: Transfer(1, lo=2.0, hi=1.0), "lo"),
        (lambda: Transfer(1, lo=math.inf), "lo"),
        (lambda: Transfer(1, hi=math.nan), "hi"),
        (lambda: Transfer(1, gamma=1.0), "source"),
        (lambda: Transfer(1, source=2), "source"),
        (lambda: Transfer(1).at(math.nan), "strength"),
        (lambda: clamp_active(1, -3.0), "c"),
        (lambda: move(3, 3), "target"),
        (lambda: median_norms(1.0, 0.0), "median_norm"),
    ],
)
def test_a_transfer_that_means_nothing_names_its_field(make, param: str) -> None:
    with pytest.raises(InterventionError) as error:
        make()
    assert (error.value.code, error.value.param) == ("invalid_artifact", param)
