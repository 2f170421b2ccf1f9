"""Readings and gate hits against the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from interventions.oracle import read_latents
from interventions.program import Op, Payload, Read, ReadKind
from interventions.selectors import ALL, GENERATED, slice_selector
from tests.engine.flat_batches import Part, random_stream
from tests.engine.triton.batches import LAYER, Batch, Device, by_digest, dictionaries, opened, random_batch, steering

D = 40


@pytest.mark.parametrize("name", ["standard", "gated", "constant_norm_rescale", "layer_norm", "unit_norm", "centre"])
def test_listed_latents_are_the_oracles_where_selected_and_absent_elsewhere(name: str) -> None:
    random, device = np.random.default_rng(1), Device(D)
    digest = dictionaries(D)[1][name].digest
    reads = (Read(digest, LAYER, (5, 1, 80), 0, ALL), Read(digest, LAYER, (1, 7), 0, GENERATED))
    rows = (Part(None, 0, 2, torch.arange(3)), Part(Payload(None, reads, None), 1, 4, torch.arange(6)))
    batch = Batch(rows, *random_stream(random, 9, D, torch.float32, True))
    done = device.run(batch, random)
    assert torch.equal(done.hidden, batch.hidden)
    here = batch.bounds[1]
    got = device.reading("before")[here]
    at = 0
    for read in reads:
        mask = read.selector.mask(rows[1].positions, rows[1].ids, 4)
        want = read_latents(batch.stream[here], by_digest(D)[digest], read.features, 0).listed
        columns = slice(at, at + len(read.features))
        torch.testing.assert_close(got[mask, columns], want[mask], rtol=1e-4, atol=1e-4)
        assert got[~mask, columns].isnan().all()
        assert mask.any()
        at = columns.stop


def test_readings_after_see_the_edited_stream() -> None:
    random, device = np.random.default_rng(2), Device(D)
    digest = dictionaries(D)[1]["standard"].digest
    reads = (Read(digest, LAYER, (3, 9), 0, slice_selector(0, None), True),)
    program = steering(ReadKind.NORM, Op(1.0, 0.5, -math.inf, math.inf, False, 0, 0))
    rows = (Part(Payload(program, reads, None), 2, 4, torch.arange(3)),)
    batch = Batch(rows, *random_stream(random, 3, D, torch.float32, True))
    done = device.run(batch, random)
    assert not torch.isclose(done.stream, batch.stream).all(dim=1).any()
    for row, here in zip(rows, batch.bounds, strict=True):
        mask = reads[0].selector.mask(row.positions, row.ids, row.prompt_len)
        want = read_latents(done.stream[here], by_digest(D)[digest], (3, 9), 0).listed
        got = device.reading("after")[here][:, :2]
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-4, atol=1e-4)


def test_gates_hear_their_evidence_at_every_token() -> None:
    random, device = np.random.default_rng(3), Device(D)
    heard = 0
    batch = random_batch(random, D, torch.float32, True, 5, plain=0)
    device.run(batch, random)
    for row, here in zip(batch.rows, batch.bounds, strict=True):
        if row.payload is None or row.payload.program is None:
            continue
        bits = device.left("opened")[0, here]
        want = opened(row, batch.stream[here].float())
        for gate in range(len(want)):
            assert torch.equal((bits >> gate & 1).bool(), want[gate])
            heard += int(want[gate].sum())
    assert heard
