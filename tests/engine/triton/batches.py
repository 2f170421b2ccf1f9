"""Ragged batches of random programs, and a device step that takes them through one armed layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import msgspec
import numpy as np
import torch

from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.resident import Resident, ResidentSet
from editserver.engine.rows import Dictionaries, RowBank
from editserver.engine.triton.capacity import Capacity
from editserver.engine.triton.fill import fill
from editserver.engine.triton.step import DeviceStep
from interventions.limits import MAX_INTERVENTIONS
from interventions.oracle import LayerResult, edit_layer, listen, row_source, select
from interventions.program import (
    TABLE_HEADER,
    Channel,
    Gate,
    GateKind,
    LayerProgram,
    Op,
    OpKind,
    Payload,
    Program,
    Read,
    ReadKind,
    UnitKind,
    feature_key,
    mean_key,
    vector_key,
)
from interventions.selectors import ALL, END, GENERATED, LAST_PROMPT_TOKEN, PROMPT, Bound, Range, Selector
from sae_weights import SAE, load_sae
from tests.engine.dictionaries import N_FEATURES, write_native, write_sae
from tests.engine.flat_batches import Part, bounds_of, random_stream, stream_of

LAYER = 3
NORMS = ("constant_norm_rescale", "layer_norm")
SHIFTS = ("unit_norm", "centre")
ON = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the kernels run: compiled on a GPU, else under the interpreter."""

ROWS, TOKENS, SLOTS = 6, 40, 8
CAPACITY = Capacity(
    tokens=TOKENS,
    rows=ROWS,
    residents=SLOTS,
    selectors=64,
    intervals=128,
    wanted_ids=64,
    channels=128,
    ops=256,
    reads=256,
    request_channels=12,
    request_reads=24,
    listed=8,
    members=32,
    bank_rows=256,
    gates=16,
    request_gates=5,
    mentions=32,
    mention_ids=128,
    history=24,
    history_rows=2,
)


@cache
def dictionaries(d: int) -> tuple[Dictionaries, dict[str, SAE]]:
    """One SAE per kind of gate and per-token norm, as every process opens them; two whose members are decided elsewhere."""
    root = Path(mkdtemp(prefix="triton-saes-"))
    folders = {
        a: write_sae(root / a, LAYER, a, d, seed=i) for i, a in enumerate(("standard", "jumprelu", "gated", "topk"))
    }
    folders |= {n: write_sae(root / n, LAYER, "gated", d, norm=n, seed=7) for n in NORMS}
    folders["topk_layer_norm"] = write_sae(root / "topk_layer_norm", LAYER, "topk", d, norm="layer_norm", seed=8)
    folders |= {n: write_native(root / n, LAYER, "gated", d, input_norm=n, encoder=6, seed=9) for n in SHIFTS}
    saes = {name: load_sae(folder) for name, folder in folders.items()}
    return Dictionaries(_config(saes)), saes


def _config(saes: dict[str, SAE]) -> EngineConfig:
    sources = tuple(SAESource(name, sae.origin.as_dict(), sae.digest, LAYER) for name, sae in saes.items())
    return EngineConfig((LAYER,), sources, tuple(saes))


def config(d: int) -> EngineConfig:
    """As every process of the server has it."""
    return _config(dictionaries(d)[1])


def by_digest(d: int) -> dict[str, SAE]:
    return {sae.digest: sae for sae in dictionaries(d)[1].values()}


# -- random programs ------------------------------------------------------------------------------------------------


def random_selector(random: np.random.Generator) -> Selector:
    def bound() -> Bound:
        return Bound(bool(random.integers(2)), int(random.integers(-6, 12)))

    ranges = (Range(bound(), bound()), Range(bound(), END))
    ids = tuple(sorted(set(random.integers(0, 6, 2).tolist())))
    some = Selector(ranges, ids if random.integers(2) else (), bool(random.integers(2)))
    return [ALL, ALL, PROMPT, GENERATED, LAST_PROMPT_TOKEN, some, some][random.integers(7)]


def f32(value: float) -> float:
    return float(np.float32(value))


