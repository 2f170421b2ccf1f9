from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from interventions.concepts.density import Densities, HistogramStream, bin_index, bin_scale
from interventions.concepts.moments import MomentStream
from tests.concepts.samples import CLASSES, fitted, generator, sparse_batch

BATCHES = [sparse_batch(seed, tokens) for seed, tokens in ((0, 400), (1, 1), (2, 57), (3, 1000))]
WHOLE = (torch.cat([a for a, _ in BATCHES]), torch.cat([y for _, y in BATCHES]))


def test_a_stream_in_any_order_and_in_parts_equals_one_batch() -> None:
    moments, densities = fitted([WHOLE], CLASSES)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        parts_moments, parts = fitted([BATCHES[i] for i in order], CLASSES)
        for name in ("tokens", "firing", "low", "high"):
            assert torch.equal(getattr(parts_moments, name), getattr(moments, name)), name
        torch.testing.assert_close(parts_moments.total, moments.total, rtol=1e-14, atol=0)
        torch.testing.assert_close(parts_moments.squares, moments.squares, rtol=1e-14, atol=0)
        for name in ("edges", "tokens", "firing", "counts"):
            assert torch.equal(getattr(parts, name), getattr(densities, name)), name


def test_merged_streams_equal_one() -> None:
    moments, densities = fitted([WHOLE], CLASSES)
    left, right = MomentStream(CLASSES, 6), MomentStream(CLASSES, 6)
    ours, theirs = HistogramStream(CLASSES, moments.edges()), HistogramStream(CLASSES, moments.edges())
    for i, batch in enumerate(BATCHES):
        (left, right)[i % 2].add(*batch)
        (ours, theirs)[i % 2].add(*batch)
    left.merge(right)
    ours.merge(theirs)
    assert torch.equal(left.moments().edges(), moments.edges())
    assert torch.equal(left.moments().firing, moments.firing)
    assert torch.equal(ours.densities().counts, densities.counts)


def test_streams_of_different_bins_are_not_merged() -> None:
    stream = HistogramStream(CLASSES, torch.tensor([[0.0, 1.0]]))
    with pytest.raises(ValueError, match="same classes, edges and bins"):
        stream.merge(HistogramStream(CLASSES, torch.tensor([[0.0, 2.0]])))
    with pytest.raises(ValueError, match="same classes and latents"):
        MomentStream(CLASSES, 2).merge(MomentStream(CLASSES, 3))


def test_moments_are_those_of_the_values() -> None:
    activations, labels = WHOLE
    moments, _ = fitted(BATCHES, CLASSES)
    a, y = activations.double().numpy(), labels.numpy()
    for c in range(3):
        for j in range(a.shape[1]):
            mine = a[y == c, j]
            positive = mine[mine > 0]
            assert float(moments.firing_rate[c, j]) == pytest.approx((mine > 0).mean(), abs=1e-15)
            assert float(moments.mean_activation[c, j]) == pytest.approx(mine.mean(), rel=1e-12)
            assert float(moments.mean[c, j]) == pytest.approx(positive.mean(), rel=1e-12)
            assert float(moments.std[c, j]) == pytest.approx(positive.std(ddof=0), rel=1e-9)


def test_histogram_is_numpys_on_the_range_widened_by_one_percent() -> None:
    activations, labels = WHOLE
    _, densities = fitted(BATCHES, CLASSES, n_bins=40)
    for j in range(activations.shape[1]):
        values = activations[:, j]
        positive = values[values > 0].double().numpy()
        margin = 0.01 * (positive.max() - positive.min())
        ends = (positive.min() - margin, positive.max() + margin)
        assert densities.edges[j].tolist() == pytest.approx(ends, rel=1e-6)
        for c in range(3):
            mine = values[(labels == c) & (values > 0)].double().numpy()
            expected = np.histogram(mine, 40, ends)[0]
            got = densities.counts[c, j].numpy()
            # float32 puts a value that lies on a bin's edge on either side of it
            assert np.abs(got - expected).sum() <= 2, (c, j)
            smooth = (got + 1e-5) / ((got + 1e-5).sum() * (ends[1] - ends[0]) / 40)
            np.testing.assert_allclose(densities.density[c, j].numpy(), smooth, rtol=1e-6)


def test_masses_sum_to_one_zero_included() -> None:
    _, densities = fitted(BATCHES, CLASSES)
    assert densities.masses.shape == (3, 6, 101)
    torch.testing.assert_close(densities.masses.sum(-1), torch.ones(3, 6, dtype=torch.float64))
    torch.testing.assert_close(densities.masses[..., 0], 1 - densities.firing_rate)


def test_masked_tokens_do_not_count() -> None:
    activations, labels = WHOLE
    mask = torch.rand(len(labels), generator=generator(5)) < 0.5
    poisoned = activations.clone()
    poisoned[~mask] = torch.nan
    stream, kept = MomentStream(CLASSES, 6), MomentStream(CLASSES, 6)
    stream.add(poisoned, labels, mask)
    kept.add(activations[mask], labels[mask])
    edges = kept.moments().edges()
    assert torch.equal(stream.moments().total, kept.moments().total)
    assert torch.equal(stream.moments().tokens, kept.moments().tokens)
    masked, plain = HistogramStream(CLASSES, edges), HistogramStream(CLASSES, edges)
    masked.add(poisoned, labels, mask)
    plain.add(activations[mask], labels[mask])
    assert torch.equal(masked.densities().counts, plain.densities().counts)


