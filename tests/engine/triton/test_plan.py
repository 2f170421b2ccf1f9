"""The plan kernel: which token runs which program, and what selects it."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine.triton.step import TILE
from interventions.program import Op, Payload, Program, ReadKind
from interventions.selectors import Selector
from tests.engine.flat_batches import Part
from tests.engine.triton.batches import SLOTS, Batch, Device, random_batch, steering

D = 40


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_every_token_gets_its_own_requests_program_and_selectors(seed: int, n_rows: int) -> None:
    random, device = np.random.default_rng(seed), Device(D)
    batch = random_batch(random, D, torch.float32, False, n_rows)
    device.step.resident.fill_(77)
    device.plan(batch, device.settle(batch, random))
    resident, selected = device.left("resident"), device.left("selected")
    for i, (row, here) in enumerate(zip(batch.rows, batch.bounds, strict=True)):
        assert (resident[here] == device.residents.index.get(f"r{i}", -1)).all()
        for number, selector in enumerate(row.selectors):
            mask = selector.mask(row.positions, row.ids, row.prompt_len)
            assert torch.equal((selected[here] >> number & 1).bool(), mask)
        assert not (selected[here] >> len(row.selectors)).any()
    end = len(batch.hidden)
    assert (resident[end - batch.padding : end] == -1).all()
    assert (resident[end:] == 77).all()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_tiles_cover_the_planned_tokens_once_and_never_two_requests(seed: int, n_rows: int) -> None:
    random, device = np.random.default_rng(seed), Device(D)
    batch = random_batch(random, D, torch.float32, False, n_rows)
    device.plan(batch, device.settle(batch, random))
    active, tokens, n_tiles, rows, number = device.step.state[:5].tolist()
    assert (active, tokens, rows, number) == (1, len(batch.hidden), n_rows, device.step.planned)
    spans = zip(
        device.left("_tile_first")[:n_tiles].tolist(), device.left("_tile_last")[:n_tiles].tolist(), strict=True
    )
    covered = []
    for first, last in spans:
        assert 0 < last - first <= TILE
        assert any(here.start <= first and last <= here.stop for here in batch.bounds)
        covered += range(first, last)
    planned = [
        t
        for row, here in zip(batch.rows, batch.bounds, strict=True)
        if row.payload
        for t in range(here.start, here.stop)
    ]
    assert covered == planned


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_mentions_are_found_across_steps(seed: int) -> None:
    """Ends of token sequences, in chunks of any size, behind a prompt of which a part is cached."""
    random, device = np.random.default_rng(seed), Device(D)
    ids = torch.from_numpy(random.integers(0, 3, 16))
    ends = tuple(sorted({tuple(random.integers(0, 3, int(random.integers(1, 5))).tolist()) for _ in range(3)}))
    selectors = (Selector(ends=ends), Selector(ends=ends[:1], include_bos=True))
    layer = steering(ReadKind.NONE, Op(1.0, 1.0, -math.inf, math.inf, False, 0, 0))
    program = Program(layer.layers, selectors, layer.vectors)
    position = int(random.integers(0, 6))
    payload = Payload(program, (), None)
    device.prompts = {"r1": ids[:8].tolist()}
    plain = Part(None, 0, 1, ids[:1])
    masks = [selector.mask(torch.arange(16), ids, 8) for selector in selectors]
    while position < 16:
        n = min(16 - position, int(random.integers(1, 6)))
        for tokens in (torch.full((n,), 2), ids[position : position + n]):  # the first turn out to be wrong
            batch = Batch((plain, Part(payload, position, 8, tokens)), torch.zeros(n + 1, D), None)
            device.plan(batch, device.settle(batch, random))
        found = device.left("selected")[1 : n + 1]
        for number, mask in enumerate(masks):
            assert torch.equal((found >> number & 1).bool(), mask[position : position + n])
        position += n


def test_a_selectors_last_bit_is_the_sign_bit() -> None:
    """64 selectors fit; the last one sets bit 63."""
    random, device = np.random.default_rng(0), Device(D)
    batch = random_batch(random, D, torch.float32, False, 1, plain=0)
    device.settle(batch, random)
    tables = device.step.tables
    edges = np.arange(65, dtype=np.int32)
    tables.write({"request_ptr": np.array([0, 64], np.int32), "interval_ptr": edges, "id_ptr": np.zeros(65, np.int32)})
    tables.write({"intervals": np.array([[0, 0]] * 63 + [[0, 9]], np.int32)})
    tables.map_slots(np.zeros(SLOTS, np.int32))
    row = Part(None, 8, 3, torch.arange(2))
    device.plan(Batch((row,), torch.zeros(2, D), None), torch.zeros(1, dtype=torch.int64))
    assert device.left("selected")[:2].tolist() == [-(2**63), 0]
