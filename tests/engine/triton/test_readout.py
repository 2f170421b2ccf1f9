"""The device's step records beside those of the CPU's engine worker, for the same batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from editserver.engine.gates import Blocks
from editserver.engine.triton.readout import take
from editserver.engine.wire import StepRecord
from editserver.engine.worker import EngineWorker
from interventions.program import Payload
from tests.engine.triton.batches import LAYER, TOKENS, Batch, Device, config, random_batch, sure
from tests.engine.triton.test_gates import BLOCK, N_BLOCKS, Paged, start

D = 40


def on_cpu(worker: EngineWorker, batch: Batch, blocks: Blocks | None = None) -> dict[str, StepRecord]:
    """The step by the CPU's engine; requests it knows stay."""
    slots: dict[str, int] = {}
    for i, row in enumerate(batch.rows):
        if row.payload is not None and f"r{i}" not in worker.residents.requests:
            own = [slots.setdefault(key, len(slots) + 64 * i) for key in row.payload.row_keys]
            worker.add_request(f"r{i}", row.payload, own, row.prompt_len)
    bounds = np.cumsum([0, *(len(row.ids) for row in batch.rows)], dtype=np.int32)
    positions = torch.cat([row.positions for row in batch.rows]).numpy()
    ids = torch.cat([row.ids for row in batch.rows]).int().numpy()
    worker.begin_step([f"r{i}" for i in range(len(batch.rows))], bounds, positions, ids, blocks)
    done = batch.copy()
    worker.run(LAYER, done.hidden, done.residual)
    return worker.end_step()


def on_device(device: Device, batch: Batch) -> dict[str, StepRecord]:
    requests = [device.residents.requests.get(f"r{i}") for i in range(len(batch.rows))]
    return take(device.step, requests, len(batch.hidden)).records()


def numbers(data: bytes, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(data, dtype)


def close(mine: StepRecord, other: StepRecord, certain: np.ndarray) -> None:
    """Equal but for the last bits, at the tokens where those decide nothing."""
    assert (mine.start, mine.n) == (other.start, other.n)
    assert np.array_equal(numbers(mine.fired, np.uint64)[certain], numbers(other.fired, np.uint64)[certain])
    assert np.array_equal(numbers(mine.clamped, np.uint8)[certain], numbers(other.clamped, np.uint8)[certain])
    np.testing.assert_allclose(
        numbers(mine.dose, np.float32)[certain], numbers(other.dose, np.float32)[certain], 1e-3, 1e-6
    )


@pytest.mark.parametrize("seed", range(2))
def test_the_records_are_those_of_the_cpus_engine(seed: int) -> None:
    random, device = np.random.default_rng(100 + seed), Device(D)
    batch = random_batch(random, D, torch.float32, True, 5, plain=0.2)
    batch = Batch(
        batch.rows,
        batch.hidden[: len(batch.hidden) - batch.padding],
        batch.residual[: len(batch.hidden) - batch.padding],
    )
    device.run(batch, random)
    mine, other = on_device(device, batch), on_cpu(EngineWorker(config(D), D, torch.float32, TOKENS), batch)
    assert set(mine) == set(other)
    assert mine
    for i, (row, here) in enumerate(zip(batch.rows, batch.bounds, strict=True)):
        if row.payload is None:
            continue
        a, b = mine[f"r{i}"], other[f"r{i}"]
        program = row.payload.program
        certain = np.zeros(0, bool) if program is None else sure(row, batch.stream[here].float()).numpy()
        close(a, b, certain)
        assert len(a.reads) == len(b.reads)
        for number, ((listed, *_), (wanted, *_)) in enumerate(zip(a.reads, b.reads, strict=True)):
            got, want = (numbers(data, np.float32).reshape(a.n, -1) for data in (listed, wanted))
            unchanged = not row.payload.reads[number].after or program is None
            rows = slice(None) if unchanged else certain
            np.testing.assert_allclose(got[rows], want[rows], 1e-3, 1e-3)


def test_gates_over_sequences_tell_what_the_cpus_engine_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    device = Paged(random, monkeypatch)
    worker = EngineWorker(config(D), D, torch.float32, TOKENS)
    both = [start(random, device, 9), start(random, device, 9)]
    told = 0
    while any(one.done < len(one.h) for one, _ in both):
        fed = [(one, blocks, one.h[one.done : one.done + 4]) for one, blocks in both]
        opened = device.feed(fed, random)
        assert opened is not None
        kv = Blocks(device.table.cpu().numpy(), BLOCK, BLOCK * N_BLOCKS)
        mine, other = on_device(device, device.last), on_cpu(worker, device.last, kv)
        for name in mine:
            for ours, theirs in zip(mine[name].gates, other[name].gates, strict=True):
                assert [place for place, _ in ours] == [place for place, _ in theirs]
                assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], rel=1e-12)
                told += sum(place >= 0 for place, _ in ours)
        for one, _, h in fed:
            one.done += len(h)
    assert told


def test_a_batch_of_inspections_alone_has_records_without_layers() -> None:
    random, device = np.random.default_rng(8), Device(D)
    batch = random_batch(random, D, torch.float32, False, 4, plain=0)
    reading = [row.payload for row in batch.rows if row.payload is not None and row.payload.reads]
    assert reading
    rows = tuple(
        type(row)(Payload(None, reading[0].reads, None), row.start, row.prompt_len, row.ids) for row in batch.rows
    )
    batch = Batch(rows, batch.hidden, None, batch.padding)
    device.run(batch, random)
    records = on_device(device, batch)
    assert len(records) == 4
    assert all(record.fired == b"" and len(record.reads) == len(reading[0].reads) for record in records.values())