def random_op(random: np.random.Generator, sae: SAE | None, kind: OpKind, d: int) -> tuple[Op, dict[str, bytes]]:
    """An op on a channel of ``sae`` (None: of a vector, affine), and the table that it brings."""
    op = Op(1.0, 0.0, -math.inf, math.inf, bool(random.integers(2)), 0, int(random.integers(MAX_INTERVENTIONS)))
    if kind is OpKind.RANGE:
        lo, hi = sorted(random.uniform(-2, 8, 2).tolist())
        return msgspec.structs.replace(op, kind=kind, lo=f32(lo), hi=f32(hi)), {}
    if kind is OpKind.GAIN:
        bins = int(random.integers(1, d - TABLE_HEADER + 1))
        row = np.zeros(d, "<f4")
        row[:TABLE_HEADER] = random.uniform(-1, 2), 1 / random.uniform(0.1, 2.0), bins
        row[TABLE_HEADER : TABLE_HEADER + bins] = random.random(bins)
        key = vector_key(row.tobytes())
        return msgspec.structs.replace(op, kind=kind, strength=f32(random.uniform(0, 3)), table=key), {
            key: row.tobytes()
        }
    lo, hi = sorted((random.normal(size=2) * 6).tolist())
    bounds = {"lo": f32(lo), "hi": f32(hi)} if random.integers(3) == 0 else {}
    alpha, beta = f32(random.choice([0.0, 1.0, random.normal() * 2])), f32(random.choice([0.0, random.normal() * 8]))
    op = msgspec.structs.replace(op, alpha=alpha, beta=beta, **bounds)
    if kind is OpKind.AFFINE or sae is None:
        return op, {}
    unit = UnitKind(int(random.integers(len(UnitKind))))
    source = feature_key(sae.digest, int(random.integers(N_FEATURES))) if random.integers(2) else ""
    remap = {"unit": unit, "source": source, "gamma": f32(random.normal() * 2) if source else 0.0}
    remap["mean"] = mean_key(sae.digest) if unit is UnitKind.PREACT_MEAN else ""
    remap["beta"] = f32(random.normal() * (0.1 if unit is UnitKind.RESIDUAL_NORM else 3))
    return msgspec.structs.replace(op, kind=kind, **remap), {}


def random_trigger(random: np.random.Generator, saes: dict[str, SAE]) -> Gate:
    own = [sae for sae in saes.values() if sae.row_separable]
    sae = own[random.integers(len(own))]
    latents = random.choice(N_FEATURES, int(random.integers(1, 4)), replace=False).tolist()
    return Gate(GateKind.TRIGGER, ReadKind.LATENT, tuple(sorted(feature_key(sae.digest, i) for i in latents)))


def random_program(
    random: np.random.Generator,
    d: int,
    reads: Sequence[ReadKind] = tuple(ReadKind)[:5],
    kinds: Sequence[OpKind] = tuple(OpKind),
) -> Program:
    """Up to six channels of these kinds; three in ten ops are behind a gate, or in a scope."""
    saes = dictionaries(d)[1]
    selectors = tuple(random_selector(random) for _ in range(random.integers(1, 4)))
    gates = tuple(random_trigger(random, saes) for _ in range(2))
    channels: dict[tuple[ReadKind, str], Channel] = {}
    vectors: dict[str, bytes] = {}
    for _ in range(random.integers(1, 7)):
        read = reads[random.integers(len(reads))]
        sae = None
        if read <= ReadKind.DOT:
            v = random.normal(size=d)
            values = (v / np.linalg.norm(v) * (3 if read is ReadKind.NONE else 1)).astype("<f4").tobytes()
            key, vectors = vector_key(values), vectors | {vector_key(values): values}
        else:
            fitting = [sae for sae in saes.values() if sae.row_separable == (read is ReadKind.LATENT)]
            sae = fitting[random.integers(len(fitting))]
            key = feature_key(sae.digest, int(random.integers(N_FEATURES)))
        ops = []
        for _ in range(random.integers(1, 4)):
            kind = OpKind.AFFINE if sae is None else kinds[random.integers(len(kinds))]
            op, tables = random_op(random, sae, kind, d)
            vectors |= tables
            if read is ReadKind.NORM:  # in units of ‖h‖
                op = msgspec.structs.replace(op, beta=op.beta / 16, lo=op.lo / 16, hi=op.hi / 16)
            behind = tuple(sorted(set(random.integers(0, 2, 2).tolist()))) if random.random() < 0.3 else ()
            scope = int(random.integers(len(selectors))) if random.random() < 0.3 else -1
            selector = int(random.integers(len(selectors)))
            ops.append(msgspec.structs.replace(op, selector=selector, scope=scope, gates=behind))
        channels[read, key] = Channel(read, key, tuple(ops))
    layer = LayerProgram(LAYER, tuple(channels[k] for k in sorted(channels)), gates)
    max_dose = f32(random.choice([math.inf, 0.2, 1.5]))
    return Program((layer,), selectors, vectors, max_dose, bool(random.integers(2)) and math.isfinite(max_dose))


