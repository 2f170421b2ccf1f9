"""The channels of all resident programs at one layer, as flat tables that a kernel can walk.

A request's own part is made once, when it arrives; the table only moves such parts together (:mod:`editserver.engine.stack`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from editserver.engine.kernel_cpu import (
    ACTIVE,
    CHANNEL_COLUMNS,
    GATES,
    INPUT_NORM,
    INTERVENTION,
    JOINT,
    KIND,
    LATENT,
    MEAN,
    MEMBER,
    MEMBER_COLUMN,
    NEED,
    OP_COLUMNS,
    OP_MASKS,
    OP_VALUES,
    PLAIN_INPUT,
    READ,
    REMAP,
    SLOT,
    TABLE,
    UNIT,
)
from editserver.engine.rows import Dictionaries
from editserver.engine.stack import Pointers, Stack
from interventions.maps import gates
from interventions.program import Channel, GateKind, LayerProgram, Op, ReadKind, parse_feature_key

if TYPE_CHECKING:
    from editserver.engine.resident import Resident

Array = npt.NDArray[Any]

NO_CHANNELS, NO_SIZES = np.zeros(1, np.int32), np.zeros((1, 3), np.int32)
"""Of a request without a program at a layer."""


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


@dataclass(frozen=True)
class LayerPart:
    """One request's channels at one layer.

    Attributes:
        channels, op_ints, op_values, op_masks: as :func:`~editserver.engine.kernel_cpu.edit_tokens` takes them.
        op_ends: int32 ``[channels]``, where the ops of each channel end.
        width: most ops of one channel.
        uses: what it needs of whole dictionaries; JOINT targets count from its own first channel.
        listeners: its gates that listen: all but those that follow rules.
        n_members: columns of ``members``.
    """

    channels: Array
    op_ends: Array
    op_ints: Array
    op_values: Array
    op_masks: Array
    width: int
    uses: list[Use]
    listeners: list[Listener]
    n_members: int

    @cached_property
    def special(self) -> bool:
        """Whether it uses dictionaries or listens."""
        return bool(self.uses or self.listeners)

    @cached_property
    def n_channels(self) -> Array:
        """How many, int32 ``[1]``."""
        return np.array([len(self.channels)], np.int32)

    @cached_property
    def sizes(self) -> Array:
        """Width, columns of ``members``, and whether it is special, int32 ``[1, 3]``."""
        return np.array([[self.width, self.n_members, self.special]], np.int32)

    @classmethod
    def of(cls, resident: Resident, lp: LayerProgram, dictionaries: Dictionaries) -> LayerPart:
        """``lp`` is the resident's program at the layer."""
        slots, whole = resident.slots, _Whole()
        # flat: numpy looks into every one of many small tuples
        rows: list[int] = []
        ints: list[int] = []
        values: list[float] = []
        masks: list[int] = []
        ends: list[int] = []
        n_ops = width = 0
        norms: dict[str, int] = {}
        for channel in lp.channels:
            read, row, ops, column, norm, remaps = channel.read, channel.row, channel.ops, -1, PLAIN_INPUT, False
            if read >= LATENT:
                sae = row[: row.rfind(":")]
                if sae not in norms:
                    norms[sae] = dictionaries.input_norm(parse_feature_key(row)[0])
                norm = norms[sae]
                if read == JOINT:
                    whole.joint(*parse_feature_key(row), len(ends), channel)
                elif read == MEMBER:
                    column = whole.member(*parse_feature_key(row), channel)
            for op in ops:
                table = source = mean = -1
                if op.kind:
                    remaps |= op.kind == REMAP
                    table = slots[op.table] if op.table else -1
                    source = _source(op, channel, resident, whole) if op.source else -1
                    mean = slots[op.mean] if op.mean else -1
                ints += op.kind, table, source, mean, op.unit, op.only_if_active, op.intervention
                values += op.alpha, op.beta, op.lo, op.hi, op.strength, op.gamma
                masks += (1 << op.selector, 0) if op.scope < 0 and not op.gates else _mask(op)
            rows += read, slots[row], norm, column, remaps
            n_ops += len(ops)
            width = max(width, len(ops))
            ends.append(n_ops)
        hearing = [i for i, gate in enumerate(lp.gates) if gate.kind is not GateKind.RULE]
        # array's constructor takes a list in a third of numpy's time
        return cls(
            np.asarray(array("i", rows)).reshape(-1, len(CHANNEL_COLUMNS)),
            np.asarray(array("i", ends)),
            np.asarray(array("i", ints)).reshape(-1, len(OP_COLUMNS)),
            np.asarray(array("f", values)).reshape(-1, len(OP_VALUES)),
            np.asarray(array("Q", masks)).reshape(-1, len(OP_MASKS)),
            width,
            whole.uses(),
            [_listener(resident, lp, i, dictionaries) for i in hearing],
            whole.n_columns,
        )


