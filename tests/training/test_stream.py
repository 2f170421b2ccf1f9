"""A stream gives the same tokens as reading everything first, mixed, and goes on where it was."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from sae_weights.training.activations import Truncated, collect
from sae_weights.training.stream import Streamed
from tests.training.test_activations import MANY, tiny_model


def rows(stream, batch, steps, start=0):
    return torch.cat(list(islice(stream.batches(batch, start), steps)))


def as_set(values):
    return {tuple(row) for row in values.float().tolist()}


def test_a_pass_over_the_text_gives_every_token(tmp_path):
    (whole,) = collect(Truncated(tiny_model(), 2), MANY)
    stream = Streamed(Truncated(tiny_model(), 2), MANY, buffer=64)
    seen = rows(stream, 16, 3 * len(whole.values) // 16)
    assert as_set(seen) == as_set(whole.values)


def test_a_batch_mixes_many_texts():
    stream = Streamed(Truncated(tiny_model(), 2), MANY, buffer=256)
    (whole,) = collect(Truncated(tiny_model(), 2), MANY)
    place = {tuple(row): i for i, row in enumerate(whole.values.float().tolist())}
    first = [place[tuple(row)] for row in rows(stream, 32, 1).float().tolist()]
    assert max(first) - min(first) > 100
    assert first != sorted(first)


def test_a_resumed_stream_goes_on_at_its_place_in_the_text():
    sequences = [[i, *range(1, 20)] for i in range(40)]
    stream = Streamed(Truncated(tiny_model(), 1), sequences, buffer=64)
    assert stream._number_after(0) == 0
    sizes = [sum(len(sequences[i]) - 1 for i in members) for members in stream._order]
    assert stream._number_after(sizes[0]) == 1
    assert stream._number_after(sum(sizes)) == len(sizes)


def test_a_stream_reads_one_layer():
    with pytest.raises(ValueError, match="a stream reads one layer"):
        Streamed(Truncated(tiny_model(), 1, 2), MANY)
