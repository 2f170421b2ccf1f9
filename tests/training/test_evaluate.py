"""Figures of a dictionary follow their formulas; a splice leaves sinks alone."""

from __future__ import annotations

import pytest
import torch

from sae_weights.hook import Hook
from sae_weights.sae import SAE
from sae_weights.training.evaluate import reconstruction, splice
from tests.training.test_activations import tiny_model


def axis_sae(d, b_dec=0.0, threshold=0.5, layer=1):
    """Latents ±x_i, so that reconstruction is exact where |x_i| > threshold and 0 elsewhere."""
    rows = torch.cat([torch.eye(d), -torch.eye(d)])
    return SAE.from_tensors(
        architecture="jumprelu",
        hook=Hook("resid_post", layer),
        W_enc=rows,
        W_dec=rows,
        b_dec=torch.full((d,), float(b_dec)),
        gate={"b_enc": torch.zeros(2 * d), "threshold": torch.full((2 * d,), threshold)},
    )


def test_fvu_l0_density_and_dead_share_by_hand():
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.4], [2.0, 0.0], [-2.0, -0.4]])
    found = reconstruction(axis_sae(2), x)
    # Lost: two entries of 0.4. Around the mean (0, 0): 4 · 2² + 2 · 0.4².
    assert found.fvu == pytest.approx(2 * 0.16 / (16 + 2 * 0.16))
    assert found.l0 == 1.0
    assert found.density.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert found.max_activation.tolist() == [2.0, 0.0, 2.0, 0.0]
    assert found.dead == 0.5


def test_variance_is_taken_around_the_mean():
    # With a large common offset the plain second moment would make any dictionary look perfect.
    x = 1000 + torch.randn(512, 3, generator=torch.Generator().manual_seed(0))
    blind = axis_sae(3, b_dec=1000, threshold=1e9)
    assert reconstruction(blind, x).fvu == pytest.approx(1.0, abs=0.02)


SEQUENCES = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]]


def test_perfect_dictionary_recovers_the_whole_loss_and_zero_ablation_none():
    found = splice(tiny_model(), axis_sae(16, threshold=0.0), 1, SEQUENCES, median_norm=1.0)
    assert found.tokens == 12
    assert found.sae == pytest.approx(found.clean, abs=1e-4)
    assert abs(found.zero - found.clean) > 1e-3
    assert found.recovered == pytest.approx(1.0, abs=0.05)
    silent = splice(tiny_model(), axis_sae(16, threshold=1e9), 1, SEQUENCES, median_norm=1.0)
    assert silent.sae == pytest.approx(silent.zero, abs=1e-6)


def test_sinks_are_never_replaced():
    # With a median this small every token is an outlier: even zero ablation then changes nothing.
    found = splice(tiny_model(), axis_sae(16, threshold=1e9), 1, SEQUENCES, median_norm=1e-9)
    assert found.zero == found.sae == found.clean


def test_position_zero_alone_is_spared(monkeypatch):
    model, seen = tiny_model(), []
    model.model.layers[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))
    splice(model, axis_sae(16), 1, [[5, 6, 7]], median_norm=1e9)
    clean, _, zero = seen
    assert torch.equal(zero[0, 0], clean[0, 0])
    assert torch.count_nonzero(zero[0, 1:]) == 0
