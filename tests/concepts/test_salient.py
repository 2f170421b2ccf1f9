from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions.concepts.density import Densities
from interventions.concepts.moments import Moments
from interventions.concepts.salient import By, scores, select
from interventions.concepts.separability import separability_from_rest
from tests.concepts.samples import CLASSES, fitted, generator, sparse_batch

DENSE, CONCEPT, LATE, OTHER, SILENT, TWIN = range(6)


def planted() -> tuple[Moments, Densities]:
    """Two classes and background, 200 tokens each.

    Latent 0 fires everywhere and most on the concept; 1 on half of the concept; 2 on a tenth of it, strongly; 3 on another
    class; 4 never; 5 as 1.
    """
    a = torch.zeros(600, 6)
    labels = torch.arange(3).repeat_interleave(200)
    a[:, DENSE] = 20 + 0.5 * (labels == 0)
    a[:100, CONCEPT] = a[:100, TWIN] = 2.0
    a[:20, LATE] = 8.0
    a[200:300, OTHER] = 5.0
    a[400:402, CONCEPT] = a[400:402, TWIN] = 2.0
    return fitted([(a, labels)], CLASSES)


def test_by_mean_the_dense_latent_is_first() -> None:
    moments, _ = planted()
    assert select(moments, "sports", by="mean", top=1, max_rate=None).features == (DENSE,)


@pytest.mark.parametrize("by", ["mean", "difference", "separability"])
def test_dense_latents_are_left_out_by_default_and_counted(by: By) -> None:
    moments, densities = planted()
    found = select(moments, "sports", by=by, densities=densities, background="background")
    assert found.features == (CONCEPT, LATE, TWIN)
    assert (found.dense, found.max_rate, found.by) == (1, 0.1, by)
    assert DENSE in select(moments, "sports", by=by, densities=densities, max_rate=None).features


def test_difference_is_the_mean_less_that_of_the_other_classes() -> None:
    moments, _ = planted()
    found = scores(moments, "sports", "difference")
    assert found.tolist() == pytest.approx([0.5, 1 - 0.01, 0.8, -1.25, 0, 1 - 0.01])


def test_separability_counts_only_where_the_concept_activates_more() -> None:
    moments, densities = planted()
    found = scores(moments, "sports", "separability", densities)
    distance = separability_from_rest(densities, 0)
    assert float(distance[OTHER]) > 0.3
    assert float(found[OTHER]) == 0
    assert torch.equal(found[[CONCEPT, LATE]], distance[[CONCEPT, LATE]])
    assert "separability" in select(moments, "sports", by="separability", densities=densities).by


def test_of_equal_scores_the_lower_index_wins() -> None:
    moments, _ = planted()
    assert select(moments, "sports", top=1).features == (CONCEPT,)
    assert select(moments, "sports", top=2).features == (CONCEPT, TWIN)
    order = torch.tensor([TWIN, OTHER, LATE, CONCEPT, SILENT, DENSE])
    assert select(moments.select(order), "sports", top=1).features == (0,)


def test_a_fraction_is_of_all_latents_rounded_up() -> None:
    moments, _ = planted()
    assert len(select(moments, "sports", fraction=0.3).features) == 2
    assert len(select(moments, "sports", fraction=1.0).features) == 3


def test_without_a_background_class_the_other_classes_say_what_is_dense() -> None:
    moments, _ = planted()
    assert select(moments, "world", max_rate=0.25).features == (OTHER,)
    with pytest.raises(ValueError, match="no latent"):
        select(moments.select(torch.tensor([DENSE, SILENT])), "sports")


def test_a_bound_of_one_keeps_latents_that_always_fire() -> None:
    moments, _ = planted()
    assert DENSE in select(moments, "sports", max_rate=1.0).features


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 5, "fraction": 0.5}, "either top or fraction"),
        ({"top": 0}, "top: expected at least 1"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"max_rate": -0.1}, "max_rate"),
        ({"by": "median"}, "there are mean, difference, separability"),
        ({"by": "separability"}, "densities: needed"),
        ({"background": "sports"}, "the concept itself"),
        ({"background": "weather"}, "'weather' is not a class"),
    ],
)
def test_what_cannot_be_selected_is_refused(options: dict, message: str) -> None:
    moments, _ = planted()
    with pytest.raises(ValueError, match=message):
        select(moments, "sports", **options)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), top=st.integers(1, 8), by=st.sampled_from(["mean", "difference", "separability"]))
def test_selections_are_ascending_the_largest_and_the_same_twice(seed: int, top: int, by: By) -> None:
    activations, labels = sparse_batch(seed)
    moments, densities = fitted([(activations, labels)], CLASSES)
    score: Tensor = scores(moments, "world", by, densities)
    if not bool((score > 0).any()):
        return
    found = select(moments, "world", by=by, top=top, densities=densities, max_rate=None)
    assert found == select(moments, "world", by=by, top=top, densities=densities, max_rate=None)
    assert list(found.features) == sorted(set(found.features))
    assert list(found.scores) == score[list(found.features)].tolist()
    rest = [j for j in range(6) if j not in found.features and score[j] > 0]
    assert all(score[j] <= min(found.scores) for j in rest)
    assert len(found.features) == min(top, int((score > 0).sum()))


def test_the_order_of_tokens_does_not_change_a_selection() -> None:
    activations, labels = sparse_batch(3)
    shuffled = torch.randperm(len(labels), generator=generator(4))
    one, _ = fitted([(activations, labels)], CLASSES)
    two, _ = fitted([(activations[shuffled], labels[shuffled])], CLASSES)
    assert select(one, "world", top=3, max_rate=None).features == select(two, "world", top=3, max_rate=None).features