class LayerTable:
    """All programs' channels at one layer, indexed by resident request.

    Attributes:
        channels, op_ints, op_values, op_masks, channel_ops, programs: as
            :func:`~editserver.engine.kernel_cpu.edit_tokens` takes them.
        read, slot, norm, member: the columns of ``channels``: ReadKind, bank slot, how the SAE normalises its input, column of
            ``members`` (-1: none).
        ops: the columns of the ops: kind, values, bank slots (table, source, mean), unit, whether it leaves zeros alone,
            selector bits, gate bits, intervention.
        width: most ops of one channel.
        uses: resident index → what it needs of whole dictionaries.
        listeners: resident index → its gates that listen: all but those that follow rules.
        n_members: most columns that one request has in the kernel's ``members``.
        has_joint: whether there are JOINT channels.
    """

    def __init__(self) -> None:
        self._parts: list[LayerPart | None] = []
        self._sizes = Stack(np.int32, 3)
        """Of each resident: width, columns of ``members``, and whether it uses dictionaries or listens."""
        self._programs, self._channel_ops = Pointers(), Pointers()
        self._channels = Stack(np.int32, len(CHANNEL_COLUMNS))
        self._op_ints = Stack(np.int32, len(OP_COLUMNS))
        self._op_values = Stack(np.float32, len(OP_VALUES))
        self._op_masks = Stack(np.uint64, len(OP_MASKS))
        self._most = 0, 0
        """Width, and columns of ``members``."""
        self._special: list[int] = []
        """Residents that use dictionaries or listen."""
        self._finished_empty = False
        self.finish()

    def push(self, parts: Sequence[LayerPart | None]) -> None:
        """Residents behind the others; None: without a program here."""
        first = len(self._parts)
        self._parts += parts
        self._programs.push([NO_CHANNELS if part is None else part.n_channels for part in parts])
        self._sizes.push([NO_SIZES if part is None else part.sizes for part in parts])
        here = [part for part in parts if part is not None]
        if not here:
            return
        width, n_members = self._most
        self._most = max(width, *(part.width for part in here)), max(n_members, *(part.n_members for part in here))
        self._special += [i for i, part in enumerate(parts, first) if part is not None and part.special]
        self._channels.push([part.channels for part in here])
        self._channel_ops.push([part.op_ends for part in here])
        self._op_ints.push([part.op_ints for part in here])
        self._op_values.push([part.op_values for part in here])
        self._op_masks.push([part.op_masks for part in here])

    def keep(self, which: Array) -> None:
        """The residents of whom ``which`` (bool) is not true are gone."""
        self._parts = [part for part, stays in zip(self._parts, which.tolist(), strict=True) if stays]
        self._sizes.keep(which)
        sizes = self._sizes.rows
        width, n_members, _ = (int(most) for most in sizes.max(axis=0, initial=0))
        self._most, self._special = (width, n_members), np.flatnonzero(sizes[:, 2]).tolist()
        if not self:
            self._programs.keep(which)
            return
        channels = self._programs.rows_of(which)
        ops = self._channel_ops.rows_of(channels)
        for stack in (self._op_ints, self._op_values, self._op_masks):
            stack.keep(ops)
        self._channel_ops.keep(channels)
        self._channels.keep(channels)
        self._programs.keep(which)

    def clear(self) -> None:
        """All residents are gone."""
        self._parts, self._most, self._special = [], (0, 0), []
        for stack in (self._sizes, self._programs, self._channels, self._channel_ops):
            stack.clear()
        for stack in (self._op_ints, self._op_values, self._op_masks):
            stack.clear()

    @property
    def addresses(self) -> tuple[int, int, int, int, int, int]:
        """Of ``programs``, ``channels``, ``channel_ops``, ``op_ints``, ``op_values`` and ``op_masks``, until the next change."""
        return (
            self._programs.at,
            self._channels.at,
            self._channel_ops.at,
            self._op_ints.at,
            self._op_values.at,
            self._op_masks.at,
        )

    def finish(self) -> None:
        """After changes: the attributes are those of the residents that are there now."""
        self.programs = self._programs.rows
        if not self and self._finished_empty:
            return
        self._finished_empty = not self
        self.channel_ops = self._channel_ops.rows
        self.channels = self._channels.rows
        self.op_ints, self.op_values, self.op_masks = (
            stack.rows for stack in (self._op_ints, self._op_values, self._op_masks)
        )
        self.width, self.n_members = self._most
        here = [(i, part) for i in self._special if (part := self._parts[i]) is not None]
        self.listeners: dict[int, list[Listener]] = {i: part.listeners for i, part in here if part.listeners}
        self.uses: dict[int, list[Use]] = {
            i: [_moved(use, int(self.programs[i])) for use in part.uses] for i, part in here if part.uses
        }
        self.has_joint = any(use.joint for found in self.uses.values() for use in found)

    @property
    def read(self) -> Array:
        """See the class."""
        return self.channels[:, READ]

    @property
    def slot(self) -> Array:
        """See the class."""
        return self.channels[:, SLOT]

    @property
    def norm(self) -> Array:
        """See the class."""
        return self.channels[:, INPUT_NORM]

    @property
    def member(self) -> Array:
        """See the class."""
        return self.channels[:, MEMBER_COLUMN]

    @property
    def ops(self) -> tuple[Array, ...]:
        """See the class."""
        ints, masks = self.op_ints, self.op_masks
        return (
            ints[:, KIND],
            self.op_values,
            ints[:, TABLE : MEAN + 1],
            *(ints[:, i] for i in (UNIT, ACTIVE)),
            *(masks[:, i] for i in (NEED, GATES)),
            ints[:, INTERVENTION],
        )

    def __bool__(self) -> bool:
        """Whether any program touches the layer."""
        return len(self._channels) > 0


def _moved(use: Use, first_channel: int) -> Use:
    return replace(use, targets=use.targets + first_channel) if use.joint else use


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
    behind = sum(1 << gate for gate in set(op.gates)) if op.gates else 0
    return 1 << op.selector | (1 << op.scope if op.scope >= 0 else 0), behind


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
