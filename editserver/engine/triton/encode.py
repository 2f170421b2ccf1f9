"""Whole dictionaries on the device: their weights, the tables of who needs which activations, and the launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.config import EngineConfig
from editserver.engine.journal import NOT_SELECTED
from editserver.engine.rows import Dictionaries
from editserver.engine.triton import codes
from editserver.engine.triton.arena import Arena, Spec, at
from editserver.engine.triton.capacity import EncodeCapacity
from editserver.engine.triton.kernel_common import FIXED
from editserver.engine.triton.kernel_encode import encode_kernel, take_kernel, tokens_kernel, views_kernel
from editserver.engine.triton.layout import PASSES, Asked, Layout
from editserver.engine.triton.reads import SHIFTED
from editserver.engine.triton.tables import Columns
from interventions.program import Read
from sae_weights import SAE

if TYPE_CHECKING:
    from editserver.engine.resident import Resident, ResidentSet
    from editserver.engine.triton.step import DeviceStep

Array = npt.NDArray[Any]
I32, I64, F32 = torch.int32, torch.int64, torch.float32

PRODUCT: dict[str, Any] = FIXED | {"BM": 16, "BN": 64, "BK": 32, "num_warps": 4}
TOKENS, VALUES = 1024, 4096
"""Tokens, and values of one token, that are looked at together."""

MEMBERS = {
    "topk": (int(codes.MEMBERS), False),
    "gradient": (int(codes.MEMBERS), False),
    "abstopk": (int(codes.SIGNED_MEMBERS), True),
    "plain_topk": (int(codes.SIGNED_MEMBERS), False),
}
"""Dictionary-wide architectures: how activations follow, and whether magnitudes are ranked."""


def form_of(sae: SAE) -> tuple[int, bool] | None:
    """(form, whether magnitudes are ranked) of an SAE that the device can encode; None for others."""
    if sae.row_separable:
        return int(codes.SINGLE_ROWS), False
    if sae.architecture == "vsae":
        return MEMBERS["abstopk" if sae.settings["signed"] else "topk"]
    return MEMBERS.get(sae.architecture)


@dataclass(frozen=True)
class Weights:
    """One SAE on the device: ``encoder [n, d]``, ``gate [n, 4]``, ``scale [n]`` that members are ranked with; fp32."""

    encoder: torch.Tensor
    gate: torch.Tensor
    scale: torch.Tensor | None
    form: int
    magnitudes: bool
    norm: int
    k: int

    @classmethod
    def of(cls, sae: SAE, norm: int, device: torch.device) -> Weights:
        """Reads the whole encoder."""
        form = form_of(sae)
        assert form is not None
        rows = sae.rows(range(sae.n_features))
        gate = torch.stack((rows.gate_bias, rows.threshold, rows.mag_scale, rows.mag_bias), dim=1)
        scale = sae.gate.get("rank_scale")
        return cls(
            rows.encoder.contiguous().to(device),
            gate.contiguous().to(device),
            None if scale is None else scale.contiguous().to(device),
            *form,
            norm,
            sae.k or 0,
        )


@dataclass(frozen=True)
class TakenTops:
    """Largest activations of one step, on their way to the host.

    Attributes:
        places: (request, layer, pass, SAE digest) → (how many, first column).
        selected: int64 ``[tokens]``, selector bits.
        found: (layer, pass) → indices and values ``[tokens, columns]``.
    """

    places: dict[tuple[str, int, str, str], tuple[int, int]]
    selected: torch.Tensor
    found: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]

    def of(self, read: Read, request_id: str, bit: np.uint64, tokens: slice) -> tuple[bytes, bytes]:
        """One inspection's, int32 and float32 ``[n, top_k]``, by magnitude; NOT_SELECTED where its selector does not hold."""
        name = "after" if read.after else "before"
        most, begin = self.places[request_id, read.layer, name, read.sae]
        index, value = (t[tokens, begin : begin + most].numpy() for t in self.found[read.layer, name])
        order = np.argsort(-np.abs(value), axis=1, kind="stable")[:, : read.top_k]
        holds = (self.selected[tokens].numpy().view(np.uint64) & bit) != 0
        shape = (len(index), read.top_k)
        top_index, top_value = np.full(shape, NOT_SELECTED, np.int32), np.zeros(shape, np.float32)
        n = order.shape[1]
        top_index[holds, :n] = np.take_along_axis(index, order, axis=1)[holds]
        top_value[holds, :n] = np.take_along_axis(value, order, axis=1)[holds]
        return top_index.tobytes(), top_value.tobytes()


