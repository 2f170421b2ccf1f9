"""One worker's steps on the device: the plan's buffers, and the launches before and inside a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from editserver.engine.triton.capacity import Capacity, RuleCapacity
from editserver.engine.triton.codes import ACTIVE, STEP
from editserver.engine.triton.kernel_common import FIXED
from editserver.engine.triton.kernel_edit import ahead_kernel, edit_kernel
from editserver.engine.triton.kernel_gates import gates_kernel
from editserver.engine.triton.kernel_plan import plan_kernel
from editserver.engine.triton.kernel_read import read_kernel
from editserver.engine.triton.tables import DeviceBank, DeviceTables

if TYPE_CHECKING:  # what is encoded and ruled needs more than PyTorch and Triton
    from editserver.engine.triton.encode import DeviceEncode
    from editserver.engine.triton.rules import DeviceRules

TILE = 4
"""Tokens of one request that a program of the prompt variant takes together: a row is loaded once for all of them."""

MOST_LANES = 10
"""log₂ of the most lanes of a sum over d. Another number gives other low bits, in both variants alike."""

DECODE_CHANNELS, PROMPT_CHANNELS = 5, 2
"""log₂ of the channels whose ops are run together; more of them for several tokens would not fit into registers."""

AHEAD = 8
"""Programs that share the rows of one token where they are read ahead."""

PLAN_BLOCK = 256
"""Tokens of one row that one program plans."""

GATES: dict[str, Any] = FIXED | {"num_warps": 4}

MOST_WIDE = 12
"""log₂ of the most columns that a decode program writes at once; up to that width their delta stays in registers."""

DECODE: dict[str, Any] = FIXED | {"T": 1, "LOG_ROWS": 3, "STAGES": 3, "num_warps": 8}
PROMPT: dict[str, Any] = FIXED | {"T": TILE, "LOG_ROWS": 2, "STAGES": 1, "num_warps": 8}
"""The two variants: tokens per program, log₂ of the rows that are read together, blocks of rows on their way, warps. Few
decode programs run at a time, so each keeps as much on its way as registers hold; prompt programs share what they load."""


MOST_PLANS = 1 << 30
"""Numbers of plans; then they begin again at 1."""

GATE_BLOCK = 1024
"""Positions of a sequence that a gate looks at together."""


@dataclass(frozen=True)
class Cache:
    """Where the KV of a batch lies: the runner's own buffers, at addresses that do not change, and its shape.

    Attributes:
        block_table: int32 ``[rows, blocks]``; rows may be any number of entries apart.
        slot_mapping: int64 ``[tokens]``, KV slot of each token of the batch, negative for padding.
        block_size: tokens per block.
        n_slots: tokens of the whole cache.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    n_slots: int


@dataclass(frozen=True)
class Stages:
    """What is launched at every armed layer, fixed at start; each returns at once where nobody asked for it."""

    gates: bool = True
    before: bool = True
    after: bool = True
    ahead: bool = False
    """Read an edit's rows side by side in a launch of their own where every request has one token: for programs of many
    latents in small batches."""


