"""Programs that are all different on an armed engine's tables, and what they are to do, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.loop import Shape
from editserver.engine.triton import codes
from editserver.engine.triton.capacity import Capacity, RuleCapacity
from editserver.engine.triton.step import Cache, DeviceStep, Stages

SEED = 0

BLOCK = 16
"""Tokens of a block of the KV cache: one per request, where stages look back."""


@dataclass
class Table:
    """The channels of all programs at one layer, as ``editserver.engine.resident.LayerTable`` has them."""

    programs: np.ndarray
    read: np.ndarray
    slot: np.ndarray
    norm: np.ndarray
    member: np.ndarray
    channel_ops: np.ndarray
    ops: tuple[np.ndarray, ...]
    n_members: int = 0


def table(slots: np.ndarray, random: np.random.Generator) -> Table:
    """``slots [programs, latents]``: the first latent is set, the others are set, scaled, added to or clamped, at every token."""
    n = slots.size
    values = np.zeros((n, 6), np.float32)
    values[:, 2:4] = -np.inf, np.inf
    kind = random.integers(0, 4, n)
    kind[:: slots.shape[1]] = 0  # one that acts on inactive latents too
    number = random.uniform(0.5, 2.0, n)
    values[:, 0] = np.select([kind == 0, kind == 1], [0.0, number], 1.0)
    values[:, 1] = np.select([kind == 0, kind == 2], [number, number], 0.0)
    values[kind == 3, 3] = 0.25
    small, wide = np.zeros(n, np.int8), np.ones(n, np.uint64)
    slots_of_op = np.full((n, 3), -1, np.int32)
    who = np.arange(n) % slots.shape[1] % 63
    ops = (small, values, slots_of_op, small, np.zeros(n, np.bool_), wide, wide * 0, who.astype(np.int8))
    programs = np.arange(0, n + 1, slots.shape[1], dtype=np.int32)
    read = np.full(n, int(codes.LATENT), np.int8)
    pointers = np.arange(n + 1, dtype=np.int32)
    return Table(programs, read, slots.ravel().astype(np.int32), small, np.full(n, -1, np.int32), pointers, ops)


class Editing:
    """An armed engine, and the programs that it was last given."""

    def __init__(
        self,
        shape: Shape,
        most_tokens: int,
        most_rows: int,
        latents: int,
        device: torch.device,
        stages: Stages,
        rules: bool = False,
    ) -> None:
        """With ``stages.gates`` a KV cache is attached, where each request's first token has a block: for decode alone.

        Raises:
            ImportError: ``rules``, and what they need besides PyTorch and Triton is not installed.
        """
        self.shape, self.device = shape, device
        self.armed = tuple(sorted({shape.layers * k // 4 for k in (1, 2, 3)}))
        rows = min(8192, len(self.armed) * latents * most_rows)
        self.capacity = Capacity.of(
            tokens=most_tokens,
            rows=most_rows,
            bank_rows=rows,
            instructions=64 * most_rows,
            channels_of_a_request=latents,
        )
        kept = RuleCapacity(requests=self.capacity.residents) if rules else None
        self.step = DeviceStep(self.capacity, self.armed, shape.d, device, stages, rules=kept)
        if stages.gates:
            blocks = torch.arange(most_tokens, dtype=torch.int32, device=device)[:, None]
            slots = torch.arange(most_tokens, device=device) * BLOCK
            self.step.attach(Cache(blocks, slots, BLOCK, most_tokens * BLOCK))
        generator = torch.Generator(device).manual_seed(SEED)
        bank = self.step.bank
        for rows_of in (bank.read, bank.write):
            rows_of.copy_(
                torch.nn.functional.normalize(torch.randn(rows_of.shape, generator=generator, device=device), dim=1)
            )
        bank.gate.copy_(torch.tensor([0.0, 0.05, 1.0, 0.0]).expand_as(bank.gate))
        self.slots: dict[int, np.ndarray] = {}
        self.tables: dict[int, Table] = {}

    def give(self, programs: int, latents: int, tokens_each: int) -> None:
        """``programs`` requests with as many tokens each, all with programs of their own; 0: nobody has one."""
        if not programs:
            self.step.clear()
            return
        random, tables = np.random.default_rng(SEED), self.step.tables
        rows = self.capacity.bank_rows
        columns = tables.dose_columns(np.full(programs, np.inf, np.float32), np.zeros(programs, np.bool_))
        pointers = np.arange(programs + 1, dtype=np.int32)
        columns |= {"request_ptr": pointers, "interval_ptr": pointers, "id_ptr": pointers * 0}
        columns |= {"intervals": np.tile(np.array([[0, 2**31 - 1]], np.int32), (programs, 1))}
        columns |= {"with_zero": np.ones(programs, np.int32)}
        for layer in self.armed:
            self.slots[layer] = np.stack([random.choice(rows, latents, replace=False) for _ in range(programs)])
            self.tables[layer] = table(self.slots[layer], random)
            columns |= tables.layer_columns(layer, self.tables[layer], programs)
        tables.write(columns)
        tables.map_slots(np.arange(programs, dtype=np.int32))
        n = programs * tokens_each
        at = torch.arange(n, device=self.device)
        start = torch.arange(0, n + 1, tokens_each, dtype=torch.int32, device=self.device)
        self.step.plan(start, at[:programs], at % tokens_each, at.int(), programs, n, tokens_each)

    def expected(self, layer: int, h: torch.Tensor, tokens_each: int) -> torch.Tensor:
        """Σ (x − a)·w in float64 for ``h [n, d]``, by the definition."""
        h, bank, own = h.double(), self.step.bank, self.tables[layer]
        delta = torch.zeros_like(h)
        for t in range(len(h)):
            q = t // tokens_each
            slots = torch.from_numpy(self.slots[layer][q]).to(self.device)
            gate = bank.gate[slots].double()
            u = bank.read[slots].double() @ h[t]
            a = torch.where(u + gate[:, 0] > gate[:, 1], torch.relu(gate[:, 2] * u + gate[:, 3]), 0.0)
            values = torch.from_numpy(own.ops[1][own.programs[q] : own.programs[q + 1]]).double().to(self.device)
            x = torch.minimum(torch.maximum(values[:, 0] * a + values[:, 1], values[:, 2]), values[:, 3])
            delta[t] = (x - a) @ bank.write[slots].double()
        return delta
