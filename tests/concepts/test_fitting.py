"""A fit finds what was planted, counts batch by batch as all at once, and is the same twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interventions.concepts import fitting
from interventions.concepts.density import HistogramStream
from interventions.concepts.fitting import Choice, Fit, fit_concept
from interventions.concepts.moments import Firings, MomentStream, concatenate
from interventions.concepts.salient import scores, select
from interventions.concepts.separability import separability

from .samples import fitted, generator, sparse_batch

CLASSES = ("sports", "world", "background")
N = 40
PLANTED = (3, 17, 29)
DENSE = 8


def planted(seed: int = 0, tokens: int = 300) -> list[tuple[Tensor, int]]:
    """Per class one batch: rare noise everywhere; PLANTED fire on half of the sports tokens, DENSE on all, most on sports."""
    rng = generator(seed)
    batches = []
    for c in range(3):
        values = torch.rand(tokens, N, generator=rng) * (torch.rand(tokens, N, generator=rng) < 0.02)
        if c == 0:
            fires = torch.rand(tokens, len(PLANTED), generator=rng) < 0.5
            values[:, PLANTED] = torch.where(fires, 2 + torch.rand(tokens, len(PLANTED), generator=rng), 0.0)
        values[:, DENSE] = 1 + torch.rand(tokens, generator=rng) + (5 if c == 0 else 0)
        batches.append((values, c))
    return batches


def sparse(activations: Tensor, label: int) -> Firings:
    feature = activations.nonzero()[:, 1]
    return Firings.of(label, len(CLASSES), len(activations), feature, activations[activations != 0])


def fit(batches: list[Firings], **fields: object) -> Fit:
    choice = Choice("sports", "background", **({"top": 3} | fields))
    return fit_concept(batches, CLASSES, N, choice, sae_digest="0" * 64, layer=15, model="m", fitted_on={"a": 1})


@pytest.mark.parametrize("by", ["difference", "mean", "separability"])
def test_the_planted_latents_are_found_and_the_dense_one_is_named(by: str) -> None:
    found = fit([sparse(*batch) for batch in planted()], by=by)
    assert tuple(found.concept.features.tolist()) == PLANTED
    assert found.dense == (DENSE,)
    assert found.concept.dense >= 1
    assert found.background_rate[DENSE] == 1.0
    kept = fit([sparse(*batch) for batch in planted()], by=by, max_rate=None)
    assert DENSE in kept.concept.features.tolist()
    assert kept.dense == ()
    # Only sports has values above 2: there P is near 1, and where all fire alike it is not.
    weight = found.concept.table.weight
    assert (weight(torch.full((3,), 2.5)) > 0.95).all()
    assert (weight(torch.full((3,), 0.5)) < 0.6).all()


def test_the_layer_score_is_the_mean_over_all_latents() -> None:
    batches = planted()
    found = fit([sparse(*batch) for batch in batches])
    labels = torch.cat([torch.full((len(values),), c) for values, c in batches])
    _, densities = fitted([(torch.cat([values for values, _ in batches]), labels)], CLASSES)
    expected = separability(densities.spread())
    torch.testing.assert_close(found.separability, expected, rtol=0, atol=1e-9)
    assert found.layer_score == pytest.approx(float(expected.mean()))
    assert found.separability[list(PLANTED)].min() > found.separability[0]


def test_a_latent_that_never_fired_separates_nothing_and_counts_in_the_layer_score() -> None:
    batches = planted()
    for values, _ in batches:
        values[:, 0] = 0
    found = fit([sparse(*batch) for batch in batches])
    assert found.separability[0] == 0
    assert found.layer_score == pytest.approx(found.active_score * (N - 1) / N)


def test_text_by_text_counts_what_one_batch_counts() -> None:
    activations, labels = sparse_batch(3, tokens=200)
    at_once, densities = fitted([(activations, labels)], CLASSES)
    texts = []
    for c in range(3):
        for part in activations[labels == c].split(7):
            feature = part.nonzero()[:, 1]
            texts.append(Firings.of(c, 3, len(part), feature, part[part != 0]))
    stream = MomentStream(CLASSES, 6)
    for text in texts:
        stream.count(text)
    moments = stream.moments()
    for name in ("tokens", "firing", "low", "high"):
        assert torch.equal(getattr(moments, name), getattr(at_once, name)), name
    torch.testing.assert_close(moments.total, at_once.total)
    torch.testing.assert_close(moments.squares, at_once.squares)
    whole, parts = HistogramStream(CLASSES, moments.edges()), HistogramStream(CLASSES, moments.edges())
    whole.count(concatenate(texts))
    for text in reversed(texts):
        parts.count(text)
    for counts in (whole.densities(), parts.densities()):
        assert torch.equal(counts.counts, densities.counts)
        assert torch.equal(counts.tokens, densities.tokens)


def test_blocks_of_latents_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [sparse(*batch) for batch in planted()]
    whole = fit(batches, by="separability")
    monkeypatch.setattr(fitting, "_BLOCK", 7 * 3 * 100)
    parts = fit(batches, by="separability")
    assert parts.concept.digest == whole.concept.digest
    assert torch.equal(parts.separability, whole.separability)


def test_equal_batches_give_equal_bytes_and_any_other_setting_another_digest() -> None:
    def make(seed: int = 0) -> list[Firings]:
        return [sparse(*batch) for batch in planted(seed)]

    base = fit(make()).concept
    assert fit(make()).concept.to_bytes() == base.to_bytes()
    priors = {"sports": 2.0, "world": 1.0, "background": 1.0}
    others = [fit(make(1)), fit(make(), top=2), fit(make(), bins=20), fit(make(), priors=priors)]
    assert len({one.concept.digest for one in others} | {base.digest}) == 5


def test_a_score_that_is_known_selects_as_the_one_that_is_computed() -> None:
    activations, labels = sparse_batch(4)
    moments, densities = fitted([(activations, labels)], CLASSES)
    known = torch.arange(6).double()
    assert select(moments, "sports", top=2, max_rate=None, score=known).features == (4, 5)
    for target in CLASSES[1:]:
        computed = select(moments, target, by="separability", top=2, max_rate=None, densities=densities)
        score = scores(moments, target, "separability", densities)
        assert select(moments, target, by="separability", top=2, max_rate=None, score=score) == computed


@pytest.mark.parametrize(
    ("label", "values", "says"),
    [(3, [1.0], "3 is not a class"), (0, [-1.0], "negative"), (0, [float("nan")], "not finite")],
)
def test_wrong_readings_are_refused(label: int, values: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Firings.of(label, 3, 1, torch.tensor([0]), torch.tensor(values))


def test_where_no_latent_qualifies_the_reason_is_said() -> None:
    batches = planted()
    for values, c in batches:
        values[:, [i for i in range(N) if i != DENSE]] = 0
        if c:
            values[:, DENSE] = 0.5
    with pytest.raises(ValueError, match="1 that do are dense"):
        fit([sparse(*batch) for batch in batches])
