"""The compiled kernel against the oracle, without vLLM: the worker runs on tensors as an armed layer would hand it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.journal import Journal
from editserver.engine.kernel_cpu import _compose as kernel_compose
from editserver.engine.rows import Dictionaries
from editserver.engine.wire import StepRecord
from editserver.engine.worker import EngineWorker
from interventions.limits import MAX_INTERVENTIONS
from interventions.oracle import LayerResult, Row, compose, edit_layer, read_latents, row_source, select
from interventions.program import (
    TABLE_HEADER,
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
from interventions.selectors import (
    ALL,
    END,
    GENERATED,
    LAST_PROMPT_TOKEN,
    PROMPT,
    Bound,
    Range,
    Selector,
    slice_selector,
)
from sae_weights import SAE, load_sae
from tests.engine.dictionaries import ARCHITECTURES, N_FEATURES, random_sae, write_native, write_sae

D = 40
LAYER = 3
MAX_TOKENS = 64
NORMS = ("constant_norm_rescale", "layer_norm")
SHIFTS = ("unit_norm", "centre")
MEMBERS = ("abstopk", "matching_pursuit", "glu", "groupmax")


@cache
def dictionaries() -> tuple[EngineConfig, dict[str, SAE]]:
    """One SAE per architecture and per-token norm (TopK with a norm too), at one layer."""
    root = Path(mkdtemp(prefix="kernel-saes-"))
    folders = {a: write_sae(root / a, LAYER, a, D, seed=i) for i, a in enumerate(ARCHITECTURES)}
    folders |= {n: write_sae(root / n, LAYER, "gated", D, norm=n, seed=7) for n in NORMS}
    folders["topk_layer_norm"] = write_sae(root / "topk_layer_norm", LAYER, "topk", D, norm="layer_norm", seed=8)
    folders |= {n: write_native(root / n, LAYER, "gated", D, input_norm=n, encoder=6, seed=9) for n in SHIFTS}
    folders |= {n: write_native(root / n, LAYER, n, D, seed=10) for n in (*MEMBERS, "polysae")}
    folders["polysae_unit_norm"] = write_native(
        root / "pun", LAYER, "polysae", D, input_norm="unit_norm", encoder=6.0, seed=11
    )
    saes = {name: load_sae(folder) for name, folder in folders.items()}
    sources = [SAESource(name, sae.origin.as_dict(), sae.digest, LAYER) for name, sae in saes.items()]
    return EngineConfig((LAYER,), tuple(sources), tuple(folders), bank_rows=512), saes


def by_digest() -> dict[str, SAE]:
    return {sae.digest: sae for sae in dictionaries()[1].values()}


def new_worker(dtype: torch.dtype) -> EngineWorker:
    return EngineWorker(dictionaries()[0], D, dtype, MAX_TOKENS)


@dataclass(frozen=True)
class Part:
    """What one request has in the step: the tokens at ``start … start + len(ids)``; no payload for a plain one."""

    payload: Payload | None
    start: int
    prompt_len: int
    ids: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.start, self.start + len(self.ids))

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return self.payload.program.selectors if self.payload and self.payload.program else ()


@dataclass
class Step:
    """A flat batch as the model runner lays it out: ``h [tokens, D]`` before the edit, and what became of it."""

    parts: Sequence[Part]
    hidden: torch.Tensor
    residual: torch.Tensor | None
    records: dict[str, StepRecord] = field(default_factory=dict)
    selected: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def bounds(self) -> list[slice]:
        edges = np.cumsum([0] + [len(p.ids) for p in self.parts]).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    @property
    def stream(self) -> torch.Tensor:
        """The residual stream in the model's dtype."""
        if self.residual is None:
            return self.hidden.clone()
        return (self.hidden.float() + self.residual.float()).to(self.hidden.dtype)

    def run(self, worker: EngineWorker, names: Sequence[str] | None = None) -> Step:
        """A copy of this step after the worker's pass. Rows of the bank are dealt out afresh."""
        names = names or [f"r{i}" for i in range(len(self.parts))]
        done = Step(self.parts, self.hidden.clone(), None if self.residual is None else self.residual.clone())
        slot_of: dict[str, int] = {}
        for name, part in zip(names, self.parts, strict=True):
            worker.remove_request(name)
            if part.payload is not None:
                slots = [slot_of.setdefault(key, len(slot_of)) for key in part.payload.row_keys]
                worker.add_request(name, part.payload, slots, part.prompt_len)
        query_start = np.cumsum([0] + [len(p.ids) for p in self.parts], dtype=np.int32)
        positions = torch.cat([p.positions for p in self.parts]).numpy()
        ids = torch.cat([p.ids for p in self.parts]).to(torch.int32).numpy()
        worker.begin_step(list(names), query_start, positions, ids)
        for segment in worker.plan.segments:
            done.selected[names.index(segment.resident.request_id)] = worker.plan.selected[segment.tokens].copy()
        worker.run(LAYER, done.hidden, done.residual)
        done.records = worker.end_step()
        for name in names:
            worker.remove_request(name)
        return done


