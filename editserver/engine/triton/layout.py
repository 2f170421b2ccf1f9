"""What the resident requests ask of whole dictionaries, and where it is put: columns of a step's buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from editserver.engine.triton.capacity import CapacityError
from interventions.program import STREAM

if TYPE_CHECKING:
    from editserver.engine.resident import ResidentSet

Array = npt.NDArray[Any]

PASSES = ("before", "after")
"""The stream before the edit, and the edited one."""


@dataclass
class Asked:
    """What all residents ask of one SAE in one pass over one layer.

    Attributes:
        always: int32 ``[residents]``, whether every token is needed.
        wants: uint64 ``[residents]``: those at which one of these selectors holds are.
        takes: resident → (latent, column of the step's ``members``).
        top: resident → (how many of the largest activations, from which column on).
    """

    always: Array
    wants: Array
    takes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    top: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def anyone(self) -> bool:
        """Whether any resident asks for anything."""
        return bool(self.always.any() or self.wants.any())


class Layout:
    """Of all layers and passes; empty as it is made: nothing is encoded.

    Attributes:
        asked: (layer, pass, SAE digest) → what is asked for.
        placed: (layer, pass) → (resident, SAE digest, latent) → column of the step's ``members``.
        tops: (layer, pass) → (resident, SAE digest) → (how many, first column) of ``top_index`` and ``top_value``.
    """

    def __init__(self) -> None:
        self.asked: dict[tuple[int, str, str], Asked] = {}
        self.placed: dict[tuple[int, str], dict[tuple[int, str, int], int]] = {}
        self.tops: dict[tuple[int, str], dict[tuple[int, str], tuple[int, int]]] = {}

    @classmethod
    def of(cls, residents: ResidentSet, encoded: Mapping[int, Sequence[str]], members: int, top: int) -> Layout:
        """Of the resident requests (refreshed).

        Args:
            encoded: armed layer → digests of the SAEs that are encoded there.
            members: columns that one of them may take at a layer.
            top: largest activations that one of them may read of a token at a layer.

        Raises:
            CapacityError: it does not fit.
            KeyError: an SAE is needed that is not encoded on the device; the message is its digest.
        """
        made, n = cls(), len(residents.requests)
        for layer, digests in encoded.items():
            for name in PASSES:
                made.placed[layer, name], made.tops[layer, name] = {}, {}
                for digest in digests:
                    made.asked[layer, name, digest] = Asked(np.zeros(n, np.int32), np.zeros(n, np.uint64))
        for layer in residents.armed:
            widths = made._channels(residents, layer)
            made._listeners(residents, layer, widths)
            made._rules(residents, layer, widths)
            made._readings(residents, layer, widths, top)
            most = int(widths.max(initial=0))
            if most > members:
                raise CapacityError("members of whole dictionaries at a layer", most, members)
        return made

    def _asked(self, layer: int, name: str, digest: str) -> Asked:
        asked = self.asked.get((layer, name, digest))
        if asked is None:
            raise KeyError(digest)
        return asked

    def _place(self, layer: int, name: str, index: int, digest: str, features: Iterable[int], widths: Array) -> None:
        """A column for each of these latents that the resident has none of yet."""
        placed = self.placed[layer, name]
        for feature in features:
            if (index, digest, feature) not in placed:
                column = placed[index, digest, feature] = int(widths[index])
                widths[index] += 1
                self._asked(layer, name, digest).takes.setdefault(index, []).append((feature, column))

    def _channels(self, residents: ResidentSet, layer: int) -> Array:
        """Channels have their columns already; how many each resident has now."""
        widths = np.zeros(len(residents.requests), np.int64)
        table = residents.layers.get(layer)
        for index, uses in table.uses.items() if table is not None else ():
            for use in uses:
                asked = self._asked(layer, "before", use.digest)
                asked.wants[index] |= np.bitwise_or.reduce(use.masks[:, 0])
                for feature, column in zip(use.features.tolist(), use.targets.tolist(), strict=True):
                    self.placed[layer, "before"][index, use.digest, feature] = column
                    asked.takes.setdefault(index, []).append((feature, column))
                    widths[index] = max(widths[index], column + 1)
        return widths

    def _listeners(self, residents: ResidentSet, layer: int, widths: Array) -> None:
        """Evidence of gates: of sequences at every token, of triggers where something is behind them."""
        table = residents.layers.get(layer)
        for index, listeners in table.listeners.items() if table is not None else ():
            for one in listeners:
                if not one.whole:
                    continue
                asked = self._asked(layer, "before", one.digest)
                if one.rule is not None:
                    asked.always[index] = 1
                elif len(one.masks):
                    asked.wants[index] |= np.bitwise_or.reduce(one.masks[:, 0])
                self._place(layer, "before", index, one.digest, one.features.tolist(), widths)

    def _rules(self, residents: ResidentSet, layer: int, widths: Array) -> None:
        ruled = residents.rules.tables.get(layer)
        for index, wholes in ruled.wholes.items() if ruled is not None else ():
            for whole in wholes:
                self._asked(layer, "before", whole.digest).always[index] = 1
                self._place(layer, "before", index, whole.digest, whole.features.tolist(), widths)

    def _readings(self, residents: ResidentSet, layer: int, widths: Array, top: int) -> None:
        owners = list(residents.requests.values())
        tops: dict[tuple[str, int, str], int] = {}
        for index, number, read in residents.reads.get(layer, ()):
            if read.sae == STREAM:
                continue
            name = "after" if read.after else "before"
            whole = not residents.dictionaries[read.sae].row_separable
            if not read.top_k and not (whole and read.features):
                continue
            self._asked(layer, name, read.sae).wants[index] |= owners[index].read_bit(number)
            if whole:
                self._place(layer, name, index, read.sae, read.features, widths)
            if read.top_k:
                most = min(read.top_k, residents.dictionaries[read.sae].n_features)
                tops[name, index, read.sae] = max(most, tops.get((name, index, read.sae), 0))
        ends: dict[tuple[str, int], int] = {}
        for (name, index, digest), most in tops.items():
            begin = ends.get((name, index), 0)
            end = ends[name, index] = begin + most
            if end > top:
                raise CapacityError("largest activations of one token at a layer that are read", end, top)
            self.tops[layer, name][index, digest] = self._asked(layer, name, digest).top[index] = most, begin
