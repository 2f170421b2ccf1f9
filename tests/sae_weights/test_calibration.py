"""The threshold that stands in for TopK membership: exact on average, and judged by what it changes."""

from __future__ import annotations

import pytest
import torch

from sae_weights import Folding, SAEFormatError
from sae_weights.calibration import calibrate, find_threshold


@pytest.fixture
def x():
    return torch.randn(3000, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("folding", [Folding(), Folding(rank_by_decoder_norm=True), Folding(decoder_norm=True)])
@pytest.mark.parametrize("k", [1, 7])
def test_at_the_threshold_as_many_latents_fire_as_membership_keeps(make_sae, x, folding, k):
    sae = make_sae("topk", d=12, n=64, k=k, folding=folding)
    theta = find_threshold(sae, x)
    near = sae.thresholded(theta).encode(x)
    exact = sae.encode(x)
    assert float((near != 0).sum()) == pytest.approx(float((exact != 0).sum()), rel=5e-4)
    # Another threshold, a tenth away, keeps visibly more or fewer.
    for factor in (0.9, 1.1):
        other = sae.thresholded(theta * factor).encode(x)
        assert abs(float((other != 0).sum()) - float((exact != 0).sum())) > 0.02 * float((exact != 0).sum())


def test_the_figures_are_those_of_the_two_dictionaries(make_sae, x):
    sae = make_sae("topk", d=12, n=64, k=6, folding=Folding(rank_by_decoder_norm=True))
    found = calibrate(sae, x[:2000], x[2000:])
    held = x[2000:]
    near_sae = sae.thresholded(found.threshold)
    exact, near = sae.encode(held), near_sae.encode(held)
    members, near_members = exact != 0, near != 0
    common = (members & near_members).sum(1)
    variance = float((held - held.mean(0)).pow(2).sum())
    assert (found.tokens, found.held_out_tokens) == (2000, 1000)
    assert found.l0 == pytest.approx(float(members.sum(1).float().mean()))
    assert found.l0_approximate == pytest.approx(float(near_members.sum(1).float().mean()))
    assert found.agreement == pytest.approx(
        float((common / (members | near_members).sum(1).clamp_min(1)).mean()), rel=1e-5
    )
    assert found.kept == pytest.approx(float(common.sum() / members.sum()))
    assert found.added == pytest.approx(float(1 - common.sum() / near_members.sum()))
    assert found.fvu == pytest.approx(float((held - sae.decode_for(held, exact)).pow(2).sum()) / variance, rel=1e-4)
    near_error = float((held - near_sae.decode_for(held, near)).pow(2).sum())
    assert found.fvu_approximate == pytest.approx(near_error / variance, rel=1e-4)
    assert 0.3 < found.agreement < 1


def test_where_k_takes_every_positive_latent_nothing_is_cut_off(make_sae, x):
    sae = make_sae("topk", d=12, n=16, k=16)
    assert find_threshold(sae, x) == 0.0
    found = calibrate(sae, x[:2000], x[2000:])
    assert (found.agreement, found.kept, found.added) == (1.0, 1.0, 0.0)


def test_progress_ends_at_the_end(make_sae, x):
    seen = []
    calibrate(make_sae("topk", d=12, n=64), x[:2000], x[2000:], lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3000, 3000)
    assert seen == sorted(seen)


@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "gated"])
def test_what_needs_no_threshold_gets_none(make_sae, x, architecture):
    with pytest.raises(SAEFormatError, match="takes no calibrated threshold: it is row-separable already"):
        calibrate(make_sae(architecture, d=12), x, x)