# -- random programs ------------------------------------------------------------------------------------------------


def random_selector(random: np.random.Generator, prompt_len: int) -> Selector:
    def bound() -> Bound:
        return Bound(bool(random.integers(2)), int(random.integers(-6, 12)))

    kinds: list[Callable[[], Selector]] = [
        lambda: ALL,
        lambda: PROMPT,
        lambda: GENERATED,
        lambda: LAST_PROMPT_TOKEN,
        lambda: slice_selector(int(random.integers(-prompt_len, prompt_len)), None),
        lambda: Selector((Range(bound(), bound()), Range(bound(), END)), (), bool(random.integers(2))),
        lambda: Selector((), tuple(sorted(set(random.integers(0, 6, 2).tolist()))), bool(random.integers(2))),
        lambda: Selector((Range(bound(), bound()),), (3,), bool(random.integers(2))),
    ]
    return kinds[random.integers(len(kinds))]()


def random_op(random: np.random.Generator, n_selectors: int) -> Op:
    kind = random.integers(5)
    alpha, beta, lo, hi = 1.0, 0.0, -math.inf, math.inf
    if kind == 0:
        alpha, beta = 0.0, float(np.float32(random.normal() * 8))  # set
    elif kind == 1:
        alpha = float(np.float32(random.normal() * 2))  # scale, project_out
    elif kind == 2:
        beta = float(np.float32(random.normal() * 8))  # add
    elif kind == 3:
        lo, hi = sorted(np.float32(random.normal(size=2) * 6).tolist())  # clamp, cap
    else:
        alpha = 0.0  # ablate
    return Op(
        alpha,
        beta,
        lo,
        hi,
        bool(random.integers(2)),
        int(random.integers(n_selectors)),
        int(random.integers(MAX_INTERVENTIONS)),
    )


def random_table(random: np.random.Generator) -> bytes:
    """A gain table over about the range of the activations."""
    low, width, bins = random.uniform(-1, 2), random.uniform(0.1, 2.0), int(random.integers(1, D - TABLE_HEADER + 1))
    row = np.zeros(D, "<f4")
    row[:TABLE_HEADER] = low, 1 / width, bins
    row[TABLE_HEADER : TABLE_HEADER + bins] = random.random(bins)
    return row.tobytes()


def random_concept_op(random: np.random.Generator, op: Op) -> tuple[Op, dict[str, bytes]]:
    """``op`` as a range mask or a gain, and the table that it brings."""
    fields = {"alpha": 1.0, "beta": 0.0, "lo": -math.inf, "hi": math.inf}
    if random.integers(2):
        lo, hi = sorted(np.float32(random.uniform(-2, 8, 2)).tolist())
        return msgspec.structs.replace(op, **fields | {"kind": OpKind.RANGE, "lo": lo, "hi": hi}), {}
    row = random_table(random)
    gain = {"kind": OpKind.GAIN, "strength": float(np.float32(random.uniform(0, 3))), "table": vector_key(row)}
    return msgspec.structs.replace(op, **fields | gain), {vector_key(row): row}


