"""Random programs, the flat batches that they run in, and the oracle's word on them: the compiled kernel, without vLLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import msgspec
import numpy as np
import torch

from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.wire import StepRecord
from editserver.engine.worker import EngineWorker
from interventions.limits import MAX_INTERVENTIONS
from interventions.oracle import LayerResult, compose, edit_layer, row_source, select
from interventions.program import (
    TABLE_HEADER,
    Channel,
    LayerProgram,
    Op,
    OpKind,
    Payload,
    Program,
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
from tests.engine.dictionaries import ARCHITECTURES, N_FEATURES, write_native, write_sae
from tests.engine.flat_batches import Part, bounds_of, random_stream, stream_of

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
        return bounds_of(self.parts)

    @property
    def stream(self) -> torch.Tensor:
        """The residual stream in the model's dtype."""
        return stream_of(self.hidden, self.residual)

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
    return Step(parts, *random_stream(random, sum(len(p.ids) for p in parts), D, dtype, split))


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
