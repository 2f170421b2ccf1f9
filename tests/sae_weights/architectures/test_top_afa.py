"""Top-AFA: as many latents as explain the norm of the input, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from sae_weights import SAE, Folding, Hook

D, N = 16, 60


def top_afa(*, spread=0.1, norm="layer_norm", seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(N, D, generator=g) * spread,
        "W_dec": torch.randn(N, D, generator=g) * (0.3 + torch.rand(N, 1, generator=g)) * 0.5,
        "b_dec": torch.randn(D, generator=g) * 0.4,
    }, norm


def opened(parts, norm):
    gate = {"b_enc": torch.zeros(N)}
    return SAE.from_tensors(
        architecture="top_afa",
        hook=Hook("resid_pre", 8),
        gate=gate,
        folding=Folding(subtract_b_dec=True),
        input_norm=norm,
        **parts,
    )


def by_hand(x, parts, norm):
    """One token, float64 → (f, k, whether all latents but one explain the norm)."""
    x = x.double()
    if norm == "layer_norm":
        x = x - x.mean()
        x = x / (x.std() + 1e-5)
    E, W, b = (parts[name].double() for name in ("W_enc", "W_dec", "b_dec"))
    a = [max(float(E[j] @ (x - b)), 0.0) for j in range(N)]
    energy = [(a[j] * float(W[j].norm())) ** 2 for j in range(N)]
    order = sorted(range(N), key=lambda j: (-energy[j], j))
    target = float((x - b).norm())
    total, sums = 0.0, []
    for j in order:
        total += energy[j]
        sums.append(total)
    sums[-1] = 1e8
    k = min(range(N), key=lambda i: (abs(math.sqrt(sums[i]) - target), i)) + 1
    f = torch.zeros(N)
    f[order[:k]] = torch.tensor([a[j] for j in order[:k]])
    return f, k, math.sqrt(sums[-2]) > target


@pytest.mark.parametrize("norm", ["layer_norm", "none"])
@pytest.mark.parametrize("spread", [0.1, 0.15, 1.0])
def test_the_number_of_latents_follows_from_the_norm_of_the_input(spread, norm):
    parts, norm = top_afa(spread=spread, norm=norm)
    sae = opened(parts, norm)
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    expected, k, explained = zip(*(by_hand(token, parts, norm) for token in x), strict=True)
    # Elsewhere k is decided by the rounding of an fp32 sum that no longer grows.
    here = torch.tensor(explained)
    assert here.float().mean() > 0.4
    torch.testing.assert_close(sae.encode(x)[here], torch.stack(expected)[here], rtol=1e-5, atol=1e-5)
    if spread == 0.1:
        assert len({count for count, told in zip(k, explained, strict=True) if told}) > 3


def test_scaling_a_token_leaves_its_latents_alone_after_layer_norm():
    parts, norm = top_afa()
    sae = opened(parts, norm)
    x = torch.randn(10, D, generator=torch.Generator().manual_seed(2)) + 0.5
    torch.testing.assert_close(sae.encode(64 * x), sae.encode(x), rtol=1e-3, atol=1e-3)


def test_all_latents_are_kept_only_by_inputs_beyond_the_authors_bound():
    parts, _ = top_afa(spread=0.002)  # all latents together explain less than the input
    parts = {name: tensor.abs() for name, tensor in parts.items()} | {"b_dec": torch.zeros(D)}
    sae = opened(parts, "none")
    x = torch.rand(5, D, generator=torch.Generator().manual_seed(3)) + 0.1
    assert (sae.pre_activations(x) > 0).all()
    assert ((sae.encode(x) > 0).sum(dim=1) < N).all()
    assert (sae.encode(x / x.norm(dim=1, keepdim=True) * 1e5) > 0).all()


def test_its_pre_activations_alone_are_not_enough():
    sae = opened(*top_afa())
    with pytest.raises(ValueError, match="encode the input"):
        sae.activate(torch.zeros(1, N))
