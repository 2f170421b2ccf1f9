"""The flat batch of one forward pass, in one form for all model runners and all engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch


@dataclass(frozen=True)
class BlockTable:
    """The KV blocks of the batch's rows, in the cache group that keeps every token's.

    Attributes:
        blocks: int32 ``[rows or more, blocks]`` by batch row: position p lies in ``blocks[row, p // block_size]``.
        block_size: tokens per block.
        n_slots: tokens of the whole KV cache.
    """

    blocks: torch.Tensor
    block_size: int
    n_slots: int


@dataclass(frozen=True)
class StepBatch:
    """The flat batch of one forward pass, as that pass will see it.

    The tensors are the runner's own, where it has them: what lies on the host beside them may be ahead of the truth (with
    asynchronous scheduling, and with drafts that a device shares out or rejects), and is not asked.

    Attributes:
        request_ids: the rows in the order of the batch, ``[rows]``; exact on the host in both families.
        slots: the runner's slot of each row, ``[rows or more]``; exact on the host too. V2 keeps a request in one slot as long
            as it runs; in V1 a row is its own slot, and a request may be in another one in the next step.
        row_slot: the same on the device, int64 ``[rows or more]``.
        query_start: row r owns the tokens ``query_start[r] … query_start[r + 1]``, int32 ``[rows + 1 or more]``.
        n_tokens: tokens of all rows.
        positions: absolute, int64 ``[n_tokens or more]``; what is behind ``n_tokens`` says nothing.
        token_ids: int32 ``[n_tokens or more]``, likewise.
        blocks: tells where the KV lies, while the batch lasts; None where no cache group keeps all of it. Few need to know.
    """

    request_ids: Sequence[str]
    slots: npt.NDArray[Any]
    row_slot: torch.Tensor
    query_start: torch.Tensor
    n_tokens: int
    positions: torch.Tensor
    token_ids: torch.Tensor
    blocks: Callable[[], BlockTable | None]

    @property
    def longest(self) -> int:
        """Upper bound of a row's tokens: every row has one at least."""
        return self.n_tokens - len(self.request_ids) + 1

    @property
    def single(self) -> bool:
        """Whether every row has one token."""
        return self.longest == 1
