"""The programs of the requests that a worker knows, as flat tables that a kernel can walk.

A request enters when it is first scheduled and leaves when it finishes; the tables are rebuilt only then, never per
step. A request that comes back after preemption is still resident.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from editserver.engine.kernel_cpu import PLAIN_INPUT
from editserver.engine.rows import Dictionaries
from interventions.program import LayerProgram, Payload, Read, ReadKind, parse_feature_key
from interventions.selectors import Selector

MAX_SELECTORS = 64
"""Selectors of one request are bits of one uint64."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Resident:
    """One request as the worker sees it."""

    request_id: str
    payload: Payload
    prompt_len: int
    slots: dict[str, int]

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """The program's selectors, then one per inspection."""
        program = self.payload.program
        return (program.selectors if program else ()) + tuple(r.selector for r in self.payload.reads)

    def read_bit(self, read: int) -> np.uint64:
        """The selector bit of inspection ``read``."""
        program = self.payload.program
        return np.uint64(1) << np.uint64((len(program.selectors) if program else 0) + read)

    def layer(self, layer: int) -> LayerProgram | None:
        """The channels at ``layer``, if there are any."""
        program = self.payload.program
        return next((lp for lp in program.layers if lp.layer == layer), None) if program else None


@dataclass(frozen=True)
class Use:
    """The channels of one request at one layer that need all activations of one SAE.

    Attributes:
        digest: the SAE.
        joint: whether they are JOINT channels (else MEMBER).
        selectors: bits of the selectors of all their ops: other tokens are none of their business.
        features: int64 ``[m]``, the latents.
        targets: int64 ``[m]``, MEMBER: columns of the kernel's ``members``; JOINT: channel numbers in the table.
    """

    digest: str
    joint: bool
    selectors: np.uint64
    features: Array
    targets: Array


@dataclass
class LayerTable:
    """All programs' channels at one layer, indexed by resident request."""

    programs: Array
    read: Array
    slot: Array
    norm: Array
    member: Array
    ops: Array
    kind: Array
    values: Array
    table: Array
    active: Array
    selector: Array
    intervention: Array
    uses: dict[int, list[Use]]
    """Resident index → what it needs of whole dictionaries."""
    n_members: int
    has_joint: bool

    @classmethod
    def build(cls, residents: Sequence[Resident], layer: int, dictionaries: Dictionaries) -> LayerTable | None:
        """The table of ``layer``, or None when no resident program touches it."""
        programs, read, slot, norm, member, op_ptr = [0], [], [], [], [], [0]
        values: list[tuple[float, float, float, float, float]] = []
        kinds, tables, active, selector, intervention = [], [], [], [], []
        uses: dict[int, list[Use]] = {}
        n_members = 0
        for index, resident in enumerate(residents):
            lp = resident.layer(layer)
            whole: dict[tuple[str, bool], list[tuple[int, int, int]]] = {}
            n_columns = 0
            for channel in lp.channels if lp else ():
                read.append(int(channel.read))
                slot.append(resident.slots[channel.row])
                column, kind = -1, PLAIN_INPUT
                if channel.read >= ReadKind.LATENT:
                    digest, feature = parse_feature_key(channel.row)
                    kind = dictionaries.input_norm(digest)
                    if channel.read >= ReadKind.MEMBER:
                        joint = channel.read == ReadKind.JOINT
                        if not joint:
                            column, n_columns = n_columns, n_columns + 1
                        bits = sum({1 << op.selector for op in channel.ops})
                        target = len(read) - 1 if joint else column
                        whole.setdefault((digest, joint), []).append((feature, target, bits))
                norm.append(kind)
                member.append(column)
                for op in channel.ops:
                    kinds.append(int(op.kind))
                    values.append((op.alpha, op.beta, op.lo, op.hi, op.strength))
                    tables.append(resident.slots[op.table] if op.table else -1)
                    active.append(op.only_if_active)
                    selector.append(op.selector)
                    intervention.append(op.intervention)
                op_ptr.append(len(values))
            programs.append(len(read))
            n_members = max(n_members, n_columns)
            if whole:
                uses[index] = [_use(digest, joint, channels) for (digest, joint), channels in whole.items()]
        if not read:
            return None
        return cls(
            np.array(programs, np.int32),
            np.array(read, np.int8),
            np.array(slot, np.int32),
            np.array(norm, np.int8),
            np.array(member, np.int32),
            np.array(op_ptr, np.int32),
            np.array(kinds, np.int8),
            np.array(values, np.float32).reshape(-1, 5),
            np.array(tables, np.int32),
            np.array(active, np.bool_),
            np.array(selector, np.int8),
            np.array(intervention, np.int8),
            uses,
            n_members,
            any(use.joint for found in uses.values() for use in found),
        )


