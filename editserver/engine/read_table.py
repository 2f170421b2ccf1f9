"""What inspections list at one layer, as a flat table that a kernel can walk: latents of which single rows tell, and
coordinates of the stream. What needs whole dictionaries is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from editserver.engine.kernel_cpu import READ_COLUMNS, STREAM
from editserver.engine.rows import Dictionaries
from interventions.program import STREAM as THE_STREAM
from interventions.program import Read, feature_key

if TYPE_CHECKING:
    from editserver.engine.resident import Resident

Array = npt.NDArray[Any]


def is_listed(read: Read, dictionaries: Dictionaries) -> bool:
    """Whether all that ``read`` asks for can be listed in a :class:`ReadTable`."""
    return read.sae == THE_STREAM or (not read.top_k and dictionaries[read.sae].row_separable)


@dataclass(frozen=True)
class ReadPart:
    """One request's share of a table: ``rows`` and ``bits`` as there, and the columns of each inspection by its number."""

    rows: Array
    bits: Array
    columns: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, resident: Resident, layer: int, after: bool, dictionaries: Dictionaries) -> ReadPart | None:
        """None where it lists nothing at the layer, before or ``after`` the edit."""
        rows: list[tuple[int, int]] = []
        bits: list[np.uint64] = []
        columns: dict[int, tuple[int, int]] = {}
        for number, read in enumerate(resident.payload.reads):
            if read.layer != layer or read.after is not after or not is_listed(read, dictionaries):
                continue
            first = len(rows)
            if read.sae == THE_STREAM:
                rows += [(coordinate, STREAM) for coordinate in read.features]
            else:
                norm = dictionaries.input_norm(read.sae)
                rows += [(resident.slots[feature_key(read.sae, feature)], norm) for feature in read.features]
            columns[number] = first, len(rows)
            bits += [resident.read_bit(number)] * (len(rows) - first)
        if not columns:
            return None
        return cls(np.array(rows, np.int32).reshape(-1, len(READ_COLUMNS)), np.array(bits, np.uint64), columns)


@dataclass(frozen=True)
class ReadTable:
    """Of all residents: ``pointers``, ``rows`` and ``bits`` as :func:`~editserver.engine.kernel_cpu.read_listed` takes them.

    Attributes:
        width: most columns of one resident.
    """

    pointers: Array
    rows: Array
    bits: Array
    width: int

    @classmethod
    def of(cls, parts: Sequence[ReadPart | None]) -> ReadTable | None:
        """A part per resident; None where there are none."""
        here = [part for part in parts if part is not None]
        if not here:
            return None
        widths = [len(part.rows) if part is not None else 0 for part in parts]
        return cls(
            np.cumsum([0, *widths], dtype=np.int32),
            np.concatenate([part.rows for part in here]),
            np.concatenate([part.bits for part in here]),
            max(widths),
        )
