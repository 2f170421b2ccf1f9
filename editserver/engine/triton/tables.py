"""All resident programs on the device: the flat tables of ``editserver.engine.resident``, at addresses that never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.triton import codes
from editserver.engine.triton.arena import Arena, Spec, at
from editserver.engine.triton.capacity import Capacity, CapacityError
from editserver.engine.triton.reads import ChannelTable, centred_of, reads_of

Array = npt.NDArray[Any]
Columns = dict[str, Array]
I32, I64, F32, F64 = torch.int32, torch.int64, torch.float32, torch.float64


class Selectors(Protocol):
    """The arrays of :class:`editserver.engine.resident.SelectorTable`."""

    requests: Array
    interval_ptr: Array
    intervals: Array
    id_ptr: Array
    ids: Array
    bos: Array


@dataclass(frozen=True)
class Listing:
    """Rows that requests want read at one layer, by request, in the order of the answer's columns.

    Attributes:
        pointers: ``[residents + 1]``.
        rows: int32 ``[n, 3]``, as :attr:`~editserver.engine.triton.reads.Reads.rows`.
        bits: int64 ``[n]``: bit of the selector, or of the gate that listens.
        centred: int32 ``[residents]``, as there.
    """

    pointers: Array
    rows: Array
    bits: Array
    centred: Array

    @classmethod
    def of(cls, wanted: Sequence[Sequence[tuple[int, int, int, int]]]) -> Listing:
        """Per resident: (slot, input norm, what is made of it, bit as a signed integer)."""
        flat = np.array([entry for one in wanted for entry in one], np.int64).reshape(-1, 4)
        sizes = [len(one) for one in wanted]
        owner = np.repeat(np.arange(len(wanted)), sizes)
        return cls(
            np.cumsum([0, *sizes], dtype=np.int32),
            flat[:, :3].astype(np.int32),
            np.ascontiguousarray(flat[:, 3]),
            centred_of(len(wanted), owner, flat[:, 1]),
        )

    @property
    def widest(self) -> int:
        """Most rows of one resident."""
        return int(np.diff(self.pointers).max(initial=0))


LISTINGS = ("before", "after", "heard")
"""Inspections of the stream before the edit, of the edited stream; evidence of gates."""


class DeviceTables:
    """Tables of fixed capacity: written when the set of residents changes, read by every kernel launch.

    Attributes:
        n_bytes: device memory.
        history: int32 ``[rows, positions]``, tokens of the requests that look for mentions.
    """

    def __init__(self, capacity: Capacity, layers: Sequence[int], device: torch.device) -> None:
        self.capacity = capacity
        self.layers = tuple(layers)
        specs: dict[str, Spec] = {
            "slot_resident": ((capacity.residents,), I32),
            "request_ptr": ((capacity.residents + 1,), I32),
            "interval_ptr": ((capacity.selectors + 1,), I32),
            "intervals": ((capacity.intervals, 2), I32),
            "id_ptr": ((capacity.selectors + 1,), I32),
            "ids": ((capacity.wanted_ids,), I32),
            "with_zero": ((capacity.selectors,), I32),
            "history_row": ((capacity.residents,), I32),
            "mention_ptr": ((capacity.selectors + 1,), I32),
            "mention_start": ((capacity.mentions + 1,), I32),
            "mention_ids": ((capacity.mention_ids,), I32),
            "dose_bound": ((capacity.residents,), F32),
            "dose_refuses": ((capacity.residents,), I32),
            "prompt_lengths": ((capacity.residents,), I32),
        }
        for layer in self.layers:
            specs |= at(layer, self._layer_specs())
        self._arena = Arena(specs, device)
        self.history = torch.zeros(capacity.history_rows, capacity.history, dtype=I32, device=device)
        self._seats: dict[str, int] = {}

    def _layer_specs(self) -> dict[str, Spec]:
        c = self.capacity
        specs: dict[str, Spec] = {
            "programs": ((c.residents + 1,), I32),
            "channels": ((c.channels, int(codes.CHANNEL_COLUMNS)), I32),
            "channel_ops": ((c.channels + 1,), I32),
            "op_ints": ((c.ops, int(codes.OP_COLUMNS)), I32),
            "op_values": ((c.ops, int(codes.OP_VALUES)), F32),
            "op_masks": ((c.ops, int(codes.OP_MASKS)), I64),
            "read_ptr": ((c.residents + 1,), I32),
            "reads": ((c.reads, int(codes.READ_COLUMNS)), I32),
            "centred": ((c.residents,), I32),
            "gate_ptr": ((c.residents + 1,), I32),
            "gates": ((c.gates, int(codes.GATE_COLUMNS)), I64),
            "gate_limits": ((c.gates,), F64),
        }
        for listing in LISTINGS:
            specs |= {
                f"{listing}_ptr": ((c.residents + 1,), I32),
                f"{listing}_rows": ((c.reads, int(codes.READ_COLUMNS)), I32),
                f"{listing}_bits": ((c.reads,), I64),
                f"{listing}_centred": ((c.residents,), I32),
            }
        return specs

    @property
    def n_bytes(self) -> int:
        """Device memory of the tables."""
        return self._arena.n_bytes + self.history.numel() * self.history.element_size()

    def __getitem__(self, name: str) -> torch.Tensor:
        """A column for all layers; always the same memory."""
        return self._arena[name]

    def of(self, layer: int, name: str) -> torch.Tensor:
        """A column of one layer; always the same memory."""
        return self._arena[f"{layer}.{name}"]

    def write(self, columns: Mapping[str, Array]) -> int:
        """Copy what changed to the device, without waiting; CapacityError and nothing done where it does not fit."""
        return self._arena.write(columns)

    def check(self, columns: Mapping[str, Array]) -> None:
        """Raises CapacityError where :meth:`write` would."""
        self._arena.check(columns)

    def map_slots(self, residents: Array) -> int:
        """``residents[s]`` (int32) is the resident index of the runner's request slot s, -1 for none."""
        return self._arena.write({"slot_resident": residents})

    def selector_columns(self, table: Selectors) -> Columns:
        """The selectors of all residents."""
        return {
            "request_ptr": table.requests,
            "interval_ptr": table.interval_ptr,
            "intervals": table.intervals,
            "id_ptr": table.id_ptr,
            "ids": table.ids,
            "with_zero": table.bos.astype(np.int32),
        }

    def mention_columns(self, sought: Sequence[Sequence[Sequence[int]]]) -> Columns:
        """Token sequences that each selector looks for, all residents' selectors one behind the other."""
        flat = [sequence for one in sought for sequence in one]
        return {
            "mention_ptr": np.cumsum([0, *map(len, sought)], dtype=np.int32),
            "mention_start": np.cumsum([0, *map(len, flat)], dtype=np.int32),
            "mention_ids": np.array([token for sequence in flat for token in sequence], np.int32),
        }

    def seat(self, known: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Rows of ``history`` for the requests that look for mentions, kept for as long as they are named here.

        ``known`` are the tokens that each begins with; those of a request that has a row already are there.

        Raises:
            CapacityError: more requests than rows, or one with more tokens than a row has; nothing is changed.
        """
        if len(known) > len(self.history):
            raise CapacityError("requests that look for mentions", len(known), len(self.history))
        longest = max(map(len, known.values()), default=0)
        if longest > self.capacity.history:
            raise CapacityError("tokens of a request that looks for mentions", longest, self.capacity.history)
        seats = {request: row for request, row in self._seats.items() if request in known}
        free = iter(sorted(set(range(len(self.history))) - set(seats.values())))
        for request, tokens in known.items():
            if request not in seats:
                seats[request] = next(free)
                given = torch.tensor(tokens, dtype=I32, pin_memory=self.history.is_cuda)
                self.history[seats[request], : len(tokens)].copy_(given, non_blocking=True)
        self._seats = seats
        return dict(seats)

    def unseat(self, request: str) -> None:
        """The request is gone; another one of its name begins with tokens of its own."""
        self._seats.pop(request, None)

    def dose_columns(self, bound: Array, refuses: Array) -> Columns:
        """Bounds on ||delta||/||h|| (float32) and whether exceeding them is an error, by resident."""
        return {"dose_bound": bound, "dose_refuses": refuses.astype(np.int32)}

    def layer_columns(self, layer: int, table: ChannelTable | None, n_residents: int) -> Columns:
        """All programs' channels at ``layer``; None: there are none.

        Raises:
            CapacityError: one request has more channels or reads at this layer than a token's scratch holds.
            ValueError: what the device does not edit.
        """
        if table is None:
            nothing = np.zeros(n_residents + 1, np.int32)
            return at(layer, {"programs": nothing, "read_ptr": nothing})
        found = reads_of(table)
        self._fits("channels of one request at a layer", table.programs, self.capacity.request_channels)
        self._fits("reads of one request at a layer", found.reads.pointers, self.capacity.request_reads)
        if table.n_members > self.capacity.members:
            raise CapacityError("members of whole dictionaries at a layer", table.n_members, self.capacity.members)
        kind, values, slots, unit, active, need, gates, who = table.ops
        op_ints = np.stack((kind, slots[:, 0], found.sources, found.means, unit, active), axis=1).astype(np.int32)
        bits = np.left_shift(np.uint64(1), who.astype(np.uint64))
        columns = {
            "programs": table.programs,
            "channels": np.stack((table.read, table.slot, table.norm, found.channels), axis=1).astype(np.int32),
            "channel_ops": table.channel_ops,
            "op_ints": op_ints,
            "op_values": values,
            "op_masks": np.stack((need, gates, bits), axis=1).view(np.int64),
            "read_ptr": found.reads.pointers,
            "reads": found.reads.rows,
            "centred": found.reads.centred,
        }
        return at(layer, columns)

    def listing_columns(self, layer: int, which: str, listing: Listing) -> Columns:
        """Rows that are read at ``layer`` for ``which`` of LISTINGS."""
        if which != "heard" and listing.widest > self.capacity.listed:
            raise CapacityError("inspected latents of one request at a layer", listing.widest, self.capacity.listed)
        columns = {"ptr": listing.pointers, "rows": listing.rows, "bits": listing.bits, "centred": listing.centred}
        return at(layer, {f"{which}_{name}": array for name, array in columns.items()})

    def gate_columns(self, layer: int, wanted: Sequence[Sequence[tuple[int, ...]]], limits: Sequence[float]) -> Columns:
        """Gates over sequences at ``layer``: per resident rows of GATE_COLUMNS, and what the statistic of each must exceed."""
        pointers = np.cumsum([0, *map(len, wanted)], dtype=np.int32)
        self._fits("gates over sequences of one request at a layer", pointers, self.capacity.request_gates)
        rows = np.array([row for one in wanted for row in one], np.int64).reshape(-1, int(codes.GATE_COLUMNS))
        columns: Columns = {"gate_ptr": pointers, "gates": rows, "gate_limits": np.array(limits, np.float64)}
        return at(layer, columns)

    @staticmethod
    def _fits(what: str, pointers: Array, capacity: int) -> None:
        most = int(np.diff(pointers).max(initial=0))
        if most > capacity:
            raise CapacityError(what, most, capacity)


class DeviceBank:
    """The bank's rows on the device: ``read``, ``write`` ``[rows, d]`` and ``gate [rows, 4]``, fp32, at fixed addresses."""

    def __init__(self, rows: int, d_model: int, device: torch.device) -> None:
        self.read = torch.zeros(rows, d_model, device=device)
        self.write = torch.zeros(rows, d_model, device=device)
        self.gate = torch.zeros(rows, 4, device=device)

    @property
    def n_bytes(self) -> int:
        """Device memory of the bank."""
        return sum(t.numel() * t.element_size() for t in (self.read, self.write, self.gate))

    def put(self, slots: torch.Tensor, read: torch.Tensor, write: torch.Tensor, gate: torch.Tensor) -> None:
        """Make ``slots [n]`` (int64) hold these rows, without waiting; all arguments lie on the host."""
        on_gpu = self.read.is_cuda
        given = [t.pin_memory() if on_gpu else t for t in (slots, read, write, gate)]
        at, *rows = (t.to(self.read.device, non_blocking=True) for t in given)
        for target, source in zip((self.read, self.write, self.gate), rows, strict=True):
            target.index_copy_(0, at, source)