def _use(digest: str, joint: bool, channels: Sequence[tuple[int, int, int]]) -> Use:
    selectors = functools.reduce(operator.or_, (bits for _, _, bits in channels))
    features, targets = (np.array([c[i] for c in channels], np.int64) for i in (0, 1))
    return Use(digest, joint, np.uint64(selectors), features, targets)


@dataclass
class SelectorTable:
    """All residents' selectors, resolved for their own prompt lengths (CSR: request → selector → intervals, ids)."""

    requests: Array
    interval_ptr: Array
    intervals: Array
    id_ptr: Array
    ids: Array
    bos: Array

    @classmethod
    def build(cls, residents: Sequence[Resident]) -> SelectorTable:
        """Resolve and flatten."""
        selectors = [[(s, r.prompt_len) for s in r.selectors] for r in residents]
        flat = list(itertools.chain.from_iterable(selectors))
        intervals = [s.intervals(prompt_len) for s, prompt_len in flat]
        return cls(
            np.cumsum([0] + [len(s) for s in selectors], dtype=np.int32),
            np.cumsum([0] + [len(i) for i in intervals], dtype=np.int32),
            np.array([pair for i in intervals for pair in i], np.int32).reshape(-1, 2),
            np.cumsum([0] + [len(s.token_ids) for s, _ in flat], dtype=np.int32),
            np.array([t for s, _ in flat for t in s.token_ids], np.int32),
            np.array([s.include_bos for s, _ in flat], np.bool_),
        )


@dataclass
class ResidentSet:
    """The resident requests and their tables."""

    dictionaries: Dictionaries
    armed: tuple[int, ...]
    requests: dict[str, Resident] = field(default_factory=dict)
    index: dict[str, int] = field(default_factory=dict)
    layers: dict[int, LayerTable | None] = field(default_factory=dict)
    selectors: SelectorTable = field(default_factory=lambda: SelectorTable.build([]))
    dose: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    refuses: Array = field(default_factory=lambda: np.zeros(0, np.bool_))
    reads: dict[int, list[tuple[int, int, Read]]] = field(default_factory=dict)
    """Layer → (resident index, inspection number, inspection)."""
    _stale: bool = False

    def add(self, resident: Resident) -> None:
        """A request that will be scheduled from now on (again, after a re-send)."""
        if len(resident.selectors) > MAX_SELECTORS:
            raise ValueError(f"{len(resident.selectors)} selectors in one request; the engine takes {MAX_SELECTORS}")
        self.requests[resident.request_id] = resident
        self._stale = True

    def remove(self, request_id: str) -> None:
        """A request that finished or was aborted; unknown ids are ignored."""
        if self.requests.pop(request_id, None) is not None:
            self._stale = True

    def refresh(self) -> None:
        """Rebuild the tables if the set changed."""
        if not self._stale:
            return
        residents = list(self.requests.values())
        self.index = {r.request_id: i for i, r in enumerate(residents)}
        self.layers = {layer: LayerTable.build(residents, layer, self.dictionaries) for layer in self.armed}
        self.selectors = SelectorTable.build(residents)
        programs = [r.payload.program for r in residents]
        self.dose = np.array([p.max_dose if p else np.inf for p in programs], np.float32)
        self.refuses = np.array([bool(p and p.refuse_over_dose) for p in programs], np.bool_)
        self.reads = {layer: [] for layer in self.armed}
        for i, resident in enumerate(residents):
            for number, read in enumerate(resident.payload.reads):
                self.reads[read.layer].append((i, number, read))
        self._stale = False
