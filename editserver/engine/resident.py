"""The programs of the requests that a worker knows, as flat tables that a kernel can walk.

A request enters when it is first scheduled and leaves when it finishes; the tables are rebuilt only then, never per
step. A request that comes back after preemption is still resident.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from editserver.engine.history import History
from editserver.engine.kernel_cpu import PLAIN_INPUT
from editserver.engine.rows import Dictionaries
from editserver.engine.rule_table import ResidentRules, RuleRun
from interventions.maps import gates
from interventions.program import (
    Channel,
    GateKind,
    LayerProgram,
    Op,
    OpKind,
    Payload,
    Read,
    ReadKind,
    parse_feature_key,
)
from interventions.selectors import Selector

if TYPE_CHECKING:
    from editserver.engine.gates import Track

MAX_SELECTORS = MAX_GATES = 64
"""Selectors of one request, and gates of one layer of it, are bits of one uint64."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Resident:
    """One request as the worker sees it.

    Attributes:
        slots: row key → slot of the bank.
        history: its tokens, where a selector looks back.
        tracks: (layer, gate number) → state of the gate, from the first step on; gone with the request.
        rules: the state of its rules; None without any.
    """

    request_id: str
    payload: Payload
    prompt_len: int
    slots: dict[str, int]
    history: History | None = None
    tracks: dict[tuple[int, int], Track] = field(default_factory=dict)
    rules: RuleRun | None = None

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """The program's selectors, then one per inspection."""
        program = self.payload.program
        return (program.selectors if program else ()) + tuple(r.selector for r in self.payload.reads)

    @cached_property
    def sequence_gates(self) -> tuple[tuple[int, int], ...]:
        """(layer, gate number) of all that records speak of."""
        layers = self.payload.program.layers if self.payload.program else ()
        return tuple((lp.layer, i) for lp in layers for i, gate in enumerate(lp.gates) if gate.over_sequence)

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
        masks: uint64 ``[k, 2]``, the distinct (selector bits, gate bits) of their ops: a token is their business where all
            bits of one pair are set.
        features: int64 ``[m]``, the latents.
        targets: int64 ``[m]``, MEMBER: columns of the kernel's ``members``; JOINT: channel numbers in the table.
    """

    digest: str
    joint: bool
    masks: Array
    features: Array
    targets: Array

    @property
    def behind_gates(self) -> bool:
        """Whether some op acts only where gates are open."""
        return bool(self.masks[:, 1].any())


@dataclass(frozen=True)
class Listener:
    """One gate of one request at one layer.

    Attributes:
        number: of the gate in the layer's program.
        rule: of a sequence gate; None for a trigger.
        digest: the SAE of its evidence.
        whole: whether that needs all activations of the SAE; then ``features`` counts, else ``slots`` and ``norm``.
        masks: as in :class:`Use`, of the ops behind it: a trigger needs to look at their tokens only.
    """

    number: int
    rule: gates.Gate | None
    digest: str
    whole: bool
    features: Array
    slots: Array
    norm: int
    masks: Array

    @property
    def bit(self) -> np.uint64:
        """Of the gate among those of its layer's program."""
        return np.uint64(1 << self.number)


