"""What holds for every architecture that can be edited, whatever it computes."""

from __future__ import annotations

import pytest
import torch

from sae_weights import Folding, load_sae, save_native
from sae_weights.architectures import ARCHITECTURES

COMPUTED = [name for name, form in ARCHITECTURES.items() if form.execution != "sequence"]
ADDITIVE = [name for name in COMPUTED if ARCHITECTURES[name].additive]
NORMS = ["none", "layer_norm", "unit_norm"]


def dictionary(make_sae, name, **more):
    # k of 8 in 32 features: some tokens have fewer active ones, and GroupMax has groups of four.
    more = {"k": 8} | more if ARCHITECTURES[name].needs_k else more
    return make_sae(name, d=12, n=32, seed=COMPUTED.index(name), **more)


def tokens(count, seed=1):
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", COMPUTED)
def test_an_edit_that_changes_nothing_adds_exactly_nothing(make_sae, name, norm):
    sae, x = dictionary(make_sae, name, input_norm=norm), tokens(9)
    f = sae.encode(x)
    assert (f != 0).any()
    assert torch.equal(sae.delta(x, f, f.clone()), torch.zeros_like(x))
    one_token = f.clone()
    one_token[4, 3] += 1.5
    assert sae.delta(x, f, one_token)[[0, 1, 2, 3, 5, 6, 7, 8]].count_nonzero() == 0
    assert sae.delta(x, f, one_token)[4].count_nonzero() > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", COMPUTED)
def test_an_edit_moves_the_reconstruction_and_keeps_the_error(make_sae, name, norm):
    sae, x = dictionary(make_sae, name, input_norm=norm), tokens(9)
    f = sae.encode(x)
    edited = f.clone()
    edited[:, [2, 20]] = torch.tensor([3.0, 0.0])
    error = x - sae.decode_for(x, f)
    torch.testing.assert_close(
        x + sae.delta(x, f, edited) - sae.decode_for(x, edited), error, rtol=1e-5, atol=1e-5 * max(1, error.abs().max())
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ADDITIVE)
def test_editing_one_feature_adds_its_decoder_row(make_sae, name, norm):
    sae, x = dictionary(make_sae, name, input_norm=norm), tokens(9)
    f = sae.encode(x)
    feature = int((f != 0).sum(dim=0).argmax())
    edited = f.clone()
    edited[:, feature] = -0.5
    by_row = sae.token_scale(x)[1][:, None] * (-0.5 - f[:, [feature]]) * sae.rows([feature]).decoder
    torch.testing.assert_close(sae.delta(x, f, edited), by_row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ADDITIVE)
def test_the_decoder_of_an_additive_one_adds_up(make_sae, name):
    sae = dictionary(make_sae, name)
    f, g = sae.encode(tokens(7)), sae.encode(tokens(7, seed=2))
    both = sae.decode(f + g) + sae.decode(torch.zeros_like(f))
    torch.testing.assert_close(both, sae.decode(f) + sae.decode(g), rtol=1e-5, atol=1e-4)


def test_a_decoder_that_does_not_add_up_says_so(make_sae):
    assert [name for name in COMPUTED if name not in ADDITIVE] == ["polysae", "crosscoder"]
    # The crosscoder is nonlinear at its gates only; see formats/test_llamascopium.py.
    core = torch.randn(12, 3, generator=torch.Generator().manual_seed(3))
    sae, x = dictionary(make_sae, "polysae", more_extras={"C2": core}, settings={"lambda2": 0.5}), tokens(7)
    f = sae.encode(x)
    first, second, both = f.clone(), f.clone(), f.clone()
    first[:, 2], second[:, 9] = 4.0, 4.0
    both[:, [2, 9]] = 4.0
    apart = sae.delta(x, f, first) + sae.delta(x, f, second)
    assert (sae.delta(x, f, both) - apart).abs().max() > 0.1


