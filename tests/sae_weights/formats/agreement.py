"""What every format has to show: encode, decode, an edit of one feature and error preservation, against another's numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_weights import SAE

TOLERANCE = 1e-5


def assert_near(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal to 1e-5 of the largest value (values of order 1 and above), fp32."""
    scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    difference = float((ours.double() - theirs.double()).abs().max()) if theirs.numel() else 0.0
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    assert difference <= TOLERANCE * scale, f"{what}: differs by {difference:.3g} at values up to {scale:.3g}"


def check_agreement(
    sae: SAE,
    x: Tensor,
    f: Tensor,
    x_hat: Tensor,
    *,
    edited: tuple[int, float, Tensor] | None = None,
) -> None:
    """x [N, d_in]; f [N, n] and x_hat [N, d_out] as the oracle computes them (x_hat in x's own space, skip included).

    ``edited`` = (feature, value, x_hat of f with that feature set to the value), where the oracle can say so; else the
    edit is compared with reconstructing through the whole decoder.
    """
    assert (f != 0).any(), "the oracle's activations are all zero: nothing is shown"
    ours = sae.encode(x)
    assert_near(ours, f, "encode")
    assert_near(sae.decode_for(x, ours), x_hat, "decode")
    if sae.row_separable:
        some = torch.arange(0, sae.n_features, max(1, sae.n_features // 7)).tolist()
        rows = sae.rows(some)
        assert_near(rows.activations(sae.token_scale(x)[0]), f[:, some], "activations of single rows")
    feature = int((f != 0).sum(dim=0).argmax())
    value = 2.5
    if edited is not None:
        feature, value, _ = edited
    changed = f.clone()
    changed[:, feature] = value
    delta = sae.delta(x, ours, torch.where(torch.arange(sae.n_features) == feature, value, ours))
    expected = edited[2] if edited is not None else sae.decode_for(x, changed)
    assert_near(delta, expected - x_hat, "an edit of one feature")
    if sae.additive:
        by_row = sae.token_scale(x)[1][:, None] * (value - f[:, [feature]]) * sae.rows([feature]).decoder
        assert_near(delta, by_row, "an edit of one feature by its decoder row")
    unchanged = (changed == f).all(dim=1)
    assert not bool((delta[unchanged] != 0).any()), "an edit that changes nothing is not exactly zero"
    if sae.hook_out is None:
        # The edited token is decode(f') plus the same error as before: x' − x̂' = x − x̂.
        error_before, error_after = x - x_hat, (x + delta) - expected
        assert_near(error_after, error_before, "the reconstruction error")
