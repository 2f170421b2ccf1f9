"""Rules on the device: what is kept with the KV and between steps, the launches, and what records say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.rule_table import RuleRun
from editserver.engine.triton.arena import Arena, Spec, at
from editserver.engine.triton.capacity import RuleCapacity
from editserver.engine.triton.kernel_common import FIXED
from editserver.engine.triton.kernel_propositions import propositions_kernel
from editserver.engine.triton.kernel_rules import stage_kernel
from editserver.engine.triton.rule_columns import Placed, columns_of, specs_of
from editserver.engine.triton.tables import Columns
from editserver.engine.wire import RuleRecord
from interventions.rules.code import RuleProgram

if TYPE_CHECKING:
    from editserver.engine.resident import Resident, ResidentSet
    from editserver.engine.triton.step import Cache, DeviceStep

Array = npt.NDArray[Any]
I32, I64, F32 = torch.int32, torch.int64, torch.float32

DECODE_STAGE: dict[str, Any] = FIXED | {"B": 32, "num_warps": 1}
PROMPT_STAGE: dict[str, Any] = FIXED | {"B": 128, "num_warps": 4}
"""The two variants of the stage: tokens of one request that are decided together. Everything in it is integers."""

LOG_PROPOSITIONS = 5
"""log₂ of the propositions of one token that are looked at together."""


class DeviceRules:
    """Everything that rules have on a device, at fixed addresses; idle where no resident request has any.

    Attributes:
        kept: int64 ``[slots, words]``, bits by KV slot; see :mod:`editserver.engine.triton.kernel_rules`.
        scores: fp32 ``[tokens, propositions]``, of the latest step.
        acts: fp32 ``[tokens, features]``, scratch.
    """

    def __init__(
        self, capacity: RuleCapacity, layers: Sequence[int], tokens: int, residents: int, device: torch.device
    ) -> None:
        self.capacity, self.layers = capacity, tuple(layers)
        specs: dict[str, Spec] = {"seats": ((residents,), I32)}
        for layer in self.layers:
            specs |= at(layer, specs_of(capacity, residents))
        self._arena = Arena(specs, device)
        tokens = -(-tokens // 64) * 64

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._cells = empty(capacity.requests, capacity.cells, dtype=I64)
        self._before = empty(capacity.requests, capacity.cells, dtype=I64)
        self._marks = empty(len(self.layers), capacity.requests, 2, dtype=I32)
        self.kept = empty(0, sum(capacity.words), dtype=I64)
        self.acts = empty(tokens, capacity.features, dtype=F32)
        self.scores = empty(tokens, capacity.propositions, dtype=F32)
        self._everywhere = torch.full((max(tokens, capacity.rows),), -1, dtype=I64, device=device)
        self._number = {layer: i for i, layer in enumerate(self.layers)}
        self._seats: dict[str, tuple[RuleRun, int]] = {}
        self._told: set[str] = set()
        self._tables = {layer: self._arena.of(layer) for layer in self.layers}

    @property
    def n_bytes(self) -> int:
        """Device memory of everything."""
        own = (t for t in vars(self).values() if isinstance(t, torch.Tensor))
        return self._arena.n_bytes + sum(t.numel() * t.element_size() for t in own)

    def attach(self, n_slots: int) -> None:
        """Keep bits with a KV cache of so many tokens. Before anything is captured."""
        self.kept = torch.zeros(n_slots, sum(self.capacity.words), dtype=I64, device=self._cells.device)

    # -- tables -------------------------------------------------------------------------------------------------

    def columns(self, residents: ResidentSet, placed: Mapping[int, Placed]) -> Columns:
        """Tables of the resident requests (refreshed), for :meth:`write`.

        ``placed`` says by layer where activations that need whole dictionaries are put; none: nobody brings them.

        Raises:
            CapacityError: they do not fit.
            KeyError: nobody brings the activations of a latent that needs its whole dictionary.
        """
        found = columns_of(self.capacity, residents, self.layers, placed)
        self._arena.check(found)
        return found

    def write(self, columns: Columns, residents: ResidentSet) -> int:
        """Copy what changed to the device, without waiting; requests that are new get seats, and those that left lose theirs."""
        ruled = {name: one.rules for name, one in residents.requests.items() if one.rules is not None}
        seats = {name: seat for name, seat in self._seats.items() if ruled.get(name) is seat[0]}
        self._told &= seats.keys()
        free = iter(sorted(set(range(self.capacity.requests)) - {seat for _, seat in seats.values()}))
        for name, run in ruled.items():
            if name not in seats:
                seats[name] = run, next(free)
                self._marks[:, seats[name][1]].fill_(-1)
        self._seats = seats
        seated = np.array([seats[name][1] if name in seats else -1 for name in residents.requests], np.int32)
        return self._arena.write(columns | {"seats": seated})

    # -- launches -----------------------------------------------------------------------------------------------

    def run(
        self, step: DeviceStep, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None, decode: bool
    ) -> None:
        """What rules read and decide at ``layer``: into ``opened``, which gates of other kinds have filled before.

        ``step`` is attached to a KV cache and planned; arguments else as :meth:`DeviceStep.run`'s.
        """
        cache, number, table = step.cache, step.number(layer), self._tables[layer]
        assert cache is not None, "rules need bits that are kept with the KV"
        words = dict(zip(("WP", "WC", "WA", "WM"), self.capacity.words, strict=True))
        rows = {name: table[f"feature_{name}"] for name in ("ptr", "rows", "centred")} | {"bits": self._everywhere}
        step.read(layer, rows, self._everywhere, self.acts, hidden, residual, decode)
        propositions_kernel[step.grid(hidden, residual, decode)](
            step.state,
            *step.tiles,
            step.resident,
            cache.slot_mapping,
            table["pointers"],
            self.acts,
            self.acts.shape[1],
            table["propositions"],
            table["thresholds"],
            table["terms"],
            table["weights"],
            table["branches"],
            table["branch_values"],
            table["own"],
            self.kept,
            self.scores,
            self.scores.shape[1],
            T=step.variant(decode)["T"],
            LOG=LOG_PROPOSITIONS,
            WP=words["WP"],
            WORDS=sum(self.capacity.words),
            num_warps=4,
            **FIXED,
        )
        stage_kernel[(min(hidden.shape[0], step.capacity.rows),)](
            step.state,
            *step.rows,
            cache.block_table,
            cache.block_table.stride(0),
            step.tables["prompt_lengths"],
            self._arena["seats"],
            self._marks[self._number[layer]],
            self._cells,
            self._before,
            self.capacity.cells,
            *(table[name] for name in ("pointers", "memories", "parts", "codes", "group_ptr", "groups", "rules")),
            *(table[name] for name in ("conclusions", "actions", "gates", "own")),
            self.kept,
            step.opened[number],
            BLOCK_SIZE=cache.block_size,
            WORDS=sum(self.capacity.words),
            **words,
            **(DECODE_STAGE if decode else PROMPT_STAGE),
        )

    # -- records ------------------------------------------------------------------------------------------------

    def take(
        self,
        cache: Cache,
        requests: Sequence[Resident | None],
        tokens: int,
        known: Mapping[str, Sequence[int]],
        copied: Callable[[torch.Tensor], torch.Tensor],
    ) -> TakenRules | None:
        """Start copying what the latest step did to the host; None where no row's request has rules.

        Args:
            requests: of each row of the batch.
            tokens: of the batch.
            known: by request, the tokens that it came with, where these are more than its prompt: its first step may have
                found some of them computed, and records speak of these too.
            copied: starts the copy of a tensor.
        """
        most = max((len(one.rules.program.propositions) for one in requests if one and one.rules), default=-1)
        if most < 0:
            return None
        words = self.capacity.words[:3]
        told = self.kept[:, : sum(words)]
        earlier: dict[int, torch.Tensor] = {}
        for row, one in enumerate(requests):
            if one is None or one.rules is None or one.request_id in self._told:
                continue
            self._told.add(one.request_id)
            n = max(one.prompt_len, len(known.get(one.request_id, ())))
            blocks = cache.block_table[row, : -(-n // cache.block_size)].long()
            inside = torch.arange(cache.block_size, device=blocks.device)
            slots = (blocks[:, None] * cache.block_size + inside).flatten()[:n]
            earlier[row] = copied(told.index_select(0, slots))
        own = told.index_select(0, cache.slot_mapping[:tokens].clamp(min=0))
        return TakenRules(words, copied(own), copied(self.scores[:tokens, :most]), earlier)


# -- records ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TakenRules:
    """What rules said in one step, on its way to the host.

    Attributes:
        words: of propositions, conclusions, actions.
        bits: int64 ``[tokens, words]`` of the step's own tokens.
        scores: fp32 ``[tokens, most propositions]``.
        earlier: by row, bits of all positions that may be before the step's, where no record has spoken of them.
    """

    words: tuple[int, int, int]
    bits: torch.Tensor
    scores: torch.Tensor
    earlier: dict[int, torch.Tensor]

    def record(self, program: RuleProgram, row: int, tokens: slice, start: int) -> RuleRecord:
        """One request's."""
        sizes = [len(part) for part in (program.propositions, program.conclusions, program.actions)]
        own = self.bits[tokens].numpy().view(np.uint64)
        known = self.earlier.get(row)
        bits = own if known is None else np.concatenate((known[:start].numpy().view(np.uint64), own))
        held, concluded, active = (
            bits[:, offset : offset + words] & _first_bits(size, words)
            for offset, words, size in zip(np.cumsum((0, *self.words[:2])).tolist(), self.words, sizes, strict=True)
        )
        mine = held[len(bits) - len(own) :]
        flags = np.unpackbits(np.ascontiguousarray(mine).view(np.uint8), axis=1, bitorder="little")[:, : sizes[0]]
        scores = self.scores[tokens, : sizes[0]].numpy()[flags.astype(np.bool_)]
        told = [
            part[:, : -(-size // 64)].tobytes() for part, size in zip((held, concluded, active), sizes, strict=True)
        ]
        return RuleRecord(start - (len(bits) - len(own)), told[0], told[1], told[2], scores.tobytes())


def _first_bits(n: int, words: int) -> Array:
    """Words with the first ``n`` bits set."""
    full = min(n // 64, words)
    masks = np.zeros(words, np.uint64)
    masks[:full] = ~np.uint64(0)
    if full < words:
        masks[full] = np.uint64((1 << n % 64) - 1)
    return masks