@pytest.mark.parametrize("name", COMPUTED)
def test_activations_are_negative_only_where_the_architecture_says_so(make_sae, name):
    f = dictionary(make_sae, name).encode(tokens(200))
    if not ARCHITECTURES[name].signed:
        assert f.min() == 0


@pytest.mark.parametrize("name", COMPUTED)
def test_a_token_has_the_same_bits_in_any_company(make_sae, name):
    sae, x = dictionary(make_sae, name), tokens(16)
    f = sae.encode(x)
    # Zeros stop at once, and large tokens need more iterations than any other.
    for others in (tokens(16, seed=5) * 100, torch.zeros(16, 12), -x):
        mixed = others.clone()
        mixed[::3] = x[::3]
        assert torch.equal(sae.encode(mixed)[::3], f[::3])


@pytest.mark.parametrize("name", COMPUTED)
def test_one_broken_token_breaks_no_other(make_sae, name):
    sae, x = dictionary(make_sae, name), tokens(8)
    f = sae.encode(x)
    broken = x.clone()
    broken[3] = float("nan")
    keep = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(sae.encode(broken)[keep], f[keep])


@pytest.mark.parametrize("name", [name for name in COMPUTED if ARCHITECTURES[name].execution == "dictionary"])
def test_of_two_equal_features_the_lower_index_is_taken_first(make_sae, name):
    sae = dictionary(make_sae, name)
    gate = {n: v.clone() for n, v in sae.gate.items()}
    order = torch.arange(32)
    order[1::2] = order[0::2]  # feature 2j + 1 is a copy of feature 2j
    twins = type(sae).from_tensors(
        architecture=name,
        hook=sae.hook,
        W_dec=sae.W_dec[order],
        b_dec=sae.b_dec,
        gate={n: v[order] for n, v in gate.items()},
        extras=sae.extras,
        k=sae.k,
        settings=sae.settings,
        **({} if ARCHITECTURES[name].tied else {"W_enc": sae.W_enc[order]}),
    )
    f = twins.encode(tokens(50))
    assert (f != 0).any()
    first, second = f[:, 0::2], f[:, 1::2]
    # The second of two twins is never there without the first; in a pursuit the first takes all of it.
    assert not ((second != 0) & (first == 0)).any()
    if name in ("groupmax", "matching_pursuit", "itda"):
        assert not second.any()


# top_afa has a constant without a unit; the loader of GLU encoders scales the second encoder itself.
@pytest.mark.parametrize("name", [name for name in COMPUTED if name not in ("top_afa", "glu")])
def test_a_constant_scale_of_the_input_folds_away(make_sae, name):
    # A dictionary trained on 4·x reads and writes x after folding; a power of two, so that nothing is rounded.
    scaled = {"settings": {"residual_threshold": 0.0}} if name == "matching_pursuit" else {}
    plain, folded = (dictionary(make_sae, name, **scaled, folding=f) for f in (Folding(), Folding(input_scale=4.0)))
    x = tokens(9)
    f = plain.encode(4 * x)
    torch.testing.assert_close(folded.encode(x), f)
    torch.testing.assert_close(4 * folded.decode(f), plain.decode(f))


@pytest.mark.parametrize("name", COMPUTED)
def test_editservers_own_layout_keeps_the_function(make_sae, tmp_path, name):
    sae, x = dictionary(make_sae, name), tokens(9)
    again = load_sae(save_native(sae, tmp_path / "sae"))
    assert (again.architecture, again.k, dict(again.settings)) == (name, sae.k, dict(sae.settings))
    assert again.compute_digest() == sae.digest
    f = sae.encode(x)
    assert torch.equal(again.encode(x), f)
    assert torch.equal(again.decode_for(x, f), sae.decode_for(x, f))


def test_every_entry_says_what_it_is():
    for name, form in ARCHITECTURES.items():
        assert form.name == name
        assert form.title
        assert form.reference
        assert (form.__doc__ or "").strip()
        assert (form.why_not != "") == (form.execution == "sequence")
        assert set(form.described) <= set(form.settings)
        assert not (form.thresholdable and (form.signed or form.row_separable))
