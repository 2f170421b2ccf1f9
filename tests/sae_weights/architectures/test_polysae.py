"""PolySAE: the polynomial decoder written out, and edits that are differences of decodings."""

from __future__ import annotations

import pytest
import torch

from sae_weights import SAE, Folding, Hook, SAEFormatError
from sae_weights.architectures import topk_members
from sae_weights.architectures.polysae import linear_directions

D, N = 9, 24
LAMBDA2, LAMBDA3 = -0.5, 0.25
VARIANTS = [
    (order, ranks, shared) for order in (1, 2, 3) for ranks in ((7, 4, 2), (3, 3, 3)) for shared in (False, True)
]
VARIANTS.append((3, (7, 2, 4), True))  # one U serves products of any rank up to its own


def parts(order=3, ranks=(7, 4, 2), shared=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    U = [torch.randn(N, rank, generator=g) * 0.5 for rank in ranks]
    C = [torch.randn(D, rank, generator=g) for rank in ranks]
    gate = {"b_enc": torch.randn(N, generator=g) * 0.3, "U1": U[0]}
    if not shared:
        gate |= {f"U{i}": U[i - 1] for i in range(2, order + 1)}
    return {
        "W_enc": torch.randn(N, D, generator=g) * 0.4,
        "W_dec": linear_directions(U[0], C[0]),
        "b_dec": torch.randn(D, generator=g),
        "gate": gate,
        "extras": {f"C{i}": C[i - 1] for i in range(1, order + 1)},
    }


def polysae(given, *, k=0, **more):
    settings = {"k": k, "lambda2": LAMBDA2, "lambda3": LAMBDA3}
    return SAE.from_tensors(architecture="polysae", hook=Hook("resid_post", 8), settings=settings, **given, **more)


def by_hand(f, given):
    """x̂ of one token: every product of latents written out, float64."""
    gate = {name: tensor.double() for name, tensor in given["gate"].items()}
    C = [tensor.double() for tensor in given["extras"].values()]
    U = [gate["U1"], gate.get("U2", gate["U1"]), gate.get("U3", gate["U1"])]
    on = [j for j in range(N) if f[j] != 0]
    value = {j: float(f[j]) for j in on}
    out = given["b_dec"].double().clone()
    for i in on:
        out += value[i] * (C[0] @ U[0][i])
        for j in on if len(C) > 1 else ():
            r2 = C[1].shape[1]
            out += LAMBDA2 * value[i] * value[j] * (C[1] @ (U[0][i, :r2] * U[1][j, :r2]))
            for m in on if len(C) > 2 else ():
                r3 = C[2].shape[1]
                product = U[0][i, :r3] * U[1][j, :r3] * U[2][m, :r3]
                out += LAMBDA3 * value[i] * value[j] * value[m] * (C[2] @ product)
    return out.float()


def tokens(count=12, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) * 1.5


@pytest.mark.parametrize(("order", "ranks", "shared"), VARIANTS)
def test_the_decoder_sums_products_of_latents(order, ranks, shared):
    given = parts(order, ranks, shared)
    sae = polysae(given, k=5)
    f = sae.encode(tokens())
    assert (f > 0).sum(dim=1).max() == 5
    expected = torch.stack([by_hand(token, given) for token in f])
    torch.testing.assert_close(sae.decode(f), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("order", "ranks", "shared"), VARIANTS)
def test_an_edit_is_the_difference_of_two_decodings(order, ranks, shared):
    given = parts(order, ranks, shared)
    sae, x = polysae(given, k=5, input_norm="layer_norm"), tokens()
    f = sae.encode(x)
    edited = f.clone()
    edited[::2, 3], edited[:, 7] = 2.0, 0.0
    scale = sae.token_scale(x)[1][:, None]
    expected = scale * torch.stack([by_hand(b, given) - by_hand(a, given) for a, b in zip(f, edited, strict=True)])
    torch.testing.assert_close(sae.delta(x, f, edited), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert sae.delta(x, f, f).count_nonzero() == 0


def test_a_small_edit_of_a_large_reconstruction_is_not_rounded_away():
    given = parts()
    given["b_dec"] = given["b_dec"] * 1e6
    sae = polysae(given, k=5)
    f = sae.encode(tokens())
    edited = f.clone()
    edited[:, 3] += 1e-3
    exact = parts()
    expected = torch.stack(
        [by_hand(b.double(), exact) - by_hand(a.double(), exact) for a, b in zip(f, edited, strict=True)]
    )
    got = sae.delta(tokens(), f, edited)
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_small_edit_beside_a_large_latent_is_not_rounded_away():
    sae = polysae(parts(order=1))
    f = torch.zeros(1, N)
    f[0, 11] = 1e6
    edited = f.clone()
    edited[0, 3] = 1e-3
    torch.testing.assert_close(sae.delta(tokens(1), f, edited)[0], 1e-3 * sae.rows([3]).decoder[0])


def test_the_effect_of_a_latent_depends_on_the_others():
    sae = polysae(parts())
    x, off = tokens(1), torch.zeros(1, N)
    alone, company = off.clone(), off.clone()
    alone[0, 3] = 1.0
    company[0, 11] = 1.5
    both = company.clone()
    both[0, 3] = 1.0
    assert (sae.delta(x, company, both) - sae.delta(x, off, alone)).abs().max() > 0.1
    assert not sae.additive
    assert sae.execution == "dictionary"


def test_to_first_order_a_latent_alone_acts_along_its_decoder_row():
    sae = polysae(parts())
    little = torch.zeros(1, N)
    little[0, 3] = 1e-3
    moved = sae.delta(tokens(1), torch.zeros(1, N), little)[0] / 1e-3
    torch.testing.assert_close(moved, sae.rows([3]).decoder[0], rtol=1e-2, atol=1e-2)


def test_topk_jumprelu_and_relu_encoders_are_settings_of_one_class():
    given, x = parts(), tokens()
    p = x @ given["W_enc"].T + given["gate"]["b_enc"]
    torch.testing.assert_close(polysae(given).encode(x), p.relu())
    torch.testing.assert_close(polysae(given, k=3).encode(x), p.relu() * topk_members(p, 3))
    given["gate"]["threshold"] = torch.linspace(0.1, 1.0, N)
    torch.testing.assert_close(polysae(given).encode(x), p * (p > given["gate"]["threshold"]))


def test_a_constant_scale_of_the_input_folds_into_all_cores():
    given, x = parts(), tokens()
    plain, folded = (polysae(given, k=5, folding=Folding(input_scale=s, subtract_b_dec=True)) for s in (1.0, 4.0))
    f = plain.encode(4 * x)
    torch.testing.assert_close(folded.encode(x), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(4 * folded.decode(f), plain.decode(f), rtol=1e-5, atol=1e-4)


def test_activations_in_units_of_the_decoder_norm_decode_to_the_same():
    given, x = parts(), tokens()
    norm = given["W_dec"].norm(dim=1)
    plain, rescaled = polysae(given), polysae(given, folding=Folding(decoder_norm=True))
    f = plain.encode(x)
    torch.testing.assert_close(rescaled.encode(x), f * norm, rtol=1e-5, atol=1e-5)
    expected = plain.decode(f)
    torch.testing.assert_close(rescaled.decode(f * norm), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def without(given, *names):
    kept = {name: tensor for name, tensor in given["gate"].items() if name not in names}
    return {**given, "gate": kept, "extras": {n: t for n, t in given["extras"].items() if n not in names}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without(parts(), "C2"), "C3 without C2"),
        (without(parts(), "U2"), "no U2"),
        (without(parts(), "U3"), "no U3"),
        (without(parts(), "C1"), "also needs .'C1'"),
        (without(parts(), "U1"), "also needs .'U1'"),
        (parts(ranks=(3, 5, 2)), "rank 5"),
        ({**parts(), "extras": {**parts()["extras"], "C2": torch.zeros(D, 3)}}, "C2: shape"),
        ({**parts(), "extras": {**parts()["extras"], "C3": torch.zeros(D + 1, 2)}}, "C3: shape"),
        ({**parts(), "extras": {**parts()["extras"], "C4": torch.zeros(D, 2)}}, "C4"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_it_opens(given, message):
    with pytest.raises(SAEFormatError, match=message):
        polysae(given)


def test_k_must_fit_the_dictionary():
    with pytest.raises(SAEFormatError, match=f"expected 0 .* to {N}"):
        polysae(parts(), k=N + 1)