def test_values_outside_given_edges_are_counted_at_the_ends() -> None:
    stream = HistogramStream(("a", "b"), torch.tensor([[1.0, 2.0]]), n_bins=4)
    stream.add(torch.tensor([[0.2], [1.1], [1.9], [50.0], [0.0]]), 0)
    densities = stream.densities()
    assert densities.counts[0, 0].tolist() == [2, 0, 0, 2]
    assert densities.firing[0, 0] == 4
    assert densities.tokens.tolist() == [5, 0]


def test_latents_with_one_value_or_none_get_a_range() -> None:
    stream = MomentStream(("a", "b"), 3)
    tiny = float(torch.finfo(torch.float32).tiny)
    stream.add(torch.tensor([[2.5, 0.0, tiny], [2.5, 0.0, tiny]]), torch.tensor([0, 1]))
    edges = stream.moments().edges()
    assert (edges[:, 0] < edges[:, 1]).all()
    assert edges[0].tolist() == pytest.approx([2.475, 2.525])
    assert edges[1].tolist() == [0.0, 1.0]
    counted = HistogramStream(("a", "b"), edges)
    counted.add(torch.tensor([[2.5, 0.0, tiny]]), 0)
    assert counted.densities().counts.sum(-1)[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("activations", "labels", "mask", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3), None, r"expected \[tokens, 6\]"),
        (torch.zeros(3, 6), torch.zeros(2), None, "labels: expected one entry per token"),
        (torch.zeros(3, 6), torch.zeros(3), torch.ones(2, dtype=torch.bool), "mask: expected one entry"),
        (torch.zeros(3, 6), torch.zeros(3), torch.ones(3), "mask: expected booleans"),
        (torch.zeros(3, 6), torch.tensor([0, 3, 1]), None, "3 is not a class; there are 0..2"),
        (torch.zeros(3, 6), -1, None, "-1 is not a class"),
        (torch.full((3, 6), torch.nan), 0, None, "not finite"),
        (torch.full((3, 6), torch.inf), 0, None, "not finite"),
        (torch.full((3, 6), -0.5), 0, None, "negative"),
    ],
)
def test_batches_that_cannot_be_counted_are_refused(
    activations: torch.Tensor, labels: torch.Tensor | int, mask: torch.Tensor | None, message: str
) -> None:
    edges = torch.tensor([[0.0, 1.0]] * 6)
    for stream in (MomentStream(CLASSES, 6), HistogramStream(CLASSES, edges)):
        with pytest.raises(ValueError, match=message):
            stream.add(activations, labels, mask)


@pytest.mark.parametrize("edges", [[[1.0, 1.0]], [[2.0, 1.0]], [[0.0, torch.inf]], [[torch.nan, 1.0]], [0.0, 1.0]])
def test_edges_that_are_no_range_are_refused(edges: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="edges"):
        HistogramStream(CLASSES, torch.tensor(edges))


@pytest.mark.parametrize("classes", [("only",), ("twice", "twice")])
def test_fewer_than_two_classes_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="classes"):
        MomentStream(classes, 2)


def test_densities_survive_safetensors() -> None:
    _, densities = fitted(BATCHES, CLASSES)
    read = Densities.from_arrays(CLASSES, load(save(densities.arrays())), densities.smoothing)
    assert torch.equal(read.masses, densities.masses)
    assert torch.equal(read.edges, densities.edges)
    arrays = densities.arrays()
    for name in arrays:
        with pytest.raises(ValueError, match=f"^{name}"):
            Densities.from_arrays(CLASSES, {other: t for other, t in arrays.items() if other != name})
        with pytest.raises(ValueError, match="expected"):
            Densities.from_arrays(CLASSES, arrays | {name: arrays[name][..., :-1][:1]})


def test_spread_counts_keep_their_sums_and_approach_the_true_density() -> None:
    """60 draws of N(6, 1): the kernel estimate is nearer to the truth than the bare histogram."""
    values = 6 + torch.randn(60, generator=generator(7))
    edges = torch.tensor([[2.0, 10.0]])
    _, bare = fitted([(values[:, None], torch.zeros(60)), (values[:, None], torch.ones(60))], ("a", "b"), edges=edges)
    smooth = bare.spread()
    torch.testing.assert_close(smooth.counts.sum(-1), bare.counts.sum(-1).double())
    assert torch.equal(smooth.firing_rate, bare.firing_rate)
    centres = 2 + 0.08 * (torch.arange(100) + 0.5)
    truth = torch.exp(-0.5 * (centres - 6) ** 2) / (2 * torch.pi) ** 0.5
    wrong = [float((d.density[0, 0] - truth).abs().sum() * 0.08) for d in (bare, smooth)]
    assert wrong[1] < 0.25 < 0.5 < wrong[0], wrong


def test_spread_leaves_a_single_value_where_it_is() -> None:
    stream = HistogramStream(("a", "b"), torch.tensor([[0.0, 1.0]]), n_bins=10)
    stream.add(torch.tensor([[0.55]]), 0)
    assert stream.densities().spread().counts[0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@settings(max_examples=200, deadline=None)
@given(
    low=st.floats(-1e3, 1e3, width=32),
    size=st.floats(0.125, 1e3, width=32),
    n_bins=st.integers(1, 300),
    value=st.floats(-1e6, 1e6, width=32),
)
def test_every_value_has_one_bin_and_bins_rise_with_it(low: float, size: float, n_bins: int, value: float) -> None:
    edges = torch.tensor([[low, low + size]])
    start, inverse = bin_scale(edges, n_bins)
    pair = torch.tensor([[value], [value + 1.0]])
    place = bin_index(pair, start, inverse, n_bins)
    assert place.dtype == torch.int64
    assert 0 <= int(place[0]) <= int(place[1]) < n_bins
