"""Numbers that say what a suppression achieves and costs. No pictures here.

Removal is read by a frozen probe: a linear classifier that was fitted on unedited activations and is then applied to edited
ones. It never adapts, so a drop of the concept's accuracy says that what the probe relied on is gone, not that no other probe
could find the concept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from interventions.concepts.moments import class_names
from interventions.concepts.posterior import class_index

RIDGE = 1.0
"""Penalty of a probe, in units of the number of examples of an average class."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A frozen linear classifier: argmax_c ((x − centre)/scale · weight + bias)_c.

    Attributes:
        classes: names, k of them.
        centre, scale: float64 ``[d]``.
        weight: float64 ``[d, k]``.
        bias: float64 ``[k]``.
    """

    classes: tuple[str, ...]
    centre: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Class index of each row of ``x`` ``[n, d]``: int64 ``[n]``; of equal scores the first class."""
        score = (x.double().cpu() - self.centre) / self.scale @ self.weight + self.bias
        return score.argmax(dim=1)


def fit_probe(x: Tensor, labels: Tensor, classes: Sequence[str], ridge: float = RIDGE) -> Probe:
    """Ridge regression on one-hot targets, every class with the same weight; closed form, so the same twice.

    Minimises Σ_i ω_i‖y_i − W z_i − b‖² + ridge·N/k·‖W‖², with z the standardised x and ω_i = N/(k·N_class(i)).

    Args:
        x: ``[N, d]``, one row per text (or token).
        labels: int ``[N]``.

    Raises:
        ValueError: shapes, a class without examples, values that are not finite, ``ridge`` not above 0.
    """
    names = class_names(classes)
    k = len(names)
    if x.ndim != 2 or labels.shape != (len(x),):
        raise ValueError(f"labels: expected one per row of x {list(x.shape)}, got shape {list(labels.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("x: a value is not finite")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge: expected a finite number above 0, got {ridge}")
    y = one_hot(labels, k)
    sizes = y.sum(dim=0)
    if bool((sizes == 0).any()):
        raise ValueError(f"class {names[int((sizes == 0).nonzero()[0])]!r} has no examples")
    n = len(x)
    omega = y @ (n / (k * sizes))
    rows = x.double().cpu()
    centre = omega @ rows / n
    spread = (omega @ (rows - centre) ** 2 / n).sqrt()
    scale = torch.where(spread > 0, spread, 1.0)
    z = (rows - centre) / scale
    weight = _ridge(z, omega, y - 1 / k, ridge * n / k)
    return Probe(names, centre, scale, weight, torch.full((k,), 1 / k, dtype=torch.float64))


def _ridge(z: Tensor, omega: Tensor, y: Tensor, penalty: float) -> Tensor:
    """(ZᵀΩZ + p·I)⁻¹ ZᵀΩY, ``[d, k]``; with fewer rows than columns as Zᵀ (ZZᵀ + p·Ω⁻¹)⁻¹ Y, which is the same."""
    n, d = z.shape
    if d <= n:
        weighted = z * omega[:, None]
        primal: Tensor = torch.linalg.solve(
            z.T @ weighted + penalty * torch.eye(d, dtype=torch.float64), weighted.T @ y
        )
        return primal
    dual: Tensor = torch.linalg.solve(z @ z.T + penalty * torch.diag(1 / omega), y)
    return z.T @ dual


def one_hot(labels: Tensor, k: int) -> Tensor:
    """float64 ``[N, k]``.

    Raises:
        ValueError: a label outside 0 … k − 1.
    """
    given = labels.long().cpu()
    if len(given) and not 0 <= int(given.min()) <= int(given.max()) < k:
        raise ValueError(f"labels: expected 0..{k - 1}, got {int(given.min())}..{int(given.max())}")
    return torch.nn.functional.one_hot(given, k).double()


@dataclass(frozen=True)
class Accuracy:
    """How well held-out texts are still told apart.

    Attributes:
        target: share of the concept's texts that are recognised as such.
        others: the same of the other classes, their even mean.
        by_class: class → share, for the classes with texts.
    """

    target: float
    others: float
    by_class: Mapping[str, float]


def accuracy(predicted: Tensor, labels: Tensor, classes: Sequence[str], target: str) -> Accuracy:
    """Accuracy of ``predicted`` ``[n]`` against ``labels`` ``[n]``, both class indices.

    Raises:
        ValueError: shapes, no text of the target or none of any other class.
    """
    names = class_names(classes)
    class_index(names, target)
    if predicted.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"labels: expected shape {list(predicted.shape)}, got {list(labels.shape)}")
    y, hit = one_hot(labels, len(names)), (predicted.cpu() == labels.cpu()).double()
    size = y.sum(dim=0)
    share = {name: float(hit @ y[:, i] / size[i]) for i, name in enumerate(names) if size[i] > 0}
    if target not in share or len(share) < 2:
        raise ValueError(f"labels: need texts of {target!r} and of another class")
    rest = [value for name, value in share.items() if name != target]
    return Accuracy(share[target], sum(rest) / len(rest), share)


def attenuated_fraction(before: Tensor, after: Tensor) -> float:
    """mean|a' − a| / mean|a|: 0 untouched, 1 all taken away (more where latents go below zero); 0 if nothing was active."""
    if before.shape != after.shape:
        raise ValueError(f"after: expected shape {list(before.shape)}, got {list(after.shape)}")
    whole = float(before.double().abs().sum())
    return float((after.double() - before.double()).abs().sum()) / whole if whole else 0.0


@dataclass(frozen=True)
class Point:
    """One point of a trade-off curve: one method at one strength.

    Attributes:
        method: "app", "attenuate", "mask" or "range".
        strength: λ.
        before, after: accuracy of a frozen probe, unedited and edited.
        perplexity: text set → (unedited, edited).
        attenuated: text set → :func:`attenuated_fraction`.
    """

    method: str
    strength: float
    before: Accuracy
    after: Accuracy
    perplexity: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    attenuated: Mapping[str, float] = field(default_factory=dict)

    @property
    def removal(self) -> float:
        """Drop of the target's accuracy."""
        return self.before.target - self.after.target

    @property
    def collateral(self) -> float:
        """Drop of the others' accuracy."""
        return self.before.others - self.after.others

    def perplexity_increase(self, texts: str) -> float:
        """Edited over unedited perplexity of one text set, less 1."""
        plain, edited = self.perplexity[texts]
        return edited / plain - 1

    def as_dict(self) -> dict[str, Any]:
        """JSON form, with what follows from the fields."""
        increase = {texts: self.perplexity_increase(texts) for texts in self.perplexity}
        derived = {"removal": self.removal, "collateral": self.collateral, "perplexity_increase": increase}
        return asdict(self) | derived


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean ± t·s/√n (Student's t, n − 1 degrees of freedom, s with ddof 1); the ends are ±∞ for a single value.

    Raises:
        ValueError: no values, one that is not finite, or a confidence outside (0, 1).
    """
    n = len(values)
    if not n or not all(map(math.isfinite, values)):
        raise ValueError("values: expected at least one, all finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    s = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = _student_quantile(confidence, n - 1) * s / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _student_quantile(confidence: float, freedom: int) -> float:
    """t with P(|T| ≤ t) = confidence, by bisection over θ = atan(t/√ν) of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    near, far = 0.0, math.pi / 2
    for _ in range(200):
        middle = (near + far) / 2
        near, far = (middle, far) if _student_within(middle, freedom) < confidence else (near, middle)
    return math.tan(near) * math.sqrt(freedom)


def _student_within(theta: float, freedom: int) -> float:
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (i - 1) / i
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