def random_program(random: np.random.Generator, prompt_len: int) -> Program:
    selectors = tuple(random_selector(random, prompt_len) for _ in range(random.integers(1, 4)))
    channels: dict[tuple[ReadKind, str], Channel] = {}
    vectors: dict[str, bytes] = {}
    for _ in range(random.integers(1, 7)):
        ops = tuple(random_op(random, len(selectors)) for _ in range(random.integers(1, 4)))
        kind = ReadKind(int(random.integers(6)))
        if kind <= ReadKind.DOT:
            v = random.normal(size=D).astype(np.float32)
            v = (v / np.linalg.norm(v)).astype(np.float32) * np.float32(3 if kind is ReadKind.NONE else 1)
            key = vector_key(v.tobytes())
            vectors[key] = v.tobytes()
        else:
            wanted = (kind is ReadKind.LATENT, kind is not ReadKind.JOINT)
            names = [n for n, s in dictionaries()[1].items() if (s.row_separable, s.additive) == wanted]
            sae = dictionaries()[1][names[random.integers(len(names))]]
            key = feature_key(sae.digest, int(random.integers(N_FEATURES)))
            mixed = [random_concept_op(random, op) if random.integers(2) else (op, {}) for op in ops]
            ops = tuple(op for op, _ in mixed)
            vectors |= {k: row for _, tables in mixed for k, row in tables.items()}
        if kind is ReadKind.NORM:  # in units of ‖h‖
            ops = tuple(msgspec.structs.replace(o, beta=o.beta / 16, lo=o.lo / 16, hi=o.hi / 16) for o in ops)
        channels[kind, key] = Channel(kind, key, ops)
    max_dose = float(np.float32(random.choice([np.inf, 0.2, 1.5])))
    layer = LayerProgram(LAYER, tuple(channels[k] for k in sorted(channels)))
    return Program((layer,), selectors, vectors, max_dose, bool(random.integers(2)) and math.isfinite(max_dose))


def random_step(seed: int, dtype: torch.dtype, split: bool, n_parts: int, plain: float = 0.3) -> Step:
    """A ragged batch: prefill chunks, single decode tokens and plain rows in any order."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(n_parts):
        prompt_len = int(random.integers(1, 12))
        n = int(random.choice([1, 1, random.integers(1, 9)]))
        start = int(random.integers(0, 12))
        payload = None
        if random.random() >= plain:
            program = random_program(random, prompt_len)
            payload = Payload(program, (), program.digest())
        parts.append(Part(payload, start, prompt_len, torch.from_numpy(random.integers(0, 6, n))))
    tokens = sum(len(p.ids) for p in parts)
    scale = np.exp(random.normal(size=(tokens, 1)) * 0.5) * 60 / math.sqrt(D)
    stream = torch.from_numpy(random.normal(size=(tokens, D)) * scale).float()
    if not split:
        return Step(parts, stream.to(dtype), None)
    residual = (stream * 0.8).to(dtype)
    return Step(parts, (stream - residual.float()).to(dtype), residual)


def expected(part: Part, h: torch.Tensor) -> LayerResult:
    """The oracle's word on one request's tokens."""
    assert part.payload is not None
    program = part.payload.program
    assert program is not None
    return edit_layer(
        h.float(),
        program.layers[0],
        select(program.selectors, part.positions, part.ids, part.prompt_len),
        row_source(program.vectors, by_digest()),
        lambda digest: by_digest()[digest].encode(h.float()),
        program.max_dose,
        program.refuse_over_dose,
        lambda digest, z, edited: by_digest()[digest].delta(h.float(), z, edited),
    )


def stepped(part: Part, channel: Channel, a: torch.Tensor) -> torch.Tensor:
    """Tokens on which some op of the channel sees a value next to a step: an end of its range, an edge of its table's bins."""
    assert part.payload is not None
    program = part.payload.program
    assert program is not None
    selected = select(program.selectors, part.positions, part.ids, part.prompt_len)
    close, x = torch.zeros(len(a), dtype=torch.bool), a
    for i, op in enumerate(channel.ops):
        near = torch.zeros(len(a), dtype=torch.bool)
        if op.kind is OpKind.RANGE:
            ends = torch.tensor([0.0, op.lo, op.hi])
            near = ((x[:, None] - ends).abs() < 1e-3).any(dim=1) & (x != 0)
        elif op.kind is OpKind.GAIN:
            row = np.frombuffer(program.vectors[op.table], "<f4")
            place = (x - float(row[0])) * float(row[1])
            near = (place - place.round()).abs() < 1e-3 * (1 + float(row[1]))
        close |= near & selected[op.selector] & (x != 0)
        x = values_after(a, Channel(channel.read, channel.row, channel.ops[: i + 1]), selected, program)
    return close