class DeviceStep:
    """Buffers at fixed addresses, and the launches that fill them.

    Per step: :meth:`plan` before the forward pass of a real batch, :meth:`clear` before any other; :meth:`run` inside, at
    every armed layer. Nothing here reads the device, and :meth:`run` may be captured: its grid depends on the shape of the
    batch only.

    Attributes:
        resident, selected: of each token of the batch, int32 and int64 ``[tokens]``.
        opened: gate bits by layer, int64 ``[layers, tokens]``.
        open_from, largest: what gates over sequences say for receipts, for the last tokens of each row (CUSUM: in steps of
            2⁻²⁰), ``[layers, rows, gates, drafts + 1]``.
        planned: number of the last plan.
        ran: by layer, ``[layers, 64]``: first of all, the number of the plan by which the layer ran last.
        rows: int32 ``[4, rows]``: first token, end, resident index (-1: none) and first position of each row.
        fired, dose, flags: what the edit of each layer did, ``[layers, tokens]``; valid for tokens of resident requests.
        readings: by (layer, "before" or "after"), fp32 ``[tokens, listed]``; NaN where the selector does not hold.
        members: activations of latents that come from whole dictionaries, by layer, fp32 ``[layers, tokens, members]``.
    """

    def __init__(
        self,
        capacity: Capacity,
        layers: Sequence[int],
        d_model: int,
        device: torch.device,
        stages: Stages | None = None,
        lanes: int | None = None,
        drafts: int = 0,
        rules: RuleCapacity | None = None,
        encode: DeviceEncode | None = None,
    ) -> None:
        """``lanes``: log₂ of those of a sum over d; ``drafts``: most draft tokens of one request in one step; ``rules``: what
        is reserved for them, None where they are not run; ``encode``: None where whole dictionaries are not encoded."""
        self.tables = DeviceTables(capacity, layers, device)
        self.bank = DeviceBank(capacity.bank_rows, d_model, device)
        self.capacity, self.d_model, self.stages = capacity, d_model, stages or Stages()
        self._lanes = min(MOST_LANES, _power_of_two(d_model).bit_length() - 1) if lanes is None else lanes
        whole_rows = max(self._lanes, min(MOST_WIDE, _power_of_two(d_model).bit_length() - 1))
        self._decode = DECODE | {"WIDE": whole_rows, "LOG": self._lanes}
        self._prompt = PROMPT | {"WIDE": self._lanes, "LOG": self._lanes}
        self._gate_block = GATE_BLOCK
        self._number = {layer: i for i, layer in enumerate(layers)}
        # A row of every buffer begins at a multiple of 256 bytes: another alignment would be another compiled kernel.
        tokens, n_layers = -(-capacity.tokens // 64) * 64, len(layers)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        n_tiles = -(-tokens // TILE) + capacity.rows
        self.state = empty(8, dtype=torch.int32)
        self.ran = empty(n_layers, 64, dtype=torch.int32)
        self.planned = 0
        self.resident = empty(tokens, dtype=torch.int32)
        self.selected = empty(tokens, dtype=torch.int64)
        self._tile_first = empty(n_tiles, dtype=torch.int32)
        self._tile_last = empty(n_tiles, dtype=torch.int32)
        self.opened = empty(n_layers, tokens, dtype=torch.int64)
        self.fired = empty(n_layers, tokens, dtype=torch.int64)
        self.dose = empty(n_layers, tokens, dtype=torch.float32)
        self.flags = empty(n_layers, tokens, dtype=torch.int32)
        self.members = empty(n_layers, tokens, capacity.members, dtype=torch.float32)
        self.rows = empty(4, capacity.rows, dtype=torch.int32)
        facts = (n_layers, capacity.rows, capacity.request_gates, drafts + 1)
        self.open_from = empty(*facts, dtype=torch.int32)
        self.largest = empty(*facts, dtype=torch.float64)
        self.encode = encode
        self.rules = _rules(rules, layers, tokens, capacity.residents, device) if rules else None
        self._cache: Cache | None = None
        self._memory = empty(n_layers, 0, dtype=torch.int64)
        self._values = empty(tokens, capacity.request_reads, dtype=torch.float32)
        self._coefficients = empty(tokens, capacity.request_channels, dtype=torch.float32)
        wanted = [name for name in ("before", "after") if getattr(self.stages, name)]
        shape = (tokens, capacity.listed)
        self.readings = {(layer, name): empty(*shape, dtype=torch.float32) for layer in layers for name in wanted}

    @property
    def n_bytes(self) -> int:
        """Device memory of everything: tables, bank, buffers."""
        own = (t for t in vars(self).values() if isinstance(t, torch.Tensor))
        buffers = [*own, *self.readings.values()]
        parts = self.tables.n_bytes + self.bank.n_bytes + (self.rules.n_bytes if self.rules else 0)
        parts += self.encode.n_bytes if self.encode else 0
        return parts + sum(t.numel() * t.element_size() for t in buffers)

    @property
    def layers(self) -> tuple[int, ...]:
        """The armed layers."""
        return self.tables.layers

    def number(self, layer: int) -> int:
        """Where an armed layer stands in the buffers by layer."""
        return self._number[layer]

    @property
    def cache(self) -> Cache | None:
        """Where the KV lies, once :meth:`attach` said so."""
        return self._cache

    @property
    def tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First token and end of each tile of the plan, int32."""
        return self._tile_first, self._tile_last

    def variant(self, decode: bool) -> dict[str, Any]:
        """How kernels over tiles are launched."""
        return self._decode if decode else self._prompt

    @property
    def memory_bytes(self) -> int:
        """Of the bits of gates and rules that are kept with the KV cache."""
        kept = [self._memory, *([self.rules.kept] if self.rules else [])]
        return sum(one.numel() * one.element_size() for one in kept)

    @property
    def kept_per_token(self) -> dict[str, int]:
        """Bytes of them per token of the cache."""
        words = sum(self.rules.capacity.words) if self.rules else 0
        return {"hits of gates": 8 * len(self.layers), "bits of rules": 8 * words}

    def attach(self, cache: Cache | None) -> None:
        """Keep hit bits with this KV cache, 8 bytes per layer and slot: then gates may look back. Before anything is captured.
        None: with no cache, as at first."""
        slots = cache.n_slots if cache is not None else 0
        self._cache = cache
        self._memory = torch.zeros(len(self._number), slots, dtype=torch.int64, device=self.state.device)
        if self.rules is not None:
            self.rules.attach(slots)

    def clear(self) -> None:
        """The forward passes that follow edit and read nothing."""
        self.state.zero_()

    def probe(self) -> None:
        """As :meth:`clear`, but the layers that run leave the number of this plan, which is of no token, behind."""
        self.planned = self.planned % MOST_PLANS + 1
        nobody = torch.zeros(len(self.state), dtype=self.state.dtype)
        nobody[int(ACTIVE)], nobody[int(STEP)] = 1, self.planned
        self.state.copy_(nobody)

    def plan(
        self,
        query_start: torch.Tensor,
        row_slot: torch.Tensor,
        positions: torch.Tensor,
        token_ids: torch.Tensor,
        n_rows: int,
        n_padded: int,
        longest: int,
    ) -> None:
        """Plan the forward pass that follows: one launch, from what lies on the device.

        Args:
            query_start: int32 ``[n_rows + 1]``; where it is ahead of what the host knows, the device's word counts.
            row_slot: the runner's request slot of each row, integer ``[n_rows]``.
            positions, token_ids: integer, ``[n_padded]`` at least.
            n_rows, n_padded: rows, and tokens, with the padding or without.
            longest: upper bound of a row's tokens, and of the padding.
        """
        if n_padded > self.capacity.tokens or n_rows > self.capacity.rows:
            raise ValueError(
                f"a batch of {n_rows} rows and {n_padded} tokens; the device is set up for {self.capacity.rows} and "
                f"{self.capacity.tokens}"
            )
        tables = self.tables
        self.planned = self.planned % MOST_PLANS + 1
        grid = (n_rows + 1, max(1, -(-max(longest, 1) // PLAN_BLOCK)))
        plan_kernel[grid](
            query_start,
            row_slot,
            tables["slot_resident"],
            positions,
            token_ids,
            n_rows,
            n_padded,
            self.planned,
            tables["request_ptr"],
            tables["interval_ptr"],
            tables["intervals"],
            tables["id_ptr"],
            tables["ids"],
            tables["with_zero"],
            tables["mention_ptr"],
            tables["mention_start"],
            tables["mention_ids"],
            tables["history_row"],
            tables.history,
            self.state,
            self.resident,
            self.selected,
            self._tile_first,
            self._tile_last,
            *self.rows,
            TILE=TILE,
            ROWS=_power_of_two(self.capacity.rows),
            BLOCK=PLAN_BLOCK,
            HISTORY=self.capacity.history,
            num_warps=4,
        )

    def run(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None, decode: bool) -> None:
        """What happens at an armed layer: gates, inspections, the edit, inspections of its result; in place.

        Args:
            hidden, residual: contiguous ``[tokens, d]`` in the model's dtype; without ``residual``, ``hidden`` is the stream.
            decode: whether every request has one token in this batch. Either answer gives the same bits.
        """
        if self.encode is not None:
            self.encode.run(self, layer, "before", hidden, residual)
        if self.stages.gates:
            self._list(layer, "heard", hidden, residual, decode)
            if self._cache is not None:
                self._look_back(layer, self._cache, min(hidden.shape[0], self.capacity.rows))
                if self.rules is not None:
                    self.rules.run(self, layer, hidden, residual, decode)
        if self.stages.before:
            self._list(layer, "before", hidden, residual, decode)
        self.edit(layer, hidden, residual, decode)
        if self.stages.after:
            if self.encode is not None:
                self.encode.run(self, layer, "after", hidden, residual)
            self._list(layer, "after", hidden, residual, decode)

    def edit(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None, decode: bool) -> None:
        """The edit alone; arguments as :meth:`run`'s."""
        number, tables = self._number[layer], self.tables
        ahead = decode and self.stages.ahead
        if ahead:
            self._read_ahead(layer, hidden, residual)
        edit_kernel[self.grid(hidden, residual, decode)](
            hidden,
            hidden if residual is None else residual,
            self.state,
            *self.tiles,
            self.resident,
            self.selected,
            self.opened[number],
            tables.of(layer, "programs"),
            tables.of(layer, "centred"),
            tables.of(layer, "channels"),
            tables.of(layer, "channel_ops"),
            tables.of(layer, "op_ints"),
            tables.of(layer, "op_values"),
            tables.of(layer, "op_masks"),
            tables.of(layer, "read_ptr"),
            tables.of(layer, "reads"),
            tables["dose_bound"],
            tables["dose_refuses"],
            self.bank.read,
            self.bank.write,
            self.bank.gate,
            self.members[number],
            self.capacity.members,
            self._values,
            self.capacity.request_reads,
            self._coefficients,
            self.capacity.request_channels,
            self.fired[number],
            self.dose[number],
            self.flags[number],
            self.ran[number],
            D=self.d_model,
            SPLIT=residual is not None,
            LOG_CHANNELS=DECODE_CHANNELS if decode else PROMPT_CHANNELS,
            AHEAD=ahead,
            **self.variant(decode),
        )

    def _read_ahead(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        number, tables = self._number[layer], self.tables
        variant = {name: value for name, value in self._decode.items() if name != "T"}
        ahead_kernel[(hidden.shape[0], AHEAD)](
            hidden,
            hidden if residual is None else residual,
            self.state,
            self.resident,
            self.selected,
            tables.of(layer, "read_ptr"),
            tables.of(layer, "reads"),
            tables.of(layer, "centred"),
            self.bank.read,
            self.bank.gate,
            self.members[number],
            self.capacity.members,
            self._values,
            self.capacity.request_reads,
            D=self.d_model,
            SPLIT=residual is not None,
            **variant,
        )

    def read(
        self,
        layer: int,
        rows: Mapping[str, torch.Tensor],
        selected: torch.Tensor,
        out: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        decode: bool,
        hits: bool = False,
    ) -> None:
        """Read every request's own rows against the stream at ``layer``; arguments else as :meth:`run`'s.

        Args:
            rows: "ptr", "rows", "bits", "centred", on the device, as :class:`~editserver.engine.triton.tables.Listing`'s.
            selected: int64 ``[tokens]``: without ``hits``, a row is read where one of its bits is set.
            out: fp32 ``[tokens, columns]``; with ``hits`` int64 ``[tokens]``, bits of the rows that are not 0, which are kept with
                the KV cache if there is one.
        """
        number, cache = self._number[layer], self._cache
        read_kernel[self.grid(hidden, residual, decode)](
            hidden,
            hidden if residual is None else residual,
            self.state,
            *self.tiles,
            self.resident,
            selected,
            rows["ptr"],
            rows["rows"],
            rows["bits"],
            rows["centred"],
            self.bank.read,
            self.bank.gate,
            self.members[number],
            self.capacity.members,
            out,
            out.shape[-1],
            self._memory[number],
            self.selected if cache is None else cache.slot_mapping,
            D=self.d_model,
            SPLIT=residual is not None,
            HITS=hits,
            REMEMBER=hits and cache is not None,
            **self.variant(decode),
        )

    def _list(self, layer: int, which: str, hidden: torch.Tensor, residual: torch.Tensor | None, decode: bool) -> None:
        """``which`` of :data:`~editserver.engine.triton.tables.LISTINGS`."""
        rows = {name: self.tables.of(layer, f"{which}_{name}") for name in ("ptr", "rows", "bits", "centred")}
        hits = which == "heard"
        out = self.opened[self._number[layer]] if hits else self.readings[layer, which]
        self.read(layer, rows, self.selected, out, hidden, residual, decode, hits)

    def _look_back(self, layer: int, cache: Cache, rows: int) -> None:
        number, tables = self._number[layer], self.tables
        gates_kernel[(rows,)](
            self.state,
            *self.rows,
            cache.block_table,
            cache.block_table.stride(0),
            self._memory[number],
            tables.of(layer, "gate_ptr"),
            tables.of(layer, "gates"),
            tables.of(layer, "gate_limits"),
            tables["prompt_lengths"],
            self.opened[number],
            self.open_from[number],
            self.largest[number],
            self.capacity.request_gates,
            BLOCK_SIZE=cache.block_size,
            BLOCK=self._gate_block,
            FACTS=self.largest.shape[-1],
            **GATES,
        )

    def grid(self, hidden: torch.Tensor, residual: torch.Tensor | None, decode: bool) -> tuple[int]:
        """Of kernels over tiles, for a batch of this shape."""
        n = hidden.shape[0]
        for stream in (hidden, residual):
            if stream is not None and (stream.shape != (n, self.d_model) or not stream.is_contiguous()):
                raise ValueError(f"expected a contiguous [tokens, {self.d_model}], got {tuple(stream.shape)}")
        return (n if decode else -(-n // TILE) + min(n, self.capacity.rows),)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _rules(
    capacity: RuleCapacity, layers: Sequence[int], tokens: int, residents: int, device: torch.device
) -> DeviceRules:
    from editserver.engine.triton import rules

    return rules.DeviceRules(capacity, layers, tokens, residents, device)
