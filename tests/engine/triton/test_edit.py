"""The edit kernel: what it computes, what it leaves alone, and that both variants give the same bits."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine.triton.step import Stages
from interventions.program import Channel, LayerProgram, Op, OpKind, Payload, Program, ReadKind, feature_key, vector_key
from interventions.selectors import ALL, slice_selector
from sae_weights import SAE
from tests.engine.flat_batches import Part, random_stream
from tests.engine.triton.batches import (
    LAYER,
    Batch,
    Device,
    dictionaries,
    expected,
    random_batch,
    random_op,
    steering,
    sure,
)

DTYPES = (torch.float32, torch.bfloat16)
D = 40
batches = given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.booleans(), st.integers(1, 4))


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(D)


def outputs(device: Device) -> list[torch.Tensor]:
    """Everything that a step leaves behind besides the stream."""
    readings = [device.reading(which).nan_to_num(7e9) for which in ("before", "after")]
    return [device.left(name) for name in ("fired", "dose", "flags", "opened")] + readings


def check_rows(device: Device, batch: Batch, done: Batch) -> int:
    """Every row against the oracle; how many tokens were edited and compared."""
    before, after, compared = batch.stream, done.stream, 0
    for row, here in zip(batch.rows, batch.bounds, strict=True):
        if row.payload is None or row.payload.program is None:
            assert torch.equal(after[here], before[here])
            continue
        h = before[here].float()
        want, certain = expected(row, h), sure(row, h)
        fired, dose, flags = (device.left(name)[0, here] for name in ("fired", "dose", "flags"))
        assert torch.equal(fired[certain], want.fired[certain])
        assert torch.equal((flags == 1)[certain], want.clamped[certain])
        assert torch.equal((flags == 2)[certain], want.over[certain])
        torch.testing.assert_close(dose[certain], want.dose[certain], rtol=1e-3, atol=1e-6)
        size = h.norm(dim=-1, keepdim=True) + want.delta.norm(dim=-1, keepdim=True)
        error = (after[here].float() - want.apply(before[here]).float()).abs() / size
        assert not (error[certain] > (1e-5 if batch.hidden.dtype is torch.float32 else 2**-8)).any()
        compared += int((want.fired != 0)[certain].sum())
    return compared


@settings(max_examples=4, deadline=None)
@batches
def test_the_kernel_computes_what_the_oracle_says(seed: int, dtype: torch.dtype, split: bool, n_rows: int) -> None:
    random = np.random.default_rng(seed)
    batch = random_batch(random, D, dtype, split, n_rows)
    device = Device(D)
    check_rows(device, batch, device.run(batch, random))


def test_random_batches_do_edit() -> None:
    """So that the property above is about something."""
    random, device = np.random.default_rng(4), Device(D)
    batch = random_batch(random, D, torch.float32, True, 4, plain=0)
    assert check_rows(device, batch, device.run(batch, random)) > 4


def test_a_width_that_is_no_power_of_two_and_many_lanes() -> None:
    random, device = np.random.default_rng(5), Device(576, lanes=8)
    batch = random_batch(random, 576, torch.bfloat16, True, 2, plain=0)
    done = device.run(batch, random)
    assert check_rows(device, batch, done)
    assert torch.equal(device.again(batch, decode=True).stream, done.stream)


@settings(max_examples=2, deadline=None)
@batches
def test_decode_and_prompt_variants_give_the_same_bits(seed: int, dtype: torch.dtype, split: bool, n_rows: int) -> None:
    random = np.random.default_rng(seed)
    batch = random_batch(random, D, dtype, split, n_rows)
    device = Device(D)
    prompt = device.run(batch, random)
    left = outputs(device)
    decode = device.again(batch, decode=True)
    assert torch.equal(decode.hidden, prompt.hidden)
    assert split is False or torch.equal(decode.residual, prompt.residual)
    assert all(map(torch.equal, outputs(device), left))


def test_rows_that_are_read_ahead_give_the_same_bits() -> None:
    random, device = np.random.default_rng(12), Device(D)
    batch = random_batch(random, D, torch.bfloat16, True, 3, plain=0)
    done = device.run(batch, random, decode=True)
    left = outputs(device)
    device.step.stages = Stages(ahead=True)
    device.step._values.fill_(float("nan"))
    assert torch.equal(device.again(batch, decode=True).residual, done.residual)
    assert all(map(torch.equal, outputs(device), left))
    assert not torch.equal(done.residual, batch.residual)


@settings(max_examples=2, deadline=None)
@batches
def test_a_request_gets_the_same_bits_in_any_company(seed: int, dtype: torch.dtype, split: bool, n_rows: int) -> None:
    """Alone, in one token a step, and with neighbours that are NaN all over."""
    random, device = np.random.default_rng(seed), Device(D)
    batch = random_batch(random, D, dtype, split, n_rows + 1)
    done = device.run(batch, random)
    mine, here = batch.rows[0], batch.bounds[0]
    poisoned = batch.copy()
    poisoned.hidden[here.stop :] = float("nan")
    company = device.again(poisoned, decode=False)
    alone = Batch((mine,), batch.hidden[here], None if batch.residual is None else batch.residual[here])
    single = device.run(alone, random)
    for other in (company.hidden[here], single.hidden):
        assert torch.equal(other, done.hidden[here])
    if split:
        assert torch.equal(single.residual, done.residual[here])


@settings(max_examples=2, deadline=None)
@batches
def test_what_is_not_edited_keeps_every_bit(seed: int, dtype: torch.dtype, split: bool, n_rows: int) -> None:
    """Plain rows, padding and tokens without a delta keep both halves of the stream; edited ones collapse."""
    random, device = np.random.default_rng(seed), Device(D)
    batch = random_batch(random, D, dtype, split, n_rows)
    done = device.run(batch, random)
    edited = torch.zeros(len(batch.hidden), dtype=torch.bool)
    for row, here in zip(batch.rows, batch.bounds, strict=True):
        if row.payload is not None and row.payload.program is not None:
            edited[here] = device.left("dose")[0, here] > 0
    assert torch.equal(done.hidden[~edited], batch.hidden[~edited])
    if split:
        assert torch.equal(done.residual[~edited], batch.residual[~edited])
        assert not done.hidden[edited].any()


def one_row(program: Program, n: int) -> Part:
    return Part(Payload(program, (), program.digest()), 3, 5, torch.arange(n))


def with_ops(program: Program, ops: tuple[Op, ...]) -> Program:
    """A program of one channel, with these ops on it."""
    (layer,) = program.layers
    channel = msgspec.structs.replace(layer.channels[0], ops=ops)
    return msgspec.structs.replace(program, layers=(msgspec.structs.replace(layer, channels=(channel,)),))


def stream_batch(rows: tuple[Part, ...], seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    n = sum(len(row.ids) for row in rows)
    return Batch(rows, *random_stream(np.random.default_rng(seed), n, D, dtype, True))


@pytest.mark.parametrize("kind", OpKind)
def test_every_transfer_on_every_input_norm(kind: OpKind, device: Device) -> None:
    """A row of the batch per norm, and one whose members are decided elsewhere."""
    random = np.random.default_rng(int(kind))
    rows = []
    for name in ("jumprelu", "constant_norm_rescale", "layer_norm", "unit_norm", "centre", "topk_layer_norm"):
        sae: SAE = dictionaries(D)[1][name]
        read = ReadKind.LATENT if sae.row_separable else ReadKind.MEMBER
        vectors: dict[str, bytes] = {}
        channels = []
        for feature in range(0, 40, 8):
            op, tables = random_op(random, sae, kind, D)
            vectors |= tables
            if kind is OpKind.RANGE:
                op = msgspec.structs.replace(op, lo=0.25, hi=50.0)
            channels.append(Channel(read, feature_key(sae.digest, feature), (op,)))
        layer = LayerProgram(LAYER, tuple(sorted(channels, key=lambda c: c.row)))
        rows.append(one_row(Program((layer,), (ALL,), vectors), 4))
    batch = stream_batch(tuple(rows), int(kind))
    done = device.run(batch, random)
    check_rows(device, batch, done)
    for here in batch.bounds:
        assert device.left("fired")[0, here].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("read", "op"),
    [
        (ReadKind.NONE, Op(1.0, 4.0, -math.inf, math.inf, False, 0, 0)),
        (ReadKind.NORM, Op(1.0, 0.5, -math.inf, math.inf, False, 0, 0)),
        (ReadKind.DOT, Op(0.0, 0.0, -math.inf, math.inf, False, 0, 0)),
        (ReadKind.DOT, Op(1.0, 0.0, -0.25, 0.25, False, 0, 0)),
    ],
)
def test_steering_is_a_hook_on_the_sum(read: ReadKind, op: Op, dtype: torch.dtype, device: Device) -> None:
    batch = stream_batch((one_row(steering(read, op), 6),), 1, dtype)
    assert check_rows(device, batch, device.run(batch, np.random.default_rng(0))) >= 5


@pytest.mark.parametrize("refuse", [False, True])
def test_the_dose_is_clamped_or_reported(refuse: bool, device: Device) -> None:
    op = Op(1.0, 0.5, -math.inf, math.inf, False, 0, 7)
    loose, tight = (steering(ReadKind.NORM, op, max_dose=x, refuse_over_dose=refuse) for x in (0.6, 0.25))
    batch = stream_batch((one_row(loose, 3), one_row(tight, 3)), 2)
    done = device.run(batch, np.random.default_rng(0))
    check_rows(device, batch, done)
    dose, flags = device.left("dose")[0, :6], device.left("flags")[0, :6]
    assert flags.tolist() == [0, 0, 0] + [2 if refuse else 1] * 3
    torch.testing.assert_close(dose, torch.tensor([0.5] * 3 + [0.5 if refuse else 0.25] * 3))
    moved = (done.stream - batch.stream).norm(dim=-1) / batch.stream.norm(dim=-1)
    torch.testing.assert_close(moved, dose, rtol=1e-4, atol=1e-5)


def test_one_token_of_a_tile_changes_and_the_others_keep_every_bit(device: Device) -> None:
    """Also where the row that it adds has an infinite entry."""
    program = steering(ReadKind.NONE, Op(1.0, 4.0, -math.inf, math.inf, False, 0, 0))
    program = msgspec.structs.replace(program, selectors=(slice_selector(4, 5),))
    more = msgspec.structs.replace(program.layers[0].channels[0].ops[0], alpha=1.0, beta=0.0, selector=1)
    program = with_ops(program, (*program.layers[0].channels[0].ops, more))
    batch = stream_batch((one_row(Program(program.layers, (*program.selectors, ALL), program.vectors), 4),), 3)
    row_slot = device.settle(batch, np.random.default_rng(0))
    (slot,) = device.residents.requests["r0"].slots.values()
    device.step.bank.write[slot, 1] = math.inf
    device.plan(batch, row_slot)
    for decode in (False, True):
        done = device.again(batch, decode)
        others = torch.tensor([0, 2, 3])
        assert torch.equal(done.hidden[others], batch.hidden[others])
        assert torch.equal(done.residual[others], batch.residual[others])
        assert not done.hidden[1].any()
        assert done.residual[1, 1] == math.inf
    device.host._content[slot] = None


def test_an_infinite_row_spoils_only_the_tokens_that_it_is_added_to(device: Device) -> None:
    """Its neighbours in the tile have changes of their own."""
    random = np.random.default_rng(9)
    here, everywhere = (Op(1.0, 4.0, -math.inf, math.inf, False, i, 0) for i in (0, 1))
    vectors = {}
    for values in random.normal(size=(2, D)).astype("<f4"):
        vectors[vector_key(values.tobytes())] = values.tobytes()
    rows = sorted(vectors)
    channels = (Channel(ReadKind.NONE, rows[0], (here,)), Channel(ReadKind.NONE, rows[1], (everywhere,)))
    program = Program((LayerProgram(LAYER, channels),), (slice_selector(4, 5), ALL), vectors)
    batch = stream_batch((one_row(program, 4),), 6)
    row_slot = device.settle(batch, random)
    slot = device.residents.requests["r0"].slots[rows[0]]
    device.step.bank.write[slot, 1] = math.inf
    device.plan(batch, row_slot)
    done = device.again(batch, decode=False).stream
    device.host._content[slot] = None
    assert done[1, 1] == math.inf
    others = torch.tensor([0, 2, 3])
    assert done[others].isfinite().all()
    assert (done[others] != batch.stream[others]).any(dim=1).all()


@pytest.mark.parametrize("refuse", [False, True])
def test_an_infinite_change_is_written_or_refused_in_both_variants(refuse: bool, device: Device) -> None:
    """It overflowed; d is no power of two, so lanes beside it hold nothing."""
    huge = (Op(1.0, 3e38, -math.inf, math.inf, False, 0, 0), Op(10.0, 0.0, -math.inf, math.inf, False, 0, 1))
    policy = {"max_dose": 0.5, "refuse_over_dose": True} if refuse else {}
    program = with_ops(steering(ReadKind.NONE, huge[0], **policy), huge)
    batch = stream_batch((one_row(program, 3),), 8)
    want = expected(batch.rows[0], batch.stream)
    assert want.dose.isinf().all()
    device.plan(batch, device.settle(batch, np.random.default_rng(0)))
    for decode in (False, True):
        done = device.again(batch, decode)
        assert torch.equal(done.stream, want.apply(batch.stream))
        assert torch.equal(device.left("fired")[0, :3], want.fired)
        assert torch.equal(device.left("dose")[0, :3], want.dose)
        assert (device.left("flags")[0, :3] == 2 * refuse).all()


def test_a_change_that_is_no_number_is_written(device: Device) -> None:
    """Never is a token left as it was instead."""
    here = Op(1.0, 4.0, -math.inf, math.inf, False, 0, 0)
    batch = stream_batch((one_row(steering(ReadKind.NONE, here), 3),), 8)
    row_slot = device.settle(batch, np.random.default_rng(0))
    (slot,) = device.residents.requests["r0"].slots.values()
    device.step.bank.write[slot, 1] = math.nan
    device.plan(batch, row_slot)
    for decode in (False, True):
        done = device.again(batch, decode)
        assert done.stream[:, 1].isnan().all()
        assert (done.stream[:, 2] != batch.stream[:, 2]).all()
        assert (device.left("fired")[0, :3] == 1).all()
    device.host._content[slot] = None


def test_after_a_clear_nothing_happens(device: Device) -> None:
    program = steering(ReadKind.NONE, Op(1.0, 4.0, -math.inf, math.inf, False, 0, 0))
    batch = stream_batch((one_row(program, 4),), 4)
    assert not torch.equal(device.run(batch, np.random.default_rng(0)).hidden, batch.hidden)
    device.step.clear()
    for decode in (False, True):
        done = device.again(batch, decode)
        assert torch.equal(done.hidden, batch.hidden)
        assert torch.equal(done.residual, batch.residual)


def test_a_batch_without_programs_is_left_alone(device: Device) -> None:
    batch = stream_batch((Part(None, 0, 3, torch.arange(3)), Part(None, 5, 3, torch.arange(1))), 5)
    done = device.run(batch, np.random.default_rng(0))
    assert torch.equal(done.hidden, batch.hidden)
    assert torch.equal(done.residual, batch.residual)