def steering(read: ReadKind, op: Op, d: int = 40, **policy: float) -> Program:
    """One op on one unit vector, at every token."""
    v = np.random.default_rng(int(read)).normal(size=d)
    values = (v / np.linalg.norm(v)).astype("<f4").tobytes()
    everywhere = Selector(ALL.ranges, (), True)
    layer = LayerProgram(LAYER, (Channel(read, vector_key(values), (op,)),))
    return Program((layer,), (everywhere,), {vector_key(values): values}, **policy)


# -- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A flat batch, ``padding`` tokens behind it; ``residual`` None where ``hidden [tokens, d]`` is the whole stream."""

    rows: tuple[Part, ...]
    hidden: torch.Tensor
    residual: torch.Tensor | None
    padding: int = 0

    @property
    def d(self) -> int:
        return self.hidden.shape[1]

    @property
    def bounds(self) -> list[slice]:
        return bounds_of(self.rows)

    @property
    def stream(self) -> torch.Tensor:
        """The residual stream in the model's dtype."""
        return stream_of(self.hidden, self.residual)

    def copy(self) -> Batch:
        residual = None if self.residual is None else self.residual.clone()
        return dataclasses.replace(self, hidden=self.hidden.clone(), residual=residual)


def random_payload(random: np.random.Generator, d: int) -> Payload:
    program = random_program(random, d)
    if random.integers(2):
        return Payload(program, (), program.digest())
    own = [sae for sae in dictionaries(d)[1].values() if sae.row_separable]
    reads = []
    for _ in range(random.integers(1, 3)):
        features = tuple(random.choice(N_FEATURES, int(random.integers(1, 4)), replace=False).tolist())
        digest = own[random.integers(len(own))].digest
        reads.append(Read(digest, LAYER, features, 0, random_selector(random), bool(random.integers(2))))
    return Payload(program if random.integers(4) else None, tuple(reads), program.digest())


def random_batch(
    random: np.random.Generator,
    d: int,
    dtype: torch.dtype,
    split: bool,
    n_rows: int,
    *,
    decode: bool = False,
    plain: float = 0.25,
) -> Batch:
    """Prefill chunks, single decode tokens and plain rows in any order, and sometimes padding."""
    rows = []
    for _ in range(n_rows):
        prompt_len = int(random.integers(1, 12))
        n = 1 if decode else int(random.choice([1, random.integers(1, 6)]))
        payload = None if random.random() < plain else random_payload(random, d)
        rows.append(Part(payload, int(random.integers(0, 12)), prompt_len, torch.from_numpy(random.integers(0, 6, n))))
    padding = int(random.integers(0, 3))
    tokens = sum(len(row.ids) for row in rows) + padding
    return Batch(tuple(rows), *random_stream(random, tokens, d, dtype, split), padding)


# -- the device -----------------------------------------------------------------------------------------------------


