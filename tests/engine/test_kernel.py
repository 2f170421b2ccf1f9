"""The compiled kernel against the oracle, without vLLM: the worker runs on tensors as an armed layer would hand it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.journal import Journal
from editserver.engine.kernel_cpu import KIND, OP_COLUMNS
from editserver.engine.kernel_cpu import _compose as kernel_compose
from editserver.engine.rows import Dictionaries
from editserver.engine.wire import StepRecord
from interventions.oracle import Row, compose, read_latents
from interventions.program import (
    Channel,
    LayerProgram,
    Op,
    OpKind,
    Payload,
    Program,
    Read,
    ReadKind,
    feature_key,
    vector_key,
)
from interventions.selectors import ALL, GENERATED, Selector, slice_selector
from sae_weights import load_sae
from tests.engine.dictionaries import ARCHITECTURES, N_FEATURES, random_sae, write_native
from tests.engine.flat_batches import Part
from tests.engine.kernel_steps import (
    LAYER,
    MAX_TOKENS,
    MEMBERS,
    NORMS,
    SHIFTS,
    D,
    Step,
    borderline,
    dictionaries,
    expected,
    new_worker,
    random_program,
    random_selector,
    random_step,
    random_table,
)


def fired(record: StepRecord) -> np.ndarray:
    return np.frombuffer(record.fired, np.uint64).view(np.int64)


steps = given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(1, 6),
)


@settings(max_examples=150, deadline=None)
@steps
def test_the_kernel_computes_what_the_oracle_says(seed: int, dtype: torch.dtype, split: bool, n_parts: int) -> None:
    step = random_step(seed, dtype, split, n_parts)
    done = step.run(new_worker(dtype))
    before, after = step.stream, done.stream
    for i, (part, here) in enumerate(zip(step.parts, step.bounds, strict=True)):
        if part.payload is None:
            assert f"r{i}" not in done.records
            assert torch.equal(after[here], before[here])
            continue
        h = before[here]
        want, sure = expected(part, h), ~borderline(part, h)
        record = done.records[f"r{i}"]
        assert (record.start, record.n) == (part.start, len(part.ids))
        flags = torch.from_numpy(np.frombuffer(record.clamped, np.uint8).copy())
        dose = torch.from_numpy(np.frombuffer(record.dose, np.float32).copy())
        assert torch.equal(torch.from_numpy(fired(record).copy())[sure], want.fired[sure])
        assert torch.equal((flags == 1)[sure], want.clamped[sure])
        assert torch.equal((flags == 2)[sure], want.over[sure])
        torch.testing.assert_close(dose[sure], want.dose[sure], rtol=1e-4, atol=1e-6)
        size = h.float().norm(dim=-1, keepdim=True) + want.delta.norm(dim=-1, keepdim=True)
        error = (after[here].float() - want.apply(h).float()).abs() / size
        assert not (error[sure] > (1e-5 if dtype is torch.float32 else 2**-8)).any()


@pytest.mark.parametrize("kind", OpKind)
def test_each_transfer_maps_every_value_as_the_oracle_does(kind: OpKind) -> None:
    random = np.random.default_rng(int(kind))
    bank = np.frombuffer(random_table(random), np.float32).reshape(1, D).copy()
    low, inverse, bins = bank[0, 0], bank[0, 1], int(bank[0, 2])
    edges = low + np.arange(bins + 1, dtype=np.float32) / inverse
    lo, hi = np.float32(1.25), np.float32(3.5)
    values = [*edges, *np.nextafter(edges, np.float32(-9e9)), lo, hi, *np.linspace(-4, 12, 400), 0.0, -0.0, 1e30, -1e30]
    x = torch.tensor(np.array(values, np.float32))
    op = Op(-0.5, 2.0, -3.0, 4.0, False, 0, 0)
    if kind is OpKind.RANGE:
        op = Op(1.0, 0.0, float(lo), float(hi), False, 0, 0, kind)
    if kind is OpKind.GAIN:
        op = Op(1.0, 0.0, -math.inf, math.inf, False, 0, 0, kind, 1.7, "table")
    if kind is OpKind.REMAP:
        op = Op(-0.5, 0.75, -3.0, 4.0, False, 0, 0, kind)
    row = torch.from_numpy(bank[0])
    want, _ = compose(
        x,
        Channel(ReadKind.LATENT, "", (op,)),
        torch.ones(1, len(x), dtype=torch.bool),
        lambda _: Row(row, row),
        terms=[torch.full_like(x, 0.75)],
    )
    ints = np.zeros((1, len(OP_COLUMNS)), np.int32)
    ints[0, KIND] = kind
    numbers = np.array([[op.alpha, op.beta, op.lo, op.hi, op.strength, 0.0]], np.float32)
    masks, term = np.array([[1, 0]], np.uint64), np.full(1, 0.75, np.float32)
    got = [kernel_compose(a, np.uint64(1), np.uint64(0), 0, 1, ints, numbers, masks, bank, term) for a in x.numpy()]
    torch.testing.assert_close(torch.tensor([value for value, _ in got]), want, rtol=1e-6, atol=1e-6)
    assert [bool(changed) for _, changed in got] == (want != x).tolist()


@settings(max_examples=100, deadline=None)
@steps
def test_only_tokens_with_a_delta_are_written_and_those_collapse(
    seed: int, dtype: torch.dtype, split: bool, n_parts: int
) -> None:
    step = random_step(seed, dtype, split, n_parts)
    worker = new_worker(dtype)
    worker._delta = np.empty((MAX_TOKENS, D), np.float32)  # kept of every token
    done = step.run(worker)
    before = step.stream.float()
    compact = 0
    for i, (part, here) in enumerate(zip(step.parts, step.bounds, strict=True)):
        for token in range(here.start, here.stop):
            dose = 0.0
            if part.payload is not None:
                dose = float(np.frombuffer(done.records[f"r{i}"].dose, np.float32)[token - here.start])
            if dose == 0.0:
                assert torch.equal(done.hidden[token], step.hidden[token])
                assert split is False or torch.equal(done.residual[token], step.residual[token])
            else:
                delta = torch.from_numpy(worker._delta[compact + token - here.start])
                written = (before[token] + delta).to(dtype)
                assert torch.equal(done.residual[token] if split else done.hidden[token], written)
                assert not split or not done.hidden[token].any()
        compact += len(part.ids) if part.payload is not None else 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_an_added_vector_is_bit_for_bit_what_a_hook_would_write(seed: int, dtype: torch.dtype, split: bool) -> None:
    step = random_step(seed, dtype, split, 4)
    random = np.random.default_rng(seed)
    parts = []
    for part in step.parts:
        v = random.normal(size=D).astype("<f4").tobytes()
        op = Op(1.0, float(np.float32(random.normal() * 5)), -math.inf, math.inf, False, 0, 0)
        layer = LayerProgram(LAYER, (Channel(ReadKind.NONE, vector_key(v), (op,)),))
        program = Program((layer,), (random_selector(random, part.prompt_len),), {vector_key(v): v})
        parts.append(Part(Payload(program, (), program.digest()), part.start, part.prompt_len, part.ids))
    step = Step(parts, step.hidden, step.residual)
    done = step.run(new_worker(dtype))
    for part, here in zip(parts, step.bounds, strict=True):
        assert torch.equal(done.stream[here], expected(part, step.stream[here]).apply(step.stream[here]))


@settings(max_examples=60, deadline=None)
@steps
def test_a_request_gets_the_same_bits_alone_and_in_any_company(
    seed: int, dtype: torch.dtype, split: bool, n_parts: int
) -> None:
    step = random_step(seed, dtype, split, n_parts, plain=0.1)
    together = step.run(new_worker(dtype))
    order = np.random.default_rng(seed).permutation(len(step.parts)).tolist()
    bounds = step.bounds
    pick = torch.cat([torch.arange(bounds[i].start, bounds[i].stop) for i in order])
    shuffled = Step([step.parts[i] for i in order], step.hidden[pick], step.residual[pick] if split else None)
    moved = shuffled.run(new_worker(dtype))
    for at, i in enumerate(order):
        part, here = step.parts[i], bounds[i]
        solo = Step([part], step.hidden[here], step.residual[here] if split else None).run(new_worker(dtype))
        for other, there in ((moved, shuffled.bounds[at]), (solo, slice(0, len(part.ids)))):
            assert torch.equal(other.hidden[there], together.hidden[here])
            assert not split or torch.equal(other.residual[there], together.residual[here])
        if part.payload is not None:
            assert solo.records["r0"] == together.records[f"r{i}"] == moved.records[f"r{at}"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_token_gets_the_same_bits_in_any_chunk(seed: int, dtype: torch.dtype) -> None:
    """Down to chunks of one token, whole dictionaries included."""
    random = np.random.default_rng(seed)
    program = random_program(random, 7)
    part = Part(Payload(program, (), program.digest()), 0, 7, torch.from_numpy(random.integers(0, 6, 12)))
    hidden = torch.from_numpy(random.normal(size=(12, D)) * 10).to(dtype)
    whole = Step([part], hidden, None).run(new_worker(dtype))
    worker = new_worker(dtype)
    cut = int(random.integers(1, 12))
    for chunks in ([slice(0, cut), slice(cut, 12)], [slice(t, t + 1) for t in range(12)]):
        for chunk in chunks:
            piece = Part(part.payload, chunk.start, 7, part.ids[chunk])
            done = Step([piece], hidden[chunk], None).run(worker)
            assert torch.equal(done.hidden, whole.hidden[chunk])
            assert np.array_equal(fired(done.records["r0"]), fired(whole.records["r0"])[chunk])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_the_plan_selects_what_the_selectors_mean(seed: int, n_parts: int) -> None:
    step = random_step(seed, torch.float32, False, n_parts)
    done = step.run(new_worker(torch.float32))
    assert set(done.selected) == {i for i, part in enumerate(step.parts) if part.payload is not None}
    for i, bits in done.selected.items():
        part = step.parts[i]
        for number, selector in enumerate(part.selectors):
            mask = selector.mask(part.positions, part.ids, part.prompt_len)
            assert np.array_equal(bits >> np.uint64(number) & np.uint64(1), mask.numpy())
        assert not (bits >> np.uint64(len(part.selectors))).any()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *NORMS, "topk_layer_norm", *SHIFTS, *MEMBERS, "polysae"])
@pytest.mark.parametrize("after", [False, True])
def test_readings_are_the_oracles(name: str, after: bool) -> None:
    sae = dictionaries()[1][name]
    random = np.random.default_rng(5)
    n = 12
    v = (random.normal(size=D) * 4).astype("<f4").tobytes()
    layer = LayerProgram(
        LAYER, (Channel(ReadKind.NONE, vector_key(v), (Op(1.0, 2.0, -math.inf, math.inf, False, 0, 0),)),)
    )
    program = Program((layer,), (slice_selector(4, 9),), {vector_key(v): v})
    reads = (
        Read(sae.digest, LAYER, (5, 1, 80), 0, ALL, after),
        Read(sae.digest, LAYER, (), 6, GENERATED, after),
        Read(sae.digest, LAYER, (2, 40), 3, slice_selector(2, 11), after),
    )
    part = Part(Payload(program, reads, program.digest()), 0, 7, torch.arange(n))
    hidden = torch.from_numpy(random.normal(size=(n, D)) * 10).float()
    step = Step([part], hidden, None)
    done = step.run(new_worker(torch.float32))
    journal = Journal(part.payload)
    journal.add(done.records["r0"])
    h = expected(part, hidden).apply(hidden) if after else hidden
    for number, read in enumerate(reads):
        mask = read.selector.mask(part.positions, part.ids, 7)
        want = read_latents(h[mask], sae, read.features, read.top_k)
        mine = journal.readings(number, 0, n)
        assert [p for p, _ in mine] == part.positions[mask].tolist()
        assert len(mine) > 2
        for token, (_, pairs) in enumerate(mine):
            top = zip(want.top_index[token].tolist(), want.top_value[token].tolist(), strict=True)
            expect = list(zip(read.features, want.listed[token].tolist(), strict=True))
            expect += [(i, x) for i, x in top if x != 0 and i not in read.features]
            assert [i for i, _ in pairs] == [i for i, _ in expect]
            assert [x for _, x in pairs] == pytest.approx([x for _, x in expect], rel=1e-4, abs=1e-4)


def test_a_position_that_is_computed_again_overwrites_its_record() -> None:
    """As after a preemption: other values of h for the same positions, in other chunks."""
    sae = dictionaries()[1]["standard"]
    reads = (Read(sae.digest, LAYER, (5,), 2, ALL),)
    op = Op(2.0, 0.0, -math.inf, math.inf, False, 0, 0)
    channels = tuple(Channel(ReadKind.LATENT, feature_key(sae.digest, i), (op,)) for i in (5, 6, 7))
    program = Program((LayerProgram(LAYER, tuple(sorted(channels, key=lambda c: c.row))),), (ALL,), {})
    payload = Payload(program, reads, program.digest())
    worker = new_worker(torch.float32)
    first, second = (torch.randn(10, D, generator=torch.Generator().manual_seed(s)) * 10 for s in (1, 2))

    def add(journal: Journal, h: torch.Tensor, *chunks: tuple[int, int]) -> Journal:
        for a, b in chunks:
            done = Step([Part(payload, a, 4, torch.arange(a, b))], h[a:b], None).run(worker)
            journal.add(done.records["r0"])
        return journal

    again = add(add(Journal(payload), first, (0, 4), (4, 5), (5, 6), (6, 7)), second, (0, 6), (6, 10))
    once = add(Journal(payload), second, (0, 10))
    before = add(Journal(payload), first, (0, 10))
    assert again.stats(0, LAYER, 10) == once.stats(0, LAYER, 10) != before.stats(0, LAYER, 10)
    assert again.readings(0, 0, 10) == once.readings(0, 0, 10) != before.readings(0, 0, 10)
    assert again.covers(0, 10)
    assert not again.covers(0, 11)


def test_a_dummy_pass_between_steps_edits_nothing() -> None:
    step = random_step(3, torch.float32, True, 3, plain=0.0)
    worker = new_worker(torch.float32)
    step.run(worker)
    worker.idle_step()
    hidden, residual = step.hidden.clone(), step.residual.clone() if step.residual is not None else None
    worker.run(LAYER, hidden, residual)
    assert torch.equal(hidden, step.hidden)
    assert torch.equal(residual, step.residual)
    assert worker.end_step() == {}


def test_a_step_whose_layer_did_not_run_is_an_error() -> None:
    step = random_step(3, torch.float32, False, 1, plain=0.0)
    worker = new_worker(torch.float32)
    worker.add_request("a", step.parts[0].payload, list(range(len(step.parts[0].payload.row_keys))), 4)
    worker.begin_step(["a"], np.array([0, 1], np.int32), np.array([1]), np.array([1], np.int32))
    with pytest.raises(RuntimeError, match=rf"layers \[{LAYER}\] did not run"):
        worker.end_step()


def test_a_stream_of_another_width_is_an_error() -> None:
    step = random_step(3, torch.float32, False, 1, plain=0.0)
    wide = Step(step.parts, torch.zeros(len(step.hidden), D + 1), None)
    with pytest.raises(RuntimeError, match="do not carry the whole residual stream"):
        wide.run(new_worker(torch.float32))


# -- the full-encode path ---------------------------------------------------------------------------------------------


def _set(name: str, index: int, selector: int = 0) -> Channel:
    kind = ReadKind.MEMBER if dictionaries()[1][name].additive else ReadKind.JOINT
    op = Op(0.0, 5.0, -math.inf, math.inf, False, selector, 0)
    return Channel(kind, feature_key(dictionaries()[1][name].digest, index), (op,))


def _whole(*channels: Channel, selectors: tuple[Selector, ...] = (ALL,), reads: tuple[Read, ...] = ()) -> Payload:
    layer = LayerProgram(LAYER, tuple(sorted(channels, key=lambda c: (c.read, c.row))))
    program = Program((layer,), selectors, {})
    return Payload(program, reads, program.digest())


def test_only_selected_tokens_are_encoded_and_each_of_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all requests of the step, edits and readings together."""
    topk, poly = (dictionaries()[1][name].digest for name in ("topk", "polysae"))
    encoded: list[tuple[str, int]] = []
    worker = new_worker(torch.float32)
    encode = worker.dictionaries.full_encode

    def counting(digest: str, h: torch.Tensor) -> torch.Tensor:
        encoded.append((digest, len(h)))
        return encode(digest, h)

    monkeypatch.setattr(worker.dictionaries, "full_encode", counting)
    some, late = slice_selector(2, 6), slice_selector(5, 9)
    reads = (Read(topk, LAYER, (), 3, late), Read(topk, LAYER, (4,), 0, late, True))
    payloads = [
        _whole(_set("topk", 1), _set("topk", 2, 1), selectors=(some, slice_selector(3, 7))),
        _whole(_set("topk", 3), _set("polysae", 3), _set("polysae", 4), selectors=(late,), reads=reads),
        _whole(_set("standard", 1), selectors=(ALL,)),
    ]
    parts = [Part(payload, 0, 12, torch.arange(12)) for payload in payloads]
    parts[2] = Part(
        _whole(Channel(ReadKind.LATENT, _set("standard", 1).row, _set("standard", 1).ops)), 0, 12, parts[2].ids
    )
    hidden = torch.randn(36, D, generator=torch.Generator().manual_seed(0)) * 10
    Step(parts, hidden, None).run(worker)
    # request 0: positions 2..6; request 1: 5..8, where the reading after the edit encodes the edited stream
    assert sorted(encoded) == sorted([(topk, 5 + 4), (poly, 4), (topk, 4)])