@dataclass
class LayerTable:
    """All programs' channels at one layer, indexed by resident request; ``ops`` are as :func:`edit_tokens` takes them."""

    programs: Array
    read: Array
    slot: Array
    norm: Array
    member: Array
    channel_ops: Array
    remaps: Array
    ops: tuple[Array, ...]
    width: int
    uses: dict[int, list[Use]]
    """Resident index → what it needs of whole dictionaries."""
    listeners: dict[int, list[Listener]]
    """Resident index → its gates that listen: all but those that follow rules."""
    n_members: int
    has_joint: bool

    @classmethod
    def build(cls, residents: Sequence[Resident], layer: int, dictionaries: Dictionaries) -> LayerTable | None:
        """The table of ``layer``, or None when no resident program touches it."""
        programs, op_ptr = [0], [0]
        read: list[int] = []
        slot, norm, member, remaps = [], [], [], []
        ops = _OpRows()
        uses: dict[int, list[Use]] = {}
        listeners: dict[int, list[Listener]] = {}
        n_members = 0
        for index, resident in enumerate(residents):
            lp = resident.layer(layer)
            whole = _Whole()
            for channel in lp.channels if lp else ():
                column, kind = -1, PLAIN_INPUT
                if channel.read >= ReadKind.LATENT:
                    digest, feature = parse_feature_key(channel.row)
                    kind = dictionaries.input_norm(digest)
                    if channel.read is ReadKind.JOINT:
                        whole.joint(digest, feature, len(read), channel)
                    elif channel.read is ReadKind.MEMBER:
                        column = whole.member(digest, feature, channel)
                read.append(int(channel.read))
                slot.append(resident.slots[channel.row])
                norm.append(kind)
                member.append(column)
                remaps.append(any(op.kind is OpKind.REMAP for op in channel.ops))
                for op in channel.ops:
                    ops.add(op, _source(op, channel, resident, whole), resident)
                op_ptr.append(len(ops.kind))
            programs.append(len(read))
            n_members = max(n_members, whole.n_columns)
            if found := whole.uses():
                uses[index] = found
            hearing = [i for i, gate in enumerate(lp.gates) if gate.kind is not GateKind.RULE] if lp else []
            if lp and hearing:
                listeners[index] = [_listener(resident, lp, i, dictionaries) for i in hearing]
        if not read:
            return None
        return cls(
            np.array(programs, np.int32),
            np.array(read, np.int8),
            np.array(slot, np.int32),
            np.array(norm, np.int8),
            np.array(member, np.int32),
            np.array(op_ptr, np.int32),
            np.array(remaps, np.bool_),
            ops.arrays(),
            int(np.diff(op_ptr).max(initial=0)),
            uses,
            listeners,
            n_members,
            any(use.joint for found in uses.values() for use in found),
        )


@dataclass
class _OpRows:
    """The ops of a table in the making, column by column."""

    kind: list[int] = field(default_factory=list)
    values: list[tuple[float, ...]] = field(default_factory=list)
    slots: list[tuple[int, int, int]] = field(default_factory=list)
    unit: list[int] = field(default_factory=list)
    active: list[bool] = field(default_factory=list)
    need: list[int] = field(default_factory=list)
    gates: list[int] = field(default_factory=list)
    intervention: list[int] = field(default_factory=list)

    def add(self, op: Op, source: int, resident: Resident) -> None:
        """``source`` is where the kernel finds the source's activation, -1 for none."""
        need, behind = _mask(op)
        self.kind.append(int(op.kind))
        self.values.append((op.alpha, op.beta, op.lo, op.hi, op.strength, op.gamma))
        table, mean = (resident.slots[key] if key else -1 for key in (op.table, op.mean))
        self.slots.append((table, source, mean))
        self.unit.append(int(op.unit))
        self.active.append(op.only_if_active)
        self.need.append(need)
        self.gates.append(behind)
        self.intervention.append(op.intervention)

    def arrays(self) -> tuple[Array, ...]:
        """In the kernel's order."""
        return (
            np.array(self.kind, np.int8),
            np.array(self.values, np.float32).reshape(-1, 6),
            np.array(self.slots, np.int32).reshape(-1, 3),
            np.array(self.unit, np.int8),
            np.array(self.active, np.bool_),
            np.array(self.need, np.uint64),
            np.array(self.gates, np.uint64),
            np.array(self.intervention, np.int8),
        )