class Device:
    """Everything one worker has on a device. ``lanes``: log₂ of those of a sum over d."""

    def __init__(self, d: int, lanes: int = 5) -> None:
        self.d = d
        self.step = DeviceStep(CAPACITY, (LAYER,), d, ON, lanes=lanes)
        self.host = RowBank(CAPACITY.bank_rows, d, dictionaries(d)[0])
        self.residents = ResidentSet(dictionaries(d)[0], (LAYER,))
        self.remembers = False
        self.prompts: dict[str, list[int]] = {}
        self._slot_of: dict[str, int] = {}

    def settle(self, batch: Batch, random: np.random.Generator) -> torch.Tensor:
        """Make the batch's requests resident, in any order and any of the runner's slots: slot by row."""
        for request in list(self.residents.requests):
            self.residents.remove(request)
        for i in random.permutation(len(batch.rows)).tolist():
            payload = batch.rows[i].payload
            if payload is None:
                continue
            slots = [self._slot_of.setdefault(key, len(self._slot_of)) for key in payload.row_keys]
            self.host.upload(payload.row_keys, slots, payload.program.vectors if payload.program else {})
            at = torch.tensor(slots, dtype=torch.int64)
            self.step.bank.put(at, self.host.read[at], self.host.write[at], self.host.gate[at])
            named = dict(zip(payload.row_keys, slots, strict=True))
            self.residents.add(Resident(f"r{i}", payload, batch.rows[i].prompt_len, named))
        self.residents.refresh()
        encode = self.step.encode
        fill(
            self.step.tables,
            self.residents,
            remembers=self.remembers,
            members=encode is None,
            encode=encode,
            prompts=self.prompts,
        )
        row_slot = random.permutation(SLOTS)[: len(batch.rows)]
        mapped = np.full(SLOTS, -1, np.int32)
        for i, slot in enumerate(row_slot.tolist()):
            mapped[slot] = self.residents.index.get(f"r{i}", -1)
        self.step.tables.map_slots(mapped)
        return torch.from_numpy(row_slot)

    def plan(self, batch: Batch, row_slot: torch.Tensor) -> None:
        lengths = [len(row.ids) for row in batch.rows]
        positions = torch.cat([row.positions for row in batch.rows] + [torch.zeros(batch.padding, dtype=torch.int64)])
        ids = torch.cat([row.ids for row in batch.rows] + [torch.zeros(batch.padding, dtype=torch.int64)])
        query_start = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        on_device = (t.to(ON) for t in (query_start, row_slot, positions, ids.int()))
        self.step.plan(*on_device, len(batch.rows), len(ids), max([*lengths, batch.padding]))

    def bring_members(self, batch: Batch) -> None:
        """Activations that need whole dictionaries, where the full-encode path would put them."""
        table = self.residents.layers.get(LAYER)
        self.step.members.fill_(float("nan"))
        for i, here in enumerate(batch.bounds):
            index = self.residents.index.get(f"r{i}", -1)
            for use in table.uses.get(index, ()) if table else ():
                z = by_digest(self.d)[use.digest].encode(batch.stream[here].float())
                columns = torch.from_numpy(use.targets).to(ON)
                wanted = z[:, torch.from_numpy(use.features)].to(ON)
                self.step.members[0, here.start : here.stop].index_copy_(1, columns, wanted)

    def run(self, batch: Batch, random: np.random.Generator, decode: bool = False) -> Batch:
        """A copy of the batch after the armed layer."""
        row_slot = self.settle(batch, random)
        self.plan(batch, row_slot)
        self.bring_members(batch)
        return self.again(batch, decode)

    def again(self, batch: Batch, decode: bool) -> Batch:
        """As :meth:`run`, by the plan that stands."""
        hidden = batch.hidden.to(ON, copy=True)
        residual = None if batch.residual is None else batch.residual.to(ON, copy=True)
        self.step.run(LAYER, hidden, residual, decode)
        return dataclasses.replace(batch, hidden=hidden.cpu(), residual=None if residual is None else residual.cpu())

    def left(self, name: str) -> torch.Tensor:
        """What the step left in one of its buffers."""
        found: torch.Tensor = getattr(self.step, name)
        return found.clone().cpu()

    def reading(self, which: str) -> torch.Tensor:
        """What inspections saw, "before" or "after" the edit."""
        return self.step.readings[LAYER, which].clone().cpu()


# -- the oracle -----------------------------------------------------------------------------------------------------


def opened(row: Part, h: torch.Tensor) -> torch.Tensor:
    assert row.payload is not None
    program = row.payload.program
    assert program is not None
    d = h.shape[1]
    source = row_source(program.vectors, by_digest(d))
    return listen(h, program.layers[0], source, None, row.prompt_len)[0]


def expected(row: Part, h: torch.Tensor) -> LayerResult:
    """The oracle's word on one request's tokens, h ``[n, d]`` fp32."""
    assert row.payload is not None
    program = row.payload.program
    assert program is not None
    saes = by_digest(h.shape[1])
    return edit_layer(
        h,
        program.layers[0],
        select(program.selectors, row.positions, row.ids, row.prompt_len),
        row_source(program.vectors, saes),
        lambda digest: saes[digest].encode(h),
        program.max_dose,
        program.refuse_over_dose,
        opened=opened(row, h),
    )


def sure(row: Part, h: torch.Tensor) -> torch.Tensor:
    """bool ``[n]``: tokens at which a change of h in its last bits changes the oracle's word in its last bits only."""
    want, size = expected(row, h), h.norm(dim=-1)
    steady = torch.ones(len(h), dtype=torch.bool)
    noise = torch.Generator().manual_seed(0)
    for _ in range(6):
        moved = h * (1 + 1e-5 * torch.randn(h.shape, generator=noise))
        other = expected(row, moved)
        steady &= (other.fired == want.fired) & (other.clamped == want.clamped) & (other.over == want.over)
        steady &= (opened(row, moved) == opened(row, h)).all(dim=0)
        steady &= (other.delta - want.delta).norm(dim=-1) <= 1e-3 * (size + want.delta.norm(dim=-1))
    return steady & ((want.dose == 0) | (want.dose > 1e-5))
