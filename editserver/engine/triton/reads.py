"""Which rows each program looks at: what channels, remaps, inspections and gates read, each once per program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from editserver.engine.triton import codes

Array = npt.NDArray[Any]

SHIFTED = (int(codes.LAYER_NORM), int(codes.CENTRE))
"""Input norms that subtract a mean."""

KINDS = {
    int(codes.DOT): int(codes.READ_DOT),
    int(codes.LATENT): int(codes.READ_LATENT),
    int(codes.MEMBER): int(codes.READ_MEMBER),
}


class ChannelTable(Protocol):
    """All programs' channels at one layer: read kind, bank slot, input norm and column of ``members`` of each; ``ops`` are kind,
    values, bank slots (table, source, mean), unit, whether it leaves zeros alone, selector bits, gate bits, intervention."""

    programs: Array
    channel_ops: Array
    n_members: int

    @property
    def read(self) -> Array: ...

    @property
    def slot(self) -> Array: ...

    @property
    def norm(self) -> Array: ...

    @property
    def member(self) -> Array: ...

    @property
    def ops(self) -> tuple[Array, ...]: ...


@dataclass(frozen=True)
class Reads:
    """CSR by program.

    Attributes:
        pointers: int32 ``[programs + 1]``.
        rows: int32 ``[reads, 3]``: bank slot or member column, input norm, what is made of it.
        centred: int32 ``[programs]``, whether any of a program's rows is read by an SAE that subtracts a mean, or writes
            back by its deviation.
        places: for each entry that was asked for, its number among its program's reads; -1 for "nothing is read".
    """

    pointers: Array
    rows: Array
    centred: Array
    places: Array

    @classmethod
    def of(cls, n_programs: int, program: Array, slot: Array, norm: Array, how: Array) -> Reads:
        """Entry i wants ``slot[i]`` read for ``program[i]``; nothing where ``how[i]`` is -1. Equal entries become one read."""
        wants = how >= 0
        key = ((program.astype(np.int64) << 40) | (slot.astype(np.int64) << 8) | (norm.astype(np.int64) << 4) | how)[
            wants
        ]
        unique, inverse = np.unique(key, return_inverse=True)
        owner = unique >> 40
        pointers = np.searchsorted(owner, np.arange(n_programs + 1)).astype(np.int32)
        places = np.full(len(how), -1, np.int32)
        places[wants] = inverse - pointers[program[wants]]
        rows = np.stack((unique >> 8 & 0xFFFFFFFF, unique >> 4 & 0xF, unique & 0xF), axis=1).astype(np.int32)
        return cls(pointers, rows, centred_of(n_programs, owner, rows[:, 1]), places)


def centred_of(n_programs: int, owner: Array, norm: Array) -> Array:
    """int32 ``[programs]``: whether any of the reads, each of one ``owner``, has an input norm that subtracts a mean."""
    return (np.bincount(owner[np.isin(norm, SHIFTED)], minlength=n_programs) > 0).astype(np.int32)


@dataclass(frozen=True)
class TableReads:
    """What the channels of one layer read: ``channels`` and, for remaps, ``sources`` and ``means`` are numbers of reads."""

    reads: Reads
    channels: Array
    sources: Array
    means: Array


def reads_of(table: ChannelTable) -> TableReads:
    """The reads behind a layer's channels and remaps.

    Raises:
        ValueError: a channel is JOINT.
    """
    if (table.read == int(codes.JOINT)).any():
        raise ValueError("decoders that are not additive are not edited on the device")
    n_programs, n_channels = len(table.programs) - 1, len(table.read)
    op_slots = table.ops[2]
    owner = np.repeat(np.arange(n_programs), np.diff(table.programs))
    channel_of = np.repeat(np.arange(n_channels), np.diff(table.channel_ops))
    whole = table.read == int(codes.MEMBER)
    how = np.full(n_channels, -1, np.int64)
    for kind, made in KINDS.items():
        how[table.read == kind] = made
    source, mean = op_slots[:, 1], op_slots[:, 2]
    from_source = np.where(source < 0, -1, np.where(whole[channel_of], int(codes.READ_MEMBER), int(codes.READ_LATENT)))
    from_mean = np.where(mean < 0, -1, int(codes.READ_MEAN))
    norm = table.norm[channel_of]
    found = Reads.of(
        n_programs,
        np.concatenate((owner, owner[channel_of], owner[channel_of])),
        np.concatenate((np.where(whole, table.member, table.slot), source, mean)),
        np.concatenate((table.norm, norm, norm)),
        np.concatenate((how, from_source, from_mean)),
    )
    parts = np.split(found.places, (n_channels, n_channels + len(source)))
    return TableReads(found, *parts)
