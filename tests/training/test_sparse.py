"""The sparse step is the dense one: same values, same gradients, whatever the guess it starts from."""

from __future__ import annotations

import pytest
import torch

from sae_weights.training import sparse

B, N, D = 12, 30, 7


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    x, w_enc, w_dec = torch.randn(B, D, generator=g), torch.randn(N, D, generator=g), torch.randn(N, D, generator=g)
    b_enc, b_dec = torch.randn(N, generator=g), torch.randn(D, generator=g)
    return x, [t.requires_grad_(True) for t in (w_enc, b_enc, b_dec, w_dec)]


def dense_pre(x, w_enc, b_enc, b_dec):
    return (x - b_dec) @ w_enc.T + b_enc


def test_gradients_equal_those_of_the_dense_autograd(tensors):
    x, params = tensors
    w_enc, b_enc, b_dec, w_dec = params
    pre = dense_pre(x, w_enc, b_enc, b_dec)
    mask = pre > 1.0
    (x - ((pre * mask) @ w_dec + b_dec)).pow(2).sum().backward()
    expected = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None

    fired = sparse.pairs(mask, pre.detach())
    values = sparse.encode(x, w_enc, b_enc, b_dec, fired)
    (x - sparse.decode(values, fired, w_dec, b_dec)).pow(2).sum().backward()
    assert 10 < len(fired.row) < B * N
    for p, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-4)


def test_a_latent_that_fires_nowhere_gets_no_gradient(tensors):
    x, (w_enc, b_enc, b_dec, w_dec) = tensors
    pre = dense_pre(x, w_enc, b_enc, b_dec).detach()
    mask = pre > 1.0
    mask[:, 5] = False
    fired = sparse.pairs(mask, pre)
    sparse.decode(sparse.encode(x, w_enc, b_enc, b_dec, fired), fired, w_dec, b_dec).pow(2).sum().backward()
    assert torch.count_nonzero(w_enc.grad[5]) == torch.count_nonzero(w_dec.grad[5]) == 0
    assert torch.count_nonzero(w_enc.grad[pre.argmax() % N]) == D


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.5, 1.7, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_entries_do_not_depend_on_the_guess(floor, dtype):
    pre = torch.randn(40, 60, generator=torch.Generator().manual_seed(1)).to(dtype)
    fired, smallest = sparse.largest(pre, 200, floor)
    bound = pre.float().flatten().topk(200).values[-1]
    assert smallest == float(bound)
    assert torch.equal((fired.row * 60 + fired.feature), (pre.float() >= bound).flatten().nonzero().squeeze(1))
    assert torch.equal(fired.pre, pre.float()[fired.row, fired.feature])


def test_fewer_positive_entries_than_asked_are_all_there_are():
    pre = torch.full((4, 5), -1.0)
    pre[1, 2] = 0.5
    fired, smallest = sparse.largest(pre, 10, 3.0)
    assert (fired.row.tolist(), fired.feature.tolist(), smallest) == ([1], [2], 0.5)
    nothing, bound = sparse.largest(torch.full((4, 5), -1.0), 10, 3.0)
    assert (len(nothing.row), bound) == (0, 0.0)


def test_a_token_without_latents_decodes_to_the_bias():
    pre = torch.tensor([[0.0, 2.0], [-1.0, -1.0], [3.0, 0.0]])
    fired = sparse.pairs(pre > 0, pre)
    w_dec, b_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5, 0.25])
    assert sparse.decode(fired.pre, fired, w_dec, b_dec).tolist() == [[0.5, 2.25], [0.5, 0.25], [3.5, 0.25]]


def test_jumprelu_passes_the_values_above_its_threshold_and_the_papers_gradients():
    pre = torch.tensor([0.4, 0.9, 1.05, 2.0], requires_grad=True)
    theta = torch.full((4,), 1.0, requires_grad=True)
    f, on = sparse.jump(pre, theta, 0.4)
    assert f.tolist() == pytest.approx([0, 0, 1.05, 2.0])
    (f.sum() + 3 * on.sum()).backward()
    assert pre.grad.tolist() == [0, 0, 1, 1]
    # Within ±0.2 of the threshold: −θ/ε for the values, −1/ε for the count.
    assert theta.grad.tolist() == pytest.approx([0, -(1 + 3) / 0.4, -(1 + 3) / 0.4, 0])