def _specs(capacity: EncodeCapacity, residents: int) -> dict[str, Spec]:
    """Of one SAE in one pass over one layer."""
    return {
        "anyone": ((1,), I32),
        "always": ((residents,), I32),
        "wants": ((residents,), I64),
        "take_ptr": ((residents + 1,), I32),
        "takes": ((capacity.takes, 2), I32),
        "top_k": ((residents,), I32),
        "top_at": ((residents,), I32),
    }


def _columns(asked: Asked) -> Columns:
    """Of one SAE in one pass over one layer."""
    n = len(asked.always)
    counts, tops = np.zeros(n + 1, np.int32), np.zeros((2, n), np.int32)
    for index, pairs in asked.takes.items():
        counts[index + 1] = len(pairs)
    for index, top in asked.top.items():
        tops[:, index] = top
    takes = [pair for index in sorted(asked.takes) for pair in asked.takes[index]]
    return {
        "anyone": np.array([asked.anyone], np.int32),
        "always": asked.always,
        "wants": asked.wants.view(np.int64),
        "take_ptr": np.cumsum(counts, dtype=np.int32),
        "takes": np.array(takes, np.int32).reshape(-1, 2),
        "top_k": tops[0],
        "top_at": tops[1],
    }


class DeviceEncode:
    """The dictionaries that the server may encode as wholes, by armed layer, and all that it takes; at fixed addresses.

    Attributes:
        refused: digests of those that it was told to, but cannot.
        top_index, top_value: by (layer, pass), int32 and fp32 ``[tokens, top]``.
    """

    def __init__(
        self,
        capacity: EncodeCapacity,
        config: EngineConfig,
        dictionaries: Dictionaries,
        tokens: int,
        residents: int,
        d_model: int,
        device: torch.device,
    ) -> None:
        if capacity.rows % PRODUCT["BM"]:
            raise ValueError(f"rows is {capacity.rows}; expected a multiple of {PRODUCT['BM']}")
        self.capacity = capacity
        enabled = [one for one in config.saes if one.id in config.full_encode and one.layer in config.armed]
        self.refused = frozenset(one.digest for one in enabled if form_of(dictionaries[one.digest]) is None)
        self.saes: dict[int, tuple[str, ...]] = {
            layer: tuple(dict.fromkeys(o.digest for o in enabled if o.layer == layer and o.digest not in self.refused))
            for layer in config.armed
        }
        self.weights = {
            digest: Weights.of(dictionaries[digest], dictionaries.input_norm(digest), device)
            for digest in dict.fromkeys(d for digests in self.saes.values() for d in digests)
        }
        places = [(layer, name, d) for layer, digests in self.saes.items() for name in PASSES for d in digests]
        specs: dict[str, Spec] = {}
        for place in places:
            specs |= at(place, _specs(capacity, residents))
        self._arena = Arena(specs, device)
        self._tables = {place: self._arena.of(place) for place in places}
        self._tops: dict[tuple[str, int, str, str], tuple[int, int]] = {}
        self._asked_for: set[tuple[int, str, str]] = set()
        tokens = -(-tokens // 64) * 64
        widest = max((len(one.gate) for one in self.weights.values()), default=0)
        self._tokens = torch.zeros(tokens, dtype=I32, device=device)
        self._count = torch.zeros(1, dtype=I32, device=device)
        self._views = torch.zeros(capacity.rows, d_model, device=device)
        self._pre = torch.zeros(capacity.rows * widest, device=device)
        shape = (tokens, capacity.top)
        keys = [(layer, name) for layer, digests in self.saes.items() if digests for name in PASSES]
        self.top_index = {key: torch.zeros(shape, dtype=I32, device=device) for key in keys}
        self.top_value = {key: torch.zeros(shape, device=device) for key in keys}

    @property
    def n_bytes(self) -> int:
        """Device memory of everything, weights included."""
        found = [t for t in vars(self).values() if isinstance(t, torch.Tensor)]
        found += [*self.top_index.values(), *self.top_value.values()]
        found += [t for w in self.weights.values() for t in (w.encoder, w.gate, w.scale) if t is not None]
        return self._arena.n_bytes + sum(t.numel() * t.element_size() for t in found)

    # -- tables -------------------------------------------------------------------------------------------------

    def layout(self, residents: ResidentSet, members: int) -> Layout:
        """What the resident requests (refreshed) ask for, see :meth:`Layout.of`."""
        return Layout.of(residents, self.saes, members, self.capacity.top)

    def columns(self, layout: Layout) -> Columns:
        """Tables, for :meth:`write`. Raises CapacityError where they do not fit."""
        found: Columns = {}
        for place, asked in layout.asked.items():
            found |= at(place, _columns(asked))
        self._arena.check(found)
        return found

    def write(self, columns: Columns, layout: Layout, residents: ResidentSet) -> int:
        """Copy what changed to the device, without waiting."""
        names = list(residents.requests)
        self._tops = {
            (names[index], layer, name, digest): place
            for (layer, name), tops in layout.tops.items()
            for (index, digest), place in tops.items()
        }
        self._asked_for = {place for place, asked in layout.asked.items() if asked.anyone}
        return self._arena.write(columns)

    def take(
        self,
        selected: torch.Tensor,
        requests: Sequence[Resident | None],
        tokens: int,
        copied: Callable[[torch.Tensor], torch.Tensor],
    ) -> TakenTops | None:
        """Start copying the largest activations of the latest step to the host; None where no row's request asked for any."""
        here = {one.request_id for one in requests if one is not None}
        places = {key: place for key, place in self._tops.items() if key[0] in here}
        if not places:
            return None
        widths: dict[tuple[int, str], int] = {}
        for (_, layer, name, _), (most, begin) in places.items():
            widths[layer, name] = max(begin + most, widths.get((layer, name), 0))
        found = {
            key: (copied(self.top_index[key][:tokens, :width]), copied(self.top_value[key][:tokens, :width]))
            for key, width in widths.items()
        }
        return TakenTops(places, copied(selected[:tokens]), found)

    # -- launches -----------------------------------------------------------------------------------------------

    def run(self, step: DeviceStep, layer: int, name: str, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Encode what is asked for at ``layer`` in one of PASSES; arguments else as :meth:`DeviceStep.run`'s."""
        number, n = step.number(layer), hidden.shape[0]
        split = {"D": step.d_model, "SPLIT": residual is not None}
        sums = {key: step.variant(True)[key] for key in ("WIDE", "LOG")}
        for digest in self.saes[layer]:
            place = layer, name, digest
            if not hidden.is_cuda and place not in self._asked_for:
                continue  # no graph is captured on a CPU, and an interpreted launch costs much
            weights, table = self.weights[digest], self._tables[place]
            latents = len(weights.gate)
            tokens_kernel[(1,)](
                step.state,
                step.resident,
                step.selected,
                table["anyone"],
                table["always"],
                table["wants"],
                self._tokens,
                self._count,
                BLOCK=TOKENS,
                num_warps=4,
                **FIXED,
            )
            for begin in range(0, n, self.capacity.rows):
                rows = min(self.capacity.rows, n - begin)
                views_kernel[(rows,)](
                    hidden,
                    hidden if residual is None else residual,
                    self._tokens,
                    self._count,
                    begin,
                    self._views,
                    NORM=weights.norm,
                    CENTRED=weights.norm in SHIFTED,
                    num_warps=4,
                    **split,
                    **sums,
                    **FIXED,
                )
                encode_kernel[(self.capacity.programs,)](
                    self._views,
                    weights.encoder,
                    weights.gate,
                    self._count,
                    begin,
                    self._pre,
                    N=latents,
                    D=step.d_model,
                    ROWS=self.capacity.rows,
                    FORM=weights.form,
                    **PRODUCT,
                )
                take_kernel[(rows,)](
                    self._tokens,
                    self._count,
                    begin,
                    self._pre,
                    weights.gate,
                    weights.gate if weights.scale is None else weights.scale,
                    step.resident,
                    table["take_ptr"],
                    table["takes"],
                    step.members[number],
                    step.capacity.members,
                    table["top_k"],
                    table["top_at"],
                    self.top_index[layer, name],
                    self.top_value[layer, name],
                    self.capacity.top,
                    N=latents,
                    K=weights.k,
                    FORM=weights.form,
                    ABS=weights.magnitudes,
                    SCALED=weights.scale is not None,
                    BLOCK=min(VALUES, max(32, 1 << (latents - 1).bit_length())),
                    num_warps=8,
                    **FIXED,
                )