@pytest.mark.parametrize("architecture", ["topk", "matching_pursuit", "top_afa", "polysae"])
def test_a_token_is_encoded_to_the_same_bits_in_any_company(architecture: str, tmp_path: Path) -> None:
    """The promise on which requests share the products of a step, at widths where a BLAS takes its fast paths."""
    d, n = 576, 1000
    sae = random_sae(architecture, d, n=n, encoder=0.2)
    folder = write_native(tmp_path / "sae", 0, architecture, d, n=n)
    source = SAESource("a", load_sae(folder).origin.as_dict(), sae.digest, 0)
    opened = Dictionaries(EngineConfig((0,), (source,), ("a",)))
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(37, d, generator=generator) * 7
    whole = opened.full_encode(sae.digest, h)
    edited = whole.clone()
    edited[:, :5] = 3.0
    delta = opened.delta(sae.digest, h, whole, edited)
    for _ in range(8):
        some = torch.randperm(37, generator=generator)[: int(torch.randint(1, 37, (1,), generator=generator))]
        assert torch.equal(opened.full_encode(sae.digest, h[some]), whole[some])
        assert torch.equal(opened.delta(sae.digest, h[some], whole[some], edited[some]), delta[some])
    assert not opened.delta(sae.digest, h, whole, whole.clone()).any()


def test_a_dictionary_without_the_full_encode_path_is_never_encoded() -> None:
    config, saes = dictionaries()
    opened = Dictionaries(dataclasses.replace(config, full_encode=()))
    with pytest.raises(ValueError, match="full-encode path is off"):
        opened.full_encode(saes["topk"].digest, torch.zeros(1, D))
    z = torch.zeros(1, N_FEATURES)
    with pytest.raises(ValueError, match="full-encode path is off"):
        opened.delta(saes["polysae"].digest, torch.zeros(1, D), z, z)