def values_after(a: torch.Tensor, channel: Channel, selected: torch.Tensor, program: Program) -> torch.Tensor:
    """The channel's ops on ``a [n]``, by the oracle."""
    return compose(a, channel, selected, row_source(program.vectors, by_digest()))[0]


def borderline(part: Part, h: torch.Tensor) -> torch.Tensor:
    """Tokens for which a last-bit difference may decide: a gate within 1e-3 of opening, a dose at its bound."""
    assert part.payload is not None
    program = part.payload.program
    assert program is not None
    close = torch.zeros(len(h), dtype=torch.bool)
    for channel in program.layers[0].channels:
        if channel.read < ReadKind.LATENT:
            continue
        _, digest, index = channel.row.split(":")
        sae = by_digest()[digest]
        close |= stepped(part, channel, sae.encode(h.float())[:, int(index)])
        if not sae.row_separable:  # whoever is on when h is a little different, is on
            on = sae.encode(h.float()) != 0
            noise = torch.Generator().manual_seed(0)
            for _ in range(6):
                moved = h.float() * (1 + 1e-4 * torch.randn(h.shape, generator=noise))
                close |= ((sae.encode(moved) != 0) != on).any(dim=-1)
            continue
        rows = sae.rows([int(index)])
        u = sae.token_scale(h.float())[0] @ rows.encoder[0]
        close |= (u + rows.gate_bias - rows.threshold).abs() < 1e-3
        close |= (rows.mag_scale * u + rows.mag_bias).abs() < 1e-3
    dose = edit_layer(
        h.float(),
        program.layers[0],
        select(program.selectors, part.positions, part.ids, part.prompt_len),
        row_source(program.vectors, by_digest()),
        lambda digest: by_digest()[digest].encode(h.float()),
        effect=lambda digest, z, edited: by_digest()[digest].delta(h.float(), z, edited),
    ).dose
    return close | ((dose - program.max_dose).abs() < 1e-4 * dose) | ((dose > 0) & (dose < 1e-5))


def fired(record: StepRecord) -> np.ndarray:
    return np.frombuffer(record.fired, np.uint64).view(np.int64)


steps = given(
    st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.integers(1, 6)
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
    ops = np.array([kind], np.int8), np.array([[op.alpha, op.beta, op.lo, op.hi, op.strength, 0.0]], np.float32)
    rest = np.zeros((1, 3), np.int32), np.zeros(1, np.int8), np.zeros(1, np.bool_)
    masks = np.ones(1, np.uint64), np.zeros(1, np.uint64), np.zeros(1, np.int8)
    term = np.full(1, 0.75, np.float32)
    got = [kernel_compose(a, np.uint64(1), np.uint64(0), 0, 1, *ops, *rest, *masks, bank, term) for a in x.numpy()]
    torch.testing.assert_close(torch.tensor([value for value, _ in got]), want, rtol=1e-6, atol=1e-6)
    assert [bool(changed) for _, changed in got] == (want != x).tolist()


@settings(max_examples=100, deadline=None)
@steps
def test_only_tokens_with_a_delta_are_written_and_those_collapse(
    seed: int, dtype: torch.dtype, split: bool, n_parts: int
) -> None:
    step = random_step(seed, dtype, split, n_parts)
    worker = new_worker(dtype)
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
