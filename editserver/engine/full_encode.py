"""The full-encode path: all activations of a dictionary for the tokens that need them, computed once per step and layer.

Whatever needs a whole dictionary (membership of TopK-like SAEs, decoders that are not additive, the largest activations of
an inspection) says for which tokens and what it takes from their activations; tokens that nothing asks for are not
encoded. A token's activations are the same bits in any company (see :meth:`Dictionaries.full_encode`), so the requests of
a step share their products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.kernel_cpu import CHANNEL_COLUMNS, OP_COLUMNS, OP_MASKS, OP_VALUES, compose_joint
from editserver.engine.layer_table import LayerTable, Use
from editserver.engine.plan import Plan
from editserver.engine.rows import FULL_ENCODE_BLOCK, Dictionaries, RowBank

CHUNK_TOKENS, CHUNK_ELEMENTS = 256, 1 << 23
"""What is held at a time, whichever is less: tokens, and activations (32 MiB of them)."""

Array = npt.NDArray[Any]
Take = Callable[[slice, torch.Tensor], None]


@dataclass(frozen=True)
class Demand:
    """One taker of a dictionary's activations.

    Attributes:
        digest: the SAE.
        tokens: the planned tokens that it needs, ascending, int64.
        take: called once or more with a stretch of ``tokens`` (as a slice into them) and its activations, fp32
            ``[stretch, n_features]``, which it may not change.
    """

    digest: str
    tokens: Array
    take: Take


def serve(demands: Sequence[Demand], dictionaries: Dictionaries, h: torch.Tensor) -> None:
    """Encode what the demands need of ``h [n, d]`` (fp32), every token once per dictionary, and hand it out."""
    for digest in dict.fromkeys(d.digest for d in demands if len(d.tokens)):
        mine = [d for d in demands if d.digest == digest and len(d.tokens)]
        tokens = reduce(np.union1d, (d.tokens for d in mine))
        held = min(CHUNK_TOKENS, max(1, CHUNK_ELEMENTS // dictionaries[digest].n_features))
        step = max(FULL_ENCODE_BLOCK, held // FULL_ENCODE_BLOCK * FULL_ENCODE_BLOCK)
        for start in range(0, len(tokens), step):
            chunk = tokens[start : start + step]
            acts = dictionaries.full_encode(digest, h[torch.from_numpy(chunk)])
            for demand in mine:
                a, b = np.searchsorted(demand.tokens, (chunk[0], chunk[-1] + 1)).tolist()
                if a == b:
                    continue
                rows = np.searchsorted(chunk, demand.tokens[a:b])
                demand.take(slice(a, b), acts if b - a == len(chunk) else acts[torch.from_numpy(rows)])


def acting(selected: Array, masks: Array, opened: Array | None = None) -> Array:
    """bool ``[n]``: tokens with all bits of some pair of ``masks [k, 2]`` set: selectors, and gates as far as ``opened`` says."""
    acts: Array = np.zeros(len(selected), np.bool_)
    for need, gates in masks:
        here = selected & need == need
        acts |= here if opened is None else here & (opened & gates == gates)
    return acts


@dataclass(frozen=True)
class Composed:
    """What the full-encode path hands to the kernel, for the n planned tokens.

    Attributes:
        members: activations of the MEMBER channels' latents, fp32 ``[n, columns]``.
        joint, joint_fired: delta of the JOINT channels, fp32 ``[n, d]``, and who fired, uint64 ``[n]``; both empty when
            no program of the layer has any.
    """

    members: Array
    joint: Array
    joint_fired: Array

    @classmethod
    def empty(cls, n: int, d_model: int, n_members: int, has_joint: bool) -> Composed:
        """Zeros of the right sizes."""
        n_joint = n if has_joint else 0
        members = np.zeros((n if n_members else 0, n_members), np.float32)
        return cls(members, np.zeros((n_joint, d_model), np.float32), np.zeros(n_joint, np.uint64))

    def demands(
        self,
        table: LayerTable,
        plan: Plan,
        dictionaries: Dictionaries,
        h: torch.Tensor,
        bank: RowBank,
        opened: Array | None = None,
    ) -> list[Demand]:
        """What ``table``'s programs need to know of ``h [n, d]`` before the kernel runs; taking it fills this object.

        Asked twice where there are gates: without ``opened`` for all but the JOINT channels behind gates, and with it
        (uint64 ``[n]``, gates open at each token) for those, whose activations are edited as soon as they are there.
        """
        found: list[Demand] = []
        now = np.zeros(plan.n, np.uint64) if opened is None else opened
        for segment in plan.segments:
            for use in table.uses.get(segment.index, ()):
                later = use.joint and use.behind_gates
                if later != (opened is not None):
                    continue
                here = acting(plan.selected[segment.tokens], use.masks, now[segment.tokens] if later else None)
                tokens = np.flatnonzero(here) + segment.tokens.start
                if use.joint:
                    take = self._joint_taker(use, tokens, table, plan, dictionaries, h, bank, now)
                else:
                    take = self._member_taker(use, tokens)
                found.append(Demand(use.digest, tokens, take))
        return found

    def _member_taker(self, use: Use, tokens: Array) -> Take:
        features = torch.from_numpy(use.features)

        def take(here: slice, z: torch.Tensor) -> None:
            self.members[tokens[here, None], use.targets] = z[:, features].numpy()

        return take

    def _joint_taker(
        self,
        use: Use,
        tokens: Array,
        table: LayerTable,
        plan: Plan,
        dictionaries: Dictionaries,
        h: torch.Tensor,
        bank: RowBank,
        opened: Array,
    ) -> Take:
        def take(here: slice, z: torch.Tensor) -> None:
            stretch, edited = tokens[here], z.clone()
            touched = np.zeros(len(stretch), np.bool_)
            compose_joint(
                h.numpy(),
                dictionaries.input_norm(use.digest),
                table.width,
                stretch,
                plan.selected,
                opened,
                use.features,
                use.targets,
                table.channels,
                table.channel_ops,
                table.op_ints,
                table.op_values,
                table.op_masks,
                bank.read.numpy(),
                bank.gate.numpy(),
                z.numpy(),
                edited.numpy(),
                self.joint_fired,
                touched,
            )
            if touched.any():  # the others' delta is exactly zero
                rows, at = torch.from_numpy(np.flatnonzero(touched)), stretch[touched]
                self.joint[at] += dictionaries.delta(use.digest, h[torch.from_numpy(at)], z[rows], edited[rows]).numpy()

        return take


def warm_up_joint() -> None:
    """Compile what the first JOINT channel would otherwise wait for."""
    none, wide, flags = np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.bool_)
    channels, ops = np.zeros((0, len(CHANNEL_COLUMNS)), np.int32), np.zeros((0, len(OP_COLUMNS)), np.int32)
    values, masks = np.zeros((0, len(OP_VALUES)), np.float32), np.zeros((0, len(OP_MASKS)), np.uint64)
    table = channels, np.zeros(1, np.int32), ops, values, masks
    z, rows = np.zeros((0, 1), np.float32), np.zeros((1, 1), np.float32)
    compose_joint(z, 0, 0, none, wide, wide, none, none, *table, rows, rows, z, z.copy(), wide.copy(), flags)