@dataclass
class _Whole:
    """What one request needs of whole dictionaries at one layer: a column per MEMBER latent, all of a JOINT SAE."""

    n_columns: int = 0
    columns: dict[tuple[str, int], int] = field(default_factory=dict)
    found: dict[tuple[str, bool], list[tuple[int, int]]] = field(default_factory=dict)
    masks: dict[tuple[str, bool], set[tuple[int, int]]] = field(default_factory=dict)

    def joint(self, digest: str, feature: int, channel_number: int, channel: Channel) -> None:
        """A JOINT channel; its sources are in the same activations."""
        self.found.setdefault((digest, True), []).append((feature, channel_number))
        self.masks.setdefault((digest, True), set()).update(map(_mask, channel.ops))

    def member(self, digest: str, feature: int, channel: Channel) -> int:
        """A MEMBER channel: the column of its latent."""
        self.masks.setdefault((digest, False), set()).update(map(_mask, channel.ops))
        return self.column(digest, feature)

    def column(self, digest: str, feature: int) -> int:
        """Where the kernel finds the latent's activation."""
        if (digest, feature) not in self.columns:
            self.columns[digest, feature] = self.n_columns
            self.found.setdefault((digest, False), []).append((feature, self.n_columns))
            self.n_columns += 1
        return self.columns[digest, feature]

    def uses(self) -> list[Use]:
        """Per SAE and kind."""
        made = []
        for (digest, joint), pairs in self.found.items():
            features, targets = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
            made.append(Use(digest, joint, _masks(self.masks[digest, joint]), features, targets))
        return made


def _mask(op: Op) -> tuple[int, int]:
    """Bits of the selectors that must all hold, and of the gates that must all be open."""
    return 1 << op.selector | (1 << op.scope if op.scope >= 0 else 0), sum(1 << gate for gate in set(op.gates))


def _masks(pairs: Iterable[tuple[int, int]]) -> Array:
    return np.array(sorted(pairs), np.uint64).reshape(-1, 2)


def _source(op: Op, channel: Channel, resident: Resident, whole: _Whole) -> int:
    """Where the kernel finds the original activation of the op's source; -1 for none."""
    if not op.source:
        return -1
    digest, feature = parse_feature_key(op.source)
    if channel.read < ReadKind.LATENT or digest != parse_feature_key(channel.row)[0]:
        raise ValueError(f"{channel.row} cannot take from {op.source}: sources are latents of the same SAE")
    if channel.read is ReadKind.JOINT:
        return feature
    return whole.column(digest, feature) if channel.read is ReadKind.MEMBER else resident.slots[op.source]


def _listener(resident: Resident, lp: LayerProgram, number: int, dictionaries: Dictionaries) -> Listener:
    gate = lp.gates[number]
    parsed = [parse_feature_key(key) for key in gate.evidence]
    digest = parsed[0][0]
    if any(other != digest for other, _ in parsed):
        raise ValueError("the evidence of a gate must be of one SAE")
    behind = {_mask(op) for channel in lp.channels for op in channel.ops if number in op.gates}
    return Listener(
        number,
        gate.rule if gate.over_sequence else None,
        digest,
        gate.read is not ReadKind.LATENT,
        np.array([feature for _, feature in parsed], np.int64),
        np.array([resident.slots[key] for key in gate.evidence], np.int32),
        dictionaries.input_norm(digest),
        _masks(behind),
    )


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
    rules: ResidentRules = field(init=False)
    _stale: bool = False

    def __post_init__(self) -> None:
        self.rules = ResidentRules.build([], self.armed, self.dictionaries)

    def add(self, resident: Resident) -> None:
        """A request that will be scheduled from now on (again, after a re-send)."""
        if len(resident.selectors) > MAX_SELECTORS:
            raise ValueError(f"{len(resident.selectors)} selectors in one request; the engine takes {MAX_SELECTORS}")
        program = resident.payload.program
        if program and any(len(lp.gates) > MAX_GATES for lp in program.layers):
            raise ValueError(f"more than {MAX_GATES} gates at a layer of one request")
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
        self.rules = ResidentRules.build(residents, self.armed, self.dictionaries)
        self.selectors = SelectorTable.build(residents)
        programs = [r.payload.program for r in residents]
        self.dose = np.array([p.max_dose if p else np.inf for p in programs], np.float32)
        self.refuses = np.array([bool(p and p.refuse_over_dose) for p in programs], np.bool_)
        self.reads = {layer: [] for layer in self.armed}
        for i, resident in enumerate(residents):
            for number, read in enumerate(resident.payload.reads):
                self.reads[read.layer].append((i, number, read))
        self._stale = False
