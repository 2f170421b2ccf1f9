from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from interventions.concepts.report import (
    Point,
    accuracy,
    attenuated_fraction,
    fit_probe,
    mean_interval,
    one_hot,
)
from tests.concepts.samples import CLASSES, generator

CENTRES = 3 * torch.eye(3, 8)


def texts(seed: int, n: int = 300) -> tuple[Tensor, Tensor]:
    """Three classes around centres of their own, on the first three of eight axes, and a large constant offset."""
    rng = generator(seed)
    labels = torch.randint(0, 3, (n,), generator=rng)
    return 100 + CENTRES[labels] + torch.randn(n, 8, generator=rng) * torch.tensor([1.0] * 7 + [500.0]), labels


def test_a_probe_tells_classes_apart_on_texts_it_has_not_seen() -> None:
    probe = fit_probe(*texts(0), CLASSES)
    x, labels = texts(1)
    found = accuracy(probe.predict(x), labels, CLASSES, "sports")
    assert found.target > 0.9
    assert found.others > 0.9
    assert set(found.by_class) == set(CLASSES)


def test_a_frozen_probe_shows_that_a_concept_is_gone() -> None:
    """What lies along the concept's axis is removed: its texts are no longer recognised, the others still are."""
    probe = fit_probe(*texts(0), CLASSES)
    x, labels = texts(1)
    edited = x.clone()
    edited[:, 0] = 100
    before = accuracy(probe.predict(x), labels, CLASSES, "sports")
    after = accuracy(probe.predict(edited), labels, CLASSES, "sports")
    assert before.target - after.target > 0.5
    assert after.others > 0.85


def test_a_probe_minimises_its_objective() -> None:
    """The gradient of the weighted ridge loss vanishes at the solution."""
    x, labels = texts(2, 120)
    probe = fit_probe(x, labels, CLASSES, ridge=0.7)
    sizes = torch.bincount(labels, minlength=3)
    omega = 120 / (3 * sizes[labels].double())
    z = (x.double() - probe.centre) / probe.scale
    weight = probe.weight.clone().requires_grad_()
    bias = probe.bias.clone().requires_grad_()
    target = torch.nn.functional.one_hot(labels, 3).double()
    loss = (omega[:, None] * (target - z @ weight - bias) ** 2).sum() + 0.7 * 120 / 3 * (weight**2).sum()
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-9
    assert float(bias.grad.abs().max()) < 1e-9


def test_a_probe_is_the_same_twice_and_whatever_the_class_sizes_unbiased() -> None:
    x, labels = texts(3, 600)
    rare = (labels != 0) | (torch.arange(600) % 10 == 0)
    one, two = fit_probe(x[rare], labels[rare], CLASSES), fit_probe(x[rare], labels[rare], CLASSES)
    assert torch.equal(one.weight, two.weight)
    held_out, truth = texts(4, 600)
    assert accuracy(one.predict(held_out), truth, CLASSES, "sports").target > 0.85


def test_a_constant_column_does_no_harm() -> None:
    x, labels = texts(5)
    x[:, 7] = 4.0
    assert fit_probe(x, labels, CLASSES).weight.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:-1], 1.0), "labels: expected one per row"),
        (lambda x, y: (x, y.clamp(max=1), 1.0), "'background' has no examples"),
        (lambda x, y: (x, y + 1, 1.0), "labels: expected 0..2"),
        (lambda x, y: (x * math.nan, y, 1.0), "not finite"),
        (lambda x, y: (x, y, 0.0), "ridge"),
    ],
)
def test_what_no_probe_can_be_fitted_to_is_refused(change, message: str) -> None:
    x, labels, ridge = change(*texts(6))
    with pytest.raises(ValueError, match=message):
        fit_probe(x, labels, CLASSES, ridge)


def test_accuracy_weighs_the_other_classes_evenly() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    predicted = torch.tensor([0, 1, 1, 1, 1, 0, 0])
    found = accuracy(predicted, labels, CLASSES, "sports")
    assert found.target == 0.5
    assert found.by_class == {"sports": 0.5, "world": 0.75, "background": 0.0}
    assert found.others == 0.375
    with pytest.raises(ValueError, match="need texts of 'sports'"):
        accuracy(predicted[2:], labels[2:], CLASSES, "sports")
    with pytest.raises(ValueError, match="of another class"):
        accuracy(predicted[:2], labels[:2], CLASSES, "sports")


def test_attenuated_fraction_is_the_share_of_activation_taken_away() -> None:
    a = torch.tensor([1.0, 3.0, 0.0])
    assert attenuated_fraction(a, a) == 0
    assert attenuated_fraction(a, 0 * a) == 1
    assert attenuated_fraction(a, torch.tensor([1.0, -1.0, 0.0])) == 1
    assert attenuated_fraction(a, -a) == 2
    assert attenuated_fraction(0 * a, 0 * a) == 0


def test_a_point_says_what_was_removed_and_what_it_cost() -> None:
    labels = torch.tensor([0, 0, 1, 2])
    before = accuracy(labels, labels, CLASSES, "sports")
    after = accuracy(torch.tensor([1, 0, 1, 1]), labels, CLASSES, "sports")
    point = Point("app", 3.0, before, after, {"neutral": (20.0, 21.0)}, {"neutral": 0.1})
    assert (point.removal, point.collateral) == (0.5, 0.5)
    written = json.loads(json.dumps(point.as_dict(), allow_nan=False))
    assert written["perplexity_increase"]["neutral"] == pytest.approx(0.05)
    assert written["after"]["target"] == 0.5


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (10, 2.2622), (31, 2.0423)])
def test_intervals_over_seeds_are_students(n: int, t: float) -> None:
    """Quantiles of Student's t as tables print them."""
    values = [float(i) for i in range(n)]
    mean = sum(values) / n
    s = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    found = mean_interval(values)
    assert found.mean == pytest.approx(mean)
    assert (found.high - found.mean) / (s / math.sqrt(n)) == pytest.approx(t, abs=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert mean_interval([2.0]).high == math.inf
    with pytest.raises(ValueError, match="values"):
        mean_interval([])
    with pytest.raises(ValueError, match="values"):
        mean_interval([1.0, math.nan])


def test_a_probe_with_more_columns_than_texts_is_the_same_ridge_regression() -> None:
    """W minimises its penalised squares: the gradient vanishes, for many columns as for few."""
    for n, d in ((30, 7), (12, 50)):
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
        labels = torch.arange(n) % 3
        probe = fit_probe(x, labels, ("a", "b", "c"), ridge=0.5)
        sizes = torch.bincount(labels).double()
        omega = (n / (3 * sizes))[labels]
        z = (x - probe.centre) / probe.scale
        residual = one_hot(labels, 3) - z @ probe.weight - probe.bias
        gradient = -z.T @ (omega[:, None] * residual) + 0.5 * n / 3 * probe.weight
        assert gradient.abs().max() < 1e-9
